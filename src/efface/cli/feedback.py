"""`efface feedback`: let people say with pictures what must go, and learn a reward from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import checks, files
from .._hub import allowing
from .errors import told
from .folders import output_file
from .judge import DEFAULT, StoreName, StorePath, ask, export_, import_, passes_of, print_alpha, read_
from .options import AllowHub, AsJson, Guidance, ModelName, Overwrite, load, loads
from .output import say, telling

feedback_app = typer.Typer(
    help="Let people say with pictures what must go, and learn a reward from it.", no_args_is_help=True
)
Sought = Annotated[str, typer.Option("--concept", help="What the annotators look for, in words that they understand.")]


@feedback_app.command()
@loads
def draw(
    prompt: Annotated[list[str], typer.Option("--prompt", help="A prompt that may show the concept; may be repeated.")],
    out: Annotated[Path, typer.Option(help="The run folder. Continues an earlier call of the same command.")],
    model: ModelName = "emoji",
    images: Annotated[int, typer.Option("--n", min=2, max=100_000, help="The number of pictures.")] = 200,
    seed: Annotated[int, typer.Option(help="The seed of the first picture; the next ones follow.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per pipeline call; limits the memory.")] = 8,
    guidance: Guidance = None,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Draw pictures to judge. The prompts take turns."""
    with told():
        from .. import runs
        from ..records import Row, Suite

        checks.seed("--seed", seed, images)
        turns = [checks.text("--prompt", prompt[k % len(prompt)]) for k in range(images)]
        rows = tuple(Row(f"{k:06d}", text, seed + k) for k, text in enumerate(turns))
        pipe = load(model, loading)
        with told(lambda: "Run the same command, which continues."), telling():
            made = runs.run(Suite("feedback", "1", rows), pipe, name=model, out=out, batch=batch, guidance=guidance)
        typer.echo(f"{made.n} pictures in {out}. Next: `efface feedback collect {out}`")


@feedback_app.command()
def collect(
    pictures: Annotated[Path, typer.Argument(help="A folder of pictures, or a run folder.")],
    concept: Sought,
    annotator: Annotated[str, typer.Option(help="The name of the person who judges.")],
    kind: Annotated[
        Literal["binary", "ranking"],
        typer.Option(help="binary: each picture shows it or does not. ranking: sets of up to five are ranked."),
    ] = "binary",
    store: StorePath = DEFAULT,
    number: Annotated[int, typer.Option("--pass", min=1, max=1000, help="A higher pass asks again.")] = 1,
    sheets: Annotated[
        Path | None, typer.Option(help="Write contact sheets and a file for the answers, instead of a page.")
    ] = None,
    blur: Annotated[bool, typer.Option("--blur", help="Blur the pictures until the space bar is pressed.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order and of the sets.")] = 0,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port of the page. 0: any free one.")] = 0,
) -> None:
    """Judge pictures, in one pass that can be stopped and continued."""
    with told():
        from .. import feedback

        checks.seed("--seed", seed)
        items = feedback.pool(checks.path("PICTURES", pictures), explicit=blur)
        with feedback.Store(store) as kept:
            whole = (kept, items, checks.text("--concept", concept), annotator, number, seed)
            session = feedback.Ranking(*whole) if kind == "ranking" else feedback.Session(*whole, kind)
            if session.left:
                ask(session, sheets, port, store)
            else:
                say(f"Nothing is left to judge in pass {number}. --pass {number + 1} asks again.")


feedback_app.command("read")(read_)


@feedback_app.command()
def agreement(store: StoreName, as_json: AsJson = False) -> None:
    """Show how well annotators and passes agree: on pictures, and on the order of ranked pairs."""
    with told():
        from .. import feedback

        with feedback.Store(store, create=False) as kept:
            every = kept.judgements()
        found = []
        for kind in ("binary", "ranking"):
            of_kind = [each for each in every if each.kind == kind]
            for concept in dict.fromkeys(each.concept for each in of_kind):
                given = [each for each in of_kind if each.concept == concept]
                facts = {"concept": concept, "kind": kind, "passes": passes_of(given)}
                found.append(facts | feedback.agreement_facts(given))
        if as_json:
            typer.echo(json.dumps({"store": store, "concepts": found}, indent=1))
            return
        if not found:
            say(f"{store} holds no feedback yet. `efface feedback collect PICTURES` adds some.")
        for facts in found:
            _print(facts)


def _print(facts: dict[str, Any]) -> None:
    what = "pairs" if facts["kind"] == "ranking" else "pictures"
    say(f"{facts['concept']}, {facts['kind']}; " + "; ".join(f"{k}: {v}" for k, v in facts["passes"].items()))
    if len(facts["passes"]) > 1:
        print_alpha(facts, what)
    else:
        say(
            "One pass cannot be compared: the agreement is unknown, and the reward will repeat this person's taste and "
            "mistakes. Let another annotator judge the same pictures."
        )


@feedback_app.command()
def reward(
    store: StoreName,
    pictures: Annotated[Path, typer.Option(help="The folder with the pictures that were judged.")],
    concept: Sought,
    out: Annotated[Path, typer.Option(help="The file to write, such as reward.safetensors.")],
    encoder: Annotated[
        str, typer.Option(help='The frozen encoder of pictures: "emoji", or the folder or hub id of a CLIP model.')
    ] = "emoji",
    figure: Annotated[Path | None, typer.Option(help="Also draw the held-out calibration, as an SVG.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the fit.")] = 0,
    allow_hub: AllowHub = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Learn a reward from the judgements, and test it on held-out pictures."""
    with told():
        from .. import feedback
        from ..detectors._encoders import embedded
        from ..detectors._encoders import encoder as made
        from ..feedback.figure import calibration_svg
        from ..feedback.reward import RewardModel

        file, drawn = output_file(out, overwrite), figure and output_file(figure, overwrite)
        with feedback.Store(store, create=False) as kept:
            evidence = feedback.Evidence.of(kept.judgements(), concept)
        judged = set(evidence.pictures)
        items = [item for item in feedback.pool(checks.path("--pictures", pictures)) if item.picture in judged]
        with allowing(allow_hub):
            images = made(encoder)
        features = embedded(images, [item.path for item in items])
        model = RewardModel.fit(evidence, [item.picture for item in items], features, encoder=encoder, seed=seed)
        model.save(file)
        if drawn:
            files.write(drawn, calibration_svg(model.facts))
        if as_json:
            typer.echo(json.dumps({"out": str(file), "concept": concept, **model.facts}, indent=1))
            return
        say(str(model))
        for note in model.facts["notes"]:
            say(note)
        if not model.reliable:
            say("These judgements do not predict held-out ones better than chance. Judge more pictures.")


feedback_app.command("export")(export_)
feedback_app.command("import")(import_)
