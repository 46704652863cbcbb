"""The leaderboard's table and figure say what its card says."""

import importlib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from efface import Score, registry

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAN = float("nan")


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("leaderboard")


def card(board: Any) -> dict[str, Any]:
    def scores(removed: float, kept: float) -> list[Score]:
        return [
            Score("removal.absolute", removed, 40, removed / 2, 1.0, "share", True, "both eyes"),
            Score("retention", kept, 60, kept / 2, 1.0, "share", True, "both eyes"),
            Score("kid_eye", NAN, 1, NAN, NAN, "x 1000", False, "eyes"),
            Score("removal.relative", 0.9, 40, 0.8, 1.0),
        ]

    names = list(registry.methods("erasers") | registry.methods("editors"))
    return {
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python benchmarks/leaderboard.py",
        "concepts": ["cat"],
        "n": 80,
        "suite": "1",
        "data_hash": {"cat": "0a" * 32},
        "model": {"name": "emoji", "text_hash": "0b" * 32},
        "rows": [
            board.row("plain model", scores(0.0, 0.9), 0.5),
            *[board.row(name, scores(0.5 + k / 40, 0.8 - k / 40), 0.6) for k, name in enumerate(names)],
        ],
        "refused": {"wrong": "not\non emoji"},
    }


def test_the_table_has_every_number_of_the_card(board: Any) -> None:
    made = card(board)
    text = board.table(made)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for entry in made["rows"]:
        line = lines[entry["method"] if entry["method"] == "plain model" else f"`{entry['method']}`"]
        for name in ("removal.absolute", "retention"):
            assert f"{100 * entry['scores'][name]['value']:.1f} %" in line
        assert "– not defined" in line and line.count("|") == 1 + 1 + len(board.COLUMNS)
    for said in (
        "80 pictures",
        f"({80 * (0.5 + 0.6 * (len(made['rows']) - 1)) / 60:.0f} min of drawing)",
        "removed 40",
        "kept 60",
        "both eyes",
        "0a0a0a0a0a0a",
        "2026-01-01",
        "`wrong` does not run",
    ):
        assert said in text
    assert "not\non" not in text


def test_the_figure_has_a_point_for_every_method(board: Any) -> None:
    made = card(board)
    words = " ".join(ET.fromstring(board.figure(made)).itertext())
    assert all(entry["method"] in words for entry in made["rows"])
    assert "currentColor" not in board.figure(made)


def test_the_docs_have_a_place_for_it() -> None:
    text = (BENCHMARKS.parent / "docs/leaderboard.md").read_text()
    assert text.count("<!-- leaderboard:begin -->") == text.count("<!-- leaderboard:end -->") == 1


def test_an_update_changes_its_own_rows_and_nothing_else(board: Any) -> None:
    old, new = card(board), card(board)
    new["rows"] = [new["rows"][0], new["rows"][2] | {"seconds_per_picture": 9.0}]
    new |= {"date": "2026-02-02T00:00:00+00:00", "command": "python benchmarks/leaderboard.py --update x"}
    made = board.updated(old, new)
    name = new["rows"][1]["method"]
    assert [row["method"] for row in made["rows"]] == [row["method"] for row in old["rows"]]
    assert [row for row in made["rows"] if row["method"] != name] == [r for r in old["rows"] if r["method"] != name]
    assert made["rows"][2]["seconds_per_picture"] == 9.0 and made["date"] == old["date"]
    assert f"(with `--update`: `{name}` 2026-02-02)" in board.table(made)


@pytest.mark.parametrize("key", ["n", "data_hash", "model", "plain"])
def test_an_update_of_other_rows_or_another_model_is_refused(board: Any, key: str) -> None:
    old, new = card(board), card(board)
    if key == "plain":
        new["rows"][0] = board.row("plain model", [Score("retention", 0.1, 60, 0.0, 1.0)], 0.5)
    else:
        new[key] = 3
    with pytest.raises(SystemExit, match="measure all anew"):
        board.updated(old, new)
