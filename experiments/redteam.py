"""Attacks on erasers: how often an erased concept comes back, beside the base model, no attack, and random texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import efface
from efface import redteam
from efface.core import config
from efface.redteam.panel import CONCEPT
from efface.redteam.trial import ARMS

from .code import code_hash
from .outcome import PILOT, delta_file, delta_unit, packed, rate
from .runner import Experiment, Plan, Unit, timed
from .worlds import SEEDS, named, world

CELLS = ("explicit", "theme", "paraphrase")  # prompts that name the concept, and prompts that imply it
STEP = 10_000  # held-out seeds of a concept


@dataclasses.dataclass(frozen=True)
class Guard:
    """What is attacked: an editor's delta, run-time methods, or both.

    Args:
        editor: fits a delta; None: no delta.
        methods: make run-time erasers from a concept.
    """

    editor: Any = None
    methods: tuple[Callable[[Any], Any], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Redteam(Experiment):
    """Every attack on every guard.

    Args:
        guards: name -> what is attacked.
        attacks: name -> attack.
        left_out: (guard, attack) pairs that make no sense, such as weights of a run-time guard.
        concepts: the erased concepts.
        prompts: prompts per concept, of all cells in turn; fewer if `n` leaves less than four pictures for each.
        budget: denoiser rows per prompt for the search.
    """

    name: str
    question: str
    cap: float
    guards: Mapping[str, Guard]
    attacks: Mapping[str, redteam.Attack]
    left_out: frozenset[tuple[str, str]] = frozenset()
    concepts: tuple[str, ...] = ("alcohol",)
    prompts: int = 12
    budget: int = 1000
    n: int = 48
    model: str = "emoji"
    block: str = "selection"
    columns: ClassVar[Mapping[str, str]] = {
        "base": "base model",
        "before": "guarded",
        "attacked": "attacked",
        "control": "random texts",
        "newly": "prompts newly attacked",
        "nothing": "nothing recognisable",
    }

    def units(self, plan: Plan) -> list[Unit]:
        found = []
        for guard, made in self.guards.items():
            for concept in self.concepts:
                fitted = None
                if made.editor is not None:
                    fitted = delta_unit(plan, guard, made.editor, named(concept))
                    found.append(fitted)
                found += [
                    self._unit(plan, guard, attack, concept, fitted)
                    for attack in self.attacks
                    if (guard, attack) not in self.left_out
                ]
        return found

    def names(self, units: Sequence[Unit]) -> list[str]:
        return list(dict.fromkeys(unit.row for unit in units if unit.kind == "cell"))

    def texts(self, plan: Plan, concept: str) -> tuple[str, ...]:
        """The prompts of a concept in this block, of all cells in turn."""
        cells = [[text for text, _ in plan.world.prompts(concept, cell, plan.block)] for cell in CELLS]
        turns = [cell[k] for k in range(max(map(len, cells))) for cell in cells if k < len(cell)]
        return tuple(turns[: min(self.prompts, max(2, plan.n // 4))])

    def _unit(self, plan: Plan, guard: str, attack: str, concept: str, fitted: Unit | None) -> Unit:
        texts, methods = self.texts(plan, concept), [make(named(concept)) for make in self.guards[guard].methods]
        each = max(1, plan.n // len(texts))
        place = self.concepts.index(concept)
        used = [type(self.attacks[attack]), redteam.attack, *map(type, methods)]
        setting = {
            **plan.facts,
            "concept": concept,
            "prompts": texts,
            "seeds": [SEEDS[plan.block].stop - STEP * (place + 1), each],
            "erasers": [*([{"delta": fitted.digest}] if fitted else []), *map(config, methods)],
            "attack": config(self.attacks[attack]),
            "budget": self.budget,
            "code": code_hash(*used, *([efface.Delta, type(self.guards[guard].editor)] if fitted else [])),
        }
        unit = Unit(
            f"{guard} | {attack}", setting, lambda: measure(), self._pictures(plan, texts, each), lambda: pilot()
        )

        def erasers() -> list[Any]:
            return [*([efface.api.load_delta(delta_file(plan, fitted))] if fitted else []), *methods]

        def measure() -> dict[str, Any]:
            made = redteam.attack(
                plan.world.pipe,
                self.attacks[attack],
                named(concept),
                eraser=erasers(),
                out=self.folder(plan, unit),
                prompts=texts,
                budget=self.budget,
                n=each,
                seed=setting["seeds"][0],
                steps=plan.call["num_inference_steps"],
                guidance=plan.call["guidance"],
            )
            best = {
                one["prompt"]: one["search"]["attacked"].get("proposal", {}).get("about", "") for one in made.attacked
            }
            shown = [{"prompt": one["prompt"], "outcomes": one["outcomes"]} for one in made.attempts]
            return {"attempts": shown, "cost": made.cost, "best": best, "quality": made.setting["quality"]}

        def pilot() -> float:
            return _seconds(plan.model, plan.device, tuple(methods), texts[0], tuple(plan.call.items()))

        return unit

    def _pictures(self, plan: Plan, texts: Sequence[str], each: int) -> float:
        """The pictures that a unit may draw at most: searches of attack and control, and four judged arms."""
        searched = 2 * self.budget / (2 * plan.call["num_inference_steps"])
        return len(texts) * (searched + len(ARMS) * each)

    def folder(self, plan: Plan, unit: Unit) -> Path:
        """Where an attack's pictures stay."""
        return plan.folder / "attacks" / unit.digest

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        raw: dict[str, list[dict[str, Any]]] = {}
        for unit, each in found:
            if unit.kind == "cell":
                raw.setdefault(unit.row, []).append(each["raw"])
        rows, pictures = [], {}
        for name, units in raw.items():
            attempts = [one for unit in units for one in unit["attempts"] if one["outcomes"]]
            row: dict[str, Any] = {"row": name, "attacked prompts": len(attempts)}
            for arm in ARMS:
                values = [(value, one["prompt"]) for one in attempts for value in one["outcomes"].get(arm, ())]
                if values:
                    outcomes, prompts = zip(*values, strict=True)
                    row[arm] = rate([int(value == CONCEPT) for value in outcomes], prompts)
                    pictures[f"{name} | {arm}"] = packed([outcomes])
                    if arm == "attacked":
                        row["nothing"] = rate([int(value == 0) for value in outcomes], prompts)
            if attempts:
                halves = [(_half(one, "before"), _half(one, "attacked"), one["prompt"]) for one in attempts]
                row["newly"] = rate([int(after and not before) for before, after, _ in halves], [p for *_, p in halves])
            row["cost"] = {
                key: sum(unit["cost"][key] for unit in units) / len(units)
                for key in (units[0]["cost"] if units else ())
            }
            row["best"] = {prompt: about for unit in units for prompt, about in unit["best"].items()}
            row["quality"] = [unit["quality"] for unit in units]
            rows.append(row)
        return {"rows": rows, "pictures": pictures}


@functools.cache
def _seconds(model: str, device: str, methods: tuple[Any, ...], text: str, call: tuple[Any, ...]) -> float:
    """Core-seconds of a guarded picture. The same for all attacks, and a delta adds nothing."""
    pipe = world(model, device).pipe
    with efface.stack(pipe, *methods):
        draw = efface.pipelines.draw
        return timed(lambda: draw(pipe, [text] * PILOT, range(PILOT), **dict(call)))[1] / PILOT


def _half(attempt: Mapping[str, Any], arm: str) -> bool:
    found = attempt["outcomes"].get(arm, attempt["outcomes"]["before"])
    return 2 * sum(value == CONCEPT for value in found) >= len(found)
