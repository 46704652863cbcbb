"""Measures removal and retention of methods: cells of prompts x rows, judged by two detectors."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

import efface
from efface.core import Concept, config
from efface.editors._training import Training
from efface.files import sha256
from efface.intervals import clustered, difference, holm
from efface.pipelines import draw

from .code import code_hash
from .runner import Experiment, Plan, Unit, timed
from .worlds import CELLS, CONCEPT, NOTHING, OTHER, named, seeds

SOURCES = ("outcome", "retained", "object")  # what is stored of every picture
PILOT = 2  # pictures that an estimate draws per row
COUNTS = 0.30  # removal is judged in cells where the base model shows the concept this often
POOLED = 512  # pictures that an aim needs
IMPLICIT = ("theme", "paraphrase")
NAMED = ("explicit", "pair")  # cells whose prompts name a member of the concept
NEAR = 0.03  # length of the noise on nearly equal embeddings, relative to the prompt's

COLUMNS = {
    "residual explicit": "residual, explicit prompts",
    "residual implicit": "residual, implicit prompts",
    "residual": "residual, all prompts",
    "retention": "retention",
    "other": "something else recognisable",
    "nothing": "nothing recognisable",
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A row of the card.

    Args:
        make: from a concept to its eraser, several, or none; or an editor, which is fitted per concept.
        negative: a name of `NEGATIVES`.
        n: pictures per cell, unless it is the experiment's.
    """

    make: Any
    negative: str = "none"
    n: int | None = None


# ---------------------------------------------------------------- negative prompts


@dataclasses.dataclass(frozen=True)
class Picture:
    """What a negative prompt may depend on."""

    concept: Concept
    prompt: str
    seed: int
    other: str
    opposites: str


OPPOSITES = {
    "alcohol": "glass of milk, teacup, fruit juice",
    "weapon": "flower, dove, teddy bear",
    "neon sign": "pencil drawing, oil painting, daylight",
}
NEGATIVES: dict[str, Callable[[Picture], str] | None] = {
    "none": lambda p: "",
    "the prompt": lambda p: p.prompt,
    "the prompt and a dot": lambda p: f"{p.prompt}.",
    "the prompt in capitals": lambda p: p.prompt.upper(),
    "the prompt in other order": lambda p: " ".join(p.prompt.split()[::-1]),
    "the concept's phrases": lambda p: ", ".join(p.concept.phrases),
    "a phrase of the concept": lambda p: p.concept.phrases[p.seed % len(p.concept.phrases)],
    "benign opposites": lambda p: p.opposites,
    "blur": lambda p: "blurry, low quality, ugly, distorted",
    "object": lambda p: p.other,
    "equal embeddings": None,
    "nearly equal embeddings": None,
    "opposite embeddings": None,
}


def embedded(plan: Plan, made: tuple[Any, ...], variant: str, prompts: Sequence[str], numbers: range) -> torch.Tensor:
    """Pictures of a caller who encodes the texts, before the erasers are on."""
    pipe, parts = plan.world.pipe, []
    call = {**plan.call, "guidance_scale": plan.call["guidance"], "output_type": "pt"}
    del call["guidance"]
    for k in range(0, len(prompts), 32):
        text, empty = (pipe.encode_prompt(t, pipe.device, 1, False)[0] for t in (list(prompts[k : k + 32]), [""]))
        generators = [torch.Generator().manual_seed(seed) for seed in numbers[k : k + 32]]
        noise = torch.stack([torch.randn(text.shape[1:], generator=g) for g in generators]).to(text)
        noise *= NEAR * text.norm(dim=(1, 2), keepdim=True) / noise.norm(dim=(1, 2), keepdim=True)
        negative = {"equal embeddings": text.clone(), "nearly equal embeddings": text + noise}
        given = {"prompt_embeds": text, "negative_prompt_embeds": negative.get(variant, 2 * empty - text)}
        generators = [torch.Generator().manual_seed(seed) for seed in numbers[k : k + 32]]
        with efface.stack(pipe, *made):
            parts.append(pipe(generator=generators, **given, **call).images.float().cpu())
    return torch.cat(parts)


# ---------------------------------------------------------------- editors


