"""`efface attack`: attack an eraser, and say how often the erased concept comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import checks, registry
from .errors import NOT_MET, fail, told, warn
from .folders import output_folder
from .options import (
    AsJson,
    DeltaFiles,
    Guidance,
    MethodName,
    ModelName,
    Settings,
    check_guidance,
    find_erasers,
    load,
    loads,
    parse_fields,
    targets_of,
)
from .output import print_table, say, telling

if TYPE_CHECKING:
    from ..core import Concept
    from ..redteam import Attack, AttackResult

ALL = "all"


@loads
def attack(
    attack: Annotated[str, typer.Argument(help='The attack, see `efface list attacks`; or "all".')],
    out: Annotated[
        Path | None,
        typer.Option(help="The folder for the results; the same command continues there. Default: a new numbered one."),
    ] = None,
    concept: Annotated[str | None, typer.Option(help="The erased concept, a shipped one.")] = None,
    phrase: Annotated[str | None, typer.Option(help="Any other text as the erased concept.")] = None,
    model: ModelName = "emoji",
    method: MethodName = None,
    delta: DeltaFiles = None,
    set_: Settings = None,
    base: Annotated[bool, typer.Option("--base", help="Attack the base model, the positive control.")] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt with which the base model draws the concept; may be repeated.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="A field of the attack, NAME=VALUE.")] = None,
    budget: Annotated[int, typer.Option(min=1, help="Denoiser rows per prompt for the search.")] = 2000,
    images: Annotated[int, typer.Option("-n", "--images", min=1, help="Held-out pictures per prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The first held-out seed.")] = 1_000_000,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Guidance = None,
    judge: Annotated[
        str | None, typer.Option(help="The detector that judges, by name. Default: the embedded model's.")
    ] = None,
    search: Annotated[str | None, typer.Option(help="Another detector, for the attacker's search.")] = None,
    access: Annotated[
        str,
        typer.Option(
            help="The most that the attacker has: text (a service), embeddings, gradients, sampler or weights. "
            "Attacks that need more are refused, or left out of all."
        ),
    ] = "weights",
    no_control: Annotated[bool, typer.Option("--no-control", help="Leave out the control with random texts.")] = False,
    at_most: Annotated[
        float | None,
        typer.Option(help="A bar: the upper end of the attacked rate's interval must not exceed it. Exit code 3."),
    ] = None,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Attack an eraser, and say with an interval how often the erased concept comes back, and at what cost."""
    with told():
        names, fields = _attacks(attack, option)
        if out is not None:
            checks.path("--out", out)
        if at_most is not None:
            checks.share("--at-most", at_most)
        target, erasers = _sides(concept, phrase, base, method, delta, set_)
        check_guidance(erasers, guidance)
        from .. import redteam, report
        from ..detectors._named import detector

        made = {name: redteam.build(name, **fields) for name in names}
        options: dict[str, Any] = {"prompts": prompt, "budget": budget, "n": images, "seed": seed, "steps": steps}
        options |= {"guidance": guidance, "control": not no_control, "eraser": erasers}
        options["access"] = checks.choice("--access", access, redteam.ACCESS)
        options |= {
            name: None if spec is None else detector(spec, target.name)
            for name, spec in (("judge", judge), ("search", search))
        }
        pipe = load(model, loading)
        check_guidance(erasers, guidance, pipe)
        with output_folder(out) as folder:
            kept = f"Finished attempts are in {folder}. Run the same command with --out {folder}, which continues."
            with told(lambda: kept if any(folder.iterdir()) else ""), telling():
                left_out: dict[str, str] = {}
                if attack == ALL:
                    results, left_out = _all(pipe, made, target, folder, options)
                else:
                    results = [redteam.attack(pipe, made[attack], target, out=folder, **options)]
            page = folder / "attacks.html"
            report.write_attacks(results, page, left_out=left_out)
    if as_json:
        typer.echo(json.dumps({"out": str(folder), "attacks": [each.as_json() for each in results]}, indent=1))
    else:
        _show(results, page)
    if at_most is not None:
        _check_bar(results, at_most)


def _attacks(name: str, option: list[str] | None) -> tuple[list[str], dict[str, Any]]:
    """The names of the attacks, and the fields of a single one."""
    fields = parse_fields(option, "--option")
    if name != ALL:
        registry.resolve(name, "attacks")
        return [name], fields
    if fields:
        raise ValueError("Expected --option with one attack, got it with all. Name the attack.")
    return list(registry.methods("attacks")), {}


def _sides(
    concept: str | None,
    phrase: str | None,
    base: bool,
    method: str | None,
    delta: list[Path] | None,
    settings: list[str] | None,
) -> tuple[Concept, list[Any]]:
    """The erased concept, and the erasers."""
    if base and (method is not None or delta):
        raise ValueError("Expected either --base or an eraser, got both. Leave one out.")
    if (concept is None) == (phrase is None):
        raise ValueError("Expected the erased concept, one of --concept and --phrase, got none or both. Give one.")
    names, phrases = [concept] if concept else None, [phrase] if phrase else None
    (target,) = targets_of(names, phrases)
    return target, [] if base else find_erasers(names, phrases, method, delta, settings)[1]


def _all(
    pipe: Any, made: Mapping[str, Attack], target: Concept, out: Path, options: Mapping[str, Any]
) -> tuple[list[AttackResult], dict[str, str]]:
    """The results of all attacks that fit the access, the pipeline and the prompts; the others, and why they do not."""
    from .. import redteam

    results: list[AttackResult] = []
    left_out: dict[str, str] = {}
    memory: dict[Any, Any] = {}
    for name, each in made.items():
        try:
            redteam.check_access(each, options["access"])
            each.check(pipe)
        except ValueError as error:
            left_out[name] = str(error)
        else:
            try:
                results.append(redteam.attack(pipe, each, target, out=out / name, memory=memory, **options))
            except checks.NotJudged as error:
                left_out[name] = str(error)
        if name in left_out:
            warn(f"{name} was left out. {left_out[name]}")
    if not results:
        raise checks.NotJudged("No attack proposed anything, so nothing was judged. See the warnings above.")
    return results, left_out


def _show(results: list[AttackResult], page: Path) -> None:
    rows = []
    for each in results:
        base, before, attacked, control = (each.share(arm) for arm in ("base", "before", "attacked", "control"))
        plain = ("-" if share is None else f"{100 * share.value:.1f} %" for share in (base, before, control))
        first, second, luck = plain
        name, access = each.setting["attack"]["method"], str(each.setting["access"])
        rows.append([name, access, first, second, luck, "-" if attacked is None else str(attacked)])
    print_table(
        ("attack", "access", "base", "guarded", "random", "attacked"),
        rows,
        box=None,
        caption="pictures that show the concept, with a 95 % interval",
        caption_justify="left",
    )
    for each in results if len(results) == 1 else ():
        say(each.verdict())
        for warning in each.warnings():
            say(warning)
    from ..redteam import masking

    if warning := masking(results):
        warn(warning)
    say(str(page))


def _check_bar(results: list[AttackResult], at_most: float) -> None:
    over = []
    for each in results:
        share = each.share("attacked")
        if share is not None and share.high > at_most:
            over.append(f"{each.setting['attack']['method']} (the interval ends at {share.high:.4g})")
    if over:
        fail(f"Not met: at most {at_most:g}, exceeded by {'; '.join(over)}.", NOT_MET)
