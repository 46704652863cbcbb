"""The options that verbs share, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import registry

if TYPE_CHECKING:
    from ..core import Concept
    from ..records import Metric

ConceptNames = Annotated[list[str] | None, typer.Option("--concept", help="A shipped concept; may be repeated.")]
Phrases = Annotated[list[str] | None, typer.Option("--phrase", help="A text of your own to erase; may be repeated.")]
ModelName = Annotated[str, typer.Option("--model", help='"emoji", a folder, or a hub id.')]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="How to erase, see `efface list methods`; eiup, or nothing beside --delta. A preset goes behind a dot: "
        "sld.strong.",
    ),
]
DeltaFiles = Annotated[list[Path] | None, typer.Option("--delta", help="A file made by `efface fit`; may be repeated.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A field of the method, NAME=VALUE.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def parse_fields(settings: list[str]) -> dict[str, Any]:
    """`name=value` pairs; a value is read as JSON if it is JSON, else as text."""
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"Expected --set NAME=VALUE, but got {setting!r}; for example --set strength=1.5.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def targets_of(concept: list[str] | None, phrase: list[str] | None) -> list[Concept]:
    from ..core import Concept
    from ..core import concept as shipped

    return [shipped(name) for name in concept or []] + [Concept(text) for text in phrase or []]


def find_erasers(
    concept: list[str] | None,
    phrase: list[str] | None,
    method: str | None,
    delta: list[Path] | None,
    settings: list[str] | None,
) -> tuple[list[Concept], list[Any]]:
    """What is to be erased, and what erases it: deltas, then the method."""
    targets, fields = targets_of(concept, phrase), parse_fields(settings or [])
    name = (None if delta else "eiup") if method is None else method
    if not targets and name is not None:
        raise ValueError("Nothing to erase: give --concept NAME or --phrase TEXT.")
    if fields and name is None:
        raise ValueError("--set is for the fields of a --method, but only deltas were given: name the method too.")
    if name is not None:
        registry.resolve(registry.split(name)[0], "erasers")
    from .. import api

    erasers = load_deltas(delta)
    targets = targets or list(dict.fromkeys(c for each in erasers for c in each.concepts))
    return targets, erasers + ([api.build(name, targets, **fields)] if name is not None else [])


def load_deltas(files: Sequence[Path] | None) -> list[Any]:
    """The deltas in these files; ValueError if two are the same, whose change would count twice."""
    from .. import api

    found: dict[str, Path] = {}
    deltas = []
    for path in files or ():
        deltas.append(api.load_delta(path))
        if (first := found.setdefault(deltas[-1].hash, path)) is not path:
            twice = f"{path} is given twice" if first == path else f"{path} is the same delta as {first}"
            raise ValueError(f"{twice}, and its change would count twice: give each delta once.")
    return deltas


def check_guidance(erasers: list[Any], guidance: float) -> None:
    for eraser in erasers:
        if guidance <= 1 and getattr(eraser, "wants_guidance", False):
            raise ValueError(
                f"{type(eraser).__name__} needs guidance, but --guidance is {guidance:g}: give a value above 1, or "
                "--method eiup."
            )


def judges(configs: Sequence[Mapping[str, Any]], settings: list[str]) -> tuple[Metric, ...]:
    """Metrics with some of their fields set, and those that settings name besides; METRIC may be left out if one."""
    from .. import runs

    changed = [dict(config) for config in configs]
    for key, value in parse_fields(settings).items():
        name, _, field = key.rpartition(".")
        meant = [config for config in changed if name in ("", config["method"])]
        if not meant and name in registry.methods("metrics"):
            meant = [{"method": name}]
            changed += meant
        if len(meant) != 1:
            known = ", ".join(config["method"] for config in changed)
            raise ValueError(f"Expected METRIC.NAME=VALUE with one of the metrics {known}, but got {key!r}.")
        meant[0][field] = value
    return runs.make_metrics(changed)


def known(truth: Callable[[str], object], name: str) -> bool:
    try:
        truth(name)
    except ValueError:
        return False
    return True
