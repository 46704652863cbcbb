"""The script behind `make test-slow` counts what came of the slow tests, and no others."""

import json
import subprocess
import sys
from pathlib import Path

SLOW = Path(__file__).with_name("slow.py")
TESTS = """
import pytest

slow = pytest.mark.slow
@pytest.fixture
def broken(): return 1 / 0

@slow
def test_good(): pass

@slow
def test_bad(): assert False

@slow
def test_not_here(): pytest.skip("no")

@slow
def test_without_its_fixture(broken): pass

def test_quick(): assert False
"""


def ran(*args: object) -> int:
    command = [sys.executable, str(SLOW), "-p", "no:cacheprovider", *map(str, args)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_the_slow_tests_leave_a_dated_record(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    before = {path: path.read_bytes() for path in (SLOW.parents[1] / "results").glob("slow_tests.json")}
    assert ran(tmp_path / "test_some.py") == 1
    assert ran("--out", tmp_path / "out/slow.json", tmp_path / "test_some.py") == 1
    record = json.loads((tmp_path / "out/slow.json").read_text())
    assert {name: record[name] for name in ("passed", "failed", "skipped", "errors")} == dict.fromkeys(
        ("passed", "failed", "skipped", "errors"), 1
    )
    assert [name.rpartition("::")[2] for name in record["failures"]] == ["test_bad", "test_without_its_fixture"]
    assert record.keys() >= {"date", "commit", "seconds", "machine"}
    assert {path: path.read_bytes() for path in before} == before  # a part of the tests is no result of all
    assert ran("--out", tmp_path / "none.json", tmp_path / "absent.py") not in (0, 1)
    assert not (tmp_path / "none.json").exists()
