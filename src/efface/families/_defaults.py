"""Fills a method's open fields with the defaults of the pipeline's family, or of its model.

A method has a table, `defaults`: the name of a family, or of a model that its family tells apart (`Family.model`), to
the values of fields that are None; "" applies to all others. A model without an entry has its family's. The values were
calibrated on what is named. An empty entry means the defaults of the class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ._find import family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def filled(method: Any, pipe: DiffusionPipeline) -> Any:
    """Replaces fields that are None by the values of the pipeline's model, or else of its family."""
    return filled_for(method, *_names(pipe))


def filled_for(method: Any, *names: str) -> Any:
    """As `filled`, for the first of these models and families that the method knows."""
    missing = _missing(method, names)
    return replace(method, **missing) if missing else method


def uncalibrated(method: Any, pipe: DiffusionPipeline) -> str:
    """A note that a method's defaults were not calibrated for this family or model; "" if they were.

    Also "" if the method has no table of defaults, or if every field of the table is given.
    """
    table, names = _table(method), _names(pipe)
    if not table or names[0] in table or (table.get("") and not _missing(method, names)):
        return ""
    known = ", ".join(name for name in table if name) or "no family"
    return f"not calibrated for {names[0]} (calibrated: {known})"


def _names(pipe: DiffusionPipeline) -> tuple[str, str]:
    facts = family(pipe)
    return facts.model(pipe), facts.name


def _table(method: Any) -> Mapping[str, Mapping[str, Any]]:
    return getattr(method, "defaults", {})


def _missing(method: Any, names: Sequence[str]) -> dict[str, Any]:
    """The values of the first of these names, else of "", for the fields that are None."""
    table = _table(method)
    values = next((table[name] for name in (*names, "") if name in table), {})
    return {name: value for name, value in values.items() if getattr(method, name) is None}
