"""`efface verify`: draw a run's pictures again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import NOT_MET, fail, told
from .options import (
    AsJson,
    ConceptNames,
    DeltaFiles,
    MethodName,
    Phrases,
    Settings,
    find_erasers,
    load,
    loads,
)
from .output import say, telling


@loads
def verify(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    redraw: Annotated[int, typer.Option(min=1, help="The smallest number of rows to draw again.")] = 16,
    model: Annotated[
        str | None, typer.Option(help="The run's model. Default: the embedded model that the record names.")
    ] = None,
    concept: ConceptNames = None,
    phrase: Phrases = None,
    method: MethodName = None,
    delta: DeltaFiles = None,
    set_: Settings = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the choice of rows. Default: a new choice each time.")
    ] = None,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Draw sampled rows of a run again, and compare the pictures. Exit code 3 if they differ.

    Rebuilds erasers from the record, unless they are given. Deltas must be given.
    """
    with told():
        given = bool(concept or phrase or method or delta)
        erasers = find_erasers(concept, phrase, method, delta, set_)[1] if given else None
        from .. import runs

        found = runs.Run.open(run)
        if model is None and any(loading.values()):
            raise ValueError("Options for loading need --model. Name the run's model.")
        pipe = None if model is None else load(model, loading)
        with telling():
            result = runs.verify(found, redraw, model=pipe, eraser=erasers, seed=seed)
    if as_json:
        typer.echo(json.dumps(result.record(), indent=1))
    else:
        say(str(result))
    if not result.same:
        fail("The pictures differ. Look at the versions, the machine and the files.", NOT_MET)
