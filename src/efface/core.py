"""The words everything else is written in: `Concept`, `Handle`, and what an eraser, an editor and a detector are. No
model code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from . import checks
from ._concepts import (
    Concept,
    ConceptLike,
    Concepts,
    ConceptsField,
    Rows,
    RowsField,
    as_concepts,
    as_rows,
    concept,
    concept_sources,
    shipped_concepts,
)
from .fields import Converted, field_names
from .registry import name_of, near

__all__ = [
    "Concept",
    "ConceptLike",
    "Concepts",
    "ConceptsField",
    "Converted",
    "Detector",
    "Editor",
    "Eraser",
    "Handle",
    "Handles",
    "Rows",
    "RowsField",
    "as_concepts",
    "as_rows",
    "check_detector",
    "check_eraser",
    "check_pictures",
    "concept",
    "concept_sources",
    "config",
    "field_names",
    "shipped_concepts",
]

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    class Pipeline(DiffusionPipeline):
        """A pipeline that can be called. diffusers declares the call in each kind of pipeline, not in their base."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Eraser(Protocol):
    """Changes what a pipeline draws, reversibly. The object is its own configuration (a frozen dataclass).

    The methods also have, as class attributes or properties, `off`, the field values that make them the identity or
    None, and `touches_uncond`, whether they may change unconditional rows (EIUP: those with a negative prompt). They
    are no part of the protocol: type checkers do not take a class attribute and a property for the same.
    """

    def apply(self, pipe: DiffusionPipeline) -> Handle: ...


def check_eraser(eraser: Any) -> None:
    """TypeError unless it is an eraser, with what to write instead."""
    if isinstance(eraser, type):
        raise TypeError(
            f"Expected an eraser, got the class {eraser.__name__}. Write for example {eraser.__name__}('alcohol')."
        )
    if not callable(getattr(eraser, "apply", None)):
        cure = "Use efface.erase, which takes methods by name" if isinstance(eraser, str) else "See efface.Eraser"
        cure = "Give several one by one" if isinstance(eraser, (list, tuple)) else cure
        cure = "Fit it to a pipeline first, which gives a delta" if hasattr(eraser, "fit") else cure
        raise TypeError(
            f"Expected an eraser, such as efface.EIUP('alcohol') or a delta, got {checks.shown(eraser)}. {cure}."
        )


class Editor(Protocol):
    """Learns a `Delta`, an eraser made of changed weights. The object is its own configuration (a frozen dataclass)."""

    def fit(self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0) -> Any:
        """The delta (`efface.Delta`) that erases `concepts`; leaves `pipe` as found, also after an exception."""
        ...


def config(method: Any) -> dict[str, Any]:
    """What a record stores of a method: its name and its fields, as JSON types.

    The name is the registered one, by which `efface.erase` and `api.build` find the method again. A class that is not
    registered is named `module:Class`; to rebuild it from a record, register it by an entry point.
    """
    if hasattr(method, "config"):  # a delta says itself what it is: its tensors do not belong into a record
        return dict(method.config())
    fields = json.loads(json.dumps(dataclasses.asdict(method)))
    return {"method": name_of(type(method)), **fields}


SETTABLE = ("strength", "rows")  # on a handle


def _unsettable(name: str, owner: str, handle: str) -> str:
    hint = near(name, SETTABLE)
    names = " and ".join(f"{handle}.{each}" for each in SETTABLE)
    return (
        f"`{name}` of {owner} cannot be set. {hint}{' ' if hint else ''}Settable: {names}. For all else, call "
        "`remove()` and apply another eraser."
    )


