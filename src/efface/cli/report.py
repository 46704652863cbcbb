"""`efface report`: runs on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .job import job
from .options import AsJson


def report(
    run: Annotated[list[Path], typer.Argument(help="Scored run folders.")],
    out: Annotated[Path, typer.Option(help="The page to write; its numbers go beside it as JSON.")] = Path(
        "report.html"
    ),
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Also show runs that must not be compared, in marked groups.")
    ] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Rows of pictures, at most.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Write scored runs into one HTML page that stands alone."""
    with job():
        from ..report import write_report

        card = write_report(run, out, mixed=mixed, pairs=pairs)
    typer.echo(json.dumps(card, indent=1) if as_json else str(out))
