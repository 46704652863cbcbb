"""The fields that a method leaves open, filled with what suits the pipeline's family.

A method keeps its own table, `defaults`: by the name of a family the values that None stands for there, and under ""
those for all others. The families that the table names are those on which the values were calibrated. An empty entry
stands for the defaults in the class itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ._find import family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def filled(method: Any, pipe: DiffusionPipeline) -> Any:
    """The method with the values of the pipeline's family where a field is None."""
    missing = _missing(method, pipe)
    return replace(method, **missing) if missing else method


def uncalibrated(method: Any, pipe: DiffusionPipeline) -> str:
    """Says that the defaults a method uses here were calibrated elsewhere; "" if they were calibrated here.

    It is also "" if the method has no table of defaults, or if every field of the table is given.
    """
    table, facts = _table(method), family(pipe)
    if not table or facts.name in table or (table.get("") and not _missing(method, pipe)):
        return ""
    known = ", ".join(name for name in table if name) or "no family"
    return f"not calibrated for {facts.name} (calibrated: {known})"


def _table(method: Any) -> Mapping[str, Mapping[str, Any]]:
    return getattr(method, "defaults", {})


def _missing(method: Any, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The values of the family, or those of "", for the fields that are None."""
    table = _table(method)
    values = table.get(family(pipe).name, table.get("", {}))
    return {name: value for name, value in values.items() if getattr(method, name) is None}
