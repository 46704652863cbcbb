"""docs/eiup.png: the first pictures of three cells, of the base model and with EIUP; not picked."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import efface
from efface.pictures import grid, to_pil
from efface.pipelines import draw

from .worlds import seeds, world

SHOWN = (("alcohol", "theme"), ("cat", "pair"), ("neon sign", "explicit"))


def write(path: Path, n: int = 6) -> None:
    """Prompts and seeds of the selection block: the test block is for figures."""
    here, parts = world("emoji"), []
    for concept, cell in SHOWN:
        of, block = here.prompts(concept, cell, "selection"), seeds("selection", concept, cell, n)
        prompts = [of[k % len(of)][0] for k in range(n)]
        base = draw(here.pipe, prompts, block)
        with efface.EIUP(concept).apply(here.pipe):
            erased = draw(here.pipe, prompts, block)
        headings = [prompt.removesuffix(", neon sign style") for prompt in prompts]
        parts.append(grid({"base": to_pil(base), "erased": to_pil(erased)}, headings, side=152))
    out = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    for k, part in enumerate(parts):
        out.paste(part, (0, sum(p.height for p in parts[:k])))
    out.save(path)
