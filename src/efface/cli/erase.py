"""`efface erase`: draw a prompt before and after erasing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import told, warn
from .folders import check_folder, output_folder
from .options import (
    AsJson,
    ConceptNames,
    DeltaFiles,
    Guidance,
    MethodName,
    ModelName,
    Overwrite,
    Phrases,
    Settings,
    check_guidance,
    find_erasers,
    load,
    loads,
)
from .output import console, print_table, say, telling


@loads
def erase(
    prompt: Annotated[str, typer.Argument(help="The prompt to draw.")],
    concept: ConceptNames = None,
    phrase: Phrases = None,
    model: ModelName = "emoji",
    method: MethodName = None,
    delta: DeltaFiles = None,
    set_: Settings = None,
    images: Annotated[int, typer.Option(min=1, help="Number of pictures, with consecutive seeds.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the first picture.")] = 1_000_000,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Guidance = None,
    negative: Annotated[str, typer.Option(help="The negative prompt.")] = "",
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: a new numbered one.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Draw a prompt before and after erasing concepts, and write pictures, a grid and a record."""
    from .. import checks

    with told():
        checks.text("prompt", prompt)
        checks.seed("--seed", seed, images)
        targets, erasers = find_erasers(concept, phrase, method, delta, set_, f"{prompt} {negative}")
        for rows in (getattr(eraser, "rows", None) for eraser in erasers):
            if rows is not None and len(rows) != images:
                raise ValueError(
                    f"`rows` has {len(rows)} entries, but --images is {images}. Give one list per picture."
                )
        check_guidance(erasers, guidance)
        check_folder(out, overwrite)
        from .. import api, jobs
        from ..pipelines import EMBEDDED

        pipe = load(model, loading)
        check_guidance(erasers, guidance, pipe)
        api.stack(pipe, *erasers).remove()  # finds too long phrases and wrong pipelines before anything is drawn
        for what, text in (("prompt", prompt), ("negative prompt", negative)):
            if lost := api.cut_off(pipe, text):
                warn(f"The {what} is longer than the text encoder's limit. It ignores {lost!r}.")
        judge = jobs.Judge(targets, model) if model in EMBEDDED else None
        job = jobs.Erasure(pipe, erasers, prompt, negative, model, seed, images, steps, guidance, judge)
        with output_folder(out) as folder, told(lambda: job.finished(folder)), telling():
            record = job.run(folder)
    if as_json:
        typer.echo(json.dumps({"out": str(folder), **record}, indent=1))
    else:
        _report(folder, record)


def _report(folder: Path, record: Mapping[str, Any]) -> None:
    entries = record["images"]
    if "seen" in entries[0]["before"]:
        say(f"{record['prompt']}: detections in {len(entries)} pictures")
        rows = []
        for name in entries[0]["before"]["seen"]:
            cells = [name]
            for when in ("before", "after"):
                counts = [sum(e[when]["seen"][name][eye] for e in entries) for eye in range(2)]
                # The less favourable judge: more detections of a concept, or fewer recognisable icons.
                count = min(counts) if name == "any icon" or when == "before" else max(counts)
                cells.append(f"{count} ({100 * count / len(entries):.0f} %)")
            rows.append(cells)
        print_table(("", "before", "after"), rows)
        if record["not_judged"]:
            say(f"not judged: {', '.join(record['not_judged'])} (no detector)")
    else:
        console().print("[yellow]The command line has no detector for this model. Look at the pictures.[/]")
    say(f"{folder}/grid.png")
