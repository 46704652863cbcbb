"""Policies in YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import checks, files
from .forms import CURE
from .policy import Policy

LARGEST = files.MIB
DEEPEST = 20


class _Strict(yaml.SafeLoader):
    """YAML without aliases, tags and repeated entries."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {DEEPEST}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [self.construct_object(key) for key, _ in node.value]
        if odd := [name for name in names if not isinstance(name, str)]:
            raise yaml.YAMLError(f"the entry {checks.shown(odd[0])} is not a text")
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise yaml.YAMLError(f"the entry {checks.shown(name)} occurs twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def parsed(text: str, where: str | Path) -> dict[str, Policy]:
    """Policies by name, from the text of a YAML file.

    Raises:
        ValueError: the text is not YAML, has another form, or a policy is empty or contradicts itself.
    """
    try:
        loader = _Strict(text)
        found = loader.get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{where} cannot be read as YAML ({checks.short(why, 160)}). {CURE}") from None
    if not isinstance(found, Mapping) or found.keys() != {"policies"} or not isinstance(found["policies"], Mapping):
        raise ValueError(checks.refusal(f"{where} to have one entry `policies` with names and policies", found, CURE))
    if not found["policies"]:
        raise ValueError(f"Expected {where} to have at least one policy, got none. {CURE}")
    made = {}
    for name, entries in found["policies"].items():
        if not isinstance(entries, Mapping):
            raise ValueError(checks.refusal(f"the policy {name!r} in {where} to be a mapping", entries, CURE))
        try:
            made[name] = Policy(**entries)
        except ValueError as error:
            raise ValueError(f"{where}, policy {checks.shown(name)}: {error}") from None
    return made


def read(path: str | Path) -> dict[str, Policy]:
    """As `parsed`, from a file of at most 1 MiB."""
    place = checks.path("policies", path)
    return parsed(files.read_text(place, LARGEST), place)
