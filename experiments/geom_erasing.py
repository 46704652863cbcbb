"""GeomErasing on `emoji`: a set with more watermarks than the model draws, and those that it draws by itself.

`python -m experiments.geom_erasing data` or `model` prints a line of JSON per result. There is no card, because all
caps together are at their limit. The pictures are of the selection block, the training pictures of the tuning block.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import efface
from efface import api
from efface.core import Concept
from efface.delta import Delta
from efface.delta.embeddings import mean_row
from efface.delta.tokens import learning_words
from efface.editors._examples import given
from efface.editors._geometry import Grid
from efface.editors._located import Data, Located, drawing, weighted
from efface.editors._settings import Training
from efface.editors._training import run
from efface.intervals import wilson
from efface.models.emoji import vocabulary
from efface.models.emoji.eyes import INDEX, load_eyes
from efface.pictures import to_pil
from efface.pipelines import draw

from .code import ROOT
from .worlds import SEEDS

SIDE = 64
STEPS, GUIDANCE = 12, 3.0
NAME = "watermark"


# ---------------------------------------------------------------- the badge

CORNERS = ((2, 2), (29, 2), (2, 49), (29, 49))
BADGE = (33, 13)


def badge() -> Image.Image:
    """The watermark of the model's training pictures."""
    image = Image.new("RGBA", BADGE)
    ink = ImageDraw.Draw(image)
    ink.rounded_rectangle((0, 0, 32, 12), 3, fill=(90, 90, 90, 150))
    ink.text((16.5, 6.5), "STOCK", fill=(255, 255, 255, 235), font=ImageFont.load_default(9), anchor="mm")
    return image


def pasted(images: Tensor, share: float, seed: int) -> list[tuple[Image.Image, tuple[tuple[float, ...], ...]]]:
    """The pictures, with the badge in a corner of a share of them, and the exact boxes."""
    rng, made, mark = torch.Generator().manual_seed(seed), [], badge()
    for picture in to_pil(images):
        x, y = CORNERS[int(torch.randint(4, (1,), generator=rng))]
        dirty = float(torch.rand(1, generator=rng)) < share
        if dirty:
            picture.paste(mark, (x, y), mark)
        made.append((picture, ((x, y, x + BADGE[0], y + BADGE[1]),) if dirty else ()))
    return made


def watermarks(images: Tensor) -> list[list[tuple[float, ...]]]:
    """The boxes of watermarks that both detectors see: at the corner without which they see them least."""
    eyes = load_eyes()
    found: list[list[tuple[float, ...]]] = []
    for image, there in zip(images, eyes.watermark(images).all(0).tolist(), strict=True):
        if not there:
            found.append([])
            continue
        covered = image.repeat(4, 1, 1, 1)
        for k, (x, y) in enumerate(CORNERS):
            edge = image[:, y : y + BADGE[1], slice(0, 2) if x == 2 else slice(-2, None)].mean((1, 2))
            covered[k, :, y : y + BADGE[1], x : x + BADGE[0]] = edge[:, None, None]
        x, y = CORNERS[int(eyes.see(covered).watermark.mean(0).argmin())]
        found.append([(x, y, x + BADGE[0], y + BADGE[1])])
    return found


# ---------------------------------------------------------------- what is measured


def icons(n: int, first: int = 0) -> list[str]:
    """Icons with one word as their caption."""
    captions = vocabulary()["captions"]
    single = [text for text in sorted(captions.values()) if len(text.split()) == 2]
    step = next(s for s in (7, 11, 13) if len(single) % s)
    return [single[(first + k) * step % len(single)] for k in range(n)]


def kept(file: Path, fit: Callable[[], Any]) -> Any:
    """The result of a fit, which is stored in a file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        fit().save(file)
    return api.load_delta(file)


class Rows(dict[str, Any]):
    """Results that are printed as they come."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        print(json.dumps({name: value}), flush=True)


def rated(hits: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(hits), len(hits))
    return {"rate": sum(hits) / len(hits), "n": len(hits), "interval": [round(low, 3), round(high, 3)]}


def shown(images: Tensor, prompts: Sequence[str]) -> list[bool]:
    """Whether both detectors see each prompt's icon."""
    eyes, icon = load_eyes(), {text: name for name, text in vocabulary()["captions"].items()}
    seen = eyes.icons(eyes.see(images)).all(0)
    return [bool(row[INDEX[icon[prompt]]]) for row, prompt in zip(seen, prompts, strict=True)]


