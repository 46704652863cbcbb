"""Hazard categories of published schemes, as cross-references from concepts. They are never a verdict."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

RELATIONS = ("exact", "narrower", "broader", "related", "stand_in")


@dataclass(frozen=True)
class Hazard:
    """A category of a scheme to which a concept is related.

    Args:
        scheme, version: the scheme, such as "ailuminate" "1.1".
        id: the category's id in the scheme.
        relation: what the concept is to the category: "exact", "narrower", "broader", "related", or "stand_in" (a
            harmless one in its place).
    """

    scheme: str
    version: str
    id: str
    relation: str


@functools.cache
def schemes() -> Mapping[str, Any]:
    """The schemes by name: version, title, categories by id in our words, and those that are never drawn."""
    found: Mapping[str, Any] = _data()["schemes"]
    return found


@functools.cache
def hazards_of(name: str) -> tuple[Hazard, ...]:
    """The hazards of a shipped concept. A word list such as "nudity.safree" has those of "nudity"."""
    listed = _data()["concepts"].get(name.partition(".")[0], ())
    return tuple(Hazard(scheme, schemes()[scheme]["version"], each, relation) for scheme, each, relation in listed)


@functools.cache
def _data() -> Mapping[str, Any]:
    file = resources.files("efface") / "hazards.json"
    try:
        found: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing. Reinstall efface.") from error
    return found
