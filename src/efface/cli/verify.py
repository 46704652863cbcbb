"""`efface verify`: draw rows of a run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import bad_input
from .job import job
from .options import AsJson, DeltaFiles, load_deltas
from .output import escaped, quiet

DIFFERENT = 3


def verify(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    redraw: Annotated[int, typer.Option(min=1, help="At least how many rows to draw again.")] = 16,
    model: Annotated[
        str | None, typer.Option(help='The run\'s model; may be left out if it is "emoji" or another embedded one.')
    ] = None,
    delta: DeltaFiles = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the choice of rows; another each time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw sampled rows of a run and of its base run again, and say whether the pictures are the same.

    Exit code 0 if all are the same to the bit, 3 if one differs.
    """
    with bad_input():
        deltas = load_deltas(delta)
    quiet()
    with job() as tell:
        from ..runs import verify as draw_again

        found = draw_again(run, redraw, model=model, eraser=deltas, seed=seed, progress=tell)
    if as_json:
        typer.echo(json.dumps(found.record(), indent=1))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None)
        for heading in ("row", "model", "picture"):
            table.add_column(heading)
        for row in found.rows:
            differs = f"{row.share:.2%} of pixels differ, by at most {row.largest} of 255"
            table.add_row(escaped(row.row), "base" if row.base else "run", "the same" if row.same else differs)
        Console().print(table)
        typer.echo(str(found).splitlines()[-1 - len(found.versions)])
        for name, (there, here) in found.versions.items():
            typer.echo(f"{name}: {there} when it was drawn, {here} here")
    if not found.same:
        raise typer.Exit(DIFFERENT)
