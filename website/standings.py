"""The leaderboard as a table that can be sorted and filtered, from its card. Without scripts it is an ordinary one."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from efface import registry
from experiments.docs import card

from .cards import ranked

COLUMNS = {"residual": "residual, %", "retention": "retention, %", "nothing": "nothing recognisable, %"}
KINDS = {"erasers": ("run time", "the call"), "editors": ("weights", "the weights"), "": ("", "")}
"""The kind of a method, and the access that takes it away again."""
CHEAP, DEAR = 1.1, 1.4  # times a base step
SHORT = 10.0  # core-seconds of a fit


def page() -> str:
    """The page."""
    found = card("leaderboard")
    head = ["method", "kind", *COLUMNS.values(), "a step, times a base step", "fit, core-s", "undone by"]
    costs = {row["row"]: row for row in card("method_costs")["rows"]}
    concepts = ranked(found)
    return Template(Path(__file__).with_suffix(".txt").read_text("utf-8")).substitute(
        about=f"{len(concepts)} concepts, n = {found['n']} pictures a cell",
        model=found["model"]["name"],
        head="".join(f"<th>{escape(name)}</th>" for name in (*head, "card and command")),
        rows="\n".join(_row(each, costs, found["command"]) for each in found["rows"]),
    )


def _row(each: Mapping[str, Any], costs: Mapping[str, Any], command: str) -> str:
    name = each["row"]
    room = registry.methods().get(name.partition(" ")[0], "")
    kind, access = KINDS[room]
    cost = costs.get(name if room else "base", {})
    step, fit = cost.get("step", {}).get("median"), cost.get("fit")
    link = f'<a href="methods/{name.partition(" ")[0]}.html"><code>{name}</code></a>' if room else "base model"
    scores = "".join(_score(each.get(column)) for column in COLUMNS)
    marks = {"kind": kind, "access": access, "step": _step(step), "fit": _fit(fit)}
    data = " ".join(f'data-{mark}="{value}"' for mark, value in marks.items())
    return (
        f"<tr {data}><td>{link}</td><td>{kind}</td>{scores}{_number(step, '.2f', 'not measured')}"
        f'{_number(fit, ".2g", "none")}<td>{access}</td><td><a href="files/results/leaderboard.json">card</a> '
        f"<code>{escape(each.get('command') or command)}</code></td></tr>"
    )


def _step(times: float | None) -> str:
    return "" if times is None else "small" if times <= CHEAP else "middle" if times <= DEAR else "large"


def _fit(seconds: float | None) -> str:
    return "none" if seconds is None else "short" if seconds <= SHORT else "long"


def _number(value: float | None, form: str, without: str) -> str:
    if value is None:
        return f'<td data-value="0">{without}</td>'
    return f'<td data-value="{value:.4f}">{value:{form}}</td>'


def _score(found: Mapping[str, Any] | None) -> str:
    """A cell of a rate with its interval."""
    if not found:
        return '<td data-value="">not measured</td>'
    value, low, high = (100 * each for each in (found["rate"], *found["interval"]))
    return f'<td data-value="{value:.3f}">{value:.1f} [{low:.1f}, {high:.1f}]</td>'
