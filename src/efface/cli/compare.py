"""`efface compare`: compare runs of the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import checks
from .errors import told
from .options import AsJson, Labels
from .output import print_table, say


def compare(
    run: Annotated[list[Path], typer.Argument(help="Scored run folders. The first two are the primary comparison.")],
    metric: Annotated[Literal["residual", "erased", "retention"], typer.Option(help="What is compared.")] = "residual",
    labels: Labels = None,
    figure: Annotated[Path | None, typer.Option(help="An SVG file for the differences and their intervals.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare scored runs picture by picture. All comparisons but the first are adjusted by Holm."""
    with told():
        if figure is not None:
            checks.path("--figure", figure)
        from ..report.differences import compare as compared

        card = compared(run, metric=metric, labels=labels, figure=figure)
    if as_json:
        typer.echo(json.dumps(card, indent=1))
        return
    rows = []
    for each in card["comparisons"]:
        p = f"{each['p']:.3g}, primary" if each["primary"] else f"{each['p_holm']:.3g}, Holm"
        by_labels = [f"{facts['concept']} {_points(facts)}" for facts in each["corrected"] or ()]
        rows.append([f"{each['a']} - {each['b']}", _points(each), p, "; ".join(by_labels) or "-"])
        rows += [[f"  {facts['concept']}", _points(facts), "", ""] for facts in each["concepts"]]
    caption = f"{card['metric']} in points, {card['rows']} equal rows of {card['prompts']} prompts, 95 % intervals"
    print_table(("runs", "difference", "p", "by labels"), rows, box=None, caption=caption, caption_justify="left")
    for note in card["notes"]:
        say(note)


def _points(facts: Mapping[str, Any]) -> str:
    """A difference and its interval, in points."""
    low, high = facts["interval"]
    return f"{100 * facts['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
