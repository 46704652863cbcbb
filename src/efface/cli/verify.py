"""`efface verify`: a run's pictures, drawn again."""

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
    redraw: Annotated[int, typer.Option(min=1, help="At least how many rows to draw again.")] = 16,
    model: Annotated[
        str | None, typer.Option(help="The run's model. Default: the one in the record, if it comes with Efface.")
    ] = None,
    concept: ConceptNames = None,
    phrase: Phrases = None,
    method: MethodName = None,
    delta: DeltaFiles = None,
    set_: Settings = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the choice of rows. Default: another each time.")
    ] = None,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Draw sampled rows of a run again, and say whether they are the same. Exit code 3 if they are not.

    Erasers are rebuilt from the record, unless they are given; deltas have to be given.
    """
    with told():
        given = bool(concept or phrase or method or delta)
        erasers = find_erasers(concept, phrase, method, delta, set_)[1] if given else None
        from .. import runs

        found = runs.Run.open(run)
        if model is None and any(loading.values()):
            raise ValueError("Expected --model with options that say how it is loaded. Name the run's model.")
        pipe = None if model is None else load(model, loading)
        with telling():
            result = runs.verify(found, redraw, model=pipe, eraser=erasers, seed=seed)
    if as_json:
        typer.echo(json.dumps(result.record(), indent=1))
    else:
        say(str(result))
    if not result.same:
        fail("The pictures are not the same. Look at the versions, the machine and the files.", NOT_MET)
