"""`efface score`: judge a run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import bad_input
from .job import job
from .options import AsJson, judges, parse_fields
from .output import escaped

if TYPE_CHECKING:
    from ..runs import Run


def score(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="What to measure instead of what the suite says; may be repeated.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of a metric, METRIC.NAME=VALUE; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run again, from its pictures."""
    with bad_input():
        from .. import runs

        found = runs.Run.open(run)
        configs = [{"method": name} for name in metric or []] or runs.recorded(found, parse_fields(set_ or []))
        metrics = judges(configs, set_ or [])
    with job() as tell:
        runs.score(found, metrics, progress=tell)
    print_scores(found, as_json)


def print_scores(run: Run, as_json: bool) -> None:
    """The scores of a run beside the plain model's."""
    card = run.card()
    if as_json:
        typer.echo(json.dumps({"out": str(run.folder), **card}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from ..report import number, span

    scores, base = run.scores()
    plain, table = {s.metric: s for s in base}, Table(box=None, caption="95 % intervals", caption_justify="left")
    for heading in ("", "plain", "erased", "n"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for s in scores:
        if "/" not in s.metric:
            cells = [f"{number(each)} {span(each)}" for each in (plain.get(s.metric), s)]
            table.add_row(*map(escaped, (s.metric, *cells)), str(s.n))
    console = Console()
    console.print(table)
    console.print(f"{run.folder}; `efface report {run.folder}` shows more", soft_wrap=True, highlight=False)
