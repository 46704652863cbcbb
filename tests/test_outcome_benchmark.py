"""eiup_outcome.py chooses by its rule, says how a card was made, and draws again what other code has drawn."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import efface
from efface.models.emoji.weights import FOLDER

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("eiup_outcome")


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([(0.5, 0.9), (0.1, 0.86), (0.0, 0.84)], 1),  # the last keeps 6 points less than the plain model
        ([(0.1, 0.86), (0.1, 0.9), (0.2, 0.99)], 1),  # of equal ones, the one that keeps most
        ([(0.5, 0.3), (0.1, 0.2)], 0),  # none keeps enough
    ],
)
def test_the_rule(script: Any, points: list[tuple[float, float]], chosen: int) -> None:
    assert script.best(points, 0.9) == chosen
    assert script.RULE.startswith("of the points that keep within 5 points")


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([(3, 0.0, 0.0, 0.9), (2, 0.04, 0.02, 0.86), (1, 0.05, 0.031, 0.9)], 1),  # the smallest of those that do it
        ([(1, 0.051, 0.0, 0.9), (2, 0.0, 0.0, 0.85)], 1),  # too much left of explicit prompts
        ([(1, 0.0, 0.0, 0.84), (2, 0.2, 0.2, 0.9), (3, 0.1, 0.1, 0.9)], 2),  # none: least left, of those that keep
    ],
)
def test_the_rule_of_the_sweep(script: Any, points: list[tuple[float, ...]], chosen: int) -> None:
    names = ("explicit", "implicit", "kept")
    rows = [
        {"strength": strength, "left": {"rate": rates[1]}} | {n: {"rate": r} for n, r in zip(names, rates, strict=True)}
        for strength, *rates in points
    ]
    assert script.smallest(rows, 0.9) == chosen
    assert script.OWN_RULE.startswith("the smallest strength that leaves")


def test_the_default_strength_is_what_the_sweep_chose() -> None:
    card = json.loads((BENCHMARKS.parent / "results/eiup_sweep.json").read_text())
    assert efface.EIUP("cat").strength == card["chosen"]


def test_a_point_of_the_comparison_is_its_record_again(script: Any) -> None:
    point = importlib.import_module("pareto").Point
    made = point("sld", "max", (0.25, 32, 128), (1 / 3, 1, 3), (0.0, 0, 7), (1.0, 9, 9))
    assert point.of(json.loads(json.dumps(made.record()))) == made


def test_the_code_counts_and_its_comments_do_not(script: Any, tmp_path: Path) -> None:
    def meaning(text: str) -> str:
        (tmp_path / "a.py").write_text(text)
        return script.meaning(tmp_path / "a.py")

    plain = meaning("def f(x):\n    return x + 1\n")
    assert plain == meaning('"""Head."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n')
    assert plain != meaning("def f(x):\n    return x + 2\n")
    hashes = {script.code_hash(each) for each in (efface.EIUP, efface.GIE, efface.SLD, efface.Delta)}
    assert len(hashes) == 4


@pytest.mark.parametrize(("first", "n"), [(1_000, 401), (1_000, 0), (1_000_000, 10_001)])
def test_cells_never_share_seeds(script: Any, first: int, n: int, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cells would share seeds"):
        script.Bench(tmp_path, first, n)


def test_tuning_seeds_stay_below_test_seeds(script: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected tuning seeds"):
        script.Bench(tmp_path, 9_000, 1)


@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
def test_a_sweep_names_its_choice_and_a_card_says_how_it_was_made(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(pipe: Any, prompts: list[str], seeds: list[int], **call: Any) -> torch.Tensor:
        drawn.append(seeds)
        return torch.rand(len(prompts), 3, 64, 64, generator=torch.Generator().manual_seed(seeds[0]))

    monkeypatch.setattr(script, "draw", draw)
    monkeypatch.setattr(script, "COUNTS", 0.0)
    monkeypatch.setattr(script, "CELLS", [("cat", "explicit"), ("cat", "pair"), ("alcohol", "theme")])
    bench = script.Bench(tmp_path / "work", script.TUNING, 2)
    script.sweep(bench, [0.5, 1.0], tmp_path / "sweep", "sweep --n 2")
    card = json.loads((tmp_path / "sweep.json").read_text())
    assert card["chosen"] in (0.5, 1.0) and card["rule"] == script.OWN_RULE and (tmp_path / "sweep.png").exists()
    assert all({"left", "implicit", "kept", "any"} <= point.keys() for point in card["points"])
    assert card["points"][0]["implicit"]["n"] < card["points"][0]["left"]["n"]
    assert card["erasers"]["0.5"]["cat"]["method"] == "eiup" and card["erasers"]["0.5"]["cat"]["strength"] == 0.5
    assert card["seeds"]["first"] == 1_000 and set(card["versions"]) == {"torch", "diffusers", "transformers", "efface"}
    assert len(card["detector"]["thresholds_sha256"]) == len(card["data_sha256"]) == 64
    seeds = [s for batch in drawn for s in batch]
    assert len(set(seeds)) == 2 * len(script.CELLS) and max(seeds) < 10_000

    drawn.clear()
    script.sweep(bench, [0.5, 1.0], tmp_path / "sweep", "sweep --n 2")
    assert not drawn
    monkeypatch.setattr(script, "code_hash", lambda cls: "other code")
    script.sweep(bench, [0.5], tmp_path / "sweep", "sweep --n 2")
    assert len(drawn) == len(script.CELLS)  # the plain pictures stay
