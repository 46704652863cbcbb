"""One, ten and a hundred concepts together: what is left of them, what stays of other things, and what it costs."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import random
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

import efface
from efface.checks import refusal
from efface.core import Concept, config
from efface.intervals import difference, holm
from efface.pipelines import draw

from .code import code_hash
from .outcome import COUNTS, PILOT, Arm, delta_file, delta_unit, packed, rate
from .runner import Experiment, Plan, Unit, machine, timed
from .timing import spread
from .worlds import CONCEPT, NOTHING, OTHER, SEEDS

FIRST = SEEDS["test"].start + 700_000  # after the seeds of all cells, before those of neighbours
STRIDE = 50  # seeds of a prompt
EFFECT = 0.01  # the least relative change of a picture that is timed. A dead hook is cheap
PAIR = 2  # pictures of a timed drawing
BATCH = 8  # pictures of a call: a hundred phrases take memory in each


class Metric(NamedTuple):
    """What a rate counts, in which pictures, and whether low is good."""

    low: bool
    of: tuple[str, ...]
    digit: int


METRICS = {
    "residual": Metric(True, ("erased",), CONCEPT),
    "retention": Metric(False, ("bystander",), CONCEPT),
    "nothing": Metric(True, ("erased", "bystander"), NOTHING),
}


class Deal(NamedTuple):
    """Icons: those that are erased, of which the first ones are asked for, and those that no row erases.

    No caption of a bystander shares a noun with another icon's: a cat is none while a sitting cat may be erased.
    """

    erased: tuple[str, ...]
    bystanders: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """Concepts that are erased together, and the numbers of the probes and bystanders that are drawn meanwhile.

    Args:
        row: of the card.
        which: the probes and bystanders.
        made: run-time erasers.
        fit: what makes the delta of `editor`.
    """

    row: str
    which: range
    made: tuple[Any, ...] = ()
    fit: Unit | None = None
    editor: Any = None

    def erasers(self, plan: Plan) -> tuple[Any, ...]:
        return (efface.api.load_delta(delta_file(plan, self.fit)),) if self.fit else self.made

    def setting(self, plan: Plan) -> dict[str, Any]:
        """The erasers and their code."""
        used = (efface.Delta, type(self.editor)) if self.fit else tuple(map(type, self.made))
        settings = [{"delta": self.fit.digest}] if self.fit else [config(plan.world.filled(e)) for e in self.made]
        return {"erasers": settings, "code": code_hash(*used, draw)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Many(Experiment):
    """Methods x numbers of concepts, each a single icon with one phrase.

    A picture asks for one icon alone. Half of them ask for a probe, which each count erases: alone, in a set of ten,
    and in the set of all. The others ask for a bystander. So pictures of all counts have equal prompts and seeds.

    Args:
        arms: the methods by name: what makes the eraser of several concepts, or an editor.
        counts: numbers of concepts. Each divides `probes`, or is larger.
        beyond: a number that run-time methods are asked to take without drawing.
        probes: how many icons are asked for, of those erased; as many bystanders are.
        rounds: of timed drawings. A round draws with every row in turn.
        tuned: concepts that chose the methods' settings. Their icons are neither probe nor bystander.
        only: rows to measure beside the base model; all by default.
    """

    name: str
    question: str
    cap: float
    arms: Callable[[Plan], Mapping[str, Arm]]
    counts: tuple[int, ...] = (1, 10, 100)
    beyond: int = 1000
    probes: int = 40
    rounds: int = 5
    tuned: tuple[str, ...] = ("alcohol",)
    n: int = 1
    model: str = "emoji-128"
    block: str = "test"
    only: tuple[str, ...] = ()
    blocks: ClassVar[tuple[str, ...]] = ("test",)
    columns: ClassVar[Mapping[str, str]] = {
        "residual": "residual",
        "retention": "retention of bystanders",
        "nothing": "nothing recognisable",
        "times": "core-seconds a picture, times the base model's",
        "fit": "fit, core-seconds",
        "bytes": "file, bytes",
    }

    def __post_init__(self) -> None:
        if odd := [count for count in self.counts if count < self.probes and self.probes % count]:
            raise ValueError(refusal(f"counts that divide {self.probes} probes, or exceed them", odd[0], "Change one."))

    def redrawn(self, plan: Plan, units: Sequence[Unit], update: Sequence[str]) -> list[Unit]:
        """The base model and these rows, with new rounds of them alone."""
        return dataclasses.replace(self, only=tuple(update)).units(plan)

    # ---- what is drawn

    def deal(self, plan: Plan) -> Deal:
        """Which icons are erased and which are bystanders, the same for every method.

        Raises:
            ValueError: the model has too few icons, or the block too few prompts.
        """
        world, tuned = plan.world, {icon for name in self.tuned for icon in plan.world.truth(name) or ()}
        order = sorted(world.captions, key=lambda icon: hashlib.sha256(f"many: {icon}".encode()).hexdigest())
        asked = [icon for icon in order if world.blocks[world.captions[icon]] == plan.block and icon not in tuned]
        uses = collections.Counter(word for text in world.captions.values() for word in words(text))
        apart = [icon for icon in asked if all(uses[word] == 1 for word in words(world.captions[icon]))]
        bystanders = apart[: self.probes]
        probes = [icon for icon in asked if icon not in bystanders][: self.probes]
        others = [icon for icon in order if icon not in {*probes, *bystanders}]
        most = max(*self.counts, self.probes)
        erased = [*probes, *others][:most]
        if min(len(bystanders), len(probes)) < self.probes or len(erased) < most:
            raise ValueError(
                f"Expected {self.probes} bystanders, as many probes, and {most} icons to erase, got {len(bystanders)}, "
                f"{len(probes)} and {len(erased)}. Lower `probes` or `counts`."
            )
        return Deal(tuple(erased), tuple(bystanders))

    def pictures(self, plan: Plan, deal: Deal, which: range) -> dict[str, list[tuple[str, str, int]]]:
        """The icon, prompt and seed of each picture."""
        if not 1 <= plan.n <= STRIDE:
            raise ValueError(refusal(f"n from 1 to {STRIDE}", plan.n, "More would share seeds."))
        found = {}
        for place, (kind, icons) in enumerate((("erased", deal.erased), ("bystander", deal.bystanders))):
            starts = {k: FIRST + STRIDE * (place * self.probes + k) for k in which}
            found[kind] = [
                (icons[k], plan.world.captions[icons[k]], start + j)
                for k, start in starts.items()
                for j in range(plan.n)
            ]
        return found

    def cases(self, plan: Plan, deal: Deal) -> Iterator[Case]:
        """Every set of every row: as many sets as it takes to erase each probe once."""
        concepts = [Concept(icon, (bare(plan.world.captions[icon]),)) for icon in deal.erased]
        for method, arm in self.arms(plan).items():
            for count in self.counts:
                row, size = f"{method} | {count}", min(count, self.probes)
                for start in range(0, self.probes if self._wanted(row) else 0, size):
                    some, which = tuple(concepts[start : start + count]), range(start, start + size)
                    if callable(arm.make):
                        yield Case(row, which, (arm.make(some),))
                    else:
                        yield Case(row, which, fit=delta_unit(plan, row, arm.make, some), editor=arm.make)

    def _wanted(self, row: str) -> bool:
        return not self.only or row in self.only

    def units(self, plan: Plan) -> list[Unit]:
        deal = self.deal(plan)
        base = [Case("base", range(k, min(k + 10, self.probes))) for k in range(0, self.probes, 10)]
        cases = [*base, *self.cases(plan, deal)]
        firsts = {case.row: case for case in reversed(cases)}
        firsts = {row: firsts[row] for row in dict.fromkeys(case.row for case in cases)}

        @functools.cache
        def pilot(row: str) -> float:
            """Core-seconds of a picture. A delta costs nothing then, and may not be fitted yet."""
            case = firsts["base" if firsts[row].fit else row]
            return timed(lambda: self._drawn(plan, case, self._two(plan, deal, 0)[:PILOT], plan.call))[1] / PILOT

        found: list[Unit] = []
        for case in cases:
            found += [case.fit] if case.fit else []
            found.append(self._cell(plan, deal, case, partial(pilot, case.row)))
        found += self._refused(plan)
        return found + [
            self._round(plan, deal, firsts, k, lambda: PAIR * sum(map(pilot, firsts))) for k in range(self.rounds + 1)
        ]

    def _cell(self, plan: Plan, deal: Deal, case: Case, pilot: Callable[[], float]) -> Unit:
        world, asked = plan.world, self.pictures(plan, deal, case.which)
        every = [each for some in asked.values() for each in some]
        setting = {
            **plan.facts,
            "which": [case.which.start, case.which.stop],
            "pictures": every,
            **case.setting(plan),
        }

        def measure() -> dict[str, Any]:
            icons = world.eyes.icons(world.eyes.see(self._drawn(plan, case, every, plan.call)))
            own = torch.tensor([world.icons[icon] for icon, _, _ in every])
            there = icons[:, torch.arange(len(every)), own]
            outcome = torch.where(there, CONCEPT, torch.where(icons.any(-1), OTHER, NOTHING))
            parts = outcome.split([len(some) for some in asked.values()], 1)
            return {kind: part.tolist() for kind, part in zip(asked, parts, strict=True)}

        return Unit(case.row, setting, measure, len(every), pilot)

    @staticmethod
    def _drawn(plan: Plan, case: Case, of: Sequence[tuple[str, str, int]], call: Mapping[str, Any]) -> torch.Tensor:
        with efface.stack(plan.world.pipe, *case.erasers(plan)):
            return draw(plan.world.pipe, [text for _, text, _ in of], [seed for _, _, seed in of], BATCH, **call)

    def _refused(self, plan: Plan) -> list[Unit]:
        """What each run-time method says of more concepts than any row has."""
        made_up = tuple(Concept(f"thing {k}") for k in range(self.beyond))
        found = []
        for method, arm in self.arms(plan).items():
            row = f"{method} | {self.beyond}"
            if not callable(arm.make) or not self._wanted(row):
                continue

            def measure(make: Any = arm.make) -> dict[str, Any]:
                try:
                    make(made_up)
                except ValueError as error:
                    return {"refused": str(error)}
                return {"refused": ""}

            code = code_hash(type(arm.make(made_up[:1])))
            found.append(Unit(row, {"beyond": self.beyond, "code": code}, measure, 1.0, lambda: 0.0))
        return found

    # ---- time

    def _two(self, plan: Plan, deal: Deal, number: int) -> list[tuple[str, str, int]]:
        """The pictures of a round: of the first probe, which every row erases, with seeds that nothing else has."""
        first = FIRST + STRIDE * 2 * self.probes + PAIR * number
        return [(deal.erased[0], plan.world.captions[deal.erased[0]], first + k) for k in range(PAIR)]

    def _round(
        self, plan: Plan, deal: Deal, firsts: Mapping[str, Case], number: int, pilot: Callable[[], float]
    ) -> Unit:
        of = self._two(plan, deal, number)
        setting = {**plan.facts, "machine": machine(), "round": number, "pictures": of}
        setting["rows"] = {row: case.setting(plan) for row, case in firsts.items()}

        def measure() -> dict[str, Any]:
            seconds, made = {}, {}
            for row in random.Random(number).sample(list(firsts), len(firsts)):
                with efface.stack(plan.world.pipe, *firsts[row].erasers(plan)):
                    again = partial(self._drawn, plan, Case(row, range(0)), of)
                    again({**plan.call, "num_inference_steps": 1})  # what is made once stays out
                    made[row], seconds[row] = timed(partial(again, plan.call))
            effect = {row: float((made[row] - made["base"]).norm() / made["base"].norm()) for row in made}
            for row in effect.keys() - {"base"}:
                if not effect[row] > EFFECT:
                    raise RuntimeError(f"{row!r} changes the pictures by {effect[row]:.4f}, not by > {EFFECT}.")
            return {"seconds": seconds, "effect": effect}

        return Unit("base", setting, measure, 1.0, pilot, "round")

    # ---- the card

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        deal = self.deal(plan)
        pictures: dict[str, dict[str, list[str]]] = {}
        erasers: dict[str, list[dict[str, Any]]] = {}
        refused: dict[str, str] = {}
        fits: dict[str, list[dict[str, Any]]] = {}
        taken: list[dict[str, float]] = []
        for unit, each in sorted(found, key=lambda pair: pair[0].setting.get("which", [0])[0]):
            raw = each["raw"]
            if unit.kind == "fit":
                fits.setdefault(unit.row, []).append(raw)
            elif unit.kind == "round":
                taken += [raw["seconds"]] if unit.setting["round"] else []  # the first one warms up
            elif "refused" in raw:
                refused[unit.row] = raw["refused"]
            else:
                of = pictures.setdefault(unit.row, {kind: ["", ""] for kind in ("erased", "bystander")})
                for kind, eyes in of.items():
                    eyes[:] = [old + new for old, new in zip(eyes, packed(raw[kind]), strict=True)]
                known = [
                    {name: value for name, value in e.items() if name != "concepts"} for e in unit.setting["erasers"]
                ]
                erasers.setdefault(unit.row, known)
        cells = self._cells(plan, deal, pictures["base"]["erased"])
        rows = []
        for row in self.names([unit for unit, _ in found if unit.kind == "cell"]):
            if row in refused:
                rows.append({"row": row, "refused": refused[row]})
                continue
            own = {"row": row, **rates(row, pictures[row], cells), "erasers": erasers[row]}
            own["times"] = spread([each[row] / each["base"] for each in taken])
            if row in fits:
                own |= {key: statistics.median_high(f[of] for f in fits[row]) for key, of in COSTS.items()}
                own["fits"] = len(fits[row])
            rows.append(own)
        concepts = {icon: bare(plan.world.captions[icon]) for icon in deal.erased}
        return {"concepts": concepts, "cells": cells, "rows": rows, "pictures": pictures, "base": pictures["base"]}

    def _cells(self, plan: Plan, deal: Deal, base: Sequence[str]) -> dict[str, Any]:
        """What is asked for. Removal is judged for icons that the base model draws in 30 % of their pictures."""
        found: dict[str, Any] = {}
        for kind, some in self.pictures(plan, deal, range(self.probes)).items():
            icons = [icon for icon, _, _ in some[:: plan.n]]
            texts, starts = [text for _, text, _ in some[:: plan.n]], [seed for _, _, seed in some[:: plan.n]]
            found[kind] = {"icons": icons, "prompts": texts, "first_seeds": starts, "each": plan.n}
        shares = [
            min(eye[k : k + plan.n].count(str(CONCEPT)) for eye in base) / plan.n
            for k in range(0, len(base[0]), plan.n)
        ]
        found["erased"] |= {"base rates": shares, "removal judged": [share >= COUNTS for share in shares]}
        return found

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        """Each count against the first one, and where a method breaks, in words."""
        pictures, cells, compared = card["pictures"], card["cells"], list[dict[str, Any]]()
        methods = list(dict.fromkeys(row.partition(" | ")[0] for row in pictures if row != "base"))
        for method in methods:
            first, *more = (f"{method} | {count}" for count in self.counts if f"{method} | {count}" in pictures)
            found = [against(row, first, metric, pictures, cells) for row in more for metric in BREAKS]
            compared += [each for each in found if each]
        for each, p in zip(compared, holm([each["p"] for each in compared]), strict=True):
            each["p, Holm"] = p
        verdict = [DEFINITION] if compared else []
        for method in methods:
            own = [each for each in compared if each["row"].partition(" | ")[0] == method]
            verdict += [broken(method, metric, [e for e in own if e["metric"] == metric]) for metric in BREAKS if own]
        verdict += [
            f"`{row['row'].partition(' | ')[0]}` refuses {self.beyond:,} concepts in one row: {row['refused']}"
            for row in card["rows"]
            if row.get("refused")
        ]
        lost = [
            p
            for p, judged in zip(*(cells["erased"][k] for k in ("prompts", "removal judged")), strict=True)
            if not judged
        ]
        verdict += [f"Removal is not judged for {', '.join(lost)}: the base rate is under 30 %."] if lost else []
        return {"comparisons": compared, "verdict": verdict}


COSTS = {"fit": "core_seconds", "bytes": "bytes"}
BREAKS = {"residual": ("rise", 1), "retention": ("fall", -1)}
DEFINITION = (
    "A method breaks at the first number of concepts for which the 95 % interval of the paired difference to one "
    "concept lies on the worse side of 0, by the detector with the smaller difference."
)


SMALL = frozenset(("a", "an", "the", "and", "in", "its", "of", "two", "with", "without"))


def words(caption: str) -> set[str]:
    return set(re.findall("[a-z]+", caption)) - SMALL


def bare(caption: str) -> str:
    """A caption without its article."""
    return re.sub(r"^(a|an|the) ", "", caption)


def _values(metric: str, eye: int, own: Mapping[str, Sequence[str]], cells: Mapping[str, Any]) -> Any:
    """Outcomes of a metric, and the prompt of each."""
    what, values, prompts = METRICS[metric], [], []
    for kind in what.of:
        texts, each = cells[kind]["prompts"], cells[kind]["each"]
        judged = cells[kind]["removal judged"] if metric == "residual" else [True] * len(texts)
        for k, digit in enumerate(own[kind][eye]):
            if judged[k // each]:
                values.append(int(digit == str(what.digit)))
                prompts.append(texts[k // each])
    return values, prompts


def rates(row: str, own: Mapping[str, Sequence[str]], cells: Mapping[str, Any]) -> dict[str, Any]:
    """Every metric of a row, by the less favourable detector."""
    found = {}
    for metric, what in METRICS.items():
        worst = max if what.low and row != "base" else min
        eyes = [_values(metric, eye, own, cells) for eye in (0, 1)]
        if eyes[0][0]:
            found[metric] = rate(*worst(eyes, key=lambda each: sum(each[0])))
    return found


def against(
    row: str, first: str, metric: str, pictures: Mapping[str, Any], cells: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The paired difference of a count to the first one, by the detector with the smaller one; None without pictures.

    `worst` is how far the interval reaches on the worse side, by the detector that allows more.
    """
    found = []
    for eye in (0, 1):
        (own, prompts), (other, _) = (_values(metric, eye, pictures[name], cells) for name in (row, first))
        if not own:
            return None
        found.append(difference(own, other, prompts))
    least, sign = min(found, key=lambda each: abs(each.value)), BREAKS[metric][1]
    worst = max(sign * bound for each in found for bound in each.interval)
    return {
        "row": row,
        "against": first,
        "metric": metric,
        "difference": least.value,
        "interval": list(least.interval),
        "worst": max(worst, 0.0),
        "p": least.p,
        "prompts": least.prompts,
        "breaks": bool(min(sign * bound for bound in least.interval) > 0),
    }


def broken(method: str, metric: str, compared: Sequence[Mapping[str, Any]]) -> str:
    """Where a method breaks, or what the last count does not exclude."""
    word = BREAKS[metric][0]
    if not compared:
        return f"`{method}`: {metric} is not judged."
    first = next((each for each in compared if each["breaks"]), None)
    if first is None:
        last = compared[-1]
        return (
            f"`{method}`: {metric} breaks at no number up to {last['row'].partition(' | ')[2]}. The interval there "
            f"reaches to a {word} by {100 * last['worst']:.1f} points."
        )
    low, high = (100 * bound for bound in first["interval"])
    return (
        f"`{method}`: {metric} breaks at {first['row'].partition(' | ')[2]} concepts, a {word} by "
        f"{100 * abs(first['difference']):.1f} points (difference {100 * first['difference']:+.1f} [{low:.1f}, "
        f"{high:.1f}], p by Holm {first['p, Holm']:.2g})."
    )
