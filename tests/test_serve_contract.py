"""The OpenAPI description of the service against its answers, see `serve_contract.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_every_answer_is_one_that_the_description_names() -> None:
    """All checks of Schemathesis but one, with the key of a tenant and an admin key, with right and wrong requests."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    command = [sys.executable, str(here / "serve_contract.py"), "25"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    tried = {(route, who, mode): statuses for route, who, mode, statuses in map(json.loads, done.stdout.splitlines())}
    assert len({route for route, _, _ in tried}) == 12
    drawn = tried["POST /v1/images/generations", "tenant", "positive"]
    assert drawn["200"] and drawn["400"]  # the effect: some requests were right
    wrong = tried["POST /v1/images/generations", "tenant", "negative"]
    assert wrong["400"] and wrong["401"]
    assert tried["PUT /v1/efface/policies/{name}", "tenant", "positive"].keys() == {"403"}
