"""`efface list`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .. import registry
from .errors import BAD_INPUT, bad_input, fail
from .options import AsJson
from .output import escaped


def show(
    what: Annotated[
        str, typer.Argument(help="methods, concepts, suites, metrics, models or families; all if left out.")
    ] = "all",
    as_json: AsJson = False,
) -> None:
    """Show what there is: methods, concepts, suites, metrics, models, families."""
    from ..core import shipped_concepts
    from ..families import FAMILIES, about

    with bad_input():
        concepts = {name: ", ".join(c.phrases) for name, c in shipped_concepts().items()}
    tables: dict[str, dict[str, str]] = {
        "methods": registry.methods(),
        "concepts": concepts,
        "suites": registry.about("suites"),
        "metrics": registry.about("metrics"),
        "models": {"emoji": "embedded, 64 x 64", "FOLDER or HUB/ID": "any diffusers pipeline of a known family"},
        "families": {f.name: about(f) for f in FAMILIES} if what in ("all", "families") else {},
    }
    if what != "all" and what not in tables:
        hint = registry.near(what, tables)
        fail(f"Unknown list {what!r}. {hint}{' ' if hint else ''}There is: {', '.join(tables)}.", BAD_INPUT)
    chosen = tables if what == "all" else {what: tables[what]}
    if as_json:
        typer.echo(json.dumps(chosen, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    for title, rows in chosen.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in rows.items():
            table.add_row(escaped(name), escaped(text))
        Console().print(table, "")
