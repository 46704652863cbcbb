"""`efface bench`: draw a suite, and score it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import checks, registry
from .errors import told
from .options import (
    AsJson,
    ConceptNames,
    DeltaFiles,
    Format,
    MethodName,
    Phrases,
    Settings,
    find_erasers,
    judges,
    load,
    loads,
    parse_fields,
)
from .output import telling
from .score import Bars, parse_bars, print_scores

BATCH = 8


@loads
def bench(
    suite: Annotated[str, typer.Argument(help="What to draw and how to score it; see `efface list suites`.")],
    out: Annotated[Path, typer.Option(help="The run folder. An earlier run of the same command continues in it.")],
    concept: ConceptNames = None,
    phrase: Phrases = None,
    model: Annotated[
        str | None,
        typer.Option(help='"emoji", which is the default without --data; a folder, a checkpoint, or a hub id.'),
    ] = None,
    method: MethodName = None,
    delta: DeltaFiles = None,
    set_: Settings = None,
    option: Annotated[list[str] | None, typer.Option(help="A field of the suite, NAME=VALUE.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder that holds the suite's data, if it needs any.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="The folder of the base model's pictures. Default: one next to --out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at a time; it bounds the memory.")] = BATCH,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="A field of a metric, METRIC.NAME=VALUE; the suite may lack it. May be repeated."),
    ] = None,
    no_score: Annotated[bool, typer.Option("--no-score", help="Only draw; `efface score` judges it later.")] = False,
    bar: Bars = None,
    format_: Format = None,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Draw a suite with and without an eraser into a run folder, and score it.

    The same command continues a run that was stopped, by Ctrl-C, a kill or a full disk.
    """
    with told():
        registry.resolve(suite, "suites")
        checks.path("--out", out)
        bars = parse_bars(bar)
        if model is None and data is not None:
            raise ValueError(f"Expected a model to draw {suite}, got none. Give --model FOLDER, or a hub id.")
        targets, erasers = find_erasers(concept, phrase, method, delta, set_)
        from .. import jobs, runs

        chosen = runs.make_suite(suite, targets, data, limit, **parse_fields(option, "--option"))
        if judge:
            configs = [runs.metric_config(metric) for metric in chosen.metrics]
            chosen = replace(chosen, metrics=judges(configs, judge, "--judge"))
        if not no_score:
            jobs.rehearse(chosen)
        name = model or "emoji"
        pipe = load(name, loading)
        command = shlex.join(["efface", *sys.argv[1:]])
        options = {"eraser": erasers, "out": out, "base": base, "batch": batch, "name": name, "command": command}
        kept = f"What was finished is in {out}; run the same command, it continues."
        with told(lambda: kept if out.is_dir() else ""), telling():
            made = jobs.bench(chosen, pipe, score=not no_score, **options)
        if not no_score:
            print_scores(made, as_json, format_, bars)
        elif as_json:
            typer.echo(json.dumps({"out": str(out), "n": made.n}))
        else:
            typer.echo(f"{out}: drawn; `efface score {out}` is next")
