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

COLUMNS = {
    "removal.absolute": "removed, %",
    "retention": "retained, %",
    "detection.any_icon": "anything recognisable, %",
}
KINDS = {"erasers": ("run time", "the call"), "editors": ("weights", "the weights"), "": ("base model", "")}
"""The kind of a method, and the access that takes it away again."""
SHORT = 10.0


def page() -> str:
    """The page.

    Raises:
        ValueError: the card is of the runner of today, whose columns this page does not know.
    """
    found = card("leaderboard")
    if "form" in found:
        raise ValueError("Expected the leaderboard's card of an earlier runner, got one of today. Extend this page.")
    head = ["method", "kind", *COLUMNS.values(), "fit, s", "undone by", "card and command"]
    return Template(Path(__file__).with_suffix(".txt").read_text("utf-8")).substitute(
        n=found["n"],
        head="".join(f"<th>{escape(name)}</th>" for name in head),
        rows="\n".join(_row(each, found["command"]) for each in found["rows"]),
    )


def _row(each: Mapping[str, Any], command: str) -> str:
    name = each["method"]
    room = registry.methods().get(name, "")
    kind, access = KINDS[room]
    fit = card("editors_outcome")["fits"].get(name)
    seconds = mean(one["seconds"] for one in fit.values()) if fit else 0.0
    shown = f"{seconds:.{0 if seconds > SHORT else 1}f}" if fit else "none"
    length = "none" if not fit else "short" if seconds <= SHORT else "long"
    link = f'<a href="methods/{name}.html"><code>{name}</code></a>' if room else "base model"
    scores = "".join(_score(each["scores"].get(column)) for column in COLUMNS)
    return (
        f'<tr data-kind="{kind}" data-access="{access}" data-fit="{length}"><td>{link}</td><td>{kind}</td>{scores}'
        f'<td data-value="{seconds:.4f}">{shown}</td><td>{access}</td>'
        f'<td><a href="files/results/leaderboard.json">card</a> '
        f"<code>{escape(each.get('command') or command)}</code></td></tr>"
    )


def _score(score: Mapping[str, Any] | None) -> str:
    if not score or score["value"] is None:
        return '<td data-value="">not measured</td>'
    value, low, high = (100 * score[key] for key in ("value", "low", "high"))
    return f'<td data-value="{value:.3f}">{value:.1f} [{low:.1f}, {high:.1f}]</td>'
