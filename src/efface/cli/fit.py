"""`efface fit`: learn a delta."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .. import registry
from .._interrupt import INTERRUPTED, gently
from .delta import describe
from .errors import FAILED, bad_input, fail
from .folders import output_file
from .options import AsJson, ConceptNames, ModelName, Phrases, Settings, load_deltas, parse_fields, targets_of


def fit(
    method: Annotated[str, typer.Argument(help="An editor; see `efface list methods`.")],
    out: Annotated[Path, typer.Option(help="The file to write, such as no-alcohol.safetensors.")],
    concept: ConceptNames = None,
    phrase: Phrases = None,
    anchor: Annotated[str, typer.Option(help="What the concepts are to become; nothing in particular if empty.")] = "",
    keep: Annotated[list[str] | None, typer.Option(help="A text that must stay as it is; may be repeated.")] = None,
    model: ModelName = "emoji",
    set_: Settings = None,
    after: Annotated[list[Path] | None, typer.Option(help="Fit on top of this delta; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the fit.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn a delta that erases concepts from a model, and write it to one file."""
    with bad_input():
        import shutil
        from inspect import signature

        targets = targets_of(concept, phrase)
        if not targets:
            raise ValueError("Nothing to erase: give --concept NAME or --phrase TEXT.")
        targets = [replace(target, anchor=anchor, keep=tuple(keep or ())) for target in targets]
        fields = parse_fields(set_ or [])
        registry.resolve(method, "editors")
        from .. import api

        editor = api.editor(method, **fields)
        file = output_file(out, overwrite)
        pipe = api.load(model)
        pipe.set_progress_bar_config(disable=True)
        began, kept = time.perf_counter(), file.with_name(f"{file.name}.checkpoint")
        resumes = "checkpoint" in signature(editor.fit).parameters
        options = {"checkpoint": kept} if resumes else {}
        try:
            with api.stack(pipe, *load_deltas(after)):
                file.parent.mkdir(parents=True, exist_ok=True)
                gently()
                delta = editor.fit(pipe, targets, seed=seed, **options)
        except KeyboardInterrupt:
            further = f" The same command goes on from {kept}." if kept.exists() else ""
            fail(f"Interrupted: {file} was not written.{further}", INTERRUPTED)
        except RuntimeError as error:
            fail(f"{error}\n{file} was not written.", FAILED)
        seconds = time.perf_counter() - began
        delta.save(file)
        if resumes:
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink(missing_ok=True)
    if as_json:
        typer.echo(json.dumps({"out": str(file), "seconds": seconds, **delta.config()}, indent=1))
    else:
        describe(file, delta)
