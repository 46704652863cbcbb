"""A weight edit of a policy: a delta in a file, by its SHA-256."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from .. import checks
from ..core import Concept
from .forms import Frozen, Given, as_given

FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.safetensors")
HASH = re.compile("[0-9a-f]{64}")


class Edit(Frozen):
    """One weight edit of a policy: a delta in a file of the operator's folder.

    Args:
        file: the name of the file in the folder of deltas, such as "no-alcohol.safetensors".
        sha256: the SHA-256 of the file, as `sha256sum` prints it.
        concepts: what the delta erases, as in `Erasure`. The delta itself must name these concepts.
        strength: > 0, the factor on all changes. None: the strength in the file.

    Raises:
        ValueError: an entry is unknown or out of range, or the file's name is a path or not that of a safetensors file.

    Example:
        >>> from efface.guard import Edit
        >>> edit = Edit(file="no-alcohol.safetensors", sha256="0" * 64, concepts=["alcohol"])
        >>> [concept.name for concept in edit.concepts]
        ['alcohol']
    """

    file: str
    sha256: str
    concepts: Annotated[tuple[Concept, ...], BeforeValidator(as_given), Field(min_length=1, max_length=100)]
    strength: Annotated[float, Field(gt=0)] | None = None

    if TYPE_CHECKING:

        def __init__(self, *, file: str, sha256: str, concepts: Given, strength: float | None = None) -> None: ...

    @field_validator("file")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not FILE.fullmatch(value):
            cure = "Write for example no-alcohol.safetensors; the operator names the folder."
            raise ValueError(checks.refusal("`file` to be the name of a safetensors file", value, cure))
        return value

    @field_validator("sha256")
    @classmethod
    def _is_hash(cls, value: str) -> str:
        if not HASH.fullmatch(value):
            raise ValueError(
                checks.refusal("`sha256` to be 64 digits of 0-9 and a-f", value, "Take it from sha256sum.")
            )
        return value

    def as_json(self) -> dict[str, Any]:
        facts = [vars(concept) | {"phrases": [*concept.phrases], "keep": [*concept.keep]} for concept in self.concepts]
        return {"file": self.file, "sha256": self.sha256, "concepts": facts, "strength": self.strength}


def edits(value: Any) -> Any:
    """Edits, from a list of edits and mappings."""
    if isinstance(value, (list, tuple)):
        return tuple(Edit(**each) if _has_names(each) else each for each in value)
    return value


def _has_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
