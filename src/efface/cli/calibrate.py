"""`efface calibrate`: find the strength for a concept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import checks, registry
from .errors import NOT_MET, fail, told
from .folders import check_folder, output_folder
from .options import AsJson, Settings, check_guidance, load, loads, parse_fields
from .output import print_table, say, telling


@loads
def calibrate(
    concept: Annotated[str, typer.Option(help="The shipped concept to erase.")],
    model: Annotated[
        str, typer.Option(help="An embedded model, which has detectors: emoji, emoji-128 or emoji-flux.")
    ] = "emoji",
    method: Annotated[str, typer.Option(help="The eraser; see `efface list erasers`.")] = "eiup",
    set_: Settings = None,
    target: Annotated[float, typer.Option(min=0, max=1, help="The largest residual rate, as a share.")] = 0.03,
    keep: Annotated[float, typer.Option(min=0, max=1, help="The smallest retention, as a share.")] = 0.95,
    strength: Annotated[list[float] | None, typer.Option(help="A strength to try; may be repeated.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt that draws the concept; may be repeated.")] = None,
    keep_prompt: Annotated[list[str] | None, typer.Option(help="A prompt for retention; may be repeated.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Pictures for each rate.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="First of the tuning seeds, which go up to 9,999.")] = 1_000,
    refine: Annotated[int, typer.Option(min=0, help="Number of halvings of the gap below.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale of predictions with and without the prompt.")] = 7.5,
    out: Annotated[Path | None, typer.Option(help="Output folder. Continues an interrupted calibration.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Also plot calibration.png; needs matplotlib.")] = False,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Find the smallest strength that meets goals for residual rate and retention, on tuning seeds.

    Exit code 3 if no strength meets both goals, 4 if the base model rarely draws the concept.
    """
    from ..pipelines import EMBEDDED

    with told():
        if model not in EMBEDDED:
            raise ValueError(
                f"There is no detector for {model!r} on the command line, only for {', '.join(EMBEDDED)}. Use "
                "efface.calibrate with your own."
            )
        from ..core import shipped_concepts
        from ..models import vocabulary_of
        from ..models.emoji.concepts import CELLS, known

        shipped, words = shipped_concepts(), vocabulary_of(model)
        drawn = [name for name in shipped if known(words.truth, name)]
        if concept not in drawn:
            why = (
                f"is a shipped concept, but {model} cannot draw it"
                if concept in shipped
                else "is not a shipped concept"
            )
            hint = registry.near(concept, drawn)
            raise ValueError(
                f"{checks.shown(concept)} {why}. {hint}{' ' if hint else ''}It can draw {', '.join(drawn)}."
            )
        about, fields = shipped[concept], parse_fields(set_)
        if "strength" in fields:
            raise ValueError(
                "`calibrate` chooses the strength itself. Give the strengths to try by --strength, not by --set "
                "strength."
            )
        cells = {cell: [text for text, _ in words.prompts(about.name, cell)] for cell in CELLS}
        checks.tuning_seeds("--seed", range(seed, seed + 2 * n))
        registry.resolve(registry.split(method)[0], "erasers")
        from .. import api
        from ..calibration import STRENGTHS
        from ..calibration import calibrate as search

        eraser = api.build(method, about, **fields)
        check_guidance([eraser], guidance)
        if out is None or not (out / "setting.json").exists():
            check_folder(out)
        pipe = load(model, loading)
        eraser.apply(pipe).remove()
        from ..models import eyes_of
        from ..models.emoji.eyes import ConceptEyes

        eyes, done = ConceptEyes(about.name, eyes_of(model)), Counter[str]()
        with (
            output_folder(out) as folder,
            told(lambda: f"Finished strengths are in {folder}. The same command with --out continues."),
            telling() as meter,
        ):
            meter("base model", 0, 2 * n)

            def tell(what: str, pictures: int) -> None:
                done[what] += pictures
                meter(what, done[what], 2 * n)

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
                out=folder,
                plot=plot,
                progress=tell,
                num_inference_steps=steps,
                guidance=guidance,
            )
    if as_json:
        facts = {"out": str(folder), "concept": about.name, "method": method, **found.record()}
        typer.echo(json.dumps(facts, indent=1))
    else:
        rows = [(f"{point.strength:g}", str(point.left), str(point.kept)) for point in found.points]
        print_table(("strength", "residual rate", "retention"), rows)
        say(str(found))
        say(f"{folder}/calibration.json")
    if found.strength is None:
        fail("No strength meets both goals. Try others by --strength, or another --method.", NOT_MET)


def _in_turn(prompts: list[str], most: int) -> list[str]:
    """At most so many items, evenly spread."""
    return prompts if len(prompts) <= most else [prompts[k * len(prompts) // most] for k in range(most)]
