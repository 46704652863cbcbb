"""The page of recipes: a paper, our command, and the figures of our cards."""

from __future__ import annotations

import inspect

from efface import registry
from experiments.docs import table

from . import cards, methods


def page() -> str:
    rows = []
    for name, room in methods.names().items():
        paper = methods.ARXIV.search(inspect.getdoc(registry.resolve(name)) or "")
        found = next((of for each in cards.POOLED if name in (of := cards.pooled(each)[1])), {})
        link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "-"
        command = _command(name, room)
        rates = [cards.rate(found[name][column]) if found else cards.UNKNOWN for column in ("implicit left", "kept")]
        rows.append([f"[`{name}`](methods/{name}.md)", link, f"`{command}`", *rates])
    base = cards.pooled(cards.POOLED[0])[1][cards.BASE]
    head = ["method", "arXiv", "command", "residual rate, implied prompts", "retention"]
    return "\n\n".join(
        [
            "# Recipes",
            "A paper, the command that runs our implementation, and the figures to expect. The figures are of `emoji`, "
            "over four concepts, with the settings that tuning seeds chose. The base model has a residual rate of "
            f"{cards.rate(base['implicit left'])} and a retention of {cards.rate(base['kept'])}.",
            table(head, rows),
            "The papers measure other models, so their numbers cannot be compared with these. `efface bench` measures "
            "a method on a suite of yours, and `python -m experiments NAME` draws a card again; "
            "[experiments](experiments.md) lists them.",
        ]
    )


def _command(name: str, room: str) -> str:
    if name == "geom_erasing":
        return "efface fit geom_erasing --help"
    if name == "latent_directions":
        return "efface fit latent_directions --help"
    if name == "hfi":
        return "efface fit hfi --help"
    if room == "editors":
        return f"efface fit {name} --concept alcohol --out {name}.safetensors"
    return f'efface erase "a night at the pub" --concept alcohol --method {name}'
