"""`python -m experiments.check` finds what is wrong with a card that somebody sends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import efface
from efface import intervals
from experiments import check, outcome, runner
from experiments.code import meaning
from experiments.outcome import Arm, Outcome
from experiments.runner import Plan

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"concepts": ("alcohol",), "cells": ("explicit", "theme", "bystander"), "n": 4}
RESAMPLED, COUNTS = intervals._resampled, outcome.COUNTS
TRIAL = Outcome(name="trial", question="?", cap=1.0, arms={"eiup": Arm(efface.EIUP)}, keeps=True, **SMALL)


def noise(pipe: Any, prompts: Sequence[str], numbers: Sequence[int], **call: Any) -> torch.Tensor:
    """What stands for drawing: pictures that depend on the seed, on the prompt, and on what is on the pipeline."""
    on = len(efface.active(pipe))
    return torch.stack(
        [
            torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(number + 7 * on + len(prompt)))
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
    )


@pytest.fixture(scope="module", autouse=True)
def trial() -> Iterator[None]:
    """Detectors that see something different in each picture of noise, and intervals of few resamples."""
    with pytest.MonkeyPatch.context() as patch:
        _stand_ins(patch)
        yield


def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_resampled", lambda *given: RESAMPLED(*given[:3], 20, given[4]))
    monkeypatch.setattr(outcome, "COUNTS", 0.0)
    monkeypatch.setattr(outcome, "draw", noise)
    monkeypatch.setattr(check, "draw", noise)
    monkeypatch.setitem(check.CATALOGUE, "trial", TRIAL)

    def judge(self: Any, images: torch.Tensor, concept: str, keep: Any, join: Any = torch.any) -> dict[str, Any]:
        seen = (images.flatten(1).double().sum(1) * 1000).long()
        retained = [[int(value) % 2 if some else -1 for value, some in zip(seen, keep, strict=True)] for _ in range(2)]
        return {"outcome": [(seen % 3).tolist(), ((seen + 1) % 3).tolist()], "retained": retained}

    monkeypatch.setattr("experiments.worlds.World.judge", judge)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("card")
    plan = Plan("test", TRIAL.n, folder=folder / "work", cards=folder)
    found = runner.run(TRIAL, plan, folder / "trial.json", "a command", say=lambda _: None)
    assert found is not None
    return found


@pytest.fixture
def card(made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(made))
    return found


def result(card: Any, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    path = folder / "sent.json"
    path.write_text(json.dumps(card))
    code = check.main([str(path), "--seed", "1000000", "--work", str(folder / "check"), *options])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.long
def test_an_honest_card_passes(card: Any, tmp_path: Path, capsys: Any) -> None:
    code, said = result(card, tmp_path, capsys, "--redraw", "5")
    assert code == 0 and "Nothing differs" in said and "Drew 10 pictures again (--seed 1000000)" in said
    code, said = result(card, tmp_path, capsys, "--row", "eiup", "--redraw", "99")
    assert code == 0 and "Drew 12 pictures again" in said  # all there are
    code, said = result(card, tmp_path, capsys, "--redraw", "0")
    assert code == check.NOT_REDRAWN and "Not drawn again: all" in said


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(card: Any) -> None:
        for step in path[:-1]:
            card = card[step]
        card[path[-1]] = value(card[path[-1]]) if callable(value) else value

    return change


EXPLICIT = ("pictures", "eiup", "alcohol, explicit")
WRONG = {
    "a rate": (put("rows", 1, "retention", "rate", value=lambda v: v + 0.01), "expected retention"),
    "an interval": (put("rows", 1, "other", "interval", value=[0.0, 0.1]), "expected other"),
    "a metric left out": (lambda card: card["rows"][1].pop("nothing"), "expected nothing"),
    "a metric added": (put("rows", 1, "quality", value={"rate": 1.0}), "expected quality None"),
    "a digit": (put(*EXPLICIT, "outcome", value=["0000", "0000"]), "from its pictures"),
    "the base model's digits": (put("base", "alcohol, explicit", "outcome", value=["0000", "0000"]), "base differs"),
    "too few pictures": (put(*EXPLICIT, "outcome", value=["000", "000"]), "expected 4 pictures of alcohol, explicit"),
    "seeds": (put("cells", "alcohol, theme", "first_seed", value=5), "expected first_seed"),
    "prompts": (put("cells", "alcohol, theme", "prompts", value=["a pub"]), "expected prompts"),
    "eraser": (put("rows", 1, "erasers", value={"alcohol": []}), "expected erasers"),
    "code": (put("rows", 1, "code", value="0" * 64), "row eiup: other code drew it"),
    "a verdict": (put("verdict", value=["Met."]), "verdict differs"),
    "a comparison": (put("comparisons", 0, "p", value=1e-9), "comparisons differs"),
    "the model": (put("model", "text_hash", value="0" * 64), "model: expected"),
    "the detector": (put("detector", "name", value="mine"), "detector: expected"),
    "fewer steps": (put("call", "num_inference_steps", value=50), "call: expected"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_was_changed_is_named(what: str, card: Any, tmp_path: Path, capsys: Any) -> None:
    change, words = WRONG[what]
    change(card)
    code, said = result(card, tmp_path, capsys)
    assert code == 1 and words in said and "Drew" not in said


NO_CARD = {
    "another experiment": (put("experiment", value="eiup_overhead"), "an experiment on outcomes"),
    "an unknown row": (put("rows", 1, "row", value="mine"), "Add the method to"),
    "no base row": (lambda card: card["rows"].pop(0), "Expected a row 'base'"),
    "an earlier form": (put("form", value=1), "form"),
    "digits that are none": (put(*EXPLICIT, "outcome", value=["0x00", "0000"]), "outcome"),
    "no pictures": (lambda card: card.pop("pictures"), "has no `pictures`"),
    "a block that chooses": (put("block", value="all"), "a block of"),
    "too many pictures": (put("n", value=30_000), "n from 1 to"),
}


@pytest.mark.parametrize("what", NO_CARD)
def test_what_is_no_card_is_refused(what: str, card: Any, tmp_path: Path, capsys: Any) -> None:
    change, words = NO_CARD[what]
    change(card)
    code, said = result(card, tmp_path, capsys)
    assert code == 2 and words in said and "Traceback" not in said


def test_a_card_whose_figures_fit_invented_pictures_is_found_by_drawing(card: Any, tmp_path: Path, capsys: Any) -> None:
    """All of the card is made again from invented digits, so only pictures can tell."""
    plan = Plan("test", TRIAL.n, folder=tmp_path / "work", cards=tmp_path)
    found = []
    for unit in TRIAL.units(plan):
        digits = card["pictures"][unit.row][f"alcohol, {unit.setting['cell']}"]
        raw = {
            source: [[-1 if d == "-" else int(d) for d in eye] for eye in digits[source]] for source in outcome.SOURCES
        }
        if unit.row == "eiup":
            raw["outcome"] = [[1] * 4, [1] * 4]
        found.append((unit, {"raw": raw}))
    made = TRIAL.rows(plan, found)
    made["rows"] = [
        new | {s: old[s] for s in check.STAMPS} for new, old in zip(made["rows"], card["rows"], strict=True)
    ]
    card |= made
    card |= TRIAL.derived(card)
    code, said = result(card, tmp_path, capsys, "--redraw", "6")
    assert code == 1 and "row eiup, alcohol" in said and "row base" not in said
    assert result(card, tmp_path, capsys, "--redraw", "0")[0] == check.NOT_REDRAWN


def test_an_editors_row_is_fitted_only_if_asked(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    experiment = dataclasses.replace(TRIAL, arms={"uce": Arm(efface.UCE())})
    monkeypatch.setitem(check.CATALOGUE, "trial", experiment)
    plan = Plan("test", TRIAL.n, folder=tmp_path / "work", cards=tmp_path)
    found = runner.run(experiment, plan, tmp_path / "trial.json", "a command", say=lambda _: None)
    code, said = result(found, tmp_path, capsys, "--redraw", "3")
    assert code == check.NOT_REDRAWN and "Not drawn again: uce" in said and "Drew 3 pictures" in said
    code, said = result(found, tmp_path, capsys, "--redraw", "3", "--fit")
    assert code == 0 and "Fitting uce for alcohol" in said and "Drew 6 pictures" in said


def test_a_new_version_alone_is_no_other_code(tmp_path: Path) -> None:
    hashes = []
    for k, text in enumerate(('__version__ = "0.1.0"', '__version__ = "9.9.9"', '__version__ = "0.1.0"\nx = 1')):
        (tmp_path / f"{k}.py").write_text(text)
        hashes.append(meaning(tmp_path / f"{k}.py"))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.long
def test_figures_of_a_card_of_ours_follow_from_its_pictures(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(intervals, "_resampled", RESAMPLED)
    monkeypatch.setattr(outcome, "COUNTS", COUNTS)
    check.main([str(ROOT / "results/eiup_swap.json"), "--redraw", "0"])
    said = capsys.readouterr().out.splitlines()[1:]
    assert said and [line for line in said if not line.startswith(("Not", "row")) or ": other code" not in line] in (
        [],
        ["Nothing differs."],
    )
