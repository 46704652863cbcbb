"""`efface audit`: say how often a model draws concepts, and end with a code that CI understands."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import checks
from .errors import fail, told
from .options import AsJson, ConceptNames, DeltaFiles, Guidance, Labels, Phrases, loads, parse_fields, targets_of
from .output import quiet, say, telling

if TYPE_CHECKING:
    from ..auditing import Audit


@loads
def audit(
    model: Annotated[str, typer.Argument(help='The model to audit: "emoji", a folder, a checkpoint, or a hub id.')],
    out: Annotated[Path, typer.Option(help="The audit's folder. The same command continues there.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base model to compare with. Default with --delta or --lora: the model without them."),
    ] = None,
    concept: ConceptNames = None,
    phrase: Phrases = None,
    at_most: Annotated[
        float | None,
        typer.Option(
            help="The limit: the upper bound of a concept's rate, with the judge's error in it, must not exceed it. "
            "Exit code 3 if it is exceeded, 4 if it was not judged."
        ),
    ] = None,
    delta: DeltaFiles = None,
    lora: Annotated[
        list[Path] | None, typer.Option(help="A LoRA file (.safetensors) to merge into the model; may be repeated.")
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="An attack to run on the model; see `efface list attacks`.")
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Denoiser rows per prompt for an attack's search.")] = 2000,
    labels: Labels = None,
    suite: Annotated[
        str | None,
        typer.Option(help="The suite to draw; see `efface list suites`. Default: the embedded model's, or `emoji`."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The file or folder with the suite's data.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A field of the suite, NAME=VALUE.")] = None,
    detector: Annotated[str, typer.Option(help="The detector of the concepts; see `efface list detectors`.")] = "eyes",
    detector_set: Annotated[list[str] | None, typer.Option(help="A field of the detector, NAME=VALUE.")] = None,
    recognises: Annotated[
        str | None,
        typer.Option(help="The detector of anything recognisable. Default: the same one for eyes, otherwise none."),
    ] = None,
    recognises_set: Annotated[list[str] | None, typer.Option(help="A field of that detector, NAME=VALUE.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The largest number of rows, alike from each concept.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per pipeline call; limits the memory.")] = 8,
    guidance: Guidance = None,
    since: Annotated[
        Path | None, typer.Option(help="The folder of an earlier audit. Exit code 3 if a concept's rate rose.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="Write a log of inspect_ai to this file, which ends in .eval.")
    ] = None,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Say how often a model draws concepts, beside a base model. Applies no eraser."""
    with told():
        checks.path("--out", out)
        targets = targets_of(concept, phrase)
        if not targets:
            raise ValueError("Expected a concept to look for, got none. Give --concept NAME or --phrase TEXT.")
        if at_most is not None:
            checks.share("--at-most", at_most)
        if guidance is not None:
            checks.number("--guidance", guidance)
        from .. import auditing, jobs, runs
        from ..models import suite_of

        judge = _spec(detector, detector_set, "--detector-set")
        other = auditing.AUTO if recognises is None else _spec(recognises, recognises_set, "--recognises-set")
        if recognises is None and recognises_set:
            raise ValueError("Expected --recognises with --recognises-set, got none. Name the detector.")
        quiet()
        options: dict[str, Any] = {
            "base": base,
            "at_most": at_most,
            "delta": delta or (),
            "lora": lora or (),
            "attacks": attack or (),
            "labels": labels,
            "batch": batch,
            "guidance": guidance,
            "budget": budget,
            "since": since,
            "log": log,
            "loading": loading,
            "suite": runs.make_suite(
                suite or suite_of(base or model), targets, data, limit, **parse_fields(option, "--option")
            ),
            "command": shlex.join(["efface", *sys.argv[1:]]),
        }
        with told(lambda: jobs.audited(out)), telling():
            made = jobs.audit(model, targets, out=out, detector=judge, recognises=other, **options)
    _show(made, as_json)
    if made.code:
        fail(str(made.facts["headline"]), made.code)


def _spec(name: str, settings: list[str] | None, option: str) -> Any:
    """A detector's name, or a mapping with its name and options."""
    fields = parse_fields(settings, option)
    return {"name": name, **fields} if fields else name


def _show(made: Audit, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"out": str(made.folder), **made.facts}, indent=1))
        return
    say(made.verdict)
    say("Not covered:")
    for line in made.facts["not_covered"]:
        say(f"- {line}")
    say(str(made.folder / "audit.html"))
