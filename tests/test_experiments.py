"""The runner of `experiments/`: it goes on after a kill, keeps to cap and blocks, and counts what was seen."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import efface
import experiments.__main__ as command
from efface.intervals import clustered
from experiments import code, costs, docs, feedback, load, outcome, runner, tables
from experiments.catalogue import CATALOGUE, EXPERIMENTS, RUN_TIME, strengths
from experiments.closed_form import ClosedForm
from experiments.literal import denoiser_calls as calls
from experiments.literal import finetune, joint_blocks
from experiments.outcome import NEGATIVES, Arm, Outcome, Sweep, balanced, first_that_reaches, least_residual
from experiments.runner import Experiment, Plan, Store, Unit
from experiments.sequence import Sequenced
from experiments.timing import Timing
from experiments.worlds import CELLS, CONCEPTS, SEEDS, STRIDES, TUNED, World, seeds, world

ROOT = Path(__file__).parents[1]
ABOUT = {"name": "trial", "question": "Does the runner run?", "cap": 1.0}
CALL = {"num_inference_steps": 1, "guidance": 7.5}
SMALL: dict[str, Any] = {"concepts": ("alcohol",), "cells": ("explicit", "bystander"), "n": 2}


@pytest.fixture(autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step, the base model shows nothing yet, so every cell counts. Only tests of each kind draw for real."""
    monkeypatch.setattr(outcome, "COUNTS", 0.0)
    if "kind" not in request.fixturenames:
        monkeypatch.setattr(outcome, "draw", noise)


def noise(pipe: Any, prompts: Sequence[str], numbers: Sequence[int], **call: Any) -> torch.Tensor:
    """What stands for drawing, where only the runner is tested."""
    return torch.stack([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in numbers])


def plan(folder: Path, experiment: Experiment, **more: Any) -> Plan:
    given = {"block": experiment.block, "n": experiment.n, "folder": folder / "work", "cards": folder, "call": CALL}
    return Plan(**given | more)


def run(experiment: Experiment, folder: Path, **more: Any) -> Any:
    where = plan(folder, experiment, **{k: more.pop(k) for k in ("block", "n") if k in more})
    return runner.run(experiment, where, folder / f"{experiment.name}.json", "a command", say=lambda _: None, **more)


def arms(**more: Arm) -> dict[str, Arm]:
    return {"eiup": Arm(efface.EIUP), "negative_prompt": Arm(efface.NegativePrompt), **more}


class InRounds:
    """An editor of a sequence that needs no search."""

    def __new__(cls) -> Any:
        return efface.CCRT(reg=0.0, steps=1, sampler_steps=2, batch=1)


