"""Runs the slow tests and writes what came of them, dated, to results/slow_tests.json: `make test-slow`.

    python tests/slow.py [--out FILE] [-n PROCESSES] [what pytest takes, such as tests/test_ccrt.py]

A part of the tests is written where --out says, or nowhere: the committed file is of all of them.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from efface import files

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = ("passed", "failed", "skipped", "errors")


class Outcomes:
    """A plug-in of pytest that counts."""

    def __init__(self) -> None:
        self.counts, self.failed = Counter[str](), list[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed" if report.when == "call" else "errors"] += 1
            self.failed.append(report.nodeid)
        elif report.skipped or report.when == "call":
            self.counts[report.outcome] += 1


def commit() -> str:
    """The commit that is checked out; "-dirty" behind it says that files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("-n", default="0", help="processes of pytest-xdist")
    given, rest = parser.parse_known_args(argv)
    out = given.out or (None if rest else ROOT / "results/slow_tests.json")
    outcomes, began, head = Outcomes(), time.monotonic(), commit()
    spread = ["-n", given.n, "--dist", "worksteal"]
    which = ["-c", str(ROOT / "pyproject.toml"), "-m", "slow", *(rest or [str(ROOT / "tests")])]
    code = pytest.main([*which, *spread], [outcomes])
    if out is not None and code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": head,
            **{name: outcomes.counts[name] for name in OUTCOMES},
            "failures": outcomes.failed,
            "seconds": round(time.monotonic() - began, 1),
            "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(out, record)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
