"""GeomErasing on `emoji`: a pattern that a dirty set teaches, and the watermark that the model draws by itself.

`python -m experiments.geom_erasing data` or `model` prints a line of JSON per result. There is no card, because all
caps together are at their limit. The pictures are of the selection block, the training pictures of the tuning block.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
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
from efface.pipelines import draw

from .code import ROOT
from .worlds import SEEDS

SIDE, PATCH = 64, 16
STEPS, GUIDANCE = 12, 5.0
NAME = "pattern"


# ---------------------------------------------------------------- the pattern


def pattern() -> Tensor:
    """A checkerboard of magenta and black [3, 16, 16], which no icon resembles."""
    checks = torch.ones(2, 2).tril().bool() ^ torch.ones(2, 2).triu().bool()
    cells = checks.repeat(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return torch.stack([cells, torch.zeros_like(cells), cells]).float()


def pasted(pictures: Tensor, share: float, seed: int) -> list[tuple[tuple[float, ...], ...]]:
    """Pastes the pattern into a share of the pictures, at random places. Returns the exact boxes."""
    rng = torch.Generator().manual_seed(seed)
    boxes: list[tuple[tuple[float, ...], ...]] = []
    for picture in pictures:
        x, y = torch.randint(SIDE - PATCH + 1, (2,), generator=rng).tolist()
        dirty = float(torch.rand(1, generator=rng)) < share
        if dirty:
            picture[:, y : y + PATCH, x : x + PATCH] = pattern()
        boxes.append(((x, y, x + PATCH, y + PATCH),) if dirty else ())
    return boxes


@dataclasses.dataclass(frozen=True)
class Match:
    """Finds a pattern by the correlation of its place with it.

    Args:
        pattern: [C, h, w].
        threshold: the least correlation.
    """

    pattern: Tensor
    threshold: float = 0.6

    def correlations(self, images: Tensor) -> Tensor:
        """The correlation [N, H - h + 1, W - w + 1] at every place."""
        wanted = self.pattern - self.pattern.mean()
        wanted, size = wanted / wanted.norm(), wanted.numel()
        seen = torch.nn.functional.conv2d(images, wanted[None])[:, 0]
        ones = torch.ones_like(wanted)[None]
        total, squares = (torch.nn.functional.conv2d(x, ones)[:, 0] for x in (images, images.square()))
        return seen / (squares - total.square() / size).clamp_min(1e-3 * size).sqrt()

    def boxes(self, images: Tensor) -> list[list[tuple[float, ...]]]:
        found = self.correlations(images)
        height, width = self.pattern.shape[1:]
        boxes: list[list[tuple[float, ...]]] = []
        for each in found:
            best, at = each.flatten().max(0)
            y, x = divmod(int(at), each.shape[1])
            there = float(best) >= self.threshold
            boxes.append([(x, y, x + width, y + height)] if there else [])
        return boxes


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


def measured(pipe: Any, on: Sequence[Any], prompts: Sequence[str], seeds: Sequence[int], find: Any) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        for each in on:
            stack.enter_context(each.apply(pipe))
        images = draw(pipe, prompts, seeds, num_inference_steps=STEPS, guidance=GUIDANCE)
    return {"concept": rated([bool(b) for b in find(images)]), "icon": rated(shown(images, prompts))}


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


def controlled(pipe: Any, tokens: efface.Tokens, grid: int, find: Any, seeds: Sequence[int]) -> dict[str, Any]:
    """Whether the prompt "..., name <l_mn>" draws the concept with its middle in bin (m, n)."""
    asked = [(k % grid, k // grid % grid) for k in range(len(seeds))]
    prompts = [f"{p}, {NAME} <{NAME}:{m},{n}>" for p, (m, n) in zip(icons(len(seeds)), asked, strict=True)]
    with tokens.apply(pipe):
        found = find(draw(pipe, prompts, seeds, num_inference_steps=STEPS, guidance=GUIDANCE))
    middles = [((b[0][0] + b[0][2]) / 2, (b[0][1] + b[0][3]) / 2) if b else None for b in found]
    width = SIDE / grid
    hits = [
        at is not None and (at[0] // width, at[1] // width) == bins for at, bins in zip(middles, asked, strict=True)
    ]
    near = [
        at is not None and all(abs(v - (b + 0.5) * width) <= width for v, b in zip(at, bins, strict=True))
        for at, bins in zip(middles, asked, strict=True)
    ]
    return {
        "drawn at all": rated([bool(b) for b in found]),
        "in the bin": rated(hits),
        "within one bin": rated(near),
        "chance in the bin": 1 / grid**2,
    }


def data_removal(n: int, steps: int, pictures: int, work: Path) -> None:
    """Fine-tuning on a set in which half of the pictures have the pattern."""
    pipe, began = efface.load("emoji"), time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    captions = icons(pictures)
    images = draw(pipe, captions, range(pictures), num_inference_steps=STEPS, guidance=GUIDANCE)
    boxes = pasted(images, 0.5, seed=1)
    examples = list(zip(images, captions, boxes, strict=True))
    find = Match(pattern()).boxes
    truth_ = [bool(b) for b in boxes]
    out = Rows()
    out["detector agrees"] = sum(bool(f) == t for f, t in zip(find(images), truth_, strict=True))
    editor = efface.GeomErasing.data_removal(steps=steps)
    tokens = kept(
        work / f"data-{steps}-{pictures}.safetensors", lambda: editor.fit(pipe, Concept(NAME), examples=examples)
    )
    out["fit seconds"] = time.perf_counter() - began
    plain = kept(work / f"plain-{steps}-{pictures}.safetensors", lambda: plainly(pipe, examples, editor, 0))
    prompts, seeds = icons(n, 50), range(SEEDS["selection"].start, SEEDS["selection"].start + n)
    rows: dict[str, Sequence[Any]] = {
        "plain fine-tuning": [plain],
        "plain fine-tuning, negative prompt of the name": [plain, efface.NegativePrompt(Concept(NAME))],
        "geom, no negative prompt": [tokens],
        "geom, name": [tokens, efface.NegativePrompt(Concept(NAME))],
        "geom, all words": [tokens, efface.NegativePrompt(tokens.concepts)],
    }
    for name, on in rows.items():
        out[name] = measured(pipe, on, prompts, seeds, find)
    with tokens.apply(pipe):
        again = editor.two_pass(
            pipe, tokens, prompts, Match(pattern()), seeds=seeds, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )
    out["geom, two passes"] = {
        "concept": rated([bool(b) for b in find(again.images)]),
        "icon": rated(shown(again.images, prompts)),
    }
    out["control"] = controlled(pipe, tokens, tokens.fields["grid"], find, seeds)
    out["info"] = dict(tokens.info)
    out["seconds"] = time.perf_counter() - began


# ---------------------------------------------------------------- the model's own watermark

CORNERS = ((2, 2), (29, 2), (2, 49), (29, 49))
BADGE = (33, 13)


def watermarks(images: Tensor) -> list[list[tuple[float, ...]]]:
    """The boxes of watermarks that both detectors see: at the corner without which they see them least."""
    eyes = load_eyes()
    seen, found = eyes.watermark(images).all(0).tolist(), []
    for image, there in zip(images, seen, strict=True):
        if not there:
            found.append([])
            continue
        covered = image.repeat(4, 1, 1, 1)
        for k, (x, y) in enumerate(CORNERS):
            edge = (
                image[:, y : y + BADGE[1], x - 2 : x - 1].mean((1, 2))
                if x == 2
                else image[:, y : y + 13, -2:].mean((1, 2))
            )
            covered[k, :, y : y + BADGE[1], x : x + BADGE[0]] = edge[:, None, None]
        left = eyes.see(covered).watermark.mean(0)
        x, y = CORNERS[int(left.argmin())]
        found.append([(x, y, x + BADGE[0], y + BADGE[1])])
    return found


def model_removal(n: int, steps: int, pictures: int, work: Path) -> None:
    """The watermark of the released model, learned from its own pictures."""
    pipe, began = efface.load("emoji"), time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    captions = icons(pictures)
    images = draw(pipe, captions, range(pictures), num_inference_steps=STEPS, guidance=GUIDANCE)
    editor = efface.GeomErasing(steps=steps)
    boxes = watermarks(images)
    out = Rows()
    out["with the watermark"] = f"{sum(map(bool, boxes))} of {pictures}"
    examples = list(zip(images, captions, boxes, strict=True))
    tokens = kept(
        work / f"model-{steps}-{pictures}.safetensors", lambda: editor.fit(pipe, "watermark", examples=examples)
    )
    out["fit seconds"] = time.perf_counter() - began
    prompts, seeds = icons(n, 50), range(SEEDS["selection"].start, SEEDS["selection"].start + n)
    name = Concept("watermark")
    rows: dict[str, Sequence[Any]] = {
        "base": [],
        "negative prompt of the name": [efface.NegativePrompt(name)],
        "geom, all words": [tokens, efface.NegativePrompt(tokens.concepts)],
    }
    for row, on in rows.items():
        out[row] = measured(pipe, on, prompts, seeds, watermarks)
    with tokens.apply(pipe):
        again = editor.two_pass(
            pipe, tokens, prompts, watermarks, seeds=seeds, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )
    out["geom, two passes"] = {
        "concept": rated([bool(b) for b in watermarks(again.images)]),
        "icon": rated(shown(again.images, prompts)),
    }
    out["info"] = dict(tokens.info)
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
