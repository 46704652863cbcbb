"""`efface calibrate`: how much strength a concept takes."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from .. import registry
from .._interrupt import gently
from .errors import bad_input, fail
from .folders import check_folder, output_folder
from .options import check_guidance, known, parse_fields
from .output import escaped


def _in_turn(prompts: list[str], most: int) -> list[str]:
    """At most so many of them, evenly spread."""
    return prompts if len(prompts) <= most else [prompts[k * len(prompts) // most] for k in range(most)]


def calibrate(
    concept: Annotated[str, typer.Option(help="The shipped concept to erase.")],
    model: Annotated[str, typer.Option(help='"emoji": other models have no detector on the command line.')] = "emoji",
    method: Annotated[str, typer.Option(help="How to erase; see `efface list methods`.")] = "eiup",
    set_: Annotated[list[str] | None, typer.Option("--set", help="A field of the method, NAME=VALUE.")] = None,
    target: Annotated[float, typer.Option(min=0, max=1, help="Most that may be left, as a share.")] = 0.03,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Least that must be kept, as a share.")] = 0.95,
    strength: Annotated[list[float] | None, typer.Option(help="A strength to try; may be repeated.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt that draws the concept; may be repeated.")] = None,
    keep_prompt: Annotated[list[str] | None, typer.Option(help="A prompt that must survive; may be repeated.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Pictures for each rate.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="First of the tuning seeds, which go up to 9,999.")] = 1_000,
    refine: Annotated[int, typer.Option(min=0, help="How often to halve the gap below.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    out: Annotated[Path | None, typer.Option(help="Output folder; an interrupted one goes on.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Also draw calibration.png; needs matplotlib.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the smallest strength that erases a concept and keeps the rest, on tuning seeds."""
    with bad_input(), ExitStack() as ends:
        if model != "emoji":
            raise ValueError(
                f"There is no detector for {model!r} on the command line: use efface.calibrate with your own."
            )
        from ..core import shipped_concepts
        from ..models import emoji

        shipped = shipped_concepts()
        drawn = [name for name in shipped if known(emoji.truth, name)]
        if concept not in drawn:
            why = "is a shipped concept, but emoji cannot draw it" if concept in shipped else "is not a shipped concept"
            hint = registry.near(concept, drawn)
            raise ValueError(f"{concept!r} {why}. {hint}{' ' if hint else ''}It can draw {', '.join(drawn)}.")
        about = shipped[concept]
        fields = parse_fields(set_ or [])
        if "strength" in fields:
            raise ValueError(
                "The strength is what is looked for: give --strength for those to try, not --set strength."
            )
        cells = {cell: [text for text, _ in emoji.prompts(about.name, cell)] for cell in emoji.CELLS}
        registry.resolve(registry.split(method)[0], "erasers")
        from .. import api
        from ..calibration import STRENGTHS
        from ..calibration import calibrate as search

        eraser = api.build(method, about, **fields)
        check_guidance([eraser], guidance)
        if out is None or not (out / "setting.json").exists():
            check_folder(out, False)
        pipe = api.load(model)
        eraser.apply(pipe).remove()
        out = ends.enter_context(output_folder(out))
        pipe.set_progress_bar_config(disable=True)
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        from ..models.emoji.eyes import ConceptEyes

        eyes = ConceptEyes(about.name)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("plain", total=None)

            def tell(what: str, pictures: int) -> None:
                bar.advance(task, pictures)
                bar.update(task, description=f"{what}, {bar.tasks[0].completed:g} pictures")

            try:
                gently()
                found = search(
                    pipe,
                    eraser,
                    about,
                    eyes,
                    target,
                    keep,
                    prompts=prompt or _in_turn(cells["explicit"] + cells["theme"], n),
                    keep_prompts=keep_prompt or _in_turn(cells["pair"], n),
                    kept=eyes.kept,
                    strengths=strength or STRENGTHS,
                    refine=refine,
                    n=n,
                    first_seed=seed,
                    out=out,
                    plot=plot,
                    progress=tell,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                )
            except KeyboardInterrupt:
                fail(f"Interrupted. Every finished strength is in {out}: the same command with --out goes on.", 130)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "concept": about.name, "method": method, **found.record()}, indent=1))
        return
    from rich.table import Table

    table = Table("strength", "left", "kept")
    for point in found.points:
        table.add_row(f"{point.strength:g}", str(point.left), str(point.kept), style="bold" * (point == found.best))
    Console().print(table)
    for line in (str(found), f"{out}/calibration.json"):
        Console().print(escaped(line), soft_wrap=True, highlight=False)
