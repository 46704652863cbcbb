"""`efface fit`: learn a delta."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import registry
from .delta import describe
from .errors import told
from .folders import output_file
from .options import (
    NOTHING,
    AsJson,
    ConceptNames,
    ModelName,
    Overwrite,
    Phrases,
    Settings,
    load,
    load_deltas,
    loads,
    parse_fields,
    targets_of,
)
from .output import telling


@loads
def fit(
    method: Annotated[
        str, typer.Argument(help="An editor; see `efface list editors`. Write a preset after a dot: esd.paper.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, such as no-alcohol.safetensors.")],
    concept: ConceptNames = None,
    phrase: Phrases = None,
    anchor: Annotated[
        str, typer.Option(help="The anchor: a text that replaces the concepts. Default: the unconditional text.")
    ] = "",
    keep: Annotated[list[str] | None, typer.Option(help="A text to preserve; may be repeated.")] = None,
    model: ModelName = "emoji",
    set_: Settings = None,
    after: Annotated[
        list[Path] | None, typer.Option(help="A delta that is applied during the fit; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the fit.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Learn a delta that erases concepts from a model, and write it to a file."""
    with told():
        targets = targets_of(concept, phrase)
        if not targets:
            raise ValueError(NOTHING)
        targets = [replace(target, anchor=anchor, keep=tuple(keep or ())) for target in targets]
        fields = parse_fields(set_)
        registry.resolve(registry.split(method)[0], "editors")
        from .. import api, jobs

        editor = api.editor(method, **fields)
        file = output_file(out, overwrite)
        pipe = load(model, loading)
        job, began = jobs.Fit(editor, pipe, targets, file, load_deltas(after), seed), time.perf_counter()
        with told(job.finished), telling():
            delta = job.run()
    if as_json:
        seconds = time.perf_counter() - began
        typer.echo(json.dumps({"out": str(file), "seconds": seconds, **delta.config()}, indent=1))
    else:
        describe(file, delta)
