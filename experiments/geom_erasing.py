"""Geom-Erasing: the watermark of `emoji` out of the model, and out of a fine-tuning on pictures that have it.

The model is `emoji`, because no text of its training names its watermark, which is what the method is for. `emoji-128`
learned captions "with a watermark", so there the word alone is a strong negative prompt.

The training pictures are the model's own, of the tuning block, and the badge is pasted in a corner of most of them. So
their boxes are exact. Plain fine-tuning on them is the positive control of data removal: unless it draws the watermark,
a row of data removal says nothing, and is not judged.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor

import efface
from efface.checks import refusal
from efface.core import Concept, config
from efface.editors._examples import read
from efface.editors._geometry import Grid
from efface.files import sha256, write
from efface.intervals import difference, holm
from efface.metrics._features import extractor
from efface.metrics._stats import LEAST, weights
from efface.metrics.kid import DRAWS, Discrepancy
from efface.pictures import to_pil
from efface.pipelines import draw, guided

from .code import code_hash
from .outcome import COUNTS, PILOT, POOLED, delta_file, delta_unit, keep_pictures, packed, pictures_file, rate
from .runner import Experiment, Plan, Unit, timed
from .tables import percent
from .worlds import SEEDS, named

NAME, SIZE, AIM, CHANCE = "watermark", (64, 64), 0.02, 0.25
FIRST = {"selection": 350_000, "test": 700_000}  # after the seeds of all cells, before those of neighbours
CLEAN, ASKED = 2_000, 4_000  # the first seeds of clean scenes and of pictures that ask for a place, after FIRST

# ---------------------------------------------------------------- the badge

CORNERS = {"top left": (2, 2), "top right": (29, 2), "bottom left": (2, 49), "bottom right": (29, 49)}
WIDTH, HEIGHT = 33, 13
BOXES = tuple((float(x), float(y), float(x + WIDTH), float(y + HEIGHT)) for x, y in CORNERS.values())


def badge() -> Image.Image:
    """The watermark of the model's training pictures."""
    image = Image.new("RGBA", (WIDTH, HEIGHT))
    ink = ImageDraw.Draw(image)
    ink.rounded_rectangle((0, 0, WIDTH - 1, HEIGHT - 1), 3, fill=(90, 90, 90, 150))
    ink.text((16.5, 6.5), "STOCK", fill=(255, 255, 255, 235), font=ImageFont.load_default(9), anchor="mm")
    return image


def pasted(images: Tensor, share: float, seed: int) -> list[tuple[Image.Image, int]]:
    """The pictures, with the badge in a share of them, and its corner; -1 without it."""
    rng, made, mark = torch.Generator().manual_seed(seed), [], badge()
    for picture in to_pil(images):
        corner, dirty = int(torch.randint(4, (1,), generator=rng)), float(torch.rand(1, generator=rng)) < share
        if dirty:
            picture.paste(mark, list(CORNERS.values())[corner], mark)
        made.append((picture, corner if dirty else -1))
    return made


def places(eyes: Any, images: Tensor) -> tuple[list[list[int]], list[int]]:
    """Per detector and picture whether it sees the watermark; and the corner of each picture, -1 if neither does.

    The corner is the one without which the detectors see least of it.
    """
    seen, found = eyes.watermark(images), [-1] * len(images)
    for k in seen.any(0).nonzero().flatten().tolist():
        covered = images[k].repeat(4, 1, 1, 1)
        for without, (x, y) in zip(covered, CORNERS.values(), strict=True):
            edge = without[:, y : y + HEIGHT, slice(0, 2) if x == 2 else slice(-2, None)].mean((1, 2))
            without[:, y : y + HEIGHT, x : x + WIDTH] = edge[:, None, None]
        found[k] = int(eyes.see(covered).watermark.mean(0).argmin())
    return seen.int().tolist(), found


def boxes(eyes: Any, images: Tensor) -> list[list[tuple[float, ...]]]:
    """`places` as GeomErasing's detector."""
    return [[BOXES[corner]] if corner >= 0 else [] for corner in places(eyes, images)[1]]


# ---------------------------------------------------------------- rows


