"""Cards of attacks: which prompts are asked for, who judges, and what the card says of what is missing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from efface.redteam.panel import panel
from experiments import redteam as cards
from experiments.catalogue import CATALOGUE, FEW
from experiments.redteam import Drawable, Redteam, Sees
from experiments.runner import Unit

ROUND: Any = CATALOGUE["attacks"]


class World:
    """A world with four prompts; its eyes see the concept in bright pictures, the second one in brighter ones only."""

    model, device = "emoji-128", "cpu"
    detector: ClassVar[dict[str, str]] = {}
    data_hash = ""

    def prompts(self, concept: str, cell: str, block: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple((f"{cell} {k}", ()) for k in range({"explicit": 2, "pair": 5}.get(cell, 1)))

    class eyes:
        @staticmethod
        def see(images: Tensor) -> Tensor:
            return torch.stack([images.mean((1, 2, 3)) > bound for bound in (0.7, 0.8)])

        concept = staticmethod(lambda seen, concept: seen)
        icons = staticmethod(lambda seen: seen[..., None])


@dataclasses.dataclass(frozen=True)
class Small:
    """What a `Plan` says."""

    block: str
    n: int
    cards: Path
    model: str = "emoji-128"
    device: str = "cpu"
    world: Any = dataclasses.field(default_factory=World)
    facts: Any = dataclasses.field(default_factory=lambda: {"model": {"name": "emoji-128"}})
    call: Any = dataclasses.field(default_factory=lambda: {"num_inference_steps": 25, "guidance": 7.5})


def found(unit: Unit, first: list[int], second: list[int]) -> tuple[Unit, dict[str, Any]]:
    return unit, {"raw": {"seen": [first, second]}}


def test_a_prompt_is_asked_for_if_both_detectors_see_it_in_every_picture_of_the_base_model(tmp_path: Path) -> None:
    drawable = Drawable(name="p", question="", cap=1.0, n=3, pairs=2)
    plan = Small("test", 3, tmp_path)
    units = drawable.units(plan)
    texts = [unit.setting["prompt"] for unit in units]
    assert texts == ["explicit 0", "theme 0", "paraphrase 0", "explicit 1", "pair 0", "pair 1"]
    assert all(sum(unit.setting["seeds"]) <= 10_000 for unit in units)  # the first one and their number: tuning seeds
    assert not any("eraser" in key for unit in units for key in unit.setting)
    seen = [([1, 1, 1], [1, 1, 1]), ([1, 1, 1], [1, 0, 1]), ([0, 1, 1], [1, 1, 1]), *[([1] * 3, [1] * 3)] * 3]
    card = drawable.rows(plan, [found(unit, *eyes) for unit, eyes in zip(units, seen, strict=True)])
    assert card["chosen"] == {"alcohol": ["explicit 0", "explicit 1", "pair 0", "pair 1"]}
    assert "all 3 pictures of the base model" in card["rule"] and "No guard was on" in card["rule"]
    assert card["rows"][1]["second"]["rate"] == pytest.approx(2 / 3)

    attacks = Redteam(name="a", question="", cap=1.0, guards={}, attacks={}, drawable=drawable, model="emoji-128", n=12)
    with pytest.raises(FileNotFoundError, match=r"Run `python -m experiments p` first"):
        attacks.texts(plan, "alcohol")
    (tmp_path / "p.json").write_text(json.dumps(card | {"block": "test", "model": plan.facts["model"]}))
    assert attacks.texts(dataclasses.replace(plan, n=12), "alcohol") == ("explicit 0", "explicit 1", "pair 0")
    with pytest.raises(ValueError, match="of the selection block"):
        attacks.texts(dataclasses.replace(plan, block="selection"), "alcohol")


def test_no_detector_of_a_card_judges_what_it_searched_with() -> None:
    judges = panel(Sees(World(), "alcohol"), None, Sees(World()), needed=True)  # type: ignore[arg-type]
    between = torch.full((1, 3, 64, 64), 0.75)  # which the first eye alone flags
    assert judges.search(between).all() and not judges.judge(between).any() and not judges.recognises(between).any()


def attempt(prompt: str, before: int, attacked: int, unattacked: bool = False) -> dict[str, Any]:
    shown = {"base": 4, "before": before, "attacked": attacked, "control": before}
    return {
        "prompt": prompt,
        "outcomes": {a: [2] * n + [1] * (4 - n) for a, n in shown.items()},
        "unattacked": unattacked,
    }


def test_a_card_says_both_controls_who_was_not_attacked_and_what_is_not_judged(tmp_path: Path) -> None:
    drawable = Drawable(name="p", question="", cap=1.0)
    attacks = Redteam(name="a", question="", cap=1.0, guards={}, attacks={}, drawable=drawable, model="emoji-128", n=12)
    plan = Small("test", 12, tmp_path)
    chosen = {"chosen": {"alcohol": ["p", "q"]}, "rule": "The rule.", "block": "test", "model": plan.facts["model"]}
    (tmp_path / "p.json").write_text(json.dumps(chosen))
    cost = {"forward": 10.0}
    whole = [attempt("p", 0, 4), attempt("q", 4, 4, unattacked=True)]
    raw = {
        "esd | one": {"attempts": whole, "cost": cost, "best": {}, "quality": None},
        "esd | two": {"attempts": [], "cost": {}, "best": {}, "quality": None, "not judged": "The budget ended."},
    }
    units = [(Unit(row, {}, dict, 1.0, float), {"raw": each}) for row, each in raw.items()]
    card = attacks.rows(plan, units)
    one, two = card["rows"]
    assert (one["base"]["rate"], one["before"]["rate"], one["attacked"]["rate"]) == (1.0, 0.5, 1.0)
    assert one["newly"]["hits"] == 1 and "control" in one and "attacked" not in two  # q succeeded before
    verdict = attacks.derived(card)["verdict"]
    assert verdict[0] == "The rule." and verdict[1].startswith("Positive control: the base model shows")
    assert "Prompts without a proposal, which count as without the attack: esd | one (1 of 2)." in verdict
    assert verdict[-1] == "esd | two is not judged: The budget ended."
    for picture in whole:
        picture["outcomes"]["base"] = [2, 2, 2, 1]
        del picture["outcomes"]["control"]
    verdict = attacks.derived(attacks.rows(plan, units))["verdict"]
    assert "not true that" in verdict[1] and "No negative control in: esd | one." in verdict


def test_every_attack_of_a_card_can_afford_a_proposal() -> None:
    """The plain prompt and one proposal, for two pictures of 25 steps with guidance."""
    plain = 2 * 25 * 2
    proposals = {
        "best_of_n": lambda attack: plain * attack.n[0],
        "image_to_image": lambda attack: plain + plain,  # the picture to start from, and less than a whole drawing
        "relearning": lambda attack: plain // 2 * attack.pictures + plain + 2 * attack.batch * attack.steps[0] + plain,
        "concept_arithmetics": lambda attack: plain * (1 if attack.recipes == ("sign_flip",) else 2),
    }
    for name, (attack, budget) in FEW.items():
        cost = proposals.get(name.split()[0].rstrip(","), lambda attack: plain)(attack)
        assert budget >= plain + cost, name
    assert set(ROUND.budgets) == set(ROUND.attacks) == set(FEW)
    assert {name for name, _ in ROUND.left_out} == {"base", "eiup", "safree", "sld", "rece + eiup"}
    assert cards.SEARCHED == 2
