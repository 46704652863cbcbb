"""The basic types: `Concept` and `Handle`, and the protocols `Eraser`, `Editor` and `Detector`. Holds no model code."""

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
    shipped_anchors,
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
    "shipped_anchors",
    "shipped_concepts",
]

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    class Pipeline(DiffusionPipeline):
        """A callable pipeline. diffusers declares `__call__` in each pipeline class, not in their base class."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Eraser(Protocol):
    """Changes what a pipeline draws, reversibly. An eraser is a frozen dataclass, which is also its configuration.

    Methods also have two class attributes or properties. `off` holds the field values that make the method the
    identity, or None. `touches_uncond` says whether it may change unconditional rows (EIUP: those with a negative
    prompt). Neither belongs to the protocol, because type checkers distinguish class attributes from properties.
    """

    def apply(self, pipe: DiffusionPipeline) -> Handle: ...


def check_eraser(eraser: Any) -> None:
    """Raises TypeError unless `eraser` is an eraser. The message says what to write instead."""
    if isinstance(eraser, type):
        raise TypeError(
            f"Expected an eraser, got the class {eraser.__name__}. Write for example {eraser.__name__}('alcohol')."
        )
    if not callable(getattr(eraser, "apply", None)):
        cure = "Pass method names to efface.erase" if isinstance(eraser, str) else "See efface.Eraser"
        cure = "Apply them one by one" if isinstance(eraser, (list, tuple)) else cure
        cure = "Fit it to a pipeline first: `fit` returns a delta" if hasattr(eraser, "fit") else cure
        raise TypeError(
            f"Expected an eraser, such as efface.EIUP('alcohol') or a delta, got {checks.shown(eraser)}. {cure}."
        )


class Editor(Protocol):
    """Learns a `Delta`: an eraser that consists of changed weights. An editor is a frozen dataclass, which is also its
    configuration."""

    def fit(self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0) -> Any:
        """Returns the delta (a `Delta` or `Directions`) that erases `concepts`. Leaves `pipe` unchanged, also
        after an exception."""
        ...


def config(method: Any) -> dict[str, Any]:
    """The name and the fields of a method as JSON types, as records store them.

    `efface.erase` and `api.build` find the method by this registered name. A class without a registered name gets
    `module:Class`. Register it by an entry point to rebuild it from records. Fields that a class names in `added` came
    with a later version: records leave them out at their defaults, so that they equal the earlier version's.
    """
    if hasattr(method, "config"):  # deltas describe themselves, without their tensors
        return dict(method.config())
    added = getattr(type(method), "added", ())
    same = [f.name for f in dataclasses.fields(method) if f.name in added and getattr(method, f.name) == f.default]
    fields = json.loads(json.dumps(dataclasses.asdict(method)))
    return {"method": name_of(type(method)), **{name: fields[name] for name in fields if name not in same}}


SETTABLE = ("strength", "rows")  # on a handle


def _unsettable(name: str, owner: str, handle: str) -> str:
    hint = near(name, SETTABLE)
    names = " and ".join(f"{handle}.{each}" for each in SETTABLE)
    return (
        f"`{name}` of {owner} cannot be set. {hint}{' ' if hint else ''}Settable: {names}. To change anything else, "
        "call `remove()` and apply another eraser."
    )


class Handle(AbstractContextManager["Handle"]):
    """An applied eraser. Change it while it is applied; remove it with `remove()` or by leaving the `with` block.

    Set `strength`, or `rows` if the eraser has this field: the change takes effect at the next denoiser call. To change
    any other field, remove the eraser and apply another one.

    Args:
        eraser: the applied eraser.
        replace: replaces it with a changed eraser. Returns what acts, if that is another one.
        remove: removes it from the pipeline.
        record: returns the record of its edits.
        note: a remark for the user, which `efface.active` shows.

    Raises:
        AttributeError: the attribute cannot be set, or the eraser has no such field.
        ValueError: the value is out of range, or the eraser was already removed.
        TypeError: `rows` are not lists of concepts.

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
    _replace: Callable[[Any], Any]
    _remove: Callable[[], None]
    note: str
    _record: Callable[[], dict[str, Any]]

    def __init__(
        self,
        eraser: Any,
        replace: Callable[[Any], Any],
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
            raise AttributeError(
                f"{type(self.eraser).__name__} has no field {', '.join(sorted(unknown))}. Set only the fields it has."
            )
        eraser = dataclasses.replace(self.eraser, **fields)
        acting = self._replace(eraser)
        vars(self)["eraser"] = eraser if acting is None else acting

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
        """The record of the latest pipeline call, as JSON types.

        `calls` counts denoiser calls. `rows` counts, for each conditional row of the batch, the calls that changed it.
        `exempt` counts the calls that changed nothing, by reason. `layers` is the number of attention layers edited in
        each call. The record of a delta is empty, because a delta changes the weights.
        """
        return self._record()

    def remove(self) -> None:
        """Removes the eraser from the pipeline. A second call does nothing."""
        if self.active:
            self._remove()
            vars(self)["active"] = False  # not before: what failed can be tried again

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Handles(AbstractContextManager["Handles"]):
    """Several handles as one, as `efface.stack` returns them. `remove()` removes them last to first.

    Args:
        handles: in the order of application. `handles[0].strength = 0.5` changes one eraser.

    Raises:
        AttributeError: an attribute of the group is set. Only single handles can be changed.
    """

    _handles: tuple[Handle, ...]

    def __init__(self, handles: Sequence[Handle]) -> None:
        vars(self)["_handles"] = tuple(handles)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            raise AttributeError(_unsettable(name, "several handles together", "handles[0]"))

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
        """A table with one line per eraser: strength, concepts, and whether its defaults suit the model."""
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
    """Decides whether a picture shows a concept."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor:
        """Maps pictures [N, 3, H, W] in [0, 1] to bool [J, N], one row per judge. Scores report the less favourable
        judge."""
        ...


def check_detector(detector: Any) -> None:
    """Raises TypeError unless it is a detector with a name."""
    if isinstance(detector, type) or not callable(detector) or not isinstance(getattr(detector, "name", None), str):
        raise TypeError(
            "Expected a detector with a text `name`, which maps pictures [N, 3, H, W] to bool [J, N], got "
            f"{checks.shown(detector)}. See efface.Detector, or get a shipped one from efface.detector."
        )


def check_pictures(images: Tensor) -> Tensor:
    """The pictures [N, 3, H, W] in [0, 1] as float32 on the CPU, as detectors take them.

    Raises:
        TypeError: `images` is not a tensor.
        ValueError: the type or the shape is wrong, or a value is not finite or out of range. A detector would report
            such pictures as safe.
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
            f"{expected}, got values that are not finite. Lower the strength or the guidance scale, or load the model "
            "in float32."
        )
    if len(pictures) and not (float(pictures.min()) >= 0 and float(pictures.max()) <= 1):
        raise ValueError(
            f"{expected}, got values from {float(pictures.min()):g} to {float(pictures.max()):g}. Scale them "
            "to [0, 1] first."
        )
    return pictures
