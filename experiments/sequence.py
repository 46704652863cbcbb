"""Concepts removed one after the other: what is left of them, and of bystanders, after each round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

import efface
from efface.core import Concept
from efface.intervals import wilson
from efface.pipelines import draw

from .code import code_hash
from .outcome import PILOT, delta_unit, deltas_on
from .runner import Experiment, Plan, Unit, timed
from .worlds import SEEDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequenced(Experiment):
    """Rounds of editors that work on top of their earlier deltas.

    Args:
        editors: the rows; each has a `sequence` method.
        removed: icons, in the order of their removal.
        kept: bystanders, which are not known to the search.
    """

    name: str
    question: str
    cap: float
    editors: Mapping[str, Any]
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    n: int = 32
    model: str = "emoji"
    block: str = "test"
    blocks: ClassVar[tuple[str, ...]] = ("test",)
    columns: ClassVar[Mapping[str, str]] = {"residual": "residual", "retention": "retention of bystanders"}

    def units(self, plan: Plan) -> list[Unit]:
        found = [self._judged(plan, "base", [], 0)]
        for row, editor in self.editors.items():
            fits: list[Unit] = []
            for k, name in enumerate(self.removed):
                fits.append(delta_unit(plan, row, editor, Concept(name, (f"a {name}",)), 100 * k, list(fits)))
                found += [fits[-1], self._judged(plan, row, list(fits), k + 1)]
        return found

    def _judged(self, plan: Plan, row: str, fits: list[Unit], rounds: int) -> Unit:
        """All things that are removed by now (for the base model: ever), and all bystanders."""
        world, things = plan.world, (*(self.removed[:rounds] or self.removed), *self.kept)
        first = {name: SEEDS[plan.block].stop - 10_000 * (k + 1) for k, name in enumerate((*self.removed, *self.kept))}
        setting = {**plan.facts, "things": {name: first[name] for name in things}, "n": plan.n, "round": rounds}
        setting |= {"deltas": [unit.digest for unit in fits]}
        setting |= {"code": code_hash(*([efface.Delta, type(self.editors[row])] if fits else []), draw)}

        def pictures(name: str, n: int) -> torch.Tensor:
            prompt = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
            return draw(world.pipe, [prompt] * n, range(first[name], first[name] + n), **plan.call)

        def measure() -> dict[str, Any]:
            with deltas_on(plan, fits):
                seen = {name: world.eyes.see(pictures(name, plan.n)) for name in things}
            return {name: world.eyes.concept(each, name).int().tolist() for name, each in seen.items()}

        def pilot() -> float:
            return timed(lambda: pictures(things[0], PILOT))[1] / PILOT

        return Unit(row, setting, measure, plan.n * len(things), pilot)

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        for unit, each in found:
            row = rows.setdefault(unit.row, {"row": unit.row, "rounds": []})
            if unit.kind == "fit":
                row["rounds"].append(
                    {"concept": unit.setting["concept"]["name"], **each["raw"], "settings": unit.setting["fit"]}
                )
                continue
            if not row["rounds"]:
                row["rounds"].append({"concept": "nothing"})
            worst = {name: min if row["row"] == "base" or name in self.kept else max for name in each["raw"]}
            judged = {name: rated(worst[name](eyes, key=sum)) for name, eyes in each["raw"].items()}
            row["rounds"][-1] |= {
                "removed": {name: value for name, value in judged.items() if name in self.removed},
                "kept": {name: value for name, value in judged.items() if name in self.kept},
            }
        return {"rows": list(rows.values())}


def rated(eye: Sequence[int]) -> dict[str, Any]:
    """One prompt's pictures: new seeds are all that the interval speaks of."""
    return {"rate": sum(eye) / len(eye), "hits": sum(eye), "n": len(eye), "interval": list(wilson(sum(eye), len(eye)))}
