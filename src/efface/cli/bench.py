"""`efface bench`: draw a suite, and score it."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .. import registry
from .errors import bad_input
from .job import job
from .options import (
    AsJson,
    ConceptNames,
    DeltaFiles,
    MethodName,
    Phrases,
    Settings,
    find_erasers,
    judges,
    parse_fields,
)
from .output import quiet
from .score import print_scores

BATCH = 8


def bench(
    suite: Annotated[str, typer.Argument(help="What to draw and how to score it; see `efface list suites`.")],
    out: Annotated[Path, typer.Option(help="The run folder. An earlier run of the same command continues in it.")],
    concept: ConceptNames = None,
    phrase: Phrases = None,
    model: Annotated[
        str | None, typer.Option(help='"emoji", which is meant if there is no --data; a folder, or a hub id.')
    ] = None,
    method: MethodName = None,
    delta: DeltaFiles = None,
    set_: Settings = None,
    option: Annotated[list[str] | None, typer.Option(help="A field of the suite, NAME=VALUE.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder that holds the suite's data, if it needs any.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="The folder of the plain model's pictures; one beside --out if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at a time; it bounds the memory.")] = BATCH,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="A field of a metric, METRIC.NAME=VALUE; the suite may lack it. May be repeated."),
    ] = None,
    no_score: Annotated[bool, typer.Option("--no-score", help="Only draw; `efface score` judges it later.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a suite with and without an eraser into a run folder, and score it.

    The same command continues a run that was stopped, by Ctrl-C, a kill or a full disk.
    """
    with bad_input():
        registry.resolve(suite, "suites")
        if model is None and data is not None:
            raise ValueError(f"Which model is to draw {suite}? Give --model FOLDER, or a hub id.")
        targets, erasers = find_erasers(concept, phrase, method, delta, set_)
        from .. import runs

        chosen = runs.make_suite(suite, targets, data, limit, **parse_fields(option or []))
        if judge:
            chosen = replace(chosen, metrics=judges([runs.metric_config(m) for m in chosen.metrics], judge))
    quiet()
    with job(out) as tell:
        if not no_score:
            try:
                runs.rehearse(chosen)
            except (ImportError, OSError, ValueError) as error:
                raise ValueError(
                    f"Nothing is drawn yet, for it could not be scored: {error}\nMend that, change the metric with "
                    "--judge METRIC.NAME=VALUE, or draw with --no-score and run `efface score` later."
                ) from error
        command = shlex.join(["efface", *sys.argv[1:]])
        made = runs.run(
            chosen, model or "emoji", eraser=erasers, out=out, base=base, batch=batch, progress=tell, command=command
        )
        if not no_score:
            runs.score(made, progress=tell)
    if no_score:
        typer.echo(
            json.dumps({"out": str(out), "n": made.n}) if as_json else f"{out}: drawn; `efface score {out}` is next"
        )
    else:
        print_scores(made, as_json)
