"""`make gpu-check` takes its path on a CPU with tiny pipelines, and without packages that a bare machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import gpu_check
from experiments.code import ROOT

ABSENT = ("pydantic", "typer", "rich", "sqlalchemy", "scipy", "matplotlib", "pandas")
CODE = f"import sys; [sys.modules.__setitem__(m, None) for m in {ABSENT}]; from experiments.gpu_check import main; "


@pytest.mark.long
def test_every_setting_is_measured_or_says_why_not(tmp_path: Path) -> None:
    """In a process without the absent packages."""
    words = ["--device", "cpu", "--tiny", "--models", "flux1-dev", "--modes", "eager", "--methods", "eiup", "sld"]
    words += ["--out", str(tmp_path / "card.json")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-c", f"{CODE}sys.exit(main({words}))"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "card.json").read_text("utf-8"))
    assert card["tiny"] and "--tiny" in card["command"] and {"torch", "diffusers", "efface"} <= card["versions"].keys()
    rows = {(row["phrases"], row["method"]): row for row in card["models"]["flux1-dev"]["rows"]}
    assert rows.keys() == {(n, m) for n in (7, 1, 35, "mixed rows") for m in ("base", "eiup", "sld")}
    for (_, method), row in rows.items():
        if method == "sld":
            assert row["refused"].startswith("ValueError: SLD needs guidance")
        elif method == "eiup":
            assert row["ratio"] > 0 and row["change"] > 1e-3 and len(row["ratios"]) == row["rounds"] == 1


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert "Expected a CUDA device, got none. Use `--device cpu --tiny`" in capsys.readouterr().err


def test_what_takes_too_long_is_stopped() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError), gpu_check.alarm(0.05):
        while time.monotonic() < start + 5:
            pass
    assert time.monotonic() < start + 4


def test_phrases_are_as_many_and_distinct() -> None:
    assert len(set(gpu_check.PHRASES)) == len(gpu_check.PHRASES) >= max(gpu_check.COUNTS)
