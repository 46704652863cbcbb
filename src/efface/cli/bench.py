"""`efface bench`: draw and score a suite."""

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
    Guidance,
    MethodName,
    Phrases,
    Settings,
    check_guidance,
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
    suite: Annotated[str, typer.Argument(help="The suite to draw and score; see `efface list suites`.")],
    out: Annotated[Path, typer.Option(help="The run folder. Continues an earlier run of the same command.")],
    concept: ConceptNames = None,
    phrase: Phrases = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder, a checkpoint, or a hub id. Default without --data: the suite's embedded model, or emoji."
        ),
    ] = None,
    method: MethodName = None,
    delta: DeltaFiles = None,
    set_: Settings = None,
    option: Annotated[list[str] | None, typer.Option(help="A field of the suite, NAME=VALUE.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="The folder with the suite's data, for suites that need it.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The folder of the base model's pictures. Default: one next to --out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The largest number of rows.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per pipeline call; limits the memory.")] = BATCH,
    guidance: Guidance = None,
    ray: Annotated[
        str | None,
        typer.Option(help='Draw on the workers of a Ray cluster: "local" for this machine, or an address.'),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="A field of a metric, METRIC.NAME=VALUE, also of a metric that the suite lacks. May be repeated."
        ),
    ] = None,
    no_score: Annotated[bool, typer.Option("--no-score", help="Only draw; score later with `efface score`.")] = False,
    bar: Bars = None,
    format_: Format = None,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Draw a suite with and without an eraser into a run folder, and score it.

    The same command continues a run that Ctrl-C, a kill or a full disk stopped.
    """
    with told():
        registry.resolve(suite, "suites")
        checks.path("--out", out)
        bars = parse_bars(bar)
        checks.text("--ray", "local" if ray is None else ray)
        if model is None and data is not None:
            raise ValueError(f"Expected a model to draw {suite}, got none. Give --model FOLDER, or a hub id.")
        targets, erasers = find_erasers(concept, phrase, method, delta, set_)
        check_guidance(erasers, guidance)
        from .. import jobs, runs
        from ..models import SUITES

        chosen = runs.make_suite(suite, targets, data, limit, **parse_fields(option, "--option"))
        if judge:
            configs = [runs.metric_config(metric) for metric in chosen.metrics]
            chosen = replace(chosen, metrics=judges(configs, judge, "--judge"))
        if not no_score:
            jobs.rehearse(chosen)
        name = model or SUITES.get(suite, "emoji")
        pipe = load(name, loading)
        check_guidance(erasers, guidance, pipe)
        command = shlex.join(["efface", *sys.argv[1:]])
        options = {"eraser": erasers, "out": out, "base": base, "batch": batch, "name": name, "command": command}
        options |= {"guidance": guidance, "ray": runs.Cluster(ray, name, loading) if ray is not None else None}
        kept = f"Finished pictures are in {out}. Run the same command, which continues."
        with told(lambda: kept if out.is_dir() else ""), telling():
            made = jobs.bench(chosen, pipe, score=not no_score, **options)
        if not no_score:
            print_scores(made, as_json, format_, bars)
        elif as_json:
            typer.echo(json.dumps({"out": str(out), "n": made.n}))
        else:
            typer.echo(f"{out}: drawn. Next: `efface score {out}`")
