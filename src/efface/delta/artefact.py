"""What all results of editors share: their origin, their record, and their file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor

from .. import checks
from .._weights import digest
from ..core import Concept, Concepts, ConceptsField, Handle, RowsField, as_concepts
from ..fields import Converted, computed, field_names
from ..hooks import Method
from . import file, table
from .applied import check_written
from .base import Base, base_hash, check_after, origin, own_values

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Artefact:
    """The result of an editor: tensors, and the facts of their origin.

    A subclass is a frozen dataclass with a field for its tensors and a field `concepts`.

    Args:
        method, fields, seed, info: the editor, its fields, its seed, and further facts, as JSON types.
        model, base, versions: the base model, the fingerprints of its own values, and software.
        after: the deltas that were applied during the fit, hash to strength. They are required.
    """

    _kind: ClassVar[str]
    """The kind of its file, see `file`."""
    _apart: ClassVar[tuple[str, ...]]
    """The field with the tensors, then those that no header holds."""

    if TYPE_CHECKING:
        concepts = cast("tuple[Concept, ...]", ())

    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    model: str = ""
    base: Base = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def _line(self, *facts: str) -> str:
        """One line: class, facts, base model."""
        return f"{type(self).__name__}({', '.join(filter(None, facts))}, base model {self.model or 'unknown'!r})"

    @property
    def base_hash(self) -> str:
        """One hash over the model's own values of what changes, at the precision of the fit."""
        return base_hash(self.base)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the tensors (not the strength), the base, `after`, and what else decides the pictures."""
        told = json.dumps([self.base_hash, sorted(self.after.items()), *self._told()])
        return hashlib.sha256(f"{told}{digest(getattr(self, self._apart[0]))}".encode()).hexdigest()

    def _told(self) -> Sequence[Any]:
        """What else decides the pictures, as JSON types."""
        return ([concept.name for concept in self.concepts],)

    def _header(self) -> dict[str, Any]:
        """Everything except the tensors, as JSON types."""
        found = {name: getattr(self, name) for name in field_names(self) if name not in self._apart}
        found["concepts"] = [asdict(concept) for concept in self.concepts]
        if self._kind != file.WEIGHTS:
            found["kind"] = self._kind
        as_json: dict[str, Any] = json.loads(json.dumps(found))
        return as_json

    def config(self) -> dict[str, Any]:
        """The facts for records: everything except the tensors, and their hash."""
        return self._header() | {"base": self.base_hash, "hash": self.hash}

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: the tensors, and everything else as JSON in the header.

        The file appears completely or not at all.

        Raises:
            ValueError: a field is set that a file does not hold: `rows`, or an `extractor`.
            OSError: the file cannot be written, for example on a full disk. An older file stays.
        """
        if not_held := [name for name in self._apart[1:] if getattr(self, name) is not None]:
            names = " or ".join(f"`{name}`" for name in not_held)
            raise ValueError(f"A file does not hold {names}. Save the {self._kind} without them.")
        file.save(path, getattr(self, self._apart[0]), self._header())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is incomplete, damaged, of a newer version or another kind, or does not identify its
                base model.
        """
        return file.load(path, {cls._kind: cls._read})

    @classmethod
    def _read(cls, tensors: Mapping[str, Any], **header: Any) -> Self:
        made: Self = cast("Any", cls)(tensors, **header)
        return made


@dataclass(frozen=True, eq=False, repr=False)
class Vectors(Artefact, Method):
    """Tensors that a denoiser's modules read in each step: the base of `Directions` and `Steering`.

    Args:
        vectors: tensors by the name of a module, or of its part.
        concepts: the concepts of the tensors.
        strength, window, rows: as in `Method`.

    Raises:
        ValueError: `rows` names a concept without tensors. On `apply`: the base model differs, a module or a delta of
            `after` is missing.
    """

    _apart: ClassVar[tuple[str, ...]] = ("vectors", "rows")
    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    steers: ClassVar[tuple[str, ...]] = computed(lambda self: tuple(n.partition(".")[2] for n in self.modules))

    vectors: Mapping[str, Tensor]
    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    rows: RowsField = Converted(None)
    method: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known([concept for row in self.rows or () for concept in row])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the concepts."""
        return tuple(concept.name for concept in self.concepts)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the edited modules."""
        return tuple(self.vectors)

    def _known(self, concepts: Concepts) -> tuple[Concept, ...]:
        """These concepts. Raises ValueError if one has no vector."""
        found = as_concepts(concepts, self.concepts)
        if unknown := [concept.name for concept in found if concept not in self.concepts]:
            raise ValueError(f"{checks.shown(unknown[0])} has no vector. Known: {', '.join(self.names)}.")
        return found

    @classmethod
    def fitted(
        cls,
        editor: Any,
        pipe: DiffusionPipeline,
        vectors: Mapping[str, Tensor],
        concepts: Concepts,
        *,
        seed: int = 0,
        info: Mapping[str, Any] | None = None,
        **use: Any,
    ) -> Self:
        """Makes what an editor returns, for the model of `pipe` with the applied deltas.

        Args:
            editor, pipe, concepts, seed, info: as for `Delta.fitted`.
            vectors: as in the class.
            use: fields of how the vectors are used, such as `strength` and `window`.

        Raises:
            ValueError: the pipeline lacks a module, or the vectors are not as in the class.
        """
        tensors = {name: v.detach().to("cpu", torch.float32).contiguous() for name, v in vectors.items()}
        made = cls(tensors, as_concepts(concepts), **use)
        own = own_values(pipe, table.weights_of(pipe, made.modules))
        return replace(made, **origin(editor, pipe, own, seed=seed, info=info))

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        check_written(pipe)
        table.check_model(pipe, self.modules, self.base, self.model)
        check_after(pipe, self.after)
        return super().apply(pipe)

    def check(self, pipe: DiffusionPipeline) -> None:
        super().check(pipe)
        table.weights_of(pipe, self.modules)

    def config(self) -> dict[str, Any]:
        rows = None if self.rows is None else [[concept.name for concept in row] for row in self.rows]
        return super().config() | {"rows": rows, "modules": list(self.modules)}


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
