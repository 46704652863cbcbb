"""`efface list`: show the known methods, concepts, suites and so on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

import typer

from .. import checks, registry
from .errors import told
from .options import AsJson, Format
from .output import console, escaped, print_table

NAMES = "methods, erasers, editors, attacks, concepts, suites, metrics, detectors, models or families"


def show(
    what: Annotated[str, typer.Argument(help=f"{NAMES}. Default: all.")] = "all",
    format_: Format = None,
    as_json: AsJson = False,
) -> None:
    """Show the known methods, concepts, suites, metrics, detectors, models and families."""
    with told():
        if what == "all":
            names = [name for name in TABLES if name not in registry.METHODS]
        else:
            names = [checks.choice("list", what, TABLES)]
        chosen = {name: TABLES[name]() for name in names}
        if as_json:
            typer.echo(json.dumps(chosen, indent=1))
        elif format_ is not None:
            from ..tables import render

            if len(chosen) == 1:
                typer.echo(render(["name", "about"], list(chosen[what].items()), format_), nl=False)
            else:
                rows = [(name, *line) for name, rows in chosen.items() for line in rows.items()]
                typer.echo(render(["list", "name", "about"], rows, format_), nl=False)
        else:
            for title, lines in chosen.items():
                look = {"title": title, "title_justify": "left", "title_style": "bold", "box": None}
                print_table(("", ""), list(lines.items()), **look)
                if not lines:
                    console().print(escaped("nothing yet"))
                console().print("")


def _methods(*rooms: str) -> dict[str, str]:
    """One line per method, with its presets. Imports no method."""
    found = {}
    for room in rooms:
        for name, line in registry.about(room).items():
            presets = ", ".join(f"{name}.{preset}" for preset in registry.preset_names(name, room))
            found[name] = f"{line} Presets: {presets}." if presets else line
    return found


def _concepts() -> dict[str, str]:
    from ..core import concept_sources, shipped_concepts

    found = {name: ", ".join(each.phrases) for name, each in shipped_concepts().items()}
    return found | {name: f"{found[name]} (source: {source})" for name, source in concept_sources().items()}


def _detectors() -> dict[str, str]:
    from ..detectors._protocols import about

    return about()


def _models() -> dict[str, str]:
    from ..pipelines import EMBEDDED

    embedded = {name: f"embedded, {size}" for name, size in EMBEDDED.items()}
    return {**embedded, "FOLDER, FILE or HUB/ID": "any diffusers pipeline of a known family"}


def _families() -> dict[str, str]:
    from ..families import FAMILIES, about

    return {each.name: about(each) for each in FAMILIES}


TABLES: dict[str, Callable[[], dict[str, str]]] = {
    "methods": lambda: _methods(*registry.METHODS),
    "erasers": lambda: _methods("erasers"),
    "editors": lambda: _methods("editors"),
    "attacks": lambda: _methods("attacks"),
    "concepts": _concepts,
    "suites": lambda: registry.about("suites"),
    "metrics": lambda: registry.about("metrics"),
    "detectors": _detectors,
    "models": _models,
    "families": _families,
}
