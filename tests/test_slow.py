"""The script behind `make test-slow` counts what came of the slow tests, and no others."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import pytest_collection_modifyitems

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


class Case:
    """An item of pytest, as `pytest_collection_modifyitems` sees it."""

    def __init__(self, test: str, thinned: tuple[str, ...] | None, **params: object) -> None:
        self.nodeid, self.callspec, self.marks = f"{test}[x]", SimpleNamespace(params=params), list[str]()
        self.thinned = thinned

    def get_closest_marker(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(args=self.thinned or ()) if self.thinned is not None else None

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.name)


def test_a_thinned_test_meets_every_value_in_the_fast_run_and_others_stay_whole() -> None:
    def cases(test: str, thinned: tuple[str, ...] | None) -> list[Case]:
        return [Case(test, thinned, a=a, b=b) for a in "uvwxyz" for b in range(7)]

    def taken(some: list[Case], *left_out: str) -> set[tuple[object, object]]:
        return {(c.callspec.params["a"], c.callspec.params["b"]) for c in some if not {*left_out} & {*c.marks}}

    made = [cases(name, how) for name, how in (("one", ()), ("two", ()), ("three", None), ("four", ("long",)))]
    few, some_more = ([Case(name, ("long",), a=a) for a in values] for name, values in (("five", "uv"), ("six", "uvw")))
    pytest_collection_modifyitems([case for each in [*made, few, some_more] for case in each])  # type: ignore[list-item]
    ci, fast = ([taken(some, *left_out) for some in made] for left_out in (["slow"], ["slow", "long"]))
    assert [len(some) for some in ci] == [14, 14, 42, 42] and not ci[0] & ci[1]
    assert [len(some) for some in fast] == [7, 7, 42, 7]
    for left in (*ci, *fast):
        assert {a for a, _ in left} == set("uvwxyz") and {b for _, b in left} == set(range(7))
    assert not any(case.marks for case in few) and [case.marks for case in some_more].count([]) == 1


@pytest.mark.long
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
