"""Tries every route of the service with requests from its OpenAPI description. `test_serve_contract.py` runs it.

It is a process of its own, because the plugin that Schemathesis installs does not load into this version of pytest.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from test_serve import LIMITS, Desk

from efface.serve.app import create_app

NOT = [positive_data_acceptance]
"""Some rules of a request are not in the schema, such as the sizes that a server offers."""


def started(desk: Desk) -> str:
    """The address of a server in a thread."""
    config = uvicorn.Config(create_app(desk.service), port=0, log_config=None, http="h11", loop="asyncio")
    server, sockets = uvicorn.Server(config), [config.bind_socket()]
    threading.Thread(target=lambda: asyncio.run(server._serve(sockets)), daemon=True).start()
    while not server.started:
        time.sleep(0.02)
    return f"http://127.0.0.1:{sockets[0].getsockname()[1]}"


def tried(operation: Any, head: dict[str, str], examples: int, mode: Any) -> Counter[int]:
    """The statuses of the requests that were tried on a route. Raises at the first fault."""
    found: Counter[int] = Counter()

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def attempt(case: Any) -> None:
        found[case.call_and_validate(headers=head, excluded_checks=NOT, timeout=20).status_code] += 1

    with contextlib.suppress(Unsatisfiable):  # a route without parameters cannot be asked wrongly
        attempt()
    return found


def main(examples: int) -> None:
    desk = Desk(Path(tempfile.mkdtemp()), replace(LIMITS, queue=100_000, tenant=100_000, wait=5.0))
    desk.start()
    schema = schemathesis.openapi.from_url(f"{started(desk)}/openapi.json")
    for result in schema.get_all_operations():
        operation: Any = result.ok()
        for key, mode in itertools.product(("kids", desk.admin), GenerationMode):
            statuses = tried(operation, {"Authorization": desk.head(key)["authorization"]}, examples, mode)
            who = "admin" if key == desk.admin else "tenant"
            print(json.dumps([operation.label, who, mode.value, dict(sorted(statuses.items()))]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
