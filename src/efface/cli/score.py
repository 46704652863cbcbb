"""`efface score`: score a run again."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .. import checks
from .._hub import allowing
from .errors import NOT_JUDGED, NOT_MET, fail, told
from .options import AllowHub, AsJson, Format, Labels, judges, parse_fields
from .output import print_table, say, telling

if TYPE_CHECKING:
    from ..records import Score
    from ..runs import Run

Bars = Annotated[
    list[str] | None,
    typer.Option(
        "--bar",
        help='A bar for a score, such as "removal.absolute>=0.9". The less favourable end of its 95 % interval has to '
        "meet it. Exit code 3 if it does not, 4 if it was not judged. May be repeated.",
    ),
]


class Bar(NamedTuple):
    """A bar that a score has to meet."""

    metric: str
    above: bool
    value: float

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.above else '<='} {self.value:g}"


def score(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="A metric to use instead of the suite's; may be repeated.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of a metric, METRIC.NAME=VALUE; may be repeated.")
    ] = None,
    labels: Labels = None,
    bar: Bars = None,
    allow_hub: AllowHub = False,
    format_: Format = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run again, from its pictures."""
    with told():
        from .. import runs

        bars = parse_bars(bar)
        found = runs.Run.open(run)
        configs = [{"method": name} for name in metric or []] or runs.recorded(found, parse_fields(set_))
        metrics = judges(configs, set_, "--set")
        with telling(), allowing(allow_hub):
            runs.score(found, metrics, labels=labels)
        print_scores(found, as_json, format_, bars)


def parse_bars(texts: Sequence[str] | None) -> list[Bar]:
    bars = []
    for text in texts or ():
        parts = re.fullmatch(r"\s*(\S+?)\s*(>=|<=)\s*(\S+)\s*", text)
        try:
            value = float(parts[3]) if parts else math.nan
        except ValueError:
            value = math.nan
        if not parts or not math.isfinite(value):
            cure = 'Write for example --bar "removal.absolute>=0.9".'
            raise ValueError(checks.refusal("--bar METRIC>=NUMBER or METRIC<=NUMBER", text, cure))
        bars.append(Bar(parts[1], parts[2] == ">=", value))
    return bars


def print_scores(run: Run, as_json: bool, how: Format, bars: Sequence[Bar]) -> None:
    """Prints the scores of a run and of the base model. Exit code 3 if a bar is not met, 4 if it was not judged."""
    from ..tables import render, score_cells, score_numbers

    scores, base = run.scores()
    headings, rows = (score_numbers if how == "csv" else score_cells)(scores, base)
    if as_json:
        typer.echo(json.dumps({"out": str(run.folder), **run.card()}, indent=1))
    elif how is not None:
        typer.echo(render(headings, rows, how), nl=False)
    else:
        some = [row for row in rows if "/" not in row[0]]
        print_table(headings, some, box=None, caption="95 % intervals", caption_justify="left")
        say(f"{run.folder}; `efface report {run.folder}` shows more")
    _check_bars(scores, bars)


def _check_bars(scores: Sequence[Score], bars: Sequence[Bar]) -> None:
    by_name, missed = {s.metric: s for s in scores}, []
    for bar in bars:
        found = by_name.get(bar.metric)
        end = math.nan if found is None or not found.n else (found.low if bar.above else found.high)
        if math.isnan(end):
            known = ", ".join(by_name)
            fail(f"Not judged: {bar.metric}. Name one of the scores: {known}.", NOT_JUDGED)
        holds: Callable[[float, float], bool] = operator.ge if bar.above else operator.le
        if not holds(end, bar.value):
            missed.append(f"{bar} (the interval ends at {end:.4g})")
    if missed:
        fail(f"Not met: {'; '.join(missed)}.", NOT_MET)
