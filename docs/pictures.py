"""The pictures of README and docs, drawn again: `python docs/pictures.py`, about three minutes on two cores.

Nothing is picked: each row shows the first prompts of its cell, each with one seed. No figure is measured on these
seeds.
"""

from __future__ import annotations

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


def main() -> None:
    prompts = cell("alcohol", "pair", 3) + ["a night at the pub"] * 3
    erasers = {"negative": efface.NegativePrompt("alcohol"), "EIUP": efface.EIUP("alcohol")}
    erasers["EIUP, swap"] = efface.EIUP("alcohol", normalization="swap")
    rows(prompts, erasers).save(DOCS / "front.png")
    cells = (("alcohol", "theme"), ("cat", "pair"), ("neon sign", "explicit"))
    column([rows(cell(*each), {"EIUP": efface.EIUP(each[0])}) for each in cells]).save(DOCS / "eiup.png")


if __name__ == "__main__":
    main()