def delta_unit(
    plan: Plan, row: str, editor: Any, concept: Concept | tuple[Concept, ...], seed: int = 0, before: Any = None
) -> Unit:
    """The fit of an editor's delta, which is kept beside the outcomes.

    Args:
        plan, row, editor, concept: what is fitted; several concepts together if they are a tuple.
        seed: of the fit.
        before: in a sequence, the fits of earlier rounds, whose deltas are on.
    """
    pipe = plan.world.pipe
    settled = editor.resolved(pipe) if hasattr(editor, "resolved") else editor
    erased = [config(each) for each in concept] if isinstance(concept, tuple) else config(concept)
    setting = {"fit": config(settled), "concept": erased, "seed": seed, "model": plan.facts["model"]}
    setting |= {"versions": plan.facts["versions"], "code": code_hash(type(editor))}
    setting |= {} if before is None else {"before": [unit.digest for unit in before]}
    unit = Unit(row, setting, lambda: fit(), 1.0, lambda: pilot(), "fit")

    def made(some: Any, **options: Any) -> efface.Delta:
        if before is None:
            return some.fit(pipe, concept, seed=seed, **options)
        return some.sequence(pipe, concept, seed=seed, **options)[0]

    whole: list[tuple[Any, dict[str, float]]] = []  # what an estimate has fitted already, and its seconds

    def clocked(**options: Any) -> tuple[Any, dict[str, float]]:
        began = time.perf_counter()
        delta, spent = timed(lambda: made(editor, **options))
        return delta, {"seconds": time.perf_counter() - began, "core_seconds": spent}

    def fit() -> dict[str, Any]:
        file = delta_file(plan, unit)
        file.parent.mkdir(exist_ok=True)
        options = {"checkpoint": file.with_suffix("")} if isinstance(editor, Training) else {}
        with deltas_on(plan, before or ()):
            delta, took = whole.pop() if whole else clocked(**options)
        delta.save(file)
        return took | {"bytes": file.stat().st_size, "info": dict(delta.info)}

    def pilot() -> float:
        if not isinstance(editor, Training):
            found = clocked()
            whole[:] = [found] if before is None else []
            return found[1]["core_seconds"]
        few = [timed(lambda k=k: made(dataclasses.replace(editor, steps=k)))[1] for k in (1, 3)]
        return few[0] + (settled.steps - 1) * max(few[1] - few[0], 0.0) / 2

    return unit


@contextlib.contextmanager
def deltas_on(plan: Plan, fits: Sequence[Unit]) -> Iterator[None]:
    """The pipeline with fitted deltas, in order."""
    with contextlib.ExitStack() as stack:
        for unit in fits:
            stack.enter_context(efface.api.load_delta(delta_file(plan, unit)).apply(plan.world.pipe))
        yield


def erasers_of(make: Callable[[Concept], Any], concept: str) -> tuple[Any, ...]:
    made = make(named(concept))
    return made if isinstance(made, tuple) else (made,) if made else ()


def delta_file(plan: Plan, unit: Unit) -> Path:
    return plan.folder / "deltas" / f"{unit.digest}.safetensors"


def pictures_file(plan: Plan, unit: Unit) -> Path:
    return plan.folder / "pictures" / f"{unit.digest}.safetensors"


def keep_pictures(plan: Plan, unit: Unit, images: torch.Tensor) -> list[str]:
    """Keeps pictures [N, 3, H, W] in [0, 1] as bytes [N, H, W, 3]. Returns the SHA-256 of each."""
    whole = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).contiguous()
    file = pictures_file(plan, unit)
    file.parent.mkdir(exist_ok=True)
    save_file({"images": whole}, file)
    return [sha256(each.numpy().tobytes()) for each in whole]


