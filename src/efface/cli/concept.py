"""`efface concept`: help with the phrases of a concept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .errors import told
from .options import AsJson, Format, ModelName, Phrases, load, loads
from .output import print_table, say

concept_app = typer.Typer(help="Help with the phrases of a concept.", no_args_is_help=True)


@concept_app.command()
@loads
def propose(
    concept: Annotated[str, typer.Argument(help="A shipped concept, or the name of one of your own with --phrase.")],
    model: ModelName = "emoji",
    phrase: Phrases = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text to compare instead of the vocabulary; may be repeated.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="The largest number of proposals.")] = 20,
    format_: Format = None,
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Propose phrases that a text encoder reads like the concept's own, for you to accept. Adds none."""
    with told():
        from ..core import Concept, as_concepts
        from ..phrases import propose_phrases

        wanted = as_concepts(concept)[0] if phrase is None else Concept(concept, tuple(phrase))
        found = propose_phrases(load(model, loading), wanted, n=n, texts=text or None)
    rows = [(each.phrase, each.nearest, f"{each.cosine:.2f}", f"{each.covered:.2f}") for each in found]
    headings = ("phrase", "nearest", "cosine", "covered")
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(each) for each in found], indent=1))
    elif format_ is not None:
        from ..tables import render

        typer.echo(render(headings, rows, format_), nl=False)
    elif rows:
        print_table(headings, rows)
    else:
        say("No text is like the concept's phrases.")