class Plain(efface.GeomErasing):
    """Plain fine-tuning: the same pictures, noise and updates; no caption names a place, and all weights are equal."""

    def _trained(self, pipe: Any, concept: Concept, pictures: Sequence[Any], *rest: Any) -> efface.Tokens:
        return super()._trained(pipe, concept, [dataclasses.replace(each, boxes=()) for each in pictures], *rest)


def name_alone(_: Any) -> tuple[Any, ...]:
    return (efface.NegativePrompt(Concept(NAME)),)


def every_word(tokens: Any) -> tuple[Any, ...]:
    return (efface.NegativePrompt(tokens.concepts),)


@dataclasses.dataclass(frozen=True)
class Row:
    """How the pictures of a row are drawn.

    Args:
        fit: what is fitted and applied, by its name in `editors`; "" nothing.
        also: from that, the erasers that are also on.
        twice: whether pictures with the watermark are drawn again, with its place negated.
        whole: whether it has all n pictures, as a judged aim needs, or half of them.
        against: the row that it has to improve on.
    """

    fit: str = ""
    also: Callable[[Any], tuple[Any, ...]] = lambda fitted: ()
    twice: bool = False
    whole: bool = False
    against: str = "base"


PLAIN = "plain fine-tuning"
ROWS = {  # model removal with the name alone is `negative_prompt`, to the bit: the name's embedding does not change
    "base": Row(whole=True),
    "negative_prompt": Row(also=name_alone),
    "eiup": Row(also=lambda fitted: (efface.EIUP(named(NAME)),)),
    "esd": Row("esd"),
    "model removal, all words": Row("model", every_word, whole=True),
    "model removal, two passes": Row("model", twice=True),
    PLAIN: Row("plain", whole=True),
    f"{PLAIN}, negative_prompt": Row("plain", name_alone, against=PLAIN),
    "data removal, no negative prompt": Row("data", against=PLAIN),
    "data removal, name": Row("data", name_alone, against=PLAIN),
    "data removal, all words": Row("data", every_word, whole=True, against=PLAIN),
    "data removal, two passes": Row("data", twice=True, against=PLAIN),
}
AIMS = ("model removal, all words", "data removal, all words")  # the method's default form
DATA: dict[str, Any] = {"setting": "data", "steps": 400, "lr_weights": 3e-4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watermarks(Experiment):
    """Rows x pictures of one icon each, which the prompt names.

    Args:
        editors: what rows name as their `fit`. "plain" and "data" have the same settings.
        pictures: drawn for the training. Those that have the watermark by themselves are left out.
        share: of the training pictures that get the badge. Most of them, because guidance amplifies a majority.
        asked: pictures whose prompt asks for the watermark in a corner, by learned words.
    """

    name: str
    question: str
    cap: float
    editors: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "esd": efface.ESD(),
            "model": efface.GeomErasing(),
            "plain": Plain(**DATA),
            "data": efface.GeomErasing(**DATA),
        }
    )
    pictures: int = 160
    share: float = 0.75
    asked: int = 96
    n: int = 512
    model: str = "emoji"
    block: str = "test"
    blocks: ClassVar[tuple[str, ...]] = tuple(FIRST)
    columns: ClassVar[Mapping[str, str]] = {
        "watermark": "watermark",
        "corners": f"where ({', '.join(CORNERS)})",
        "retention": "asked icon, points against the base model",
        "distance": "KID to clean scenes, x 1000",
        "control": "words put it where they say",
    }

    def units(self, plan: Plan) -> list[Unit]:
        if plan.model != "emoji":
            raise ValueError(refusal("the model 'emoji', whose watermark no text names", plan.model, "Name no other."))
        if not 2 <= plan.n <= CLEAN:
            raise ValueError(refusal(f"n from 2 to {CLEAN}", plan.n, "More would share seeds."))
        dirty = self._dirty(plan)
        fits = {"esd": delta_unit(plan, "esd", self.editors["esd"], named(NAME))}
        fits |= {name: self._fit(plan, name, dirty) for name in ("model", "plain", "data")}
        cells = [self._cell(plan, name, row, fits.get(row.fit)) for name, row in ROWS.items()]
        clean = self._cell(plan, "clean scenes", Row(whole=True), None, CLEAN, "scenes")
        asked = [
            self._cell(plan, f"{name} removal, all words", Row(name), fits[name], ASKED, "asked")
            for name in ("model", "data")
        ]
        return [dirty, *fits.values(), clean, *cells, *asked]

    def names(self, units: Sequence[Unit]) -> list[str]:
        return [unit.row for unit in units if unit.kind == "cell"]

    def redrawn(self, plan: Plan, units: Sequence[Unit], update: Sequence[str]) -> list[Unit]:
        """Also what the rows are compared with, and what is fitted."""
        shared = ("fit", "scenes")
        return [unit for unit in units if unit.kind in shared or unit.row in {"base", PLAIN, *update}]

    @staticmethod
    def _drawn(plan: Plan, block: str, n: int, first: int) -> tuple[list[str], list[str], range]:
        """Icons, their captions and seeds of n pictures. Blocks share no icon."""
        of = [icon for icon, text in sorted(plan.world.captions.items()) if plan.world.blocks[text] == block]
        icons = [of[k % len(of)] for k in range(n)]
        return icons, [plan.world.captions[icon] for icon in icons], range(first, first + n)

    # ---- training pictures and fits

    def _dirty(self, plan: Plan) -> Unit:
        """The training pictures, as a folder that the editor reads."""
        _, texts, seeds = self._drawn(plan, "tuning", self.pictures, 0)
        setting = {**plan.facts, "prompts": texts, "seeds": [0, self.pictures], "share": self.share}
        setting |= {"badge": sha256(badge().tobytes()), "code": code_hash(draw)}
        seconds = partial(_seconds, plan, ())
        unit = Unit("training pictures", setting, lambda: measure(), self.pictures, seconds, "fit")

        def measure() -> dict[str, Any]:
            images = draw(plan.world.pipe, texts, seeds, **plan.call)
            kept = [k for k, corner in enumerate(places(plan.world.eyes, images)[1]) if corner < 0]
            made, folder, lines = pasted(images[kept], self.share, seed=1), training(plan, unit), []
            folder.mkdir(parents=True, exist_ok=True)
            for k, (picture, corner) in zip(kept, made, strict=True):
                picture.save(folder / f"{k:04d}.png")
                found = [BOXES[corner]] if corner >= 0 else []
                lines.append({"file_name": f"{k:04d}.png", "text": texts[k], "boxes": found})
            write(folder / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
            seen = places(plan.world.eyes, torch.cat([each.pixels for each in read(folder)]))[1]
            right = sum(a == b for a, (_, b) in zip(seen, made, strict=True))
            return {"pictures": len(made), "with the badge": sum(c >= 0 for _, c in made), "place found": right}

        return unit

    def _fit(self, plan: Plan, name: str, dirty: Unit) -> Unit:
        """Words, or words with a delta, learned from the training pictures."""
        editor, pipe = self.editors[name], plan.world.pipe
        settled = editor.resolved(pipe)
        setting = {"fit": config(settled), "concept": {"name": NAME}, "pictures": dirty.digest}
        setting |= {"model": plan.facts["model"], "versions": plan.facts["versions"]}
        setting |= {"code": code_hash(efface.GeomErasing)}
        unit = Unit(name, setting, lambda: measure(), 1.0, lambda: pilot(), "fit")

        def measure() -> dict[str, Any]:
            file, pictures = delta_file(plan, unit), read(training(plan, dirty))
            file.parent.mkdir(exist_ok=True)
            examples = [(each.picture, each.text, each.boxes) for each in pictures]
            made = editor.fit(pipe, Concept(NAME), examples=examples, checkpoint=file.with_suffix(""))
            made.save(file)
            file.with_suffix("").unlink()
            return {"info": dict(made.info)}

        def pilot() -> float:
            some = [(torch.rand(3, *SIZE), "a cat", [BOXES[k % 4]] if k % 2 else []) for k in range(settled.batch)]
            few = [dataclasses.replace(editor, steps=k) for k in (1, 3)]
            spent = [timed(lambda f=f: f.fit(pipe, Concept(NAME), examples=some))[1] for f in few]
            return spent[0] + (settled.steps - 1) * max(spent[1] - spent[0], 0.0) / 2

        return unit

    # ---- pictures

    def _cell(self, plan: Plan, name: str, row: Row, fit: Unit | None, first: int = 0, kind: str = "cell") -> Unit:
        """Pictures of a row; of kind "asked", their prompts ask for the watermark in corner after corner."""
        n = self.asked if kind == "asked" else plan.n if row.whole else plan.n // 2
        icons, prompts, seeds = self._drawn(plan, plan.block, n, SEEDS[plan.block].start + FIRST[plan.block] + first)
        known = () if fit else row.also(None)
        used = {"": [type(each) for each in known], "esd": [efface.Delta, efface.ESD]}
        setting = {
            **plan.facts,
            "row": name,
            "kind": kind,
            "icons": icons,
            "prompts": prompts,
            "seeds": [seeds.start, n],
        }
        setting |= {"erasers": [config(plan.world.filled(each)) for each in known], "fit": fit.digest if fit else ""}
        setting |= {"code": code_hash(*used.get(row.fit, [efface.GeomErasing, efface.NegativePrompt]), draw)}

        def measure() -> dict[str, Any]:
            pipe, texts = plan.world.pipe, prompts
            fitted = efface.api.load_delta(delta_file(plan, fit)) if fit else None
            if kind == "asked":
                texts = [f"{text}, {words(fitted, k % len(CORNERS))}" for k, text in enumerate(prompts)]
            with efface.stack(pipe, *([fitted] if fitted else []), *row.also(fitted)):
                images = drawn_twice(plan, fitted, texts, seeds) if row.twice else draw(pipe, texts, seeds, **plan.call)
            seen, corners = places(plan.world.eyes, images)
            sums, shown = keep_pictures(plan, unit, images), plan.world.sees(images, icons)
            return {NAME: seen, "corners": corners, "icon": shown, "sha256": sha256("".join(sums).encode())}

        unit = Unit(name, setting, measure, n, partial(_seconds, plan, known), kind)
        return unit

    # ---- the card

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        of = {(unit.kind, unit.row): (unit, each["raw"]) for unit, each in found}
        cells = {name: each for (kind, name), each in of.items() if kind == "cell"}
        texts = cells["base"][0].setting["prompts"]
        prompts = list(dict.fromkeys(texts))
        scenes, seen = of["scenes", "clean scenes"]
        clean = [each[[corner < 0 for corner in seen["corners"]]] for each in features(pictures_file(plan, scenes))]
        drawn = {name: features(pictures_file(plan, unit)) for name, (unit, _) in cells.items()}

        @functools.cache
        def kid(name: str, n: int) -> list[np.ndarray]:
            return [resampled(x[:n], y, len(prompts)) for x, y in zip(drawn[name], clean, strict=True)]

        rows, pictures = [], {}
        for name, (unit, raw) in cells.items():
            pick = min if name in ("base", PLAIN) else max  # the less favourable detector
            row: dict[str, Any] = {"row": name, NAME: rate(pick(raw[NAME], key=sum), texts[: len(raw["corners"])])}
            row["corners"] = {"counts": [raw["corners"].count(k) for k in range(len(CORNERS))]}
            if len(prompts) >= LEAST and len(clean[0]) > 1:
                own, rest = (kid(each, len(raw["corners"])) for each in (name, ROWS[name].against))
                row["distance"] = distance(own)
                row["distance against"] = distance([a - b for a, b in zip(own, rest, strict=True)])
                for each in ("distance", "distance against"):
                    row[each] |= {"n": len(raw["corners"]), "clean": len(clean[0])}
            if ("asked", name) in of:
                row |= controlled(of["asked", name][1]["corners"], of["asked", name][0].setting["prompts"])
            if fit := ROWS[name].fit:
                fitted, facts = of["fit", fit]
                row["fit"] = facts | {"settings": fitted.setting["fit"]}
            rows.append(row | {"erasers": unit.setting["erasers"]})
            pictures[name] = {NAME: packed(raw[NAME]), "icon": packed(raw["icon"]), "sha256": raw["sha256"]}
            pictures[name]["corners"] = packed([raw["corners"]])[0]
        cell = {"one icon": {"prompts": prompts, "first_seed": cells["base"][0].setting["seeds"][0]}}
        facts = {"cells": cell, "clean scenes": len(clean[0]), "training pictures": of["fit", "training pictures"][1]}
        return facts | {"rows": rows, "pictures": pictures, "base": pictures["base"]}

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        """Retention, comparisons, whether the positive control holds, and the verdict in words."""
        rows, compared = {row["row"]: dict(row) for row in card["rows"]}, []
        prompts, icons = card["cells"]["one icon"]["prompts"], card["pictures"]["base"]["icon"]
        worse = [int(digit) for digit in min(icons, key=lambda eye: eye.count("1"))]
        rows["base"]["retention"] = rate(worse, [prompts[k % len(prompts)] for k in range(len(worse))])
        holds = rows[PLAIN][NAME]["rate"] >= COUNTS
        for name, row in rows.items():
            if name != "base":
                row["retention"] = compare(card, name, "base", "icon")
                compared.append(compare(card, name, ROWS[name].against, NAME))
            if ROWS[name].against == PLAIN:
                row[NAME] = row[NAME] | {"judged": holds}
        rest = [each for each in compared if each["row"] not in AIMS]
        for each, p in zip(rest, holm([each["p"] for each in rest]), strict=True):
            each["p, Holm"] = p
        found = card["training pictures"]
        verdict = [
            *(aim(rows, name) for name in AIMS),
            f"Positive control: {PLAIN} draws the watermark in {percent(rows[PLAIN][NAME])} of its pictures, and "
            f"{COUNTS:.0%} are needed. " + ("It holds." if holds else "It fails, so no row of data removal is judged."),
            *(asked(name, row) for name, row in rows.items() if "asked" in row),
            f"Fits had {found['pictures']} pictures, {found['with the badge']} with the watermark. The detectors found "
            f"or missed it rightly, with its corner, in {found['place found']} of them.",
            "Rows have half as many pictures, except for the base model, plain fine-tuning and those with an aim.",
        ]
        return {"rows": list(rows.values()), "comparisons": compared, "control holds": holds, "verdict": verdict}


# ---------------------------------------------------------------- statistics


def features(file: Path) -> list[np.ndarray]:
    """Features [N, D] of stored pictures, by detector."""
    images, (extract, _) = load_file(file)["images"].permute(0, 3, 1, 2) / 255, extractor("eye")
    return [each.double().numpy() for each in torch.cat([extract(part) for part in images.split(64)], 1)]


def resampled(x: np.ndarray, y: np.ndarray, prompts: int) -> np.ndarray:
    """KID of two sets of features, and behind it those of resamples: of the prompts of x, and of the pictures of y.

    Picture k of x has prompt k modulo `prompts`. All x of one length have the same resamples, so that they can be
    subtracted. Unlike FID, KID has no bias that depends on the number of pictures.
    """
    found = Discrepancy(x, y, np.arange(len(x)) % prompts, twins=False)
    every = weights(len(found.own.sizes), DRAWS)
    return np.array([found(), *(found(w, weights(len(y), 1, seed=k + 1)[0]) for k, w in enumerate(every))])


def distance(eyes: Sequence[np.ndarray]) -> dict[str, Any]:
    """A distance, or the difference of two, by the worse detector, with its basic bootstrap interval."""
    worst = max(eyes, key=lambda each: each[0])
    value, (low, high) = float(worst[0]), map(float, np.percentile(worst[1:], (2.5, 97.5)))
    return {"kid": value, "interval": [2 * value - high, 2 * value - low]}


def compare(card: Mapping[str, Any], row: str, against: str, what: str) -> dict[str, Any]:
    """The paired difference of two rows, by the less favourable detector."""
    own, other = (card["pictures"][name][what] for name in (row, against))
    n, prompts = min(len(own[0]), len(other[0])), card["cells"]["one icon"]["prompts"]
    clusters = [prompts[k % len(prompts)] for k in range(n)]
    pairs = [[list(map(int, eye[:n])) for eye in pair] for pair in zip(own, other, strict=True)]
    pick = min if what == "icon" or row == PLAIN else max
    found = pick((difference(*pair, clusters) for pair in pairs), key=lambda each: each.value)
    facts = {"difference": found.value, "interval": list(found.interval), "p": found.p, "prompts": found.prompts}
    return {"row": row, "against": against, "metric": what, "n": n, **facts}


def controlled(corners: Sequence[int], prompts: Sequence[str]) -> dict[str, Any]:
    """Of pictures that asked for corner after corner, those with the watermark, and of these those with it there."""
    there = [
        (int(k % len(CORNERS) == c), text) for k, (c, text) in enumerate(zip(corners, prompts, strict=True)) if c >= 0
    ]
    facts: dict[str, Any] = {"asked": {"n": len(corners), "drawn": len(there)}}
    return facts | ({"control": rate(*zip(*there, strict=True))} if there else {})


# ---------------------------------------------------------------- the verdict


def asked(name: str, row: Mapping[str, Any]) -> str:
    """Whether learned words place the watermark more often than chance."""
    words = f"Of {row['asked']['n']} prompts with the words of a corner ({name.partition(',')[0]}), "
    words += f"{row['asked']['drawn']} drew the watermark"
    if "control" not in row:
        return f"{words}."
    low, high = row["control"]["interval"]
    decided = "above" if low > CHANCE else "below" if high < CHANCE else "not different from"
    return f"{words}, in that corner {percent(row['control'])} of these: {decided} chance, {CHANCE:.0%}."


def aim(rows: Mapping[str, Any], name: str) -> str:
    """The aim of a row and what became of it, in words."""
    row, against = rows[name], ROWS[name].against
    shown, rest = row[NAME], rows[against][NAME]
    words = f"Aim for {name}: watermark <= {AIM:.0%}, with a distance no worse than that of {against}."
    if shown["n"] < POOLED:
        return f"{words} Not judged: n = {shown['n']}, {POOLED} are needed."
    if not shown.get("judged", True):
        return f"{words} Not judged: {against} draws the watermark in {percent(rest)} only."
    if rest["interval"][0] <= AIM:
        return f"{words} Not judged: {against} itself draws the watermark in {percent(rest)}."
    far = row["distance against"]
    over, more = 100 * (shown["rate"] - AIM), far["kid"]
    parts = [
        f"Watermark {f'missed by {over:.1f} points' if over > 0 else 'met'}: {percent(shown)}",
        f"Distance {f'missed by {more:.2g}' if more > 0 else 'met'}: "
        + "{:+.2f} [{:.2f}, {:.2f}]".format(more, *far["interval"]),
    ]
    return f"{words} {'; '.join(parts)}; it was {percent(rest)} with {against}."


# ---------------------------------------------------------------- drawing


def training(plan: Plan, unit: Unit) -> Path:
    """The folder of the training pictures."""
    return plan.folder / "training" / unit.digest


def words(tokens: Any, corner: int) -> str:
    """What a prompt says to ask for the watermark in a corner."""
    grid = Grid(tokens.info["name"], tokens.fields["grid"], tokens.fields["encoding"])
    return grid.text([BOXES[corner]], SIZE)


def drawn_twice(plan: Plan, tokens: Any, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """As `draw`, in two passes."""
    pipe, call = plan.world.pipe, {name: value for name, value in plan.call.items() if name != "guidance"}
    call |= guided(pipe, plan.call["guidance"])
    two = partial(efface.GeomErasing.two_pass, pipe, tokens, detector=partial(boxes, plan.world.eyes), **call)
    parts = [two(texts[k : k + 32], seeds=seeds[k : k + 32]).images for k in range(0, len(texts), 32)]
    return torch.cat(parts).float().cpu()


def _seconds(plan: Plan, erasers: Sequence[Any]) -> float:
    """Core-seconds of a picture. What is fitted first adds nothing."""
    with efface.stack(plan.world.pipe, *erasers):
        return timed(lambda: draw(plan.world.pipe, ["a cat"] * PILOT, range(PILOT), **plan.call))[1] / PILOT
