"""The pictures of README and docs, drawn again: `python docs/pictures.py`, about three minutes on two cores.

Nothing is picked: each row shows the first prompts of its cell, each with one seed. No figure is measured on these
seeds. `python docs/pictures.py watermarks` shows every third of the first pictures of the card `geom_erasing`, and
`professions` draws with the vectors of the card `directions`; `python -m experiments` has to have drawn that card with
the same code.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from PIL import Image

import efface
import efface.api
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


def drawn(name: str) -> tuple[Any, list[Any]]:
    """The plan and the units of an experiment."""
    sys.path.insert(0, str(DOCS.parent))
    from experiments.catalogue import CATALOGUE
    from experiments.runner import Plan

    each = CATALOGUE[name]
    plan = Plan(each.block, each.n, each.model)
    plan = dataclasses.replace(plan, folder=plan.folder / each.name)
    return plan, each.units(plan)


def watermarks() -> Image.Image:
    """Rows of the card `geom_erasing`."""
    from safetensors.numpy import load_file

    plan, units = drawn("geom_erasing")
    from experiments.outcome import pictures_file

    files = {unit.row: pictures_file(plan, unit) for unit in units if unit.kind == "cell"}
    found = {label: load_file(files[row])["images"][: 3 * N * 2 : 3] for row, label in WATERMARKS.items()}
    return grid({label: [Image.fromarray(one) for one in some] for label, some in found.items()}, side=76)


def professions() -> Image.Image:
    """Two pictures of each profession: the base model, and with the vectors of the card `directions`."""
    plan, units = drawn("directions")
    from experiments.outcome import delta_file

    (fit,) = (unit for unit in units if unit.kind == "fit" and unit.row == "directions")
    learned = efface.api.load_delta(delta_file(plan, fit)).fair()
    jobs = [job for job in emoji.vocabulary()["professions"] for _ in range(2)]
    prompts, seeds = [f"a {job}" for job in jobs], [SEED + k for k in range(len(jobs))]
    found = {"base": to_pil(draw(plan.world.pipe, prompts, seeds))}
    with efface.stack(plan.world.pipe, dataclasses.replace(learned, strength=1.25)):
        found["fair"] = to_pil(draw(plan.world.pipe, prompts, seeds))
    return grid(found, jobs, side=76)


PAGES = {"watermarks": watermarks, "professions": professions}


def main() -> None:
    for name in sys.argv[1:]:
        PAGES[name]().save(DOCS / f"{name}.png")
    if sys.argv[1:]:
        return
    prompts = cell("alcohol", "pair", 3) + ["a night at the pub"] * 3
    erasers = {"negative": efface.NegativePrompt("alcohol"), "EIUP": efface.EIUP("alcohol")}
    erasers["EIUP, swap"] = efface.EIUP("alcohol", normalization="swap")
    rows(prompts, erasers).save(DOCS / "front.png")
    cells = (("alcohol", "theme"), ("cat", "pair"), ("neon sign", "explicit"))
    column([rows(cell(*each), {"EIUP": efface.EIUP(each[0])}) for each in cells]).save(DOCS / "eiup.png")


if __name__ == "__main__":
    main()
