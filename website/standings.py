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

EARLIER = {
    "removal.absolute": "removed, %",
    "retention": "retained, %",
    "detection.any_icon": "anything recognisable, %",
}
"""The columns of a card of an earlier runner."""
COLUMNS = {"residual": "residual, %", "retention": "retention, %", "nothing": "nothing recognisable, %"}
JUDGED = {
    True: "*Residual* is judged where the base model shows the concept.",
    False: "*Removed* counts pictures without the concept, ruined ones included: read it with *anything recognisable*.",
}
BASES = dict.fromkeys(("base", "plain model"), "base model")
KINDS = {"erasers": ("run time", "the call"), "editors": ("weights", "the weights"), "": ("", "")}
"""The kind of a method, and the access that takes it away again."""
CHEAP, DEAR = 1.1, 1.4  # times a base step
SHORT = 10.0  # core-seconds of a fit


def page() -> str:
    """The page."""
    found = card("leaderboard")
    columns = COLUMNS if "form" in found else EARLIER
    head = ["method", "kind", *columns.values(), "a step, times a base step", "fit, core-s", "undone by"]
    costs = {row["row"]: row for row in card("method_costs")["rows"]}
    concepts = ranked(found)
    return Template(Path(__file__).with_suffix(".txt").read_text("utf-8")).substitute(
        about=f"{len(concepts)} concepts, n = {found['n']} {'pictures a cell' if 'form' in found else 'a method'}",
        judged=JUDGED["form" in found],
        head="".join(f"<th>{escape(name)}</th>" for name in (*head, "card and command")),
        rows="\n".join(_row(each, columns, costs, found["command"]) for each in found["rows"]),
    )


def _row(each: Mapping[str, Any], columns: Mapping[str, str], costs: Mapping[str, Any], command: str) -> str:
    name = each["row"] if "row" in each else each["method"]
    room = registry.methods().get(name, "")
    kind, access = KINDS[room]
    cost = costs.get(name if room else "base", {})
    step, fit = cost.get("step", {}).get("median"), cost.get("fit")
    link = f'<a href="methods/{name}.html"><code>{name}</code></a>' if room else BASES.get(name, escape(name))
    scores = "".join(_score(each, column) for column in columns)
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


def _score(row: Mapping[str, Any], column: str) -> str:
    """A cell of a rate with its interval, from a card of either runner."""
    found = row["scores"].get(column) if "scores" in row else row.get(column)
    if not found or found.get("value", found.get("rate")) is None:
        return '<td data-value="">not measured</td>'
    whole = (found["rate"], *found["interval"]) if "rate" in found else (found["value"], found["low"], found["high"])
    value, low, high = (100 * each for each in whole)
    return f'<td data-value="{value:.3f}">{value:.1f} [{low:.1f}, {high:.1f}]</td>'
