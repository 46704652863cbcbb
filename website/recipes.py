"""The page of recipes: a paper, our command, and the figures of our cards."""

from __future__ import annotations

import inspect

from efface import registry
from experiments.docs import card, table

from . import cards, methods

METRICS = ("residual implicit", "retention")


def page() -> str:
    rows, measured = [], cards.rows()
    for name, room in methods.names().items():
        paper = methods.ARXIV.search(inspect.getdoc(registry.resolve(name)) or "")
        link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "-"
        rates = [cards.rate(measured.get(name, {}).get(metric)) for metric in METRICS]
        rows.append([f"[`{name}`](methods/{name}.md)", link, f"`{_command(name, room)}`", *rates])
    found, base = card("leaderboard"), measured[cards.BASE]
    head = ["method", "arXiv", "command", *(found["columns"][metric] for metric in METRICS)]
    return "\n\n".join(
        [
            "# Recipes",
            "A paper, the command that runs our implementation, and the figures to expect. The figures are of "
            f"`{found['model']['name']}`, over {len(cards.ranked(found))} concepts; {cards.SETTING} The base model has "
            f"a residual of {cards.rate(base[METRICS[0]])} and a retention of {cards.rate(base[METRICS[1]])}.",
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
