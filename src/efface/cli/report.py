"""`efface report`: show runs on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .. import checks
from .errors import told
from .options import AsJson, Format, Labels
from .output import telling


def report(
    run: Annotated[list[Path], typer.Argument(help="Scored run folders.")],
    out: Annotated[Path, typer.Option(help="The page to write. Its numbers go to a JSON file next to it.")] = Path(
        "report.html"
    ),
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Also show runs that are not comparable, in marked groups.")
    ] = False,
    pairs: Annotated[int, typer.Option(min=1, help="The largest number of picture rows.")] = 24,
    labels: Labels = None,
    format_: Format = None,
    as_json: AsJson = False,
) -> None:
    """Write scored runs into one self-contained HTML page. With --format, print their scores instead."""
    with told():
        if format_ is not None:
            from ..tables import table

            typer.echo(table(run, format_), nl=False)
            return
        checks.path("--out", out)
        from ..report import write_report

        with telling():
            card = write_report(run, out, mixed=mixed, pairs=pairs, labels=labels)
        typer.echo(json.dumps(card, indent=1) if as_json else str(out))
