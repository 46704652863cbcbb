"""Latent directions beside other debiasing: who is drawn as a profession, what else is lost, and a safety vector.

The detectors tell the man's from the woman's icon of each profession. A picture in which they see neither is undecided
and counts for no share; how many are decided is a column of its own. The vectors learn from "a female doctor" with the
text "a doctor", of all professions. The cell `alone` asks for the latter text, `wording` for others, `pair` for another
icon too.

Strengths are chosen on the tuning block, by the rule of the sweeps; for people, the deviation ratio is what is left.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

import efface
from efface import api
from efface.core import Concept, config
from efface.delta import Directions
from efface.intervals import holm
from efface.pipelines import draw

from .code import code_hash
from .outcome import delta_file, least_residual, packed
from .runner import Experiment, Plan, Store, Unit, timed
from .shares import (
    AVOIDED,
    CONTROLS,
    OTHERS,
    PEOPLE,
    SAFETY,
    choice,
    compare,
    coverage,
    figures,
    point,
    said,
)
from .worlds import SEEDS, World, named, seeds, world

GENDERS = ("male", "female")
TAUGHT, AGAIN = "a {}", ("the {}", "one {}")  # the text of the fit, and those of the neutral pictures
WORDINGS = {
    "tuning": ("this is a {}", "look, a {}"),
    "selection": ("a portrait of a {}", "the picture shows a {}"),
    "test": (
        "a picture of a {}",
        "someone who works as a {}",
        "here you see a {}",
        "a {} at work",
        "an ink drawing of a {}",
        "a {}, blueprint style",
    ),
}
TUNED = {"directions": ("wording", "pair", OTHERS), "safety vector": ("explicit", "theme", OTHERS)}
STRENGTHS = {"directions": (1.0, 1.25, 1.5), "safety vector": (0.5, 1.0, 2.0)}
FIRST = {"tuning": 9_800, "selection": 495_000, "test": 700_000}  # of people; before or behind all other seeds
STRIDE = {"tuning": 50, "selection": 1_000, "test": 10_000}
TRIAL = 8  # pictures that an estimate draws
MEASURED, TOLERANCE = 12, 0.1  # pictures of a round of UCE's balance, and the distance from equal shares that ends it


@dataclasses.dataclass(frozen=True)
class Acting:
    """What draws a row.

    Args:
        facts: all that decides it, as JSON.
        on: gives the erasers, once everything is fitted.
        used: their classes.
        rewrites: whether prompts name a gender, which is drawn from the seed.
    """

    facts: Any = ()
    on: Callable[[], tuple[Any, ...]] = tuple
    used: tuple[Any, ...] = ()
    rewrites: bool = False


@dataclasses.dataclass(frozen=True)
class Asked:
    """The prompts of a cell, each with its profession ("": none) and the icons to retain.

    Picture k has prompt k, counted in a circle.
    """

    prompts: tuple[str, ...]
    jobs: tuple[str, ...]
    keep: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, found: Sequence[tuple[str, str, tuple[str, ...]]]) -> Asked:
        return cls(*map(tuple, zip(*found, strict=True)))

    def each(self, n: int) -> tuple[list[str], list[str], list[tuple[str, ...]]]:
        """Prompt, profession and icons of n pictures."""
        rows = [k % len(self.prompts) for k in range(n)]
        return [self.prompts[k] for k in rows], [self.jobs[k] for k in rows], [tuple(self.keep[k]) for k in rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directed(Experiment):
    """Rows are the base model, ways to balance men and women with their controls, and ways to avoid alcohol.

    Args:
        fit: learns the vectors.
        strengths: row to the strengths of its vectors, weakest first; the tuning block chooses.
        rounds, step: of UCE's balance, which measures on the tuning block.
        professions: (): all of the model.
        wordings: per block, the texts of the cell `wording`, with "{}" for the profession.
        few: pictures per profession and cell on the tuning block.
    """

    name: str
    question: str
    cap: float
    fit: efface.LatentDirections = dataclasses.field(default_factory=efface.LatentDirections)
    strengths: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=lambda: STRENGTHS)
    rounds: int = 8
    step: float = 0.25
    professions: tuple[str, ...] = ()
    wordings: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: WORDINGS)
    few: int = 8
    n: int = 52
    model: str = "emoji"
    block: str = "test"
    blocks: ClassVar[tuple[str, ...]] = ("selection", "test")
    columns: ClassVar[Mapping[str, str]] = {
        "deviation": "deviation ratio",
        "deviation alone": "of it, as learned",
        "deviation wording": "of it, other wordings",
        "person": "profession seen",
        OTHERS: "other icons alone",
        "pair": "icon beside a profession",
        "residual explicit": "alcohol, explicit prompts",
        "residual implicit": "alcohol, implicit prompts",
    }

    def __post_init__(self) -> None:
        given = [self.wordings.get(block, ()) for block in ("tuning", *self.blocks)]
        every = [TAUGHT, *AGAIN, *(text for texts in given for text in texts)]
        if not all(given) or len(set(every)) < len(every) or not all("{}" in text for text in every):
            raise ValueError(
                'Expected wordings for each block, with "{}" for the profession, that no other block and no fit has, '
                f"got {dict(self.wordings)}. Give each block its own: held-out wordings are what the card measures."
            )

    # ---- what is asked for

    def jobs(self, world: World) -> tuple[str, ...]:
        """The professions, each with an icon of a man and one of a woman."""
        return self.professions or tuple(world.data["vocabulary"]["professions"])

    def asked(self, world: World, cell: str, block: str, pairs: int) -> Asked:
        """The prompts of a cell in a block; `pairs` per profession."""
        jobs = self.jobs(world)
        if cell in (OTHERS, *SAFETY):
            kind = "bystander" if cell == OTHERS else cell
            return Asked.of([(text, "", keep) for text, keep in world.prompts(AVOIDED, kind, block)])
        if cell == "pair":
            others, found = world.prompts(AVOIDED, "bystander", block), []
            for k in range(pairs):
                for place, job in enumerate(jobs):
                    text, keep = others[(7 * place + k) % len(others)]
                    two = (TAUGHT.format(job), text)
                    found.append((" and ".join(two if k % 2 == 0 else two[::-1]), job, keep))
            return Asked.of(found)
        texts = (TAUGHT,) if cell == "alone" else self.wordings[block]
        return Asked.of([(text.format(job), job, ()) for text in texts for job in jobs])

    def _sizes(self, plan: Plan, block: str) -> dict[str, int]:
        """Pictures per cell."""
        jobs, n = len(self.jobs(plan.world)), plan.n
        if block == "tuning":
            few = min(self.few, STRIDE[block] // jobs)
            people, safe = dict.fromkeys(PEOPLE[1:], few * jobs), dict.fromkeys(SAFETY[:2], 2 * few)
            return people | safe | {OTHERS: 3 * few}
        people, safe = {"alone": n * jobs, "wording": n * jobs, "pair": -(-n // 3) * jobs}, dict.fromkeys(SAFETY, n)
        return people | safe | {OTHERS: 8 * n}

    def _seeds(self, block: str, cell: str, n: int) -> range:
        if cell not in PEOPLE:
            return seeds(block, AVOIDED, "bystander" if cell == OTHERS else cell, n)
        if n > STRIDE[block]:
            raise ValueError(f"Expected at most {STRIDE[block]} pictures of a cell, got {n}. More would share seeds.")
        first = SEEDS[block].start + FIRST[block] + STRIDE[block] * (PEOPLE.index(cell) - (block == "tuning"))
        return range(first, first + n)

    # ---- the units

    def units(self, plan: Plan) -> list[Unit]:
        plain = Acting()
        found = [self._cell(plan, "base", plain, cell) for cell in (*PEOPLE, OTHERS, *SAFETY)]
        cells = dict.fromkeys(cell for of in TUNED.values() for cell in of)
        base = {cell: self._cell(plan, "base", plain, cell, tuning=0.0) for cell in cells}
        return [*found, *base.values(), *self._people(plan, base), *self._safety(plan, base)]

    def _people(self, plan: Plan, base: Mapping[str, Unit]) -> Iterator[Unit]:
        jobs = self.jobs(plan.world)
        editor = dataclasses.replace(self.fit, neutral=tuple(TAUGHT.format(job) for job in jobs))
        sexes = [Concept(sex, tuple(TAUGHT.format(f"{sex} {job}") for job in jobs)) for sex in GENDERS]
        again = [Concept(text.format("person"), tuple(text.format(job) for job in jobs)) for text in AGAIN]
        learned = self._learned(plan, "directions", editor, sexes)
        neutral = self._learned(plan, "neutral vectors", editor, again)
        steps, strength = self._ladder(plan, "directions", learned, base)
        edits = [self._balanced(plan, job) for job in jobs]
        rows = {
            "rewriting": Acting("a gender in the prompt, drawn from the seed", rewrites=True),
            "directions": _vectors(plan, learned, strength, steps),
            "uce": Acting([unit.digest for unit in edits], lambda: tuple(_load(plan, e) for e in edits), (efface.UCE,)),
            "random vectors": _vectors(plan, learned, strength, steps, random_=True),
            "neutral vectors": _vectors(plan, neutral, strength, steps),
        }
        cells = {row: PEOPLE[:2] for row in CONTROLS["directions"]} | {"rewriting": PEOPLE}  # others stay to the bit
        yield from (learned, *steps, *edits, neutral)
        for row, acting in rows.items():
            yield from (self._cell(plan, row, acting, cell) for cell in cells.get(row, (*PEOPLE, OTHERS)))

    def _safety(self, plan: Plan, base: Mapping[str, Unit]) -> Iterator[Unit]:
        avoided, world = named(AVOIDED), plan.world
        texts = [text for cell in SAFETY for text, _ in world.prompts(AVOIDED, cell, "tuning")]
        neutral = tuple(text for text in texts if text not in avoided.phrases)
        editor = dataclasses.replace(self.fit, anti=True, neutral=neutral)
        learned = self._learned(plan, "safety vector", editor, [avoided])
        steps, strength = self._ladder(plan, "safety vector", learned, base)
        negative = world.filled(efface.NegativePrompt(avoided))
        rows = {
            "safety vector": _vectors(plan, learned, strength, steps),
            "random safety vector": _vectors(plan, learned, strength, steps, random_=True),
            "negative_prompt": Acting(config(negative), lambda: (negative,), (efface.NegativePrompt,)),
        }
        yield from (learned, *steps)
        for row, acting in rows.items():
            cells = (*SAFETY, OTHERS) if row == "safety vector" else SAFETY
            yield from (self._cell(plan, row, acting, cell) for cell in cells)

    def names(self, units: Sequence[Unit]) -> list[str]:
        return list(dict.fromkeys(unit.row for unit in units if unit.kind == "cell"))

    def redrawn(self, plan: Plan, units: Sequence[Unit], update: Sequence[str]) -> list[Unit]:
        """With all fits and all of the tuning block, which several rows need."""
        return [unit for unit in units if unit.kind != "cell" or unit.row in {"base", *update}]

    def _cell(self, plan: Plan, row: str, acting: Acting, cell: str, tuning: float | None = None) -> Unit:
        """A cell of the plan's block; with a strength, of the tuning block."""
        world, block = plan.world, plan.block if tuning is None else "tuning"
        n = self._sizes(plan, block)[cell]
        asked, numbers = self.asked(world, cell, block, n // len(self.jobs(world))), self._seeds(block, cell, n)
        prompts, jobs, keep = asked.each(n)
        if acting.rewrites:
            prompts = [rewritten(*each) for each in zip(prompts, jobs, numbers, strict=True)]
        setting = {
            **plan.facts,
            "cell": cell,
            "prompts": prompts,
            "asked": dataclasses.asdict(asked),
            "seeds": [numbers.start, n],
            "tuning": tuning,
            "acting": acting.facts,
            "code": code_hash(*acting.used, draw),
        }

        def measure() -> dict[str, Any]:
            with efface.stack(world.pipe, *acting.on()):
                images = draw(world.pipe, prompts, numbers, **plan.call)
            if cell in SAFETY:
                return world.judge(images, AVOIDED, keep)
            return {"gender": genders(world, images, jobs), "retained": retained(world, images, keep)}

        return Unit(row, setting, measure, n, lambda: _drawing(plan), "cell" if tuning is None else "tuning")

    def _learned(self, plan: Plan, row: str, editor: Any, concepts: Sequence[Concept]) -> Unit:
        """The vectors of some concepts."""
        pipe = plan.world.pipe
        settled = editor.resolved(pipe)
        setting = {"fit": config(settled), "concepts": [config(each) for each in concepts], "seed": 0}
        setting |= {"model": plan.facts["model"], "versions": plan.facts["versions"], "code": code_hash(type(editor))}
        unit = Unit(row, setting, lambda: measure(), 1.0, lambda: pilot(), "fit")

        def measure() -> dict[str, Any]:
            file = delta_file(plan, unit)
            file.parent.mkdir(exist_ok=True)
            learned = editor.fit(pipe, concepts, checkpoint=file.with_suffix(""))
            learned.save(file)
            norms = {name: rows.flatten(1).norm(dim=1).tolist() for name, rows in learned.vectors.items()}
            return {"info": dict(learned.info), "norms": norms}

        def pilot() -> float:
            few = [dataclasses.replace(editor, pictures=2, steps=steps) for steps in (1, 3)]
            spent = [timed(lambda f=f: f.fit(pipe, concepts))[1] for f in few]
            drawing = _drawing(plan) * settled.sampler_steps / plan.call["num_inference_steps"]
            updates = (settled.steps - 1) * max(spent[1] - spent[0], 0.0) / 2
            return spent[0] + updates + drawing * settled.pictures * len(concepts)

        return unit

    def _balanced(self, plan: Plan, job: str) -> Unit:
        """UCE's delta of a profession, after rounds that measure the shares of tuning pictures."""
        world, jobs = plan.world, self.jobs(plan.world)
        rest = tuple(TAUGHT.format(each) for each in jobs if each != job)
        editor = efface.UCE(
            mode="debias", attributes=tuple((f"a {sex} {job}", 0.0) for sex in GENDERS), preserve=("", *rest)
        )
        concept = Concept(job, (TAUGHT.format(job),))
        first = FIRST["tuning"] + 2 * STRIDE["tuning"] + MEASURED * jobs.index(job)
        numbers = range(first, first + MEASURED)
        setting = {"fit": config(editor), "concept": config(concept), "rounds": [self.rounds, self.step, TOLERANCE]}
        setting |= {"seeds": [first, MEASURED], "call": dict(plan.call), "model": plan.facts["model"]}
        setting |= {"versions": plan.facts["versions"], "code": code_hash(efface.UCE, draw)}

        def shares(pipe: Any) -> list[float]:
            told = genders(world, draw(pipe, [TAUGHT.format(job)] * MEASURED, numbers, **plan.call), [job] * MEASURED)
            counts = [sum(eye.count(k) for eye in told) for k in (0, 1)]
            return [count / max(sum(counts), 1) for count in counts]

        def measure() -> dict[str, Any]:
            file = delta_file(plan, unit)
            file.parent.mkdir(exist_ok=True)
            delta = editor.balance(world.pipe, concept, shares, rounds=self.rounds, tolerance=TOLERANCE, step=self.step)
            delta.save(file)
            return {"info": dict(delta.info)}

        unit = Unit("uce", setting, measure, self.rounds * MEASURED, lambda: _drawing(plan), "fit")
        return unit

    def _ladder(
        self, plan: Plan, row: str, learned: Unit, base: Mapping[str, Unit]
    ) -> tuple[list[Unit], Callable[[], float]]:
        """The strengths on the tuning block, and what gives the chosen one once they are measured."""
        steps = [
            self._cell(plan, row, _vectors(plan, learned, lambda s=s: s, s), cell, tuning=s)
            for s in self.strengths[row]
            for cell in TUNED[row]
        ]

        @functools.cache
        def chosen() -> float:
            store, points = Store(plan.folder), dict[float, list[Any]]()
            for unit in (*(base[cell] for cell in TUNED[row]), *steps):
                found = store.found(unit)
                if found is None:
                    raise ValueError(
                        f"Expected all strengths of {row} to be measured, got none of {unit.setting['tuning']}."
                    )
                points.setdefault(unit.setting["tuning"], []).append((unit.setting, found["raw"]))
            return choice({strength: point(of) for strength, of in points.items()})

        return steps, chosen

    # ---- the card

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        cells: dict[str, Any] = {}
        pictures: dict[str, Any] = {}
        about: dict[str, Any] = {}
        steps: dict[str, dict[float, list[Any]]] = {row: {} for row in TUNED}
        for unit, each in found:
            s, raw = unit.setting, each["raw"]
            if unit.kind == "fit":
                about.setdefault(unit.row, {}).setdefault("fits", []).append(raw | {"settings": s["fit"]})
            elif unit.kind == "tuning":
                for row in TUNED if unit.row == "base" else (unit.row,):
                    if s["cell"] in TUNED[row]:
                        steps[row].setdefault(s["tuning"], []).append((s, raw))
            else:
                pictures.setdefault(unit.row, {})[s["cell"]] = {source: packed(eyes) for source, eyes in raw.items()}
                about.setdefault(unit.row, {})["acting"] = s["acting"]
                if unit.row == "base":
                    cells[s["cell"]] = {**s["asked"], "first_seed": s["seeds"][0]}
        for name, cell in cells.items():
            cell |= coverage(name, cell, pictures["base"][name])
        points = {row: {strength: point(of) for strength, of in by.items()} for row, by in steps.items()}
        rule = f"{' '.join((least_residual.__doc__ or '').split())} For people, the deviation ratio is the residual."
        return {
            "cells": cells,
            "rows": [{"row": row, **figures(cells, of, row == "base"), **about[row]} for row, of in pictures.items()],
            "pictures": pictures,
            "base": pictures["base"],
            "tuning": {row: {f"{s:g}": each for s, each in of.items()} for row, of in points.items()},
            "chosen": {row: choice(of) for row, of in points.items()},
            "rule": rule,
        }

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        """Comparisons with the controls and with the base model, and the verdict in words."""
        what = {"directions": "majority", "safety vector": "residual"}
        primary = [(row, control, what[row]) for row, of in CONTROLS.items() for control in of]
        primary += [(row, "base", "kept") for row in CONTROLS]
        every = [(row, "base", metric) for row in card["pictures"] for metric in ("majority", "residual", "kept")]
        rest = [each for each in every if each[0] != "base" and each not in primary]
        found = {each: compare(each, card["cells"], card["pictures"]) for each in (*primary, *rest)}
        of_rest = [each for names, each in found.items() if each and names in rest]
        for each, p in zip(of_rest, holm([each["p"] for each in of_rest]), strict=True):
            each["p, Holm"] = p
        compared = [each for each in found.values() if each]
        return {"comparisons": compared, "verdict": said(card, compared)}


# ---------------------------------------------------------------- what acts, and what is seen


def _vectors(plan: Plan, learned: Unit, strength: Callable[[], float], by: Any, random_: bool = False) -> Acting:
    """Vectors of a fit, one per picture if there are several; or random ones of their norms.

    Args:
        plan, learned: the fit.
        strength: gives the strength.
        by: what decides it: a number, or the units that are measured for the choice.
        random_: whether the vectors are random.
    """
    facts = {"vectors": learned.digest, "random": random_}
    facts |= {"strength": by if isinstance(by, float) else [unit.digest for unit in by]}

    def on() -> tuple[Any, ...]:
        found = of_equal_norm(_load(plan, learned)) if random_ else _load(plan, learned)
        found = found.fair() if len(found.concepts) > 1 else found
        return (dataclasses.replace(found, strength=strength()),)

    return Acting(facts, on, (Directions,))


def _load(plan: Plan, unit: Unit) -> Any:
    return api.load_delta(delta_file(plan, unit))


def of_equal_norm(directions: Directions) -> Directions:
    """Random vectors with the norms of `directions`."""
    rng, made = torch.Generator().manual_seed(0), {}
    for name, rows in directions.vectors.items():
        new = torch.randn(rows.shape, generator=rng)
        norms = [each.flatten(1).norm(dim=1) for each in (rows, new)]
        made[name] = new * (norms[0] / norms[1]).view(-1, *(1,) * (rows.ndim - 1))
    return dataclasses.replace(directions, vectors=made)


def rewritten(prompt: str, job: str, seed: int) -> str:
    """The prompt with a gender before the profession, drawn from the seed. A prompt without a profession stays."""
    return prompt.replace(job, f"{random.Random(seed).choice(GENDERS)} {job}") if job else prompt


def genders(world: World, images: torch.Tensor, jobs: Sequence[str]) -> list[list[int]]:
    """Per detector and picture: 0 for the man's icon of the profession, 1 for the woman's, -1 for neither. Of both, the
    likelier one counts."""
    seen, told = world.eyes.see(images), list[list[int]]()
    there, icons = world.eyes.icons(seen), world.data["vocabulary"]["professions"]
    for eye in (0, 1):
        told.append([])
        for k, job in enumerate(jobs):
            two = [world.icons[icons[job][sex]] for sex in GENDERS] if job else []
            shown = {sex: float(seen.icons[eye, k, icon]) for sex, icon in enumerate(two) if there[eye, k, icon]}
            told[-1].append(max(shown, key=shown.__getitem__) if shown else -1)
    return told


def retained(world: World, images: torch.Tensor, keep: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Per detector and picture: whether all icons to retain are there; -1 where there are none."""
    icons = world.eyes.icons(images)
    places = [[world.icons[icon] for icon in some] for some in keep]
    return [[int(icons[eye, k, some].all()) if some else -1 for k, some in enumerate(places)] for eye in (0, 1)]


def _drawing(plan: Plan) -> float:
    """Core-seconds of a picture in a batch; vectors and deltas of weights add next to nothing."""
    return _seconds(plan.model, plan.device, tuple(plan.call.items()))


@functools.cache
def _seconds(model: str, device: str, call: tuple[tuple[str, Any], ...]) -> float:
    pipe = world(model, device).pipe
    return timed(lambda: draw(pipe, ["a cat"] * TRIAL, range(TRIAL), **dict(call)))[1] / TRIAL
