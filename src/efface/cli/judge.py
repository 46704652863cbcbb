"""`efface judge`: let people label the pictures of a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import checks, files
from .._hub import allowing
from .._interrupt import gently
from .errors import told
from .folders import output_file
from .options import AllowHub, AsJson, Overwrite, parse_fields
from .output import print_table, say

if TYPE_CHECKING:
    from ..feedback import Judgement, Session

judge_app = typer.Typer(help="Let people label the pictures of a run, and compare their labels.", no_args_is_help=True)
StorePath = Annotated[str, typer.Option("--store", help="The store of judgements: a file, or a URL of SQLAlchemy.")]
StoreName = Annotated[str, typer.Argument(help="The store of judgements: a file, or a URL of SQLAlchemy.")]
DEFAULT = "labels.db"


@judge_app.command()
def label(
    run: Annotated[Path, typer.Argument(help="A scored run folder.")],
    concept: Annotated[str, typer.Option(help="The concept to look for, as the run's rows name it.")],
    annotator: Annotated[str, typer.Option(help="The name of the person who labels.")],
    store: StorePath = DEFAULT,
    number: Annotated[
        int | None,
        typer.Option(
            "--pass", min=1, max=3, help="1 or 2; 3 presents the pictures in which these differ. Default: the next one."
        ),
    ] = None,
    sheets: Annotated[
        Path | None, typer.Option(help="Write contact sheets and a file for the answers, instead of a page.")
    ] = None,
    positives: Annotated[int | None, typer.Option(min=1, help="Detected pictures to label. Default: 100.")] = None,
    near: Annotated[
        int | None, typer.Option(min=1, help="Others to label whose score is near the threshold. Default: 50.")
    ] = None,
    negatives: Annotated[int | None, typer.Option(min=1, help="Other pictures to label. Default: 150.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample and of the order.")] = 0,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port of the page. 0: any free one.")] = 0,
) -> None:
    """Label sampled pictures of a run and its base run, in one pass that can be stopped and continued."""
    with told():
        from .. import feedback, runs

        checks.seed("--seed", seed)
        feedback.annotator_name(annotator)
        found = runs.Run.open(run)
        given = {"positive": positives, "near": near, "negative": negatives}
        sizes = {name: size for name, size in given.items() if size is not None}
        with feedback.Store(store) as kept:
            items = runs.draw_items(kept, found, concept, sizes or None, seed)
            which = feedback.choose_pass(kept, items, concept, annotator) if number is None else number
            session = feedback.Session(kept, items, concept, annotator, which, seed)
            if not session.left:
                why = "The passes do not differ, or pass 3 is complete" if which == feedback.FINAL else "It is complete"
                say(f"Nothing is left to judge in pass {which}. {why}; `efface judge agreement {store}` shows more.")
            else:
                ask(session, sheets, port, store)


KEYS = {
    "label": "Keys: 1 it is there, 2 something else is recognisable, 3 nothing is.",
    "binary": "Keys: 1 the picture shows it, 2 it does not.",
    "ranking": "Keys: 1 shows most of it, 2 less, and so on; x does not show it; Enter stores the set.",
}


def ask(session: Session, sheets: Path | None, port: int, store: str) -> None:
    """Writes contact sheets, or serves the page, for what is left of a session."""
    if sheets is not None:
        _write(session, checks.path("--sheets", sheets), store)
    else:
        _serve(session, port, store)


def _verb(session: Session) -> str:
    return "judge" if session.kind == "label" else "feedback"


def _write(session: Session, folder: Path, store: str) -> None:
    from .. import feedback

    made = feedback.write_sheets(session, folder)
    if any(item.details.get("explicit") for item in session.items):
        say("The sheets may show explicit pictures without blur.")
    n = sum(len(session.shown(k)) for k in session.left)
    say(
        f"Pass {session.number}: {n} pictures on {len(made)} sheets in {folder}. Fill in "
        f"{folder / feedback.ANSWERS}, then run `efface {_verb(session)} read {folder} --store {store}`."
    )


def _serve(session: Session, port: int, store: str) -> None:
    from ..feedback.page import Page

    what = "sets" if session.kind == "ranking" else "pictures"
    with Page(session, port) as page:
        say(f"Pass {session.number}: {len(session.left)} of {session.total} {what} are left. Open")
        say(page.url)
        say(f"{KEYS[session.kind]} Ctrl-C stops, and the same command continues.")
        gently()
        try:
            page.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            say(f"{len(session.answered)} of {session.total} answers are stored in {store}.")
            raise
    say(f"Pass {session.number} is complete. `efface {_verb(session)} agreement {store}` shows the agreement.")


@judge_app.command("read")
def read_(
    folder: Annotated[Path, typer.Argument(help="A folder of contact sheets whose answers are filled in.")],
    store: StorePath = DEFAULT,
    replace: Annotated[bool, typer.Option("--replace", help="Replace earlier answers by corrected ones.")] = False,
) -> None:
    """Read the answers of contact sheets into the store."""
    with told():
        from .. import feedback

        facts, answers = feedback.read_sheets(folder)
        with feedback.Store(store, create=False) as kept:
            given = feedback.judgements_of(kept, facts, answers, datetime.now(UTC).isoformat(timespec="seconds"))
            new = kept.add(given, replace=replace)
        empty = len(facts["items"]) - len(answers)
        rest = f" {empty} answers are not filled in; fill them in and read the folder again." if empty else ""
        say(f"{new} new answers of {facts['annotator']} in pass {facts['pass']}, {len(answers)} in all.{rest}")


@judge_app.command()
def agreement(store: StoreName, as_json: AsJson = False) -> None:
    """Show how well the passes agree, and list the pictures in which they differ."""
    with told():
        from .. import feedback

        with feedback.Store(store, create=False) as kept:
            labels = kept.judgements(kind="label")
        found = [_agreed(concept, labels) for concept in dict.fromkeys(each.concept for each in labels)]
        if as_json:
            typer.echo(json.dumps({"store": store, "concepts": found}, indent=1))
            return
        if not found:
            say(f"{store} holds no labels yet. `efface judge label RUN` adds some.")
        for facts in found:
            _print(facts)


def _agreed(concept: str, labels: list[Judgement]) -> dict[str, Any]:
    """The agreement on one concept, over all runs of the store."""
    from .. import feedback

    given = [each for each in labels if each.concept == concept]
    passes = passes_of(given)
    apart = [
        {"run": run, "row": row, "outcomes": {f"{e.annotator}, pass {e.number}": e.outcome for e in group}}
        for (run, row), group in feedback.differing(given).items()
    ]
    return {"concept": concept, "passes": passes, **feedback.agreement_facts(given), "differing": apart}


def passes_of(given: Sequence[Judgement]) -> dict[str, int]:
    """The number of judgements of each annotator in each pass."""
    return dict(Counter(f"{each.annotator}, pass {each.number}" for each in given))


def _print(facts: dict[str, Any]) -> None:
    passes, apart = facts["passes"], facts["differing"]
    say(f"{facts['concept']}: {facts['pictures']} pictures; " + "; ".join(f"{k}: {v}" for k, v in passes.items()))
    if len(passes) < 2:
        say("One pass cannot be compared. `efface judge label RUN` adds a second one.")
        return
    print_alpha(facts, "pictures")
    if apart:
        lines = [[e["row"], e["run"][:12], "; ".join(f"{k}: {v}" for k, v in e["outcomes"].items())] for e in apart]
        print_table(["row", "run", "outcomes"], lines, box=None)
        say("`efface judge label RUN --pass 3` presents these pictures again.")


def print_alpha(facts: Mapping[str, Any], what: str) -> None:
    """Prints the agreement of several passes."""
    alpha = facts["alpha"]
    words = "not defined, because all outcomes are equal"
    if alpha is not None:
        words = f"{alpha:.2f} [{facts['interval'][0]:.2f}, {facts['interval'][1]:.2f}]"
    say(f"Krippendorff's alpha: {words}. The passes differ in {facts['differ']} {what}.")
    if len(facts["annotators"]) < 2:
        say("One annotator made all passes, so alpha measures consistency, not agreement between people.")


@judge_app.command("threshold")
def threshold_(
    file: Annotated[Path, typer.Argument(help="A CSV file with `picture` and `label` (1, 0, there, other, nothing).")],
    concept: Annotated[str, typer.Option(help="What the labels say is there.")],
    detector: Annotated[str, typer.Option(help="A detector with a threshold; see `efface list detectors`.")],
    detector_set: Annotated[list[str] | None, typer.Option(help="A field of the detector, NAME=VALUE.")] = None,
    misses: Annotated[float, typer.Option(help="The largest share of misses on the half that chooses.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the halves.")] = 0,
    allow_hub: AllowHub = False,
    as_json: AsJson = False,
) -> None:
    """Choose a detector's threshold on pictures that you labelled, and measure its errors on the other half."""
    with told():
        from .. import thresholds

        fields = parse_fields(detector_set, "--detector-set")
        pictures = thresholds.read_labelled(checks.path("FILE", file))
        with allowing(allow_hub):
            found = thresholds.threshold({"name": detector, **fields}, concept, pictures, misses, seed)
        if as_json:
            typer.echo(json.dumps(found.record(), indent=1))
            return
        say(f"--detector-set threshold={found.value:g}")
        say(f"On the other half: misses {found.missed}, false alarms {found.false_alarms} (95 % intervals).")


@judge_app.command("export")
def export_(
    store: StoreName,
    out: Annotated[Path, typer.Option(help="The file to write, one JSON object per line.")],
    overwrite: Overwrite = False,
) -> None:
    """Write all judgements of a store into a JSON-lines file."""
    with told():
        from .. import feedback

        path = output_file(out, overwrite)
        with feedback.Store(store, create=False) as kept:
            say(f"{feedback.export(kept, path)} judgements in {out}")


@judge_app.command("import")
def import_(
    store: StoreName,
    file: Annotated[Path, typer.Argument(help="A file made by `efface judge export` or `efface feedback export`.")],
) -> None:
    """Add the judgements of a JSON-lines file to a store. What it already holds stays."""
    with told():
        from .. import feedback

        path = checks.path("FILE", file)
        files.check_ordinary(path)
        with feedback.Store(store) as kept:
            say(f"{feedback.load(kept, path)} new judgements from {file} in {store}")
