"""The leaderboard as a table that can be sorted and filtered, from its card. Without scripts it is an ordinary one."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from statistics import mean
from string import Template
from typing import Any

from efface import registry
from experiments.docs import card

COLUMNS = {"residual": "residual, %", "retention": "retained, %", "nothing": "nothing recognisable, %"}
KINDS = {"erasers": ("run time", "the call"), "editors": ("weights", "the weights"), "": ("base model", "")}
"""The kind of a method, and the access that takes it away again."""
SHORT = 10.0


def page() -> str:
    """The page."""
    found = card("leaderboard")
    head = ["method", "kind", *COLUMNS.values(), "fit, s", "undone by", "card and command"]
    return Template(Path(__file__).with_suffix(".txt").read_text("utf-8")).substitute(
        n=sum(len(raw["outcome"][0]) for raw in found["base"].values()),
        concepts=_words(list(dict.fromkeys(cell["concept"] for cell in found["cells"].values()))),
        head="".join(f"<th>{escape(name)}</th>" for name in head),
        rows="\n".join(_row(each, found["command"]) for each in found["rows"]),
    )


def _words(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _row(each: Mapping[str, Any], command: str) -> str:
    name = each["row"]
    room = registry.methods().get(name, "")
    kind, access = KINDS[room]
    fit = each.get("fits")
    seconds = mean(one["seconds"] for one in fit.values()) if fit else 0.0
    shown = f"{seconds:.{0 if seconds > SHORT else 1}f}" if fit else "none"
    length = "none" if not fit else "short" if seconds <= SHORT else "long"
    link = f'<a href="methods/{name}.html"><code>{name}</code></a>' if room else "base model"
    scores = "".join(_score(each.get(column)) for column in COLUMNS)
    return (
        f'<tr data-kind="{kind}" data-access="{access}" data-fit="{length}"><td>{link}</td><td>{kind}</td>{scores}'
        f'<td data-value="{seconds:.4f}">{shown}</td><td>{access}</td>'
        f'<td><a href="files/results/leaderboard.json">card</a> '
        f"<code>{escape(each.get('command') or command)}</code></td></tr>"
    )


def _score(score: Mapping[str, Any] | None) -> str:
    if not score:
        return '<td data-value="">not measured</td>'
    value, low, high = (100 * each for each in (score["rate"], *score["interval"]))
    return f'<td data-value="{value:.3f}">{value:.1f} [{low:.1f}, {high:.1f}]</td>'
