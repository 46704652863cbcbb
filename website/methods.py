"""A page for each run-time method and each editor, from its class, its note in `docs/methods` and the cards."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from efface import registry
from efface.families import FAMILIES, OFFERS, matrix
from experiments.docs import table

from . import cards
from .links import ROOT

ROOMS = {"erasers": "run time", "editors": "editor, writes a delta"}
NOTES = ROOT / "docs/families"
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


@functools.cache
def names() -> dict[str, str]:
    """The methods of Efface with their rooms; no plug-ins."""
    shipped = {name: room for name, room in registry.methods().items() if room in ROOMS}
    return {n: room for n, room in shipped.items() if registry.resolve(n).__module__.startswith("efface.")}


def page(name: str) -> str:
    cls = registry.resolve(name)
    note = ROOT / f"docs/methods/{name}.md"
    return "\n\n".join(
        [
            f"# {cls.__name__}",
            registry.about(names()[name])[name].partition(": ")[2].capitalize(),
            "\n".join(f"- **{key}**: {value}" for key, value in _facts(name, cls).items()),
            *([note.read_text("utf-8").partition("\n")[2].strip()] if note.is_file() else []),
            "## Figures",
            cards.of_method(name),
            "## Reference",
            f"::: {cls.__module__}.{cls.__name__}\n    options:\n      heading_level: 3",
        ]
    )


def _facts(name: str, cls: Any) -> dict[str, str]:
    paper = ARXIV.search(inspect.getdoc(cls) or "")
    presets = [f"`{name}.{each}`" for each in registry.preset_names(name, names()[name])]
    called = f'`method="{name}"`, `--method {name}`' if names()[name] == "erasers" else f"`efface fit {name}`"
    return {
        "kind": ROOMS[names()[name]],
        "by name": called,
        "paper": f"[arXiv {paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "none on arXiv",
        "presets": ", ".join(presets) or "none",
        "works on": where(name),
    }


cells_of = functools.cache(matrix)


def where(name: str) -> str:
    """The families on which a method works by default."""
    cells = cells_of()[name, ""]
    of: dict[str, list[str]] = {}
    for family, cell in cells.items():
        if cell:
            of.setdefault("" if cell == "yes" else f"with {cell}: ", []).append(family)
    return "; ".join(condition + ", ".join(found) for condition, found in sorted(of.items()))


def families() -> str:
    """The page on which method works on which family."""
    from experiments.docs import families as drawn

    offers = [[f"`{name}`", offer.words, offer.meaning] for name, offer in OFFERS.items()]
    kinds = [[each.name, ", ".join(f"`{offer}`" for offer in sorted(each.offers)) or "-"] for each in FAMILIES]
    return "\n\n".join(
        [
            "# Methods and families",
            "A method declares its needs, a family of pipelines its offers. A method works on a family that offers "
            "what it needs, and refuses the others with an error that names both. This page is made from the code. All "
            "families are tested for mechanics on tiny pipelines with random weights; figures exist for `emoji` only.",
            drawn(),
            "## What a family can offer",
            table(["offer", "in messages", "meaning"], offers),
            "## What each family offers",
            table(["family", "offers"], kinds),
            *(note.read_text("utf-8").replace("# ", "## ", 1).strip() for note in sorted(NOTES.glob("*.md"))),
        ]
    )
