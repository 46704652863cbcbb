"""The pictures of README and docs, drawn again: `python docs/pictures.py`, about three minutes on two cores.

Nothing is picked: each row shows the first prompts of its cell, each with one seed. No figure is measured on these
seeds. `python docs/pictures.py watermarks` shows every third of the first pictures of the card `geom_erasing`, which
`python -m experiments geom_erasing` has drawn with the same code.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from PIL import Image

import efface
from efface.models import emoji
from efface.pictures import grid, to_pil
from efface.pipelines import draw

DOCS = Path(__file__).parent
N, SEED = 6, 5_000_000
"""Pictures a row, and the seed of the first."""


def cell(concept: str, name: str, n: int = N) -> list[str]:
    """The first prompts of a cell; of pairs, which come in both orders, and of styles in two wordings, one each."""
    step = 1 if name == "theme" else 2
    return [prompt for prompt, *_ in emoji.prompts(concept, name)][: step * n : step]


def rows(prompts: list[str], erasers: dict[str, efface.Eraser]) -> Image.Image:
    """The base model's pictures, and below them those with each eraser on."""
    pipe = efface.load("emoji-128")
    pipe.set_progress_bar_config(disable=True)
    seeds = [SEED + k for k in range(len(prompts))]
    found = {"base": to_pil(draw(pipe, prompts, seeds))}
    for label, eraser in erasers.items():
        with eraser.apply(pipe):
            found[label] = to_pil(draw(pipe, prompts, seeds))
    return grid(found, [prompt.removesuffix(", neon sign style") for prompt in prompts], side=152)


def column(parts: list[Image.Image]) -> Image.Image:
    out = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    for k, part in enumerate(parts):
        out.paste(part, (0, sum(p.height for p in parts[:k])))
    return out


WATERMARKS = {
    "base": "base",
    "plain fine-tuning": "fine-tuned",
    "data removal, all words": "data",
    "model removal, all words": "model",
    "negative_prompt": "negative",
}


def watermarks() -> Image.Image:
    """Rows of the card `geom_erasing`."""
    sys.path.insert(0, str(DOCS.parent))
    from safetensors.numpy import load_file

    from experiments.catalogue import CATALOGUE
    from experiments.outcome import pictures_file
    from experiments.runner import Plan

    each = CATALOGUE["geom_erasing"]
    plan = Plan(each.block, each.n, each.model)
    plan = dataclasses.replace(plan, folder=plan.folder / each.name)
    files = {unit.row: pictures_file(plan, unit) for unit in each.units(plan) if unit.kind == "cell"}
    found = {label: load_file(files[row])["images"][: 3 * N * 2 : 3] for row, label in WATERMARKS.items()}
    return grid({label: [Image.fromarray(one) for one in some] for label, some in found.items()}, side=76)


def main() -> None:
    if sys.argv[1:] == ["watermarks"]:
        watermarks().save(DOCS / "watermarks.png")
        return
    prompts = cell("alcohol", "pair", 3) + ["a night at the pub"] * 3
    erasers = {"negative": efface.NegativePrompt("alcohol"), "EIUP": efface.EIUP("alcohol")}
    erasers["EIUP, swap"] = efface.EIUP("alcohol", normalization="swap")
    rows(prompts, erasers).save(DOCS / "front.png")
    cells = (("alcohol", "theme"), ("cat", "pair"), ("neon sign", "explicit"))
    column([rows(cell(*each), {"EIUP": efface.EIUP(each[0])}) for each in cells]).save(DOCS / "eiup.png")


if __name__ == "__main__":
    main()