TINY = {"tiny": partial(calls.scene, "tiny", 1)}
KINDS: dict[str, Callable[[], Experiment]] = {
    "outcome": lambda: Outcome(**ABOUT, **SMALL, arms=arms()),
    "negative prompts": lambda: Outcome(
        **ABOUT,
        **SMALL | {"n": 1, "cells": ("explicit",)},
        arms={
            **{variant: Arm(efface.EIUP, variant, 1) for variant in ("object", "opposite embeddings")},
            "nearly": Arm(lambda c: None, "nearly equal embeddings"),
            "two": Arm(lambda c: (efface.EIUP(c), efface.NegativePrompt(c, strength=3.75))),
        },
    ),
    "editors": lambda: Outcome(
        **ABOUT, **SMALL, arms={"uce": Arm(efface.UCE()), "esd": Arm(efface.ESD(steps=1, sampler_steps=2, batch=1))}
    ),
    "sweep": lambda: Sweep(**ABOUT, **SMALL | {"n": 1}, points={"eiup": strengths(efface.EIUP, 0.5, 1.0)}),
    "sequence": lambda: Sequenced(
        **ABOUT, editors={"in rounds": InRounds()}, removed=("cat", "rose"), kept=("robot",), n=1
    ),
    "overhead": lambda: Timing(
        **ABOUT,
        scenes=TINY,
        variants={n: partial(calls.seconds, calls.CALLS[n]) for n in ("plain", "eiup projected", "two trajectories")},
        against="plain",
        effect=0.1,
        used=(calls.seconds,),
        n=2,
    ),
    "hooks alone": lambda: Timing(
        **ABOUT,
        scenes=TINY,
        variants={"step": partial(calls.seconds, calls.base), "hooks": partial(calls.hooks_alone, calls=2)},
        against="step",
        used=(calls.hooks_alone,),
        n=1,
    ),
    "fine-tuning": lambda: Timing(
        **ABOUT,
        scenes={method: partial(finetune.scene, method, tiny.pipeline("small")) for method in ("esd", "sdd")},
        variants=finetune.variants(4),
        against="naive",
        slower=True,
        used=(finetune.Naive,),
        n=1,
    ),
    "closed form": lambda: ClosedForm(**ABOUT, size="tiny", concepts=(1, 2), n=1),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr("experiments.closed_form.fresh", lambda experiment, given: experiment.one(given))
    monkeypatch.setattr(finetune, "K", 2)
    made = KINDS[request.param]()
    return dataclasses.replace(made, n=1) if isinstance(made, Outcome) else made


def without(card: Mapping[str, Any], *keys: str) -> Any:
    """A card without what differs between two runs: dates, and the seconds that were measured."""
    gone = {"date", "core_hours", "seconds", "core_seconds", "memory MiB", "ratio", "times slower", *keys}
    if isinstance(card, dict):
        return {k: without(v, *keys) for k, v in card.items() if k not in gone}
    return [without(each, *keys) for each in card] if isinstance(card, list) else card


# ---------------------------------------------------------------- every kind, end to end


def says_how_it_was_made(made: dict[str, Any], kind: Experiment) -> None:
    assert made["form"] == runner.FORM and made["command"] == "a command" and made["n"] == kind.n
    assert made["core_hours"].keys() == {"cap", "estimate", "spent"} and made["core_hours"]["estimate"] > 0
    assert len(made["data_sha256"]) == len(made["detector"]["thresholds_sha256"]) == 64
    assert made["detector"]["threshold"] and made["machine"] and made["code"]["commit"] and made["versions"]["torch"]
    assert all(len(row["code"]) == 64 and row["date"] and row["commit"] for row in made["rows"])
    for form in ("md", "latex", "csv"):
        text = tables.of_card(made, form)
        assert all(
            row["row"].replace("_", "\\_") in text or row["row"] in text or row["row"] == "base" for row in made["rows"]
        )
    assert "a command" in tables.caption(made, "trial") and "core-hours" in tables.caption(made, "trial")


def test_the_retention_over_all_groups_is_that_of_its_card() -> None:
    """docs/results.md gives it in prose, since the earlier card leaves cells with a low base rate out."""
    rows = json.loads((ROOT / "results/eiup_outcome.json").read_text("utf-8"))["rows"]
    found, counts = {}, set()
    for name in ("plain", "eiup", "negative_prompt"):
        judged = [row[f"{name} kept"] for row in rows if f"{name} kept" in row]
        n = sum(each["n"] for each in judged)
        counts.add(n)
        found[name] = f"{100 * sum(each['rate'] * each['n'] for each in judged) / n:.1f} %"
    assert found == {"plain": "76.5 %", "eiup": "71.3 %", "negative_prompt": "67.4 %"} and counts == {1152}
    text = (ROOT / "docs/results.md").read_text("utf-8")
    assert all(figure in text for figure in (*found.values(), "1,152"))


@pytest.mark.long
@pytest.mark.thinned
def test_an_interrupted_run_goes_on_to_the_identical_card(
    kind: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(kind, tmp_path / "whole")
    assert whole == json.loads((tmp_path / "whole/trial.json").read_text())
    says_how_it_was_made(whole, kind)
    measured: list[Unit] = []
    measure = Store.measure

    def count(self: Store, unit: Unit) -> Any:
        if len(measured) == len(kind.units(plan(tmp_path, kind))) // 2 and stop:
            raise KeyboardInterrupt
        measured.append(unit)
        return measure(self, unit)

    monkeypatch.setattr(Store, "measure", count)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run(kind, tmp_path / "cut")
    stop, first = False, list(measured)
    assert first and not (tmp_path / "cut/trial.json").exists()
    (tmp_path / "cut/work/trial/half.json.partial").write_text('{"raw": ')  # what a kill while writing leaves
    resumed = run(kind, tmp_path / "cut")
    assert without(resumed, "info") == without(whole, "info")
    assert len({unit.digest for unit in measured}) == len(measured)  # nothing is measured twice
    assert {unit.digest for unit in measured} == {unit.digest for unit in kind.units(plan(tmp_path, kind))}
    file = tmp_path / "cut/trial.json"
    before, number = file.read_bytes(), len(measured)
    run(kind, tmp_path / "cut")
    assert file.read_bytes() == before and len(measured) == number


@pytest.mark.thinned("long")
def test_an_estimate_above_the_cap_is_refused_and_nothing_is_measured(kind: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at most 1e-09 core-hours, got \S+ \(.*Lower `--n`.*raise `cap`"):
        run(dataclasses.replace(kind, cap=1e-9), tmp_path)
    assert not list((tmp_path / "work/trial").glob("*.json")) and not (tmp_path / "trial.json").exists()


def test_an_estimate_draws_nothing_else(tmp_path: Path) -> None:
    said: list[str] = []
    experiment = KINDS["outcome"]()
    where = plan(tmp_path, experiment)
    assert runner.run(experiment, where, tmp_path / "card.json", "", only_estimate=True, say=said.append) is None
    assert [line.split(":")[0].strip() for line in said] == ["trial", "base", "eiup", "negative_prompt"]
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_stops_where_the_cap_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "estimate", lambda units: {"base": 0.0})
    with pytest.raises(ValueError, match="at most 1e-06 core-hours, got .*, all of it spent"):
        run(dataclasses.replace(KINDS["outcome"](), cap=1e-6), tmp_path)


def _forever(folder: str) -> None:
    outcome.COUNTS = 0.0
    run(dataclasses.replace(KINDS["outcome"](), n=40), Path(folder))


@pytest.mark.long
def test_a_killed_process_leaves_what_it_measured_and_no_lock(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_forever, args=(str(tmp_path),))
    worker.start()
    begun = time.monotonic()
    while not list(tmp_path.glob("work/trial/" + "[0-9a-f]" * 64 + ".json")):
        assert worker.is_alive() and time.monotonic() - begun < 240
        time.sleep(0.02)
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    kept = {path: path.read_bytes() for path in tmp_path.glob("work/trial/" + "[0-9a-f]" * 64 + ".json")}
    made = run(dataclasses.replace(KINDS["outcome"](), n=40), tmp_path)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert made["rows"][0]["nothing"]["n"] == 80


def test_one_process_writes(tmp_path: Path) -> None:
    experiment = KINDS["outcome"]()
    store = Store(tmp_path / "work/trial")
    with runner.lock(store.folder / "lock"), pytest.raises(BlockingIOError, match="working in"):
        run(experiment, tmp_path)


@pytest.mark.long
def test_a_damaged_file_of_raw_outcomes_is_named(tmp_path: Path) -> None:
    experiment = KINDS["outcome"]()
    run(experiment, tmp_path)
    path = next(tmp_path.glob("work/trial/" + "[0-9a-f]" * 64 + ".json"))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"is damaged.* Delete it"):
        run(experiment, tmp_path)
    path.write_text('{"setting": 1}')
    with pytest.raises(ValueError, match="holds another unit than its name says"):
        run(experiment, tmp_path)


# ---------------------------------------------------------------- other code, other rows


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Outcome, Path, dict[str, Any]]:
    experiment = Outcome(**ABOUT, **SMALL, arms=arms())
    return experiment, tmp_path, run(experiment, tmp_path)


def other_code(monkeypatch: pytest.MonkeyPatch, method: type) -> None:
    true = outcome.code_hash
    monkeypatch.setattr(outcome, "code_hash", lambda *used: "0" * 64 if method in used else true(*used))


@pytest.mark.long
def test_an_update_leaves_the_other_rows_to_the_bit(drawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, folder, old = drawn
    other_code(monkeypatch, efface.EIUP)
    new = run(experiment, folder, update=["eiup"])
    assert (
        [row["row"] for row in new["rows"]]
        == [row["row"] for row in old["rows"]]
        == ["base", "eiup", "negative_prompt"]
    )
    for before, after in zip(old["rows"], new["rows"], strict=True):
        assert (json.dumps(before) == json.dumps(after)) == (before["row"] != "eiup")
    assert new["rows"][1]["code"] == "0" * 64 and new["command"] == old["command"]
    assert [note["rows"] for note in new["updates"]] == [["eiup"]] and "Redrawn" in tables.caption(new, "trial")
    assert new["comparisons"] == old["comparisons"]  # the pictures are the same
    again = run(experiment, folder, update=["negative_prompt"])
    assert again["rows"] == new["rows"] and len(again["updates"]) == 2


@pytest.mark.long
def test_a_row_that_is_new_joins_the_card(drawn: Any) -> None:
    experiment, folder, old = drawn
    new = run(dataclasses.replace(experiment, arms=arms(sld=Arm(efface.SLD))), folder, update=["sld"])
    assert new["rows"][:3] == old["rows"] and new["rows"][3]["row"] == "sld"
    assert {each["row"] for each in new["comparisons"]} == {"eiup", "negative_prompt", "sld"}


@pytest.mark.long
@pytest.mark.thinned("long")
@pytest.mark.parametrize("what", ["n", "block", "data_sha256", "base"])
def test_rows_that_must_not_be_compared_do_not_join(drawn: Any, what: str) -> None:
    experiment, folder, old = drawn
    other = copy.deepcopy(old)
    other[what] = "another"
    (folder / "trial.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=f"The card has {what} .*Measure all rows again"):
        run(experiment, folder, update=["eiup"])


def test_an_update_needs_a_card_and_a_row(tmp_path: Path) -> None:
    experiment = KINDS["outcome"]()
    with pytest.raises(ValueError, match="is no card of this runner"):
        run(experiment, tmp_path, update=["eiup"])
    with pytest.raises(ValueError, match="Expected a row of `trial`, got 'eip'. There is: base, eiup, negative_prompt"):
        run(experiment, tmp_path, update=["eip"])


@pytest.mark.long
def test_a_card_of_other_code_is_named(drawn: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    experiment, folder, card = drawn
    where = plan(folder, experiment)
    assert runner.outdated(experiment, where, card) == []
    other_code(monkeypatch, efface.EIUP)
    assert runner.outdated(experiment, where, card) == ["eiup"]
    monkeypatch.setattr(command, "CATALOGUE", {"trial": experiment})
    monkeypatch.setattr(command, "ROOT", folder)
    (folder / "results").mkdir()
    (folder / "results/trial.json").write_text(json.dumps(card))
    command.main(["list"])
    assert f"card of {card['date'][:10]}, other code: eiup" in capsys.readouterr().out


def test_the_code_of_an_editor_counts_for_its_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = KINDS["editors"]()
    where = plan(tmp_path, experiment)
    card = {
        "rows": [
            {"row": unit.row, "code": unit.setting["code"]} for unit in experiment.units(where) if unit.kind == "cell"
        ]
    }
    assert runner.outdated(experiment, where, card) == []
    other_code(monkeypatch, efface.UCE)
    assert set(runner.outdated(experiment, where, card)) == {"uce"}


@pytest.mark.long
def test_the_test_block_is_drawn_once_per_release(drawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, folder, _ = drawn
    other_code(monkeypatch, efface.EIUP)
    with pytest.raises(ValueError, match="the test block is drawn once per release. Redraw single rows with `--update"):
        run(experiment, folder)


def test_the_code_counts_and_its_comments_do_not(tmp_path: Path) -> None:
    def meaning(text: str) -> str:
        path = tmp_path / f"{abs(hash(text))}.py"
        path.write_text(text)
        return code.meaning(path)

    plain = meaning("def f(x):\n    return x + 1\n")
    assert plain == meaning('"""Head."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n')
    assert plain != meaning("def f(x):\n    return x + 2\n")
    methods = (efface.EIUP, efface.GIE, efface.SLD, efface.Delta, efface.UCE)
    assert len({code.code_hash(each) for each in methods}) == len(methods)


def test_all_code_behind_a_method_counts() -> None:
    """What it imports, what that imports, and the families, which are imported by name."""
    src = ROOT / "src/efface"
    todo, seen = [src / "erasers/eiup.py"], set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += code.imported(path)
    named = {str(path.relative_to(src)) for path in seen}
    assert {
        "erasers/eiup.py",
        "hooks/method.py",
        "hooks/denoiser.py",
        "_text.py",
        "core.py",
        "families/base.py",
    } <= named
    assert not named & {"report.py", "cli/app.py", "erasers/sld.py"}


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("model", ["emoji", "emoji-128"])
def test_blocks_share_neither_a_seed_nor_a_prompt(model: str) -> None:
    world, where = World(model), {}
    for block, concept, cell in itertools.product(SEEDS, CONCEPTS, CELLS):
        for text, _ in world.prompts(concept, cell, block):
            assert where.setdefault(text, block) == block
            turned = " and ".join(text.split(" and ")[::-1])
            assert where.get(turned, block) == block  # the same pair in the other order
    assert {block for block in where.values()} == set(SEEDS)
    for a, b in itertools.combinations(SEEDS.values(), 2):
        assert not set(a) & set(b)
    for block in SEEDS:
        used = [s for c in CONCEPTS for cell in CELLS for s in seeds(block, c, cell, STRIDES[block])]
        assert len(used) == len(set(used)) and set(used) <= set(SEEDS[block])
    assert max(SEEDS["tuning"]) < efface.checks.TUNING_SEEDS <= min(SEEDS["selection"])


@pytest.mark.parametrize("model", ["emoji", "emoji-128"])
def test_some_concepts_are_never_tuned_on_and_all_are_tested(model: str) -> None:
    world = World(model)
    for concept in CONCEPTS:
        tuned = any(world.prompts(concept, cell, "tuning") for cell in CELLS)
        assert tuned == (concept in TUNED) and world.prompts(concept, "explicit", "test")
    assert 0 < len(TUNED) < len(CONCEPTS)


@pytest.mark.long
def test_what_chooses_never_sees_the_test_block(tmp_path: Path) -> None:
    sweep = KINDS["sweep"]()
    with pytest.raises(ValueError, match=r"Expected `trial` on the tuning or selection block, because it chooses"):
        run(sweep, tmp_path, block="test")
    with pytest.raises(ValueError, match="Expected a block of tuning, selection, test, got 'train'"):
        run(KINDS["outcome"](), tmp_path, block="train")
    made = run(sweep, tmp_path, block="selection")
    first = made["cells"]["alcohol, explicit"]["first_seed"]
    assert first in SEEDS["selection"] and made["chosen"]["eiup"] in ("0.5", "1")
    for experiment in EXPERIMENTS:
        assert experiment.chooses == isinstance(experiment, Sweep)
        assert not experiment.chooses or experiment.block == "tuning"


def test_more_pictures_than_a_cell_has_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected n from 1 to 280 on the tuning block, got 281"):
        seeds("tuning", "cat", "pair", 281)


def test_methods_are_tuned_alike() -> None:
    with pytest.raises(ValueError, match="Expected as many points for each method"):
        Sweep(**ABOUT, points={"a": {"1": None}, "b": {"1": None, "2": None}})


@pytest.mark.long
def test_a_choice_is_measured_by_the_experiment_that_reads_it(tmp_path: Path) -> None:
    sweep = KINDS["sweep"]()
    measured = Outcome(**ABOUT | {"name": "measured"}, **SMALL, arms=partial(outcome.chosen, sweep))
    with pytest.raises(FileNotFoundError, match=r"Run `python -m experiments trial` first: it chooses"):
        run(measured, tmp_path)
    chosen = run(sweep, tmp_path)["chosen"]
    base, row = run(measured, tmp_path)["rows"]
    assert (base["row"], row["row"]) == ("base", "eiup")
    assert {each["strength"] for each in row["erasers"]["alcohol"]} == {float(chosen["eiup"])}


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([(0.5, 0.9), (0.1, 0.86), (0.0, 0.84)], 1),  # the last retains 6 points less than the base model
        ([(0.1, 0.86), (0.1, 0.9), (0.2, 0.99)], 1),  # of equal ones, the one that retains most
        ([(0.5, 0.3), (0.1, 0.2)], 0),  # none retains enough
    ],
)
def test_the_rule(points: list[tuple[float, float]], chosen: int) -> None:
    rows = [{"residual": {"rate": residual}, "retention": {"rate": kept}} for residual, kept in points]
    assert least_residual(rows, {"retention": {"rate": 0.9}}) == chosen


def test_the_balanced_rule_weighs_residual_and_retention_alike() -> None:
    points = [(0.5, 0.9), (0.125, 0.75), (0.0, 0.625), (0.0, 0.5)]
    rows = [{"residual": {"rate": residual}, "retention": {"rate": kept}} for residual, kept in points]
    assert balanced(rows, rows[0]) == 1  # and of equal ones the weakest


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([(0.051, 0.031, 0.9), (0.04, 0.02, 0.86), (0.0, 0.0, 0.9)], 1),  # the first of those that do it
        ([(0.051, 0.0, 0.9), (0.0, 0.0, 0.85)], 1),  # too much left of explicit prompts
        ([(0.0, 0.0, 0.84), (0.2, 0.2, 0.9), (0.1, 0.1, 0.9)], 2),  # none: least left, of those that retain
    ],
)
def test_the_rule_of_the_smallest_strength(points: list[tuple[float, float, float]], chosen: int) -> None:
    names = ("residual explicit", "residual implicit", "retention")
    rows = [{"residual": {"rate": p[0]}} | {n: {"rate": r} for n, r in zip(names, p, strict=True)} for p in points]
    assert first_that_reaches(rows, {"retention": {"rate": 0.9}}) == chosen


@pytest.mark.parametrize(("form", "row"), [("projected", "eiup"), ("swap", "eiup swap")])
def test_the_default_strength_is_what_the_sweep_of_the_model_chose(form: Any, row: str) -> None:
    small, larger = (json.loads((ROOT / f"results/{name}.json").read_text()) for name in ("eiup_sweep", RUN_TIME.name))
    assert (small["model"]["name"], larger["model"]["name"]) == ("emoji", "emoji-128")
    known = {model: values["strength"] for model, values in efface.EIUP("cat", normalization=form).defaults.items()}
    assert known == {"emoji": small["chosen"], "emoji-128": float(larger["chosen"][row]), "": small["chosen"]}
    rates = [{"retention": point["kept"], "residual": point["left"]} for point in small["points"]]
    by_the_leaderboards_rule = small["points"][balanced(rates, {})]["strength"]
    assert (
        f"the sweep of `emoji` would choose {by_the_leaderboards_rule:g}." in (ROOT / "docs/leaderboard.md").read_text()
    )
    for model, strength in (("emoji", small["chosen"]), ("emoji-128", float(larger["chosen"][row]))):
        assert world(model).filled(efface.EIUP("cat", normalization=form)).strength == strength


# ---------------------------------------------------------------- what a card counts


def of_pictures(rows: Mapping[str, Mapping[str, tuple[Sequence[str], Sequence[str]]]], **more: Any) -> dict[str, Any]:
    """A card of given outcomes: row to "concept, cell" to the digits of both eyes, and of what is retained."""
    experiment, found = Outcome(**ABOUT, arms={}, **more), []
    for row, cells in rows.items():
        for name, (digits, retained) in cells.items():
            concept, cell = name.split(", ")
            n = len(digits[0])
            eyes = [[-1 if c == "-" else int(c) for c in eye] for eye in digits]
            kept = [[-1 if c == "-" else int(c) for c in eye] for eye in retained]
            prompts = [f"{name} {k % 4}" for k in range(n)]
            setting = {"concept": concept, "cell": cell, "prompts": prompts, "seeds": [0, n], "erasers": [], "code": ""}
            unit = Unit(row, setting, dict, n, lambda: 0.0)
            found.append((unit, {"raw": {"outcome": eyes, "retained": kept, "object": kept}, "date": ""}))
    card = experiment.rows(Plan("test", 8), found)
    return card | experiment.derived(card)


def test_retention_is_judged_on_every_row_and_removal_where_the_base_model_shows_the_concept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault of the earlier cards: cells with a low base rate were left out of retention too."""
    monkeypatch.setattr(outcome, "COUNTS", 0.3)
    nothing = "-" * 8
    rows = {
        "base": {
            "alcohol, explicit": (["22222222"] * 2, [nothing] * 2),
            "alcohol, theme": (["11111110", "22221111"], ["11111100"] * 2),  # one eye sees nothing of it
            "alcohol, bystander": (["11111111"] * 2, ["11111111"] * 2),
        },
        "eiup": {
            "alcohol, explicit": (["00000001", "00000012"], [nothing] * 2),
            "alcohol, theme": (["00000000"] * 2, ["00000000"] * 2),
            "alcohol, bystander": (["11111111"] * 2, ["11111111", "11111110"]),
        },
    }
    card = of_pictures(rows)
    base, eiup = card["rows"]
    assert card["not judged"] == ["alcohol, theme"] and "Removal is not judged in alcohol, theme" in card["verdict"][0]
    assert (eiup["residual"]["hits"], eiup["residual"]["n"]) == (1, 8)  # the eye that sees more
    assert (base["retention"]["hits"], base["retention"]["n"]) == (14, 16)
    assert (eiup["retention"]["hits"], eiup["retention"]["n"]) == (7, 16)  # the eye that sees less
    assert base["retention"]["prompts"] == 8 and "residual implicit" not in eiup


def test_a_ruined_picture_is_no_success() -> None:
    """Three outcomes: nothing of the concept is left, but nothing else is there either."""
    rows = {
        "base": {"cat, pair": (["22222222"] * 2, ["11111111"] * 2)},
        "ruined": {"cat, pair": (["00000000"] * 2, ["00000000"] * 2)},
        "clean": {"cat, pair": (["11111111"] * 2, ["11111111"] * 2)},
    }
    _, ruined, clean = of_pictures(rows)["rows"]
    assert ruined["residual"]["rate"] == clean["residual"]["rate"] == 0.0
    assert (ruined["nothing"]["rate"], ruined["other"]["rate"]) == (1.0, 0.0)
    assert (clean["nothing"]["rate"], clean["other"]["rate"]) == (0.0, 1.0)


def test_intervals_are_clustered_by_prompt_and_name_the_worst() -> None:
    rows = {
        "base": {"cat, pair": (["2" * 8] * 2, ["1" * 8] * 2)},
        "x": {"cat, pair": (["0002000200020002"[:8]] * 2, ["1" * 8] * 2)},
    }
    found = of_pictures(rows)["rows"][1]["residual"]
    assert found["rate"] == 0.25 and found["highest"] == ["cat: cat, pair 3", 1.0] and found["prompts"] == 4
    values = [int(k % 4 == 3) for k in range(8)]
    assert found["interval"] == list(clustered(values, [f"cat: cat, pair {k % 4}" for k in range(8)]))


def test_comparisons_are_paired_and_the_rest_adjusted() -> None:
    digits = {"base": "2" * 32, "a": "0" * 32, "b": "0" * 28 + "2" * 4, "c": "2" * 8}
    rows = {row: {"cat, pair": ([d] * 2, ["1" * len(d)] * 2)} for row, d in digits.items()}
    card = of_pictures(rows, primary=(("a", "b", "residual"),))
    found = {(each["row"], each["against"], each["metric"]): each for each in card["comparisons"]}
    first = found["a", "b", "residual"]
    assert first["difference"] == -0.125 and "p, Holm" not in first
    rest = [each for key, each in found.items() if key != ("a", "b", "residual")]
    assert len(rest) == 6 and all(each["p, Holm"] >= each["p"] for each in rest)
    assert found["c", "base", "residual"]["difference"] == 0.0  # on the pictures that both have


def test_an_aim_needs_enough_pictures() -> None:
    cell = {"base": {"cat, pair": (["2" * 8] * 2, ["1" * 8] * 2)}, "x": {"cat, pair": (["0" * 8] * 2, ["1" * 8] * 2)}}
    few = of_pictures(cell, aims=(("x", "residual", 0.03),))["verdict"]
    assert few == ["Aim for x: residual <= 3 %. Not judged: n = 8, 512 are needed."]
    many = {
        row: {name: tuple([d * 64 for d in eyes] for eyes in both) for name, both in of.items()}
        for row, of in cell.items()
    }
    assert of_pictures(many, aims=(("x", "residual", 0.03),))["verdict"][0].startswith(
        "Aim for x: residual <= 3 %. Met: 0.0 %, bound"
    )


@pytest.mark.long
def test_the_eyes_give_three_outcomes_and_what_is_retained() -> None:
    """On drawn pictures: a cat, a guitar, and grey."""
    world = World("emoji")
    images = efface.pipelines.draw(world.pipe, ["a cat", "a guitar"], [11, 12])
    images = torch.cat([images, torch.full((1, 3, 64, 64), 0.5)])
    judged = world.judge(images, "cat", [(), ("guitar",), ("guitar",)])
    assert judged["outcome"] == [[2, 1, 0]] * 2 and judged["retained"] == [[-1, 1, 0]] * 2
    assert world.sees(images, ["guitar"] * 3) == [[0, 1, 0]] * 2


# ---------------------------------------------------------------- timing


def test_a_variant_without_effect_fails(tmp_path: Path) -> None:
    dead = dataclasses.replace(
        KINDS["overhead"](), variants={n: partial(calls.seconds, calls.base) for n in ("plain", "dead hook")}
    )
    with pytest.raises(RuntimeError, match=r"'dead hook' changes the prediction by 0\.0000"):
        run(dead, tmp_path)


@pytest.mark.long
def test_a_variant_that_is_timed_again_leaves_the_others(tmp_path: Path) -> None:
    experiment = KINDS["overhead"]()
    old = run(experiment, tmp_path)
    again = dataclasses.replace(experiment, only=("eiup projected",))
    assert {name for unit in again.units(plan(tmp_path, again)) for name in unit.setting["variants"]} == {
        "plain",
        "eiup projected",
    }
    assert runner.outdated(experiment, plan(tmp_path, experiment), old) == []
    new = run(experiment, tmp_path, update=["eiup projected"])
    rows = {row["row"]: row for row in new["rows"]}
    assert [rows[name] for name in ("plain", "two trajectories")] == [old["rows"][0], old["rows"][2]]
    assert all(each["scenes"]["tiny"]["ratio"]["median"] == 1 for each in old["rows"] if each["row"] == "plain")


def test_memory_is_that_of_a_process_of_its_own() -> None:
    found = KINDS["overhead"]().one({"scene": "tiny", "variant": "plain"})
    assert found["peak"] > 2**20


def test_no_hook_stays_after_the_hooks_were_timed() -> None:
    scene = calls.scene("tiny", 1)
    with torch.no_grad():
        before = scene.call(*scene.texts())()
        calls.hooks_alone(scene, 2)
        assert torch.equal(scene.call(*scene.texts())(), before)


def test_rows_of_the_denoiser_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "K", 2)
    rows = finetune.rows_per_update(tiny.pipeline("small"), 4)
    assert rows["esd: efface, reuse 4"] < rows["esd: efface, reuse 1"]


# ---------------------------------------------------------------- the catalogue, the command, the documents


EXPLICIT = ("alcohol, explicit", "smoking, explicit")


def test_the_readme_of_the_experiments_names_those_that_there_are() -> None:
    text = (ROOT / "experiments/README.md").read_text("utf-8")
    kinds, earlier = text.split("| kind | experiments |")[1].split("| card | command then | command now |")
    listed = re.findall(r"`(\w+)`", kinds.partition("\n\n")[0])
    assert sorted(listed) == sorted(CATALOGUE)
    now = [line.split(" | ")[2] for line in earlier.splitlines() if line.startswith("| `results/")]
    assert {re.findall(r"`(\w+)`", each)[0] for each in now} <= CATALOGUE.keys() and len(now) > 10


def test_a_methods_settings_are_not_those_of_a_method_whose_name_begins_alike() -> None:
    found = {"chosen": {"eiup": "1", "eiup swap": "1"}, "rows": [{"row": "base"}, {"row": "eiup 1"}]}
    found["rows"] += [{"row": "eiup swap 1"}, {"row": "eiup 2"}]
    assert docs.tried(found, "eiup") == ["eiup 1", "eiup 2"] and docs.tried(found, "eiup swap") == ["eiup swap 1"]


def test_figures_in_the_leaderboards_prose_are_those_of_its_cards() -> None:
    card, judge = docs.card("leaderboard"), docs.card("judge")
    rows = {row["row"]: row for row in card["rows"]}
    left, kept = ({name: 100 * row[m]["rate"] for name, row in rows.items()} for m in ("residual", "retention"))
    page = " ".join((ROOT / "docs/leaderboard.md").read_text("utf-8").split())
    assert set(sorted(rows, key=lambda name: left[name] - kept[name])[:3]) == {"eiup", "adavd", "midsteer"}
    for name in ("eiup", "midsteer", "adavd", "eiup swap", "esd", "speed"):
        assert f"{kept[name] - left[name]:.1f}" in page, name
    compared = {(each["row"], each["against"], each["metric"]): each for each in card["comparisons"]}
    for rival, words in (("esd", " points of residual"), ("safree", "")):
        each = compared["eiup", rival, "residual"]
        figures = [each["difference"], *each["interval"]]
        assert "{:.1f}{} [{:.1f}, {:.1f}]".format(100 * figures[0], words, *(100 * x for x in figures[1:])) in page
    nothing = {
        name: sum(max(eye.count("0") for eye in card["pictures"][name][cell]["outcome"]) for cell in EXPLICIT)
        for name in ("eiup", "eiup swap", "adavd")
    }
    assert f"{nothing['eiup']} of 32 of these" in page and f"{32 - nothing['eiup swap']} of 32, and AdaVD" in page
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    (cost,) = (row for row in docs.card("eiup_cost")["rows"] if row["row"] == "7 phrases")
    assert f"takes {cost['scenes']['emoji, batch 4']['ratio']['median']:.2f} times as long" in readme
    looked = {row["row"]: 100 * row["residual"]["looking"]["rate"] for row in judge["rows"]}
    assert f"in {looked['base']:.1f} % of them, not {left['base']:.1f} %" in readme
    largest = max(abs(looked[name] - left[name]) for name in looked.keys() - {"base"})
    assert f"The largest difference is {largest:.1f} points" in readme


def test_all_cards_together_take_at_most_60_core_hours() -> None:
    assert sum(each.cap for each in EXPERIMENTS) <= 60
    assert len(CATALOGUE) == len(EXPERIMENTS) and all(
        each.question.endswith("?") or each.question.endswith(".") for each in EXPERIMENTS
    )


READ_CARDS = (
    "leaderboard",
    "eiup_neighbours_flagged",
    "attacks",
    "attacks_few",
    "peer_attacks",
)  # which plan by what another card chose


@pytest.mark.long
@pytest.mark.thinned("long")
@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in READ_CARDS])
def test_every_experiment_can_be_planned(name: str) -> None:
    """Prompts in its block, seeds for its n, and configurations that go into a file."""
    each = CATALOGUE[name]
    units = each.units(Plan(each.block, each.n, each.model))
    assert units and all(len(unit.digest) == 64 and unit.weight > 0 for unit in units)


@pytest.mark.parametrize("make", [partial(joint_blocks.flux, 0, 1), joint_blocks.sd35], ids=["flux", "sd35"])
def test_a_block_is_timed_with_and_without_eiup(make: Any) -> None:
    """Conditional rows alone are edited; EIUP comes off for the next variant."""
    scene = joint_blocks.scene(make, small=True)
    plain, erased, again = (joint_blocks.seconds(n, scene) for n in (0, 2, 0))
    assert torch.equal(plain[1], again[1]) and min(plain[0], erased[0]) > 0
    assert (erased[1] - plain[1]).norm() / plain[1].norm() > 1e-4
    with efface.EIUP(efface.Concept("a", ("beer",))).apply(scene.pipe) as handle:
        with torch.no_grad(), efface.conditional_rows(scene.pipe, scene.rows):
            scene.pipe.transformer(**scene.arguments)
        assert handle.record["rows"] == {"0": 1}


def test_a_leak_is_what_the_policy_alone_does_not_show() -> None:
    """20 requests that ask for an erased concept. The detector sees one of them with and without a server."""
    alone = [[load.CONCEPTS.index(each[0])] if k == 3 else [] for k, each in enumerate(load.erased())]
    asked = [load.CONCEPTS.index(each[0]) for each in load.erased()]
    part: dict[str, Any] = {"policy": list(range(20)), "asked": asked, "apart": [0.0] * 20, "memory": [700.0, 701.0]}
    part |= {"delays": [float(k) for k in range(20)], "seconds": {"service": 4.0, "guard": 3.0, "base": 2.0}}
    part["shows"] = {"base": [[each] for each in asked], "guard": alone, "service": alone}
    unit: Any = None
    kind, plan = load.Load(name="load", question="?", cap=1.0), Plan("selection", 20)
    clean = kind.rows(plan, [(unit, {"raw": part})])
    service, guard, base = (row["figures"] for row in clean["rows"])
    assert (service["leaks"]["hits"], service["leaks"]["n"]) == (0, 20) and clean["ratios"]["base"]["median"] == 0.5
    key = "erased concept that was asked for is seen"
    assert (service[key]["hits"], guard[key]["hits"], base[key]["hits"]) == (1, 1, 20)
    assert service["seconds"] == {"p50": 10.0, "p99": 19.0}
    leaking = part | {"shows": part["shows"] | {"service": [[asked[0]], *alone[1:]]}, "apart": [99.0, *[0.0] * 19]}
    leaky = kind.rows(plan, [(unit, {"raw": leaking})])["rows"][0]["figures"]
    assert leaky["leaks"]["hits"] == leaky["pictures unlike those of the policy alone"]["hits"] == 1
    flat, grows = ([700.0 + slope * k for k in range(100)] for slope in (0.01, 1.0))
    words = [load.minutes(20, {"memory": each, "requests": 9, "ok": 9})["verdict"][0] for each in (flat, grows)]
    assert "(flat" in words[0] and "(not flat" in words[1]


def test_each_policy_is_asked_for_what_it_erases_and_for_what_others_erase() -> None:
    sets, every = load.erased(), load.asks(world("emoji"), "selection", range(200))
    assert len(set(sets)) == len({each.policy for each in every}) == 20 and len({each.seed for each in every}) == 200
    erased = [each.concept in sets[each.policy] for each in every]
    assert sum(erased) == 100 and {each.concept for each in every} == set(load.CONCEPTS)


def test_negative_prompts_are_tried_on_every_method_that_takes_them() -> None:
    rows = CATALOGUE["negative_prompts"].arms
    for variant in NEGATIVES:
        assert f"eiup | {variant}" in rows and (variant == "none" or f"base | {variant}" in rows)
    assert "safree | equal embeddings" not in rows and "eiup | with NegativePrompt 3.75" in rows


def test_every_card_of_an_earlier_runner_is_named_with_its_command() -> None:
    text = (ROOT / "experiments/README.md").read_text()
    for path in sorted((ROOT / "results").glob("*.json")):
        card = json.loads(path.read_text())
        if isinstance(card, dict) and "form" in card:
            continue
        assert f"`results/{path.name}`" in text
        made = [each.get("command") for each in (card if isinstance(card, list) else [card])]
        assert all(command in text for command in made if command)


def test_the_documents_are_filled_from_the_cards() -> None:
    pages = {name: (ROOT / name).read_text("utf-8") for name in (*docs.PAGES, docs.MODEL_CARD)}
    for marker in docs.BLOCKS:
        assert sum(f"<!-- {marker}:begin -->" in text for text in pages.values()) == 1, marker
    for text in pages.values():
        emptied = re.sub(r"(<!-- (\w+):begin -->).*?(<!-- \2:end -->)", r"\1\3", text, flags=re.DOTALL)
        assert docs.filled(emptied) == docs.filled(text) == text, "run `python -m experiments docs`"
    for name in docs.FIGURES:
        svg = docs.figure(docs.card(name))
        assert svg == (ROOT / f"docs/{name}.svg").read_text("utf-8") and "currentColor" not in svg


@pytest.mark.long
def test_a_card_of_this_runner_fills_its_block_and_a_changed_earlier_one_does_not(drawn: Any, tmp_path: Path) -> None:
    _, _, card = drawn
    (tmp_path / "results").mkdir()
    file = tmp_path / "results/eiup_outcome.json"
    file.write_text(json.dumps(card))
    text = docs.block("measured", tmp_path)
    assert "Does the runner run?" in text and "`a command`" in text and "| `eiup` |" in text
    assert "eiup" in docs.figure(card)
    earlier = (ROOT / "results/eiup_outcome.json").read_text()
    file.write_text(earlier)
    assert "21 min of drawing" in docs.block("measured", tmp_path)
    file.write_text(earlier.replace("0.9", "0.8", 1))
    with pytest.raises(ValueError, match="Expected the cards eiup_outcome as an earlier runner left them, got others"):
        docs.block("measured", tmp_path)


@pytest.mark.long
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    experiment = KINDS["outcome"]()
    monkeypatch.setattr(command, "CATALOGUE", {"trial": experiment})
    monkeypatch.setattr(command, "Plan", partial(Plan, call=CALL))
    base = ["trial", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "card.json")]
    assert command.main([*base, "--n", "1"]) == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["command"] == "python -m experiments trial --n 1" and "| `eiup` |" in capsys.readouterr().out
    assert command.main(["table", str(tmp_path / "card.json"), "--format", "latex"]) == 0
    assert r"\begin{tabular}" in capsys.readouterr().out
    assert command.main([*base, "--block", "train"]) == 1
    assert "Error: Expected a block of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["no such experiment"])
    assert "is not an experiment. There is: trial" in capsys.readouterr().err


def test_a_heat_map_has_a_cell_for_each_guard_and_attack_that_was_drawn() -> None:
    def row(name: str, attacked: float, control: float | None = None) -> dict[str, Any]:
        made = {"row": name, "attacked": {"rate": attacked}}
        return made | ({"control": {"rate": control}} if control is not None else {})

    card = {"rows": [row("esd | relearning", 0.97), row("esd | best_of_n", 0.31, 0.04), row("eiup | best_of_n", 0.02)]}
    svg = docs.figure(card)
    shown = re.findall(r">([^<>]+)</text>", svg)
    assert sorted(shown) == sorted(["97 %", "31 % (4)", "2 %", "esd", "eiup", "relearning", "best_of_n"])
    assert "currentColor" not in svg
    assert svg == docs.figure(card)  # without a date
    assert {each for each in re.findall(r"#ffffff|#1f2328", svg)} == {"#ffffff", "#1f2328"}


def test_the_peak_of_memory_is_what_tensors_hold_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(1000)

    def at_once() -> None:
        kept = [torch.ones(1000) for _ in range(3)]
        kept.clear()

    assert costs.peak(one_after_the_other) < 2 * 4000 < 3 * 4000 <= costs.peak(at_once) < 4 * 4000
    with pytest.raises(RuntimeError, match="no memory"):
        costs.peak(lambda: None)


@pytest.mark.long
def test_words_and_a_learned_token_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "HOSTS", {"eiup": efface.EIUP})
    about = dataclasses.replace(
        feedback.CONCEPTS["alcohol"], words={"name": ("alcohol",)}, judgements=((60, 0.0),), trainers=False
    )
    trial = feedback.Feedback(**ABOUT, concepts={"alcohol": about}, fit=efface.HFI(steps=4), n=5)
    call = {"num_inference_steps": 8, "guidance": 7.5}
    card = runner.run(trial, plan(tmp_path, trial, call=call), tmp_path / "card.json", "trial", say=lambda line: None)
    assert card is not None
    rows = {row["row"]: row for row in card["rows"]}
    words, token = "alcohol | eiup | words: name", "alcohol | eiup | 60 judgements"
    assert set(rows) == {"alcohol | base", words, token}
    assert rows["alcohol | base"]["seen"]["rate"] >= 0.8 > rows[words]["seen"]["rate"]
    assert rows["alcohol | base"]["far"]["rate"] >= 0.8
    (learned,) = card["tokens"]
    assert learned["judged"] == 60 and 10 < learned["yes"] < 30 and learned["reward"]["binary"]["auc"] > 0.8
    assert all(set(about.cells) <= set(row) for row in rows.values())
    (pool,) = (tmp_path / "work/trial/pools").iterdir()
    wrong = feedback.judged(plan(tmp_path, trial), pool, "alcohol", about, 1.0)
    assert sum(wrong.shares.values()) == 60 - learned["yes"]  # every answer is turned around
    assert "second detector" in tables.caption(card, "trial")


def test_the_card_of_feedback_says_whether_pictures_beat_words() -> None:
    cells = {"seen": ("a", "b"), "unseen": ("c",), "near": ("d",), "far": ("e", "f")}
    about = feedback.Fuzzy(cells, {"name": ("x",), "list": ("x", "y")})
    trial = feedback.Feedback(**ABOUT, concepts={"x": about}, n=24)
    base = dict.fromkeys(cells, "1" * 24)

    def judged(words: str, token: str, kept: str = "1") -> dict[str, Any]:
        """The verdict if words leave and keep this, and the token that; the name alone leaves everything."""
        rows = {"base": base, "sld | words: name": base}
        rows["sld | words: list"] = base | dict.fromkeys(("seen", "unseen"), words * 24)
        rows["sld | 200 judgements"] = base | dict.fromkeys(("seen", "unseen"), token * 24)
        rows["sld | 200 judgements"] |= dict.fromkeys(("near", "far"), kept * 24)
        pictures = {f"x | {row} | {cell}": [digits] for row, of in rows.items() for cell, digits in of.items()}
        return trial.derived({"n": 24, "pictures": pictures})

    won, lost, open_ = judged("1", "0"), judged("0", "1"), judged("0", "0")
    assert [each["comparisons"][0]["better"] for each in (won, lost, open_)] == ["pictures", "words", ""]
    assert judged("1", "0", kept="0")["comparisons"][0]["better"] == ""  # it ruins near things
    (found,) = lost["comparisons"]
    assert found["words"] == "list" and (found["left"]["token"], found["left"]["words"]) == (1.0, 0.0)
    assert "100 % of the members are left, with words (list) 0 %, +100 points" in lost["verdict"][0]