def measured(pipe: Any, on: Sequence[Any], prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        for each in on:
            stack.enter_context(each.apply(pipe))
        images = draw(pipe, prompts, seeds, num_inference_steps=STEPS, guidance=GUIDANCE)
    return {"concept": rated([bool(b) for b in watermarks(images)]), "icon": rated(shown(images, prompts))}


def plainly(pipe: Any, examples: Sequence[Any], editor: efface.GeomErasing, seed: int) -> Delta:
    """Plain fine-tuning on the same pictures: captions without words, equal weights."""
    clean = [(picture, text, ()) for picture, text, _ in examples]
    editor = editor.resolved(pipe)
    with learning_words(pipe, ("<unused>",), mean_row(pipe, "a")) as words:
        data = Data(pipe, given(clean), Grid(NAME, 1, "bins"), size=(SIDE, SIDE), ratio=1.0, flip=False)
        net = Located(
            pipe, data.texts, words.embeddings, trains_weights=True, train=editor.train, precision="auto", lr=1
        )
        settings = Training(
            steps=editor.steps, lr=editor.lr_weights, batch=editor.batch, reuse=1, clip=editor.clip, weight_decay=1e-2
        )
        state = run(
            net,
            settings,
            drawing(net, data, editor.batch, editor.dropout),
            lambda student, points, _: weighted(net, student, points),
            seed=seed,
            name="plain fine-tuning",
            identity={},
        )
    return Delta.fitted(editor, pipe, net.change(state.student), (Concept(NAME),), seed=seed)


def controlled(pipe: Any, tokens: efface.Tokens, seeds: Sequence[int]) -> dict[str, Any]:
    """Whether a prompt with the words of a corner draws the badge in that corner."""
    grid, asked = Grid(NAME, tokens.fields["grid"], "bins"), [CORNERS[k % 4] for k in range(len(seeds))]
    boxes = [(float(x), float(y), float(x + BADGE[0]), float(y + BADGE[1])) for x, y in asked]
    named = [grid.text([box], (SIDE, SIDE)) for box in boxes]
    prompts = [f"{text}, {words}" for text, words in zip(icons(len(seeds)), named, strict=True)]
    with tokens.apply(pipe):
        found = watermarks(draw(pipe, prompts, seeds, num_inference_steps=STEPS, guidance=GUIDANCE))
    hits = [bool(f) and f[0][:2] == corner for f, corner in zip(found, asked, strict=True)]
    right = [hit for hit, f in zip(hits, found, strict=True) if f]
    return {"drawn": rated([bool(f) for f in found]), "of these in the corner": rated(right) if right else None}


def dirty(pipe: Any, pictures: int, out: Rows) -> list[Any]:
    """Pictures that the model draws without the watermark, half of which then get one."""
    captions = icons(pictures)
    clean = draw(pipe, captions, range(pictures), num_inference_steps=STEPS, guidance=GUIDANCE)
    keep = [k for k, boxes in enumerate(watermarks(clean)) if not boxes]
    made = pasted(clean[keep], 0.5, seed=1)
    examples = [(picture, captions[k], boxes) for k, (picture, boxes) in zip(keep, made, strict=True)]
    seen = watermarks(torch.cat([each.pixels for each in given(examples)]))
    corners = [list(f) == list(e[2]) for f, e in zip(seen, examples, strict=True)]
    out["corner found"] = f"{sum(corners)} of {len(examples)}"
    return examples


def compared(pipe: Any, rows: Mapping[str, Sequence[Any]], tokens: Any, n: int, out: Any) -> None:
    """Measures each row, two passes, and whether words place the watermark."""
    prompts, seeds = icons(n, 50), range(SEEDS["selection"].start, SEEDS["selection"].start + n)
    for name, on in rows.items():
        out[name] = measured(pipe, on, prompts, seeds)
    with tokens.apply(pipe):
        again = efface.GeomErasing.two_pass(
            pipe, tokens, prompts, watermarks, seeds=seeds, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )
    out["geom, two passes"] = {
        "concept": rated([bool(b) for b in watermarks(again.images)]),
        "icon": rated(shown(again.images, prompts)),
    }
    out["control"] = controlled(pipe, tokens, seeds[:64])
    out["info"] = dict(tokens.info)


def data_removal(n: int, steps: int, pictures: int, work: Path) -> None:
    """Fine-tuning on a set in which half of the pictures have the watermark."""
    pipe, began = efface.load("emoji"), time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    out = Rows()
    examples = dirty(pipe, pictures, out)
    editor = efface.GeomErasing.data_removal(steps=steps, lr_weights=3e-4)
    tokens = kept(
        work / f"data-{steps}-{pictures}.safetensors", lambda: editor.fit(pipe, Concept(NAME), examples=examples)
    )
    out["fit seconds"] = time.perf_counter() - began
    plain = kept(work / f"plain-{steps}-{pictures}.safetensors", lambda: plainly(pipe, examples, editor, 0))
    rows: dict[str, Sequence[Any]] = {
        "base": [],
        "plain fine-tuning": [plain],
        "plain fine-tuning, negative prompt of the name": [plain, efface.NegativePrompt(Concept(NAME))],
        "geom, no negative prompt": [tokens],
        "geom, name": [tokens, efface.NegativePrompt(Concept(NAME))],
        "geom, all words": [tokens, efface.NegativePrompt(tokens.concepts)],
    }
    compared(pipe, rows, tokens, n, out)
    out["seconds"] = time.perf_counter() - began


def model_removal(n: int, steps: int, pictures: int, work: Path) -> None:
    """The watermark of the released model: only words are learned."""
    pipe, began = efface.load("emoji"), time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    out = Rows()
    examples, editor = dirty(pipe, pictures, out), efface.GeomErasing(steps=steps)
    tokens = kept(
        work / f"model-{steps}-{pictures}.safetensors", lambda: editor.fit(pipe, "watermark", examples=examples)
    )
    out["fit seconds"] = time.perf_counter() - began
    name = Concept("watermark")
    rows: dict[str, Sequence[Any]] = {
        "base": [],
        "negative prompt of the name": [efface.NegativePrompt(name)],
        "geom, all words": [tokens, efface.NegativePrompt(tokens.concepts)],
    }
    compared(pipe, rows, tokens, n, out)
    out["seconds"] = time.perf_counter() - began


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m experiments.geom_erasing", description=__doc__)
    made.add_argument("setting", choices=("data", "model"))
    made.add_argument("--n", type=int, default=32)
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--pictures", type=int, default=64)
    made.add_argument(
        "--work", type=Path, default=ROOT / "runs/geom_erasing", help="folder of fits; other code needs another"
    )
    given_ = made.parse_args()
    measure = data_removal if given_.setting == "data" else model_removal
    measure(given_.n, given_.steps, given_.pictures, given_.work)


if __name__ == "__main__":
    main()
