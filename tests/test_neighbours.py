"""The experiments on neighbours and on phrases: seeds, rates against the base model, flags, and unnamed members."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import neighbours, outcome
from experiments.catalogue import EXPERIMENTS
from experiments.runner import Plan, Unit
from experiments.worlds import CELLS, CONCEPTS, SEEDS, seeds

CATALOGUE = {each.name: each for each in EXPERIMENTS}
FEW, MANY = CATALOGUE["eiup_neighbours"], CATALOGUE["eiup_neighbours_flagged"]


def numbers(unit: Unit) -> set[int]:
    first, n = unit.setting["seeds"]
    return {seed + k for seed in first for k in range(n)}


def test_every_icon_alone_with_seeds_of_its_own() -> None:
    plan = Plan(FEW.block, FEW.n)
    units = FEW.units(plan)
    for concept in ("alcohol", "weapon", "cat"):
        own = [unit for unit in units if unit.setting["concept"] == concept and unit.row == "base"]
        prompts = [text for unit in own for text in unit.setting["prompts"]]
        assert prompts == [text for text, _ in plan.world.every(concept, "bystander")] and len(prompts) > 100
        used = [numbers(unit) for unit in own]
        assert sum(map(len, used)) == len(set().union(*used)) == 8 * len(prompts)
        assert all(seed in SEEDS["selection"] for some in used for seed in some)
    last = seeds("selection", CONCEPTS[-1], CELLS[-1], 1).start + 10_000
    assert min(seed for unit in units for seed in numbers(unit)) >= last  # no cell of another experiment has them
    others = [unit for unit in units if unit.row == "eiup" and unit.setting["concept"] == "cat"]
    assert [unit.setting["seeds"] for unit in others] == [unit.setting["seeds"] for unit in own]  # paired


def test_flagged_icons_are_drawn_again_with_fresh_seeds(tmp_path: Path) -> None:
    card = {"flagged": {"eiup": {"alcohol": ["soft-drink", "teacup-without-handle"], "cat": []}}}
    plan = Plan(MANY.block, MANY.n, cards=tmp_path)
    with pytest.raises(FileNotFoundError, match="it flags"):
        MANY.units(plan)
    every = [icon for _, (icon,) in plan.world.every("alcohol", "bystander")]
    card["flagged"]["eiup"]["alcohol"] = every[3:5]
    (tmp_path / "eiup_neighbours.json").write_text(json.dumps(card), "utf-8")
    units = MANY.units(plan)
    assert {unit.setting["concept"] for unit in units} == {"alcohol"} and len(units) == 6
    assert all(len(unit.setting["prompts"]) == 2 and len(numbers(unit)) == 256 for unit in units)
    early = {seed for unit in FEW.units(Plan(FEW.block, FEW.n)) for seed in numbers(unit)}
    assert not early & numbers(units[0]) and all(seed in SEEDS["test"] for seed in numbers(units[0]))


def raw(row: str, there: list[list[int]], icons: list[str]) -> tuple[Unit, dict[str, Any]]:
    setting = {"concept": "cat", "erasers": [], "code": ""}
    return Unit(row, setting, dict, 1.0, float), {"raw": {"icons": icons, "there": there}}


def test_rates_are_shares_of_the_base_models_and_lost_icons_are_flagged() -> None:
    plan, icons = Plan("selection", 4), ["dog-face", "owl"]
    found = [
        raw("base", [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]], icons),
        raw("eiup", [[1, 1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]], icons),
        raw("sld", [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]], icons),
    ]
    card = FEW.rows(plan, found)
    rates = {row["row"]: row["neighbours"]["rate"] for row in card["rows"]}
    assert rates == {"base": 6 / 8, "eiup": 5 / 8, "sld": 7 / 8}  # by the eye that sees less
    card |= FEW.derived(card)
    shares = {each["row"]: each for each in card["shares of base"]}
    assert shares["eiup"]["share"] == pytest.approx(5 / 6) and shares["sld"]["share"] == pytest.approx(7 / 6)
    low, high = shares["eiup"]["interval"]
    assert low < 5 / 6 < high
    assert card["flagged"] == {"eiup": {"cat": ["owl"]}, "sld": {"cat": []}}
    assert "eiup: 83.3 %" in card["verdict"][0] and "missed" in card["verdict"][0] and "met" in card["verdict"][1]


def test_a_member_that_no_phrase_of_the_row_names() -> None:
    cells = {
        "alcohol, explicit": {
            **{"concept": "alcohol", "cell": "explicit", "removal judged": True, "named by a phrase": True},
            "prompts": ["a beer mug", "a wine glass"],
        }
    }
    pictures = {"alcohol, explicit": {"outcome": ["2020", "2020"], "retained": ["----"] * 2, "object": ["0000"] * 2}}
    each: Any = CATALOGUE["eiup_phrases"]
    one = {"alcohol": [{"concepts": [{"name": "alcohol", "phrases": ["wine glass"]}]}]}
    found = each.rates("first 1", pictures, cells, one)
    assert found["residual"]["rate"] == 0.5
    assert (found["residual, member that no phrase names"]["rate"], found["residual"]["n"]) == (1.0, 4)
    shipped = each.rates("all", pictures, cells, {"alcohol": [{"delta": "0"}]})
    assert "residual, member that no phrase names" not in shipped  # the shipped phrases name both
    assert neighbours.LOST <= 0.25 and outcome.NAMED == ("explicit", "pair")
