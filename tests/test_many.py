"""The experiment on many concepts: what is dealt, what is paired, and where a method breaks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import efface
from efface.erasers._anchors import PHRASES
from efface.intervals import difference
from experiments import docs, many, runner, tables
from experiments.catalogue import CATALOGUE
from experiments.many import Many, against, bare, broken, rates
from experiments.outcome import Arm
from experiments.runner import Plan
from experiments.worlds import CELLS, CONCEPTS, SEEDS, STRIDES, seeds

SHIPPED: Any = CATALOGUE["many_concepts"]
ARMS = {"eiup": Arm(partial(efface.EIUP, strength=1.0)), "uce": Arm(efface.UCE())}
TRIAL = Many(
    name="trial", question="?", cap=1.0, arms=lambda plan: ARMS, counts=(1, 2, 4), probes=2, rounds=1, model="emoji"
)

FEW = dataclasses.replace(TRIAL, counts=(1, 4))


def plan(folder: Path, **more: Any) -> Plan:
    call = {"num_inference_steps": 1, "guidance": 7.5}
    return Plan(**{"block": "test", "n": 2, "model": "emoji", "folder": folder / "work", "call": call} | more)


def drawn(pipe: Any, prompts: Sequence[str], numbers: Sequence[int], batch: int, **call: Any) -> torch.Tensor:
    """Noise by seed, and other noise under an eraser."""
    on = 10_000 * len(str(efface.active(pipe)))
    return torch.stack([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(s + on)) for s in numbers])


def run(experiment: Many, folder: Path, **more: Any) -> Any:
    return runner.run(experiment, plan(folder), folder / "trial.json", "a command", say=lambda line: None, **more)


# ---------------------------------------------------------------- what is dealt


def test_a_hundred_icons_are_erased_and_no_bystander_is_near_one() -> None:
    where = Plan(SHIPPED.block, SHIPPED.n, SHIPPED.model)
    deal, world = SHIPPED.deal(where), where.world
    assert len(set(deal.erased)) == 100 and len(set(deal.bystanders)) == 40
    assert not set(deal.erased) & set(deal.bystanders)
    probes = deal.erased[: SHIPPED.probes]
    assert {world.blocks[world.captions[icon]] for icon in (*probes, *deal.bystanders)} == {"test"}
    assert not set(world.truth("alcohol") or ()) & {*probes, *deal.bystanders}  # what the sweeps tuned on
    own = {icon: set(bare(text).split()) for icon, text in world.captions.items()}
    for bystander in deal.bystanders:
        shared = {word for icon in deal.erased for word in own[bystander] & own[icon]}
        assert shared <= {"a", "of", "and", "the", "in", "with"}, bystander


@pytest.mark.long
def test_every_count_erases_each_probe_once_with_equal_pictures(tmp_path: Path) -> None:
    units = [unit for unit in TRIAL.units(plan(tmp_path)) if unit.kind == "cell" and "pictures" in unit.setting]
    rows: dict[str, list[Any]] = {}
    for unit in units:
        rows.setdefault(unit.row, []).append(unit)
    assert list(rows) == ["base", *(f"{m} | {n}" for m in ARMS for n in (1, 2, 4))]
    asked = {row: sorted(p for unit in of for p in unit.setting["pictures"]) for row, of in rows.items()}
    assert all(each == asked["base"] for each in asked.values()) and len(asked["base"]) == 8
    for row, count in (("eiup | 1", 1), ("eiup | 2", 2), ("eiup | 4", 4)):
        for unit in rows[row]:
            erased = [concept["name"] for concept in unit.setting["erasers"][0]["concepts"]]
            probes = {icon for icon, _, _ in unit.setting["pictures"][: len(unit.setting["pictures"]) // 2]}
            others = {icon for icon, _, _ in unit.setting["pictures"]} - probes
            assert len(erased) == count and probes <= set(erased) and not others & set(erased)
    small, large = (rows[row][0].setting["erasers"][0]["concepts"] for row in ("eiup | 2", "eiup | 4"))
    assert large[:2] == small


def test_its_seeds_are_in_no_cell_and_in_no_other_experiment() -> None:
    where = Plan(SHIPPED.block, many.STRIDE, SHIPPED.model)
    deal = SHIPPED.deal(where)
    asked = SHIPPED.pictures(where, deal, range(SHIPPED.probes))
    used = [seed for some in asked.values() for _, _, seed in some]
    used += [seed for k in range(SHIPPED.rounds + 1) for _, _, seed in SHIPPED._two(where, deal, k)]
    assert len(used) == len(set(used)) == 80 * many.STRIDE + 2 * 6
    last = seeds("test", CONCEPTS[-1], CELLS[-1], 1).start + STRIDES["test"]
    assert min(used) >= last and max(used) < SEEDS["test"].start + 750_000  # where those of neighbours begin
    with pytest.raises(ValueError, match="Expected n from 1 to 50, got 51"):
        SHIPPED.pictures(dataclasses.replace(where, n=51), deal, range(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"counts": (1, 15, 100)}, "counts that divide 40 probes"), ({"counts": (1, 10, 160)}, "160 icons to erase")],
)
def test_counts_that_cannot_be_dealt_are_refused(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHIPPED, **change).deal(Plan("test", 2, "emoji-128"))


# ---------------------------------------------------------------- the run


@pytest.mark.long
def test_a_run_fits_draws_times_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "draw", drawn)
    card = run(FEW, tmp_path)
    rows = {row["row"]: row for row in card["rows"]}
    assert list(rows) == ["base", *(f"{m} | {n}" for m in ARMS for n in (1, 4)), "eiup | 1000"]
    one, four = (rows[f"uce | {n}"] for n in (1, 4))
    assert one["bytes"] < four["bytes"] and one["fits"] == 2 and min(one["fit"], four["fit"]) > 0
    files = {path.stat().st_size for path in (tmp_path / "work/trial/deltas").glob("*.safetensors")}
    assert {one["bytes"], four["bytes"]} <= files
    assert rows["base"]["times"] == {"median": 1.0, "min": 1.0, "max": 1.0} and "bytes" not in rows["eiup | 4"]
    assert "at most 256 phrases in a row of EIUP, got 1000" in rows["eiup | 1000"]["refused"]
    assert any("refuses 1,000 concepts in one row: Expected" in line for line in card["verdict"])
    assert card["pictures"]["base"].keys() == {"erased", "bystander"} and len(card["base"]["erased"][0]) == 4
    text = tables.of_card(card)
    assert "`uce: 4`" in text and f"{four['bytes']:,}" in text and "`eiup: 1000` | - |" in text
    assert "4 prompts; 95 % intervals, clustered by prompt" in tables.caption(card, "trial")


@pytest.mark.long
def test_an_update_leaves_the_other_rows_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "draw", drawn)
    card = run(FEW, tmp_path)
    assert runner.outdated(FEW, plan(tmp_path), card) == []
    weaker = dataclasses.replace(FEW, arms=lambda plan: ARMS | {"eiup": Arm(partial(efface.EIUP, strength=0.5))})
    new = run(weaker, tmp_path, update=["eiup | 4"])
    before, after = ({row["row"]: row for row in each["rows"]} for each in (card, new))
    assert [name for name in before if after[name] != before[name]] == ["eiup | 4"]
    assert after["eiup | 4"]["erasers"][0]["strength"] == 0.5


def test_a_method_without_effect_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "draw", lambda pipe, prompts, numbers, batch, **call: torch.ones(2, 3, 8, 8))
    one = dataclasses.replace(TRIAL, counts=(1,), arms=lambda plan: {"eiup": ARMS["eiup"]})
    (last,) = [u for u in one.units(plan(tmp_path)) if u.kind == "round" and u.setting["round"] == 1]
    with pytest.raises(RuntimeError, match=r"'eiup \| 1' changes the pictures by 0\.0000"):
        last.measure()


# ---------------------------------------------------------------- what is counted


def cells(each: int, judged: Sequence[bool]) -> dict[str, Any]:
    texts = [f"thing {k}" for k in range(len(judged))]
    return {
        "erased": {"prompts": texts, "each": each, "removal judged": list(judged)},
        "bystander": {"prompts": [f"other {k}" for k in range(len(judged))], "each": each},
    }


def test_the_less_favourable_detector_counts_and_what_the_base_model_does_not_draw_is_not_judged() -> None:
    of = cells(2, [True, True, False])
    own = {"erased": ["200020", "002222"], "bystander": ["222222", "220000"]}
    found = rates("eiup | 1", own, of)
    assert (found["residual"]["hits"], found["residual"]["n"], found["residual"]["prompts"]) == (2, 4, 2)
    assert (found["retention"]["hits"], found["retention"]["n"]) == (2, 6)
    assert (found["nothing"]["hits"], found["nothing"]["n"]) == (6, 12)
    assert rates("base", own, of)["residual"]["hits"] == 1  # for the base model the smaller rate is the worse one


def compare(lost: int, gained: int, metric: str, other: int = 0) -> dict[str, Any]:
    """20 things in two pictures each: how many lose their bystander, or still show the concept, at 10 concepts."""
    rest = 20 - lost - gained
    digits = {"x | 1": "22" * lost + "00" * gained + "22" * rest, "x | 10": "00" * lost + "22" * gained + "22" * rest}
    second = {"x | 1": digits["x | 1"], "x | 10": "00" * other + digits["x | 1"][2 * other :]}
    pictures = {row: {kind: [digits[row], second[row]] for kind in ("erased", "bystander")} for row in digits}
    found = against("x | 10", "x | 1", metric, pictures, cells(2, [True] * 20))
    assert found is not None
    return found | {"p, Holm": found["p"]}


def test_a_method_breaks_where_the_interval_of_the_paired_difference_lies_on_the_worse_side() -> None:
    fell = compare(12, 0, "retention", other=10)
    assert fell["breaks"] is True and fell["difference"] == -0.5  # of the detector that saw less of a difference
    values = [0] * 20 + [1] * 20, [1] * 40
    whole = difference(*values, [f"other {k // 2}" for k in range(40)])
    assert tuple(fell["interval"]) == whole.interval and fell["interval"][1] < 0
    words = broken("x", "retention", [fell])
    assert words.startswith("`x`: retention breaks at 10 concepts, a fall by 50.0 points (difference -50.0 [")
    assert not compare(12, 0, "residual", other=12)["breaks"]  # less is left: no break
    assert not compare(0, 12, "retention")["breaks"]  # one detector sees nothing of it


def test_where_nothing_breaks_the_verdict_says_how_far_the_interval_reaches() -> None:
    close = compare(1, 1, "retention", other=1)
    assert not close["breaks"] and close["worst"] > 0
    words = broken("x", "retention", [close])
    reach = f"{100 * close['worst']:.1f} points"
    assert words == f"`x`: retention breaks at no number up to 10. The interval there reaches to a fall by {reach}."
    assert broken("x", "residual", []) == "`x`: residual is not judged."


def test_the_first_count_that_breaks_is_named_and_comparisons_are_adjusted_together() -> None:
    good, bad = "22" * 20, "00" * 20
    of = cells(2, [True] * 20)
    pictures = {"base": {"erased": [good] * 2, "bystander": [good] * 2}}
    kept = {"a": {1: good, 10: good, 100: bad}, "b": {1: good, 10: bad, 100: bad}}
    for method, counts in kept.items():
        for count, digits in counts.items():
            pictures[f"{method} | {count}"] = {"erased": [bad] * 2, "bystander": [digits] * 2}
    found = SHIPPED.derived({"pictures": pictures, "cells": of, "rows": [{"row": row} for row in pictures]})
    assert len(found["comparisons"]) == 8 and all(each["p, Holm"] >= each["p"] for each in found["comparisons"])
    assert max(each["p, Holm"] / each["p"] for each in found["comparisons"] if each["breaks"]) == 8
    lines = [line for line in found["verdict"] if "retention breaks at" in line]
    assert lines[0].startswith("`a`: retention breaks at 100") and lines[1].startswith("`b`: retention breaks at 10 ")
    assert sum("residual breaks at no number up to 100" in line for line in found["verdict"]) == 2


def test_the_page_has_the_card_or_says_how_to_draw_it(tmp_path: Path) -> None:
    page = " ".join((docs.ROOT / "docs/leaderboard.md").read_text("utf-8").split())
    assert f"EIUP takes at most {PHRASES} phrases in a row" in page
    assert docs.many(tmp_path) == "Without a card so far: `python -m experiments many_concepts`."
    head = {"form": 2, "question": "How many?", "model": {"name": "emoji-128"}, "block": "test", "n": 2}
    head |= {"date": "2026-11-29", "command": "python -m experiments many_concepts", "machine": "one core"}
    head |= {"code": {"commit": "0123456789"}, "core_hours": {"spent": 0.5, "estimate": 0.5, "cap": 1.0}}
    rows = [{"row": "uce | 10", "fit": 0.123456, "bytes": 1234567, "times": {"median": 1.0, "min": 0.9, "max": 1.1}}]
    card = head | {"verdict": ["A verdict."], "columns": dict(Many.columns), "rows": rows}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/many_concepts.json").write_text(json.dumps(card), "utf-8")
    text = docs.many(tmp_path)
    assert "A verdict." in text and "| `uce: 10` | - | - | - | 1.00 (0.90-1.10) | 0.123 | 1,234,567 |" in text