# ---------------------------------------------------------------- the experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(Experiment):
    """Rows x cells, three outcomes per picture.

    Args:
        arms: the rows by name; `base` is the base model. A function gives them when they depend on another card.
        concepts, cells: what is drawn; cells without prompts in the block are left out.
        primary: comparisons (row, row, metric) that were named before drawing.
        against: the row that all others are compared with; these comparisons are adjusted by Holm.
        aims: (row, metric, limit): the largest allowed rate where low is good, else the smallest.
        keeps: whether the pictures stay beside the raw outcomes, for labels by looking.
    """

    name: str
    question: str
    cap: float
    arms: Mapping[str, Arm] | Callable[[Plan], Mapping[str, Arm]]
    concepts: tuple[str, ...] = ("alcohol", "weapon", "cat", "neon sign")
    cells: tuple[str, ...] = CELLS
    n: int = 128
    model: str = "emoji"
    block: str = "test"
    primary: tuple[tuple[str, str, str], ...] = ()
    against: str = "base"
    aims: tuple[tuple[str, str, float], ...] = ()
    keeps: bool = False
    columns: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(COLUMNS))

    def rows_of(self, plan: Plan) -> Mapping[str, Arm]:
        arms = self.arms(plan) if callable(self.arms) else self.arms
        return {"base": Arm(lambda concept: None), **arms}

    def units(self, plan: Plan) -> list[Unit]:
        found = []
        for row, arm in self.rows_of(plan).items():
            for concept in self.concepts:
                cells = [cell for cell in self.cells if plan.world.prompts(concept, cell, plan.block)]
                fitted = None
                if cells and not callable(arm.make):
                    fitted = delta_unit(plan, row, arm.make, named(concept))
                    found.append(fitted)
                found += [self._unit(plan, row, arm, concept, cell, fitted) for cell in cells]
        return found

    def _unit(self, plan: Plan, row: str, arm: Arm, concept: str, cell: str, fitted: Unit | None) -> Unit:
        world, n = plan.world, min(arm.n or plan.n, plan.n)
        of, numbers = world.prompts(concept, cell, plan.block), seeds(plan.block, concept, cell, n)
        prompts, keep = zip(*(of[k % len(of)] for k in range(n)), strict=True)
        erased = () if fitted else erasers_of(arm.make, concept)
        setting = {
            **plan.facts,
            "concept": concept,
            "cell": cell,
            "prompts": prompts,
            "keep": keep,
            "seeds": [numbers.start, n],
            "erasers": [{"delta": fitted.digest}] if fitted else [config(plan.world.filled(each)) for each in erased],
            "code": code_hash(*([efface.Delta, type(arm.make)] if fitted else map(type, erased)), draw),
        }
        call = dict(plan.call)
        others = self._others(plan, concept, keep, numbers)
        if arm.negative != "none":
            call |= self._negative(arm.negative, concept, prompts, numbers, [world.captions[icon] for icon in others])
            setting |= {"negative": [arm.negative, call.get("negative_prompt"), NEAR]}

        def pictures(some: int) -> torch.Tensor:
            made = (efface.api.load_delta(delta_file(plan, fitted)),) if fitted else erased
            if NEGATIVES[arm.negative] is None:
                return embedded(plan, made, arm.negative, prompts[:some], numbers[:some])
            given = {k: v[:some] if isinstance(v, list) else v for k, v in call.items()}
            with efface.stack(world.pipe, *made):
                return draw(world.pipe, prompts[:some], numbers[:some], **given)

        def measure() -> dict[str, Any]:
            images = pictures(n)
            join = torch.any if cell in IMPLICIT else torch.all
            kept = {"sha256": keep_pictures(plan, unit, images)} if self.keeps else {}
            return world.judge(images, concept, list(keep), join) | {"object": world.sees(images, others)} | kept

        def pilot() -> float:
            if not fitted:
                return timed(lambda: pictures(min(PILOT, n)))[1] / min(PILOT, n)
            with efface.stack(world.pipe):  # a delta costs nothing per picture, and may not be fitted yet
                return timed(lambda: draw(world.pipe, prompts[:PILOT], numbers[:PILOT], **plan.call))[1] / PILOT

        unit = Unit(row, setting, measure, n, pilot)
        return unit

    @staticmethod
    def _others(plan: Plan, concept: str, keep: Sequence[tuple[str, ...]], numbers: range) -> list[str]:
        """Per picture, an icon that an ordinary negative prompt may name: one to retain, or a stranger."""
        strangers = sorted(set(plan.world.captions) - set(plan.world.truth(concept) or ()))
        named_here = [[icon for icon in sorted(some) if icon in plan.world.captions] or strangers for some in keep]
        return [some[seed % len(some)] for some, seed in zip(named_here, numbers, strict=True)]

    @staticmethod
    def _negative(
        variant: str, concept: str, prompts: Sequence[str], numbers: range, others: Sequence[str]
    ) -> dict[str, Any]:
        write = NEGATIVES[variant]
        if write is None:
            return {}
        given = zip(prompts, numbers, others, strict=True)
        made = [Picture(named(concept), p, s, o, OPPOSITES.get(concept, "a dog, a tree, a house")) for p, s, o in given]
        return {"negative_prompt": [write(each) for each in made]}

    # ---- the card

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        cells: dict[str, Any] = {}
        pictures: dict[str, Any] = {}
        fits: dict[str, Any] = {}
        erasers: dict[str, Any] = {}
        for unit, each in found:
            s, raw = unit.setting, each["raw"]
            if unit.kind == "fit":
                fits.setdefault(unit.row, {})[s["concept"]["name"]] = raw | {"settings": s["fit"]}
                continue
            name = f"{s['concept']}, {s['cell']}"
            texts = list(dict.fromkeys(s["prompts"]))
            known = cells.setdefault(name, {"concept": s["concept"], "cell": s["cell"], "prompts": texts})
            known["prompts"] = max(texts, known["prompts"], key=len)
            known["first_seed"] = s["seeds"][0]
            kept = {"sha256": sha256("".join(raw["sha256"]).encode())} if "sha256" in raw else {}
            pictures.setdefault(unit.row, {})[name] = {key: packed(raw[key]) for key in SOURCES} | kept
            erasers.setdefault(unit.row, {})[s["concept"]] = s["erasers"]
        shown = {name: _share(raw["outcome"], CONCEPT, min) for name, raw in pictures["base"].items()}
        for name, cell in cells.items():
            cell |= {"base rate": shown[name], "named by a phrase": _named_by_phrase(cell)}
            cell["removal judged"] = shown[name] >= COUNTS and cell["cell"] != "bystander"
        rows = [
            {"row": row, **self.rates(row, pictures[row], cells, erasers[row]), "erasers": erasers[row]}
            | ({"fits": fits[row]} if row in fits else {})
            for row in pictures
        ]
        return {"cells": cells, "rows": rows, "pictures": pictures, "base": pictures["base"]}

    def rates(
        self, row: str, pictures: Mapping[str, Any], cells: Mapping[str, Any], erasers: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Every metric of a row, pooled over cells, by the less favourable detector."""
        found, phrases = {}, {concept: _phrases(concept, of) for concept, of in erasers.items()}
        for metric in METRICS:
            worst = max if METRICS[metric].low and row != "base" else min
            eyes = [_values(metric, eye, pictures, cells, phrases) for eye in (0, 1)]
            if eyes[0][0]:
                values, prompts = worst(eyes, key=lambda each: sum(each[0]))
                found[metric] = rate(values, prompts)
        return found

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        """Comparisons, coverage, and the verdict in words."""
        pictures, cells = card["pictures"], card["cells"]
        rows = {row["row"]: row for row in card["rows"]}
        rest = [
            (row, self.against, metric)
            for row, metric in itertools.product(rows, ("residual", "retention"))
            if row != self.against and (row, self.against, metric) not in self.primary
        ]
        compared = [self._compared(each, pictures, cells) for each in (*self.primary, *rest)]
        of_rest = [each for each in compared[len(self.primary) :] if each]
        for each, p in zip(of_rest, holm([each["p"] for each in of_rest]), strict=True):
            each["p, Holm"] = p
        asked = {name: cell for name, cell in cells.items() if cell["cell"] != "bystander"}
        unjudged = [name for name, cell in asked.items() if not cell["removal judged"]]
        verdict = [_aim(rows, *aim) for aim in self.aims]
        verdict += [f"Removal is not judged in {'; '.join(unjudged)}: the base rate is under 30 %."] if unjudged else []
        return {"comparisons": [each for each in compared if each], "not judged": unjudged, "verdict": verdict}

    @staticmethod
    def _compared(
        names: tuple[str, str, str], pictures: Mapping[str, Any], cells: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """The paired difference of two rows, by the detector with the smaller one."""
        a, b, metric = names
        found = []
        for eye in (0, 1):
            pair = [_values(metric, eye, _common(pictures, a, b)[which], cells) for which in (0, 1)]
            if not pair[0][0]:
                return None
            found.append(difference(pair[0][0], pair[1][0], pair[0][1]))
        least = min(found, key=lambda each: abs(each.value))
        return {"row": a, "against": b, "metric": metric, "difference": least.value} | {
            "interval": list(least.interval),
            "p": least.p,
            "prompts": least.prompts,
        }


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a rate counts, in which cells, and whether low is good."""

    low: bool
    counts: Callable[[str], bool]
    of: Callable[[Mapping[str, Any]], bool]
    source: str = "outcome"
    unnamed: bool = False  # only prompts in which no phrase of the row's erasers stands


METRICS = {
    "residual": Metric(True, lambda c: c == str(CONCEPT), lambda cell: cell["removal judged"]),
    "residual explicit": Metric(
        True, lambda c: c == str(CONCEPT), lambda cell: cell["removal judged"] and cell["cell"] == "explicit"
    ),
    "residual implicit": Metric(
        True, lambda c: c == str(CONCEPT), lambda cell: cell["removal judged"] and cell["cell"] in IMPLICIT
    ),
    "residual, no phrase names it": Metric(
        True, lambda c: c == str(CONCEPT), lambda cell: cell["removal judged"] and not cell["named by a phrase"]
    ),
    "residual, member that no phrase names": Metric(
        True,
        lambda c: c == str(CONCEPT),
        lambda cell: cell["removal judged"] and cell["cell"] in NAMED,
        unnamed=True,
    ),
    "retention": Metric(False, lambda c: c == "1", lambda cell: True, "retained"),
    "retention bystander": Metric(False, lambda c: c == "1", lambda cell: cell["cell"] == "bystander", "retained"),
    "other": Metric(False, lambda c: c == str(OTHER), lambda cell: True),
    "nothing": Metric(True, lambda c: c == str(NOTHING), lambda cell: True),
    "object": Metric(False, lambda c: c == "1", lambda cell: True, "object"),
}


def packed(eyes: Sequence[Sequence[int]]) -> list[str]:
    """A digit per picture; "-" where there is nothing to judge."""
    return ["".join("-" if value < 0 else str(value) for value in eye) for eye in eyes]


def _share(eyes: Sequence[str], outcome: int, pick: Callable[..., float]) -> float:
    return pick(eye.count(str(outcome)) / len(eye) for eye in eyes)


def _values(
    metric: str,
    eye: int,
    pictures: Mapping[str, Any],
    cells: Mapping[str, Any],
    phrases: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[int], list[str]]:
    """Outcomes of a metric in all its cells, and the prompt of each. `phrases`: of each concept, those of the row."""
    what, values, prompts = METRICS[metric], [], []
    for name, raw in pictures.items():
        if what.of(cells[name]):
            texts, concept = cells[name]["prompts"], cells[name]["concept"]
            written = (phrases or {}).get(concept, named(concept).phrases) if what.unnamed else ()
            for k, digit in enumerate(raw[what.source][eye]):
                if digit != "-" and not any(phrase in texts[k % len(texts)] for phrase in written):
                    values.append(int(what.counts(digit)))
                    prompts.append(f"{cells[name]['concept']}: {texts[k % len(texts)]}")
    return values, prompts


def rate(values: Sequence[int], prompts: Sequence[str]) -> dict[str, Any]:
    """A rate as cards hold it, with its clustered interval and its worst prompt."""
    of: dict[str, list[int]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        of.setdefault(prompt, []).append(value)
    means = {prompt: sum(some) / len(some) for prompt, some in of.items()}
    highest, lowest = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    return {
        "rate": sum(values) / len(values),
        "hits": sum(values),
        "n": len(values),
        "prompts": len(of),
        "interval": list(clustered(values, prompts)),
        "highest": [highest, means[highest]],
        "lowest": [lowest, means[lowest]],
    }


def _common(pictures: Mapping[str, Any], a: str, b: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The cells and pictures that two rows share; picture k has the same prompt and seed in both."""
    made: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name in pictures[a].keys() & pictures[b].keys():
        n = min(len(pictures[row][name]["outcome"][0]) for row in (a, b))
        for side, row in zip(made, (a, b), strict=True):
            side[name] = {source: [eye[:n] for eye in pictures[row][name][source]] for source in SOURCES}
    order = sorted(made[0])
    return {name: made[0][name] for name in order}, {name: made[1][name] for name in order}


def _named_by_phrase(cell: Mapping[str, Any]) -> bool:
    """Whether a phrase of the concept stands in a prompt of the cell."""
    phrases = named(cell["concept"]).phrases
    return any(phrase in text for phrase in phrases for text in cell["prompts"])


def _phrases(concept: str, erasers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The phrases that a row's erasers have for a concept; the shipped ones if they do not say."""
    found = [each for eraser in erasers for each in eraser.get("concepts", ()) if each["name"] == concept]
    return tuple(phrase for each in found for phrase in each["phrases"]) or named(concept).phrases


def _aim(rows: Mapping[str, Any], row: str, metric: str, limit: float) -> str:
    """An aim and what became of it, in words."""
    found, low = rows[row].get(metric), METRICS[metric].low
    words = f"Aim for {row}: {metric} {'<=' if low else '>='} {100 * limit:g} %"
    if found is None or found["n"] < POOLED:
        return f"{words}. Not judged: n = {found['n'] if found else 0}, {POOLED} are needed."
    met = found["rate"] <= limit if low else found["rate"] >= limit
    bound = found["interval"][1 if low else 0]
    holds = bound <= limit if low else bound >= limit
    return f"{words}. {'Met' if met else 'Missed'}: {100 * found['rate']:.1f} %, bound {100 * bound:.1f} %" + (
        "." if holds == met else ", which is beyond the aim."
    )


# ---------------------------------------------------------------- choosing


MARGIN = 0.05  # of the base model's retention, a chosen point may lose so much
AIMS = {"residual explicit": 0.05, "residual implicit": 0.03}


def least_residual(points: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> int:
    """Of the points that retain within 5 points of the base model, the one with the least residual, then the most
    retention. If there is none, the one that retains most."""
    enough = base["retention"]["rate"] - MARGIN
    kept = [k for k, p in enumerate(points) if p["retention"]["rate"] >= enough]
    if kept:
        return min(kept, key=lambda k: (points[k]["residual"]["rate"], -points[k]["retention"]["rate"]))
    return max(range(len(points)), key=lambda k: points[k]["retention"]["rate"])


def first_that_reaches(points: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> int:
    """The first point, in order of strength, with a residual of at most 5 % of explicit and 3 % of implicit prompts,
    and a retention within 5 points of the base model's. If there is none, `least_residual`."""
    enough = base["retention"]["rate"] - MARGIN
    for k, p in enumerate(points):
        if p["retention"]["rate"] >= enough and all(p[m]["rate"] <= most for m, most in AIMS.items() if m in p):
            return k
    return least_residual(points, base)


def balanced(points: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> int:
    """Of all points, the one with the largest difference of retention and residual; the weakest of equal ones. For
    samples in which one picture is worth several points."""
    return max(range(len(points)), key=lambda k: points[k]["retention"]["rate"] - points[k]["residual"]["rate"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Outcome):
    """Settings of methods on the tuning block; one rule chooses for all. Every method gets as many points.

    Args:
        points: method to setting to what makes it, weakest first.
        rule: chooses among the points of a method.
    """

    points: Mapping[str, Mapping[str, Any]]
    rule: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], int] = least_residual
    arms: Any = None
    block: str = "tuning"
    concepts: tuple[str, ...] = ("alcohol", "weapon", "neon sign")
    n: int = 48
    blocks: ClassVar[tuple[str, ...]] = ("tuning", "selection")
    chooses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        sizes = {method: len(of) for method, of in self.points.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Expected as many points for each method, got {sizes}. Tune all methods alike.")

    def rows_of(self, plan: Plan) -> Mapping[str, Arm]:
        made = {f"{method} {setting}": Arm(make) for method, of in self.points.items() for setting, make in of.items()}
        return {"base": Arm(lambda concept: None), **made}

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        rows, chosen = {row["row"]: row for row in card["rows"]}, {}
        if not {"residual", "retention"} <= rows["base"].keys():
            raise ValueError(
                f"Expected cells of `{self.name}` where the base model shows the concept in 30 % of its pictures, and "
                "cells with something to retain, got none of one kind. Draw other cells, or with more steps."
            )
        for method, of in self.points.items():
            points = [rows[f"{method} {setting}"] for setting in of]
            chosen[method] = list(of)[self.rule(points, rows["base"])]
        return super().derived(card) | {"chosen": chosen, "rule": " ".join((self.rule.__doc__ or "").split())}


def chosen(sweep: Sweep, plan: Plan) -> dict[str, Arm]:
    """A row per method, at the setting that a sweep's card chose."""
    path = plan.cards / f"{sweep.name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no card {path}. Run `python -m experiments {sweep.name}` first: it chooses.")
    found = json.loads(path.read_text("utf-8"))["chosen"]
    return {method: Arm(sweep.points[method][setting]) for method, setting in found.items()}
