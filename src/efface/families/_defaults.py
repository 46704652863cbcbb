"""Fills a method's open fields with the defaults of the pipeline's family.

A method has a table, `defaults`: family name to the values of fields that are None; "" applies to all other families.
The values were calibrated on the named families. An empty entry means the defaults of the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ._find import family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def filled(method: Any, pipe: DiffusionPipeline) -> Any:
    """Replaces fields that are None by the values of the pipeline's family."""
    missing = _missing(method, pipe)
    return replace(method, **missing) if missing else method


def uncalibrated(method: Any, pipe: DiffusionPipeline) -> str:
    """A note that a method's defaults were not calibrated for this family; "" if they were.

    Also "" if the method has no table of defaults, or if every field of the table is given.
    """
    table, facts = _table(method), family(pipe)
    if not table or facts.name in table or (table.get("") and not _missing(method, pipe)):
        return ""
    known = ", ".join(name for name in table if name) or "no family"
    return f"not calibrated for {facts.name} (calibrated: {known})"


def _table(method: Any) -> Mapping[str, Mapping[str, Any]]:
    return getattr(method, "defaults", {})


def _missing(method: Any, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The family's values, or those of "", for the fields that are None."""
    table = _table(method)
    values = table.get(family(pipe).name, table.get("", {}))
    return {name: value for name, value in values.items() if getattr(method, name) is None}