class Handle(AbstractContextManager["Handle"]):
    """An applied eraser: change it while it is on, take it off with `remove()` or by leaving the `with` block.

    `strength` and, where the eraser has them, `rows` can be set and take effect at the next denoiser call. Nothing else
    can: for another window or form, take it off and apply another eraser.

    Args:
        eraser: what was applied.
        replace: puts a changed eraser in its place.
        remove: takes it off.
        record: what it did.
        note: what its user should know, shown by `efface.active`.

    Raises:
        AttributeError: on setting anything else, such as a misspelt name, or what the eraser lacks.
        ValueError: on setting a value out of range, or on an eraser that is off already.
        TypeError: on setting `rows` that are no lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> handle = efface.EIUP("alcohol").apply(pipe)
        >>> handle.strength = 1.5
        >>> handle.config()["strength"]
        1.5
        >>> handle.remove()
    """

    eraser: Any
    active: bool
    _replace: Callable[[Any], None]
    _remove: Callable[[], None]
    note: str
    _record: Callable[[], dict[str, Any]]

    def __init__(
        self,
        eraser: Any,
        replace: Callable[[Any], None],
        remove: Callable[[], None],
        record: Callable[[], dict[str, Any]] = dict,
        note: str = "",
    ) -> None:
        vars(self).update(eraser=eraser, active=True, _replace=replace, _remove=remove, _record=record, note=note)

    if not TYPE_CHECKING:  # a type checker would take it to allow any name

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in SETTABLE:
                raise AttributeError(_unsettable(name, type(self.eraser).__name__, "handle"))
            super().__setattr__(name, value)

    def _set(self, **fields: Any) -> None:
        if not self.active:
            raise ValueError("This eraser was already removed. Apply it again to change it.")
        unknown = fields.keys() - set(field_names(self.eraser))
        if unknown:
            raise AttributeError(f"{type(self.eraser).__name__} has no {', '.join(sorted(unknown))} to set.")
        eraser = dataclasses.replace(self.eraser, **fields)
        self._replace(eraser)
        vars(self)["eraser"] = eraser

    @property
    def strength(self) -> float | None:
        return None if self.eraser.strength is None else float(self.eraser.strength)

    @strength.setter
    def strength(self, value: float | None) -> None:
        self._set(strength=value)

    @property
    def rows(self) -> tuple[tuple[Concept, ...], ...] | None:
        rows: tuple[tuple[Concept, ...], ...] | None = self.eraser.rows
        return rows

    @rows.setter
    def rows(self, value: Rows) -> None:
        self._set(rows=value)

    def config(self) -> dict[str, Any]:
        """The eraser's name and fields as JSON types, as stored in records."""
        return config(self.eraser)

    @property
    def record(self) -> dict[str, Any]:
        """What the eraser did since the latest call of the pipeline began, as JSON types.

        `calls` counts denoiser calls, `rows` the calls that acted on each conditional row of the batch, and `exempt`
        the calls without anything to do, by reason; `layers` is the number of attention layers that were edited in each
        call. Empty for a delta, which is in the weights.
        """
        return self._record()

    def remove(self) -> None:
        """Takes the eraser off; a second call does nothing."""
        if self.active:
            self._remove()
            vars(self)["active"] = False  # not before: what failed can be tried again

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Handles(AbstractContextManager["Handles"]):
    """Several handles as one, as `efface.stack` returns them; taken off last to first.

    Args:
        handles: in the order in which the erasers were applied; `handles[0].strength = 0.5` changes one of them.

    Raises:
        AttributeError: on setting anything on all of them at once.
    """

    _handles: tuple[Handle, ...]

    def __init__(self, handles: Sequence[Handle]) -> None:
        vars(self)["_handles"] = tuple(handles)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            raise AttributeError(_unsettable(name, "several handles at once", "handles[0]"))

    def __iter__(self) -> Iterator[Handle]:
        return iter(self._handles)

    def __getitem__(self, k: int) -> Handle:
        return self._handles[k]

    def __len__(self) -> int:
        return len(self._handles)

    def __enter__(self) -> Self:
        return self

    def config(self) -> list[dict[str, Any]]:
        return [h.config() for h in self._handles]

    def __str__(self) -> str:
        """A table: a line for each, with its strength, its concepts, and whether its defaults suit the model."""
        lines = []
        for handle in self._handles:
            eraser = handle.eraser
            groups = getattr(eraser, "rows", None) or (eraser.concepts,)
            concepts = " | ".join(", ".join(c.name for c in group) or "none" for group in groups)
            strength = getattr(eraser, "strength", None)
            name = getattr(eraser, "method", type(eraser).__name__)
            lines.append((name, "" if strength is None else f"strength {strength:g}", concepts, handle.note))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)] if lines else []
        joined = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return "\n".join(joined) or "nothing is on"

    def remove(self) -> None:
        with ExitStack() as each:
            for handle in self._handles:
                each.callback(handle.remove)  # all of them, last to first, even if one raises

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Detector(Protocol):
    """Says whether a concept is in a picture."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] in [0, 1] to bool [J, N]: one row per judge; the worse judge is reported."""
        ...


def check_detector(detector: Any) -> None:
    """TypeError unless it is a detector: what was judged is known again by its name."""
    if isinstance(detector, type) or not callable(detector) or not isinstance(getattr(detector, "name", None), str):
        raise TypeError(
            "Expected a detector, pictures [N, 3, H, W] to bool [J, N], with a text `name` by which records know it, "
            f"got {checks.shown(detector)}. See efface.Detector, or efface.detector for those that come with Efface."
        )


def check_pictures(images: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1] as float32 on the CPU, as detectors take them.

    Raises:
        TypeError: no tensor.
        ValueError: another type or shape, or values that are not finite or out of range. Nothing can be seen in such
            pictures, and a detector that answered all the same would call them safe.
    """
    expected = "Expected pictures as a float tensor [N, 3, H, W] in [0, 1]"
    if not callable(getattr(images, "is_floating_point", None)):
        raise TypeError(f"{expected}, got {type(images).__name__}. Give what a pipeline returns as output_type='pt'.")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or not images.is_floating_point():
        cure = (
            "Give what a pipeline returns as output_type='pt'" if images.is_floating_point() else "Divide bytes by 255"
        )
        raise ValueError(f"{expected}, got {images.dtype} {tuple(images.shape)}. {cure}.")
    pictures = images.detach().float().cpu()
    if not bool(pictures.isfinite().all()):
        raise ValueError(
            f"{expected}, got values that are not finite: the model left its range of numbers. Lower the strength or "
            "the guidance scale, or load the model in float32."
        )
    if len(pictures) and not (float(pictures.min()) >= 0 and float(pictures.max()) <= 1):
        raise ValueError(
            f"{expected}, got values from {float(pictures.min()):g} to {float(pictures.max()):g}. Scale them "
            "to [0, 1] first."
        )
    return pictures
