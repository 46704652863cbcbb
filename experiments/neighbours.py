"""What erasing a concept does to every other thing alone: few seeds of all icons, then many of those that suffered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import efface
from efface.core import config
from efface.intervals import difference
from efface.pipelines import draw

from .code import code_hash
from .outcome import PILOT, Arm, erasers_of, rate
from .runner import Experiment, Plan, Unit, timed
from .worlds import CONCEPTS, SEEDS

FIRST = {"selection": 355_000, "test": 750_000}  # after the seeds of all cells, before those of sequences
STRIDE = 20_000  # seeds of a concept
SOME = 24  # icons of a unit
LOST = 0.25  # an icon is flagged if this share of its pictures lost it, beyond what the base model loses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours(Experiment):
    """Rows x concepts x single icons outside the concept: a prompt names one icon, which is drawn with `n` seeds.

    Args:
        arms: the rows by name; `base` is the base model.
        concepts: what is erased.
        flagged: the card of an experiment of this kind, and one of its rows: only icons that this row lost there are
            drawn.
        share: the smallest rate aimed at, as a share of the base model's.
    """

    name: str
    question: str
    cap: float
    arms: Mapping[str, Arm]
    concepts: tuple[str, ...] = ("alcohol", "weapon", "cat")
    flagged: tuple[str, str] | None = None
    share: float = 0.98
    n: int = 8
    model: str = "emoji"
    block: str = "test"
    blocks: ClassVar[tuple[str, ...]] = tuple(FIRST)
    columns: ClassVar[Mapping[str, str]] = {"neighbours": "retention of single icons"}

    def units(self, plan: Plan) -> list[Unit]:
        found = []
        for row, arm in {"base": Arm(lambda concept: None), **self.arms}.items():
            for concept in self.concepts:
                every = plan.world.every(concept, "bystander")
                wanted = self._wanted(plan, concept)
                chosen = [k for k, (_, (icon,)) in enumerate(every) if wanted is None or icon in wanted]
                for start in range(0, len(chosen), SOME):
                    found.append(self._unit(plan, row, arm, concept, chosen[start : start + SOME]))
        return found

    def _wanted(self, plan: Plan, concept: str) -> Sequence[str] | None:
        if self.flagged is None:
            return None
        name, row = self.flagged
        path = plan.cards / f"{name}.json"
        if not path.is_file():
            raise FileNotFoundError(f"There is no card {path}. Run `python -m experiments {name}` first: it flags.")
        icons: Sequence[str] = json.loads(path.read_text("utf-8"))["flagged"].get(row, {}).get(concept, ())
        return icons

    def _unit(self, plan: Plan, row: str, arm: Arm, concept: str, which: Sequence[int]) -> Unit:
        world, erased = plan.world, erasers_of(arm.make, concept)
        every = world.every(concept, "bystander")
        if len(every) * plan.n > STRIDE:
            raise ValueError(f"Expected n up to {STRIDE // len(every)}, got {plan.n}. More would share seeds.")
        first = SEEDS[plan.block].start + FIRST[plan.block] + STRIDE * CONCEPTS.index(concept)
        drawn = [(*every[k], first + k * plan.n + j) for k in which for j in range(plan.n)]
        prompts, icons, numbers = zip(*((text, icon, seed) for text, (icon,), seed in drawn), strict=True)
        setting = {
            **plan.facts,
            "concept": concept,
            "prompts": prompts[:: plan.n],
            "seeds": [numbers[:: plan.n], plan.n],
            "erasers": [config(plan.world.filled(each)) for each in erased],
            "code": code_hash(*map(type, erased), draw),
        }

        def pictures(some: int) -> Any:
            with efface.stack(world.pipe, *erased):
                return draw(world.pipe, prompts[:some], numbers[:some], **plan.call)

        def measure() -> dict[str, Any]:
            return {"icons": icons[:: plan.n], "there": world.sees(pictures(len(prompts)), list(icons))}

        def pilot() -> float:
            return timed(partial(pictures, PILOT))[1] / PILOT

        return Unit(row, setting, measure, len(prompts), pilot)

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        pictures: dict[str, dict[str, dict[str, list[str]]]] = {}
        erasers: dict[str, dict[str, Any]] = {}
        for unit, each in found:
            concept, there = unit.setting["concept"], each["raw"]["there"]
            erasers.setdefault(unit.row, {})[concept] = unit.setting["erasers"]
            of = pictures.setdefault(unit.row, {}).setdefault(concept, {})
            for k, icon in enumerate(each["raw"]["icons"]):
                of[icon] = ["".join(map(str, eye[k * plan.n : (k + 1) * plan.n])) for eye in there]
        rows = [{"row": row, **_rated(of), "erasers": erasers[row]} for row, of in pictures.items()]
        return {"rows": rows, "pictures": pictures, "base": pictures.get("base", {})}

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        """Rates as shares of the base model's, the icons that suffered, and the verdict in words."""
        pictures, shares, flagged, verdict = card["pictures"], [], {}, []
        for row in (row for row in pictures if row != "base"):
            eyes = []
            for eye in (0, 1):
                own, names = _values(pictures[row], eye)
                base, _ = _values(pictures["base"], eye)
                found, rated = difference(own, base, names), sum(base) / len(base)
                low, high = (1 + bound / rated for bound in found.interval)
                eyes.append({"row": row, "share": 1 + found.value / rated, "interval": [low, high], "n": len(own)})
            least = min(eyes, key=lambda each: each["share"])
            shares.append(least)
            flagged[row] = {
                concept: [icon for icon in of if _lost(of[icon], pictures["base"][concept][icon]) >= LOST]
                for concept, of in pictures[row].items()
            }
            verdict.append(
                f"{row}: {100 * least['share']:.1f} % [{100 * least['interval'][0]:.1f}, "
                f"{100 * least['interval'][1]:.1f}] of the base model's rate, n = {least['n']}. Aim >= "
                f"{100 * self.share:g} %: {'met' if least['share'] >= self.share else 'missed'}."
            )
        return {"shares of base": shares, "flagged": flagged, "verdict": verdict}


def _values(of: Mapping[str, Mapping[str, Sequence[str]]], eye: int) -> tuple[list[int], list[str]]:
    """Whether each picture shows its icon, and the icon, which the interval is clustered by."""
    values, names = [], []
    for concept, icons in of.items():
        for icon, eyes in icons.items():
            values += [int(digit) for digit in eyes[eye]]
            names += [f"{concept}: {icon}"] * len(eyes[eye])
    return values, names


def _rated(of: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, Any]:
    """By the detector that sees less."""
    eyes = [_values(of, eye) for eye in (0, 1)]
    return {"neighbours": rate(*min(eyes, key=lambda each: sum(each[0])))}


def _lost(own: Sequence[str], base: Sequence[str]) -> float:
    """The share of an icon's pictures that lost it, by the detector that reports more losses."""
    pairs = zip(own, base, strict=True)
    return max((b.count("1") - a.count("1")) / len(a) for a, b in pairs)
