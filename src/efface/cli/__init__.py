"""The `efface` command. Commands import heavy packages themselves, so that `efface --help` is fast."""

from . import (
    attack,
    audit,
    bench,
    calibrate,
    compare,
    concept,
    delta,
    erase,
    feedback,
    fit,
    judge,
    new,
    report,
    score,
    serve,
    studio,
    verify,
)
from . import list as listing
from .app import app

__all__ = ["app"]

app.command("list")(listing.show)
for _verb in (
    erase.erase,
    fit.fit,
    bench.bench,
    score.score,
    report.report,
    calibrate.calibrate,
    verify.verify,
    attack.attack,
    audit.audit,
    compare.compare,
    studio.studio,
):
    app.command()(_verb)
app.add_typer(concept.concept_app, name="concept")
app.add_typer(delta.delta_app, name="delta")
app.add_typer(judge.judge_app, name="judge")
app.add_typer(feedback.feedback_app, name="feedback")
app.add_typer(serve.serve_app, name="serve")
app.add_typer(new.new_app, name="new")
