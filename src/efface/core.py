"""The basic types: `Concept` and `Handle`, and the protocols `Eraser`, `Editor` and `Detector`. Holds no model code."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib import resources
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, overload

from . import checks
from .registry import name_of, near

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    class Pipeline(DiffusionPipeline):
        """A callable pipeline. diffusers declares `__call__` in each pipeline class, not in their base class."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


Given = TypeVar("Given")
Held = TypeVar("Held")


class Converted(Generic[Given, Held]):
    """The type of a dataclass field whose constructor takes a `Given` and which then holds a `Held`.

    Only type checkers read it. At run time `Converted(default)` is the default, and `__post_init__` converts. In a
    dataclass derived from the one with the field, mypy shows `Given` again.
    """

    if TYPE_CHECKING:

        def __init__(self, default: Given) -> None: ...

        @overload
        def __get__(self, instance: None, owner: Any) -> Given: ...

        @overload
        def __get__(self, instance: object, owner: Any) -> Held: ...

        def __get__(self, instance: Any, owner: Any) -> Any: ...

        def __set__(self, instance: object, value: Given) -> None: ...

    else:

        def __new__(cls, default):
            return default


def field_names(method: Any) -> tuple[str, ...]:
    """The names of the fields of a method, or of its class, in order; none if it is not a dataclass."""
    return tuple(f.name for f in dataclasses.fields(method)) if dataclasses.is_dataclass(method) else ()


@dataclasses.dataclass(frozen=True)
class Concept:
    """Something that the model must not draw.

    Args:
        name: its name in files and reports.
        phrases: short texts that evoke it. They become erasure prompts. Default: `(name,)`.
        anchor: the text that methods with an anchor map the concept to. "" is the unconditional text.
        keep: related texts that methods with preservation leave unchanged.

    Raises:
        ValueError: `name` or a phrase is empty.
        TypeError: `name` is not a text, or `phrases` or `keep` is not a sequence of texts.

    Example:
        >>> from efface import Concept
        >>> Concept("neon sign").phrases
        ('neon sign',)
    """

    name: str
    phrases: tuple[str, ...] = ()
    anchor: str = ""
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.text("name", self.name)
        checks.text("anchor", self.anchor, empty=True)
        phrases, keep = (checks.texts(field, getattr(self, field)) for field in ("phrases", "keep"))
        object.__setattr__(self, "phrases", phrases or (self.name,))
        object.__setattr__(self, "keep", keep)
        if not all(p.strip() for p in self.phrases):
            raise ValueError(
                f"Expected the phrases of {checks.shown(self.name)} to be texts, got an empty one. Remove it."
            )


ConceptLike = Concept | str
Concepts = ConceptLike | Sequence[ConceptLike]
ConceptsField = Converted[Concepts, tuple[Concept, ...]]


@functools.cache
def shipped_concepts() -> Mapping[str, Concept]:
    """The concepts that come with Efface, by name."""
    return {name: found for name, (found, _) in _shipped().items()}


@functools.cache
def concept_sources() -> Mapping[str, str]:
    """The published source of a shipped concept's phrases, by name. Concepts without a published source are left
    out."""
    return {name: source for name, (_, source) in _shipped().items() if source}


def _shipped() -> dict[str, tuple[Concept, str]]:
    """The shipped concepts with their sources. In the file, a concept without a source is a plain list of phrases."""
    file = resources.files("efface") / "concepts.json"
    try:
        data = json.loads(file.read_text("utf-8"))
        entries = {name: entry for group in data.values() for name, entry in group.items()}
        published = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
        phrases = entries | {name: entry["phrases"] for name, entry in published.items()}
        sources = {name: str(entry["source"]) for name, entry in published.items()}
        return {name: (Concept(name, tuple(some)), sources.get(name, "")) for name, some in phrases.items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing. Reinstall efface.") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}). Reinstall efface.") from error


def concept(name: str) -> Concept:
    """The shipped concept of that name.

    Args:
        name: a name from `efface list concepts`. Upper and lower case differ. Names with a dot, such as
            "nudity.safree", are published word lists; `efface list concepts` shows their sources.

    Raises:
        ValueError: there is no such concept. The message lists near matches. Write other texts as `Concept("...")`.
        TypeError: `name` is not a text.

    Example:
        >>> import efface
        >>> efface.concept("alcohol").phrases[:2]
        ('beer mug', 'wine glass')
        >>> efface.concept("unsafe.uce").phrases
        ('violence', 'nudity', 'harm')
    """
    known = shipped_concepts()
    if not isinstance(name, str):
        raise TypeError(
            f"Expected the name of a shipped concept, got {checks.shown(name)}. Give a text, such as 'alcohol'."
        )
    if not name.strip():
        raise ValueError(
            "Expected the name of a shipped concept, got an empty text. Choose one from `efface list concepts`."
        )
    if name not in known:
        hint = near(name, known)
        raise ValueError(
            f"{checks.shown(name)} is not a shipped concept. {hint}{' ' if hint else ''}`efface list concepts` shows "
            f"all. Write any other text as Concept({checks.shown(name)}), on the command line as --phrase."
        )
    return known[name]


def as_concepts(concepts: Concepts, known: Sequence[Concept] = ()) -> tuple[Concept, ...]:
    """Concepts from names and `Concept` objects. A name must be in `known` or belong to a shipped concept."""
    if isinstance(concepts, (Concept, str)):
        concepts = (concepts,)
    names = {c.name: c for c in known}
    if not isinstance(concepts, Sequence) or not all(isinstance(c, (Concept, str)) for c in concepts):
        raise TypeError(
            f"Expected a Concept, a shipped name, or a sequence of these, got {checks.shown(concepts)}. "
            "Write for example ['alcohol', Concept('neon sign')]."
        )
    return tuple(c if isinstance(c, Concept) else names[c] if c in names else concept(c) for c in concepts)


Rows = Sequence[Concepts] | None
RowsField = Converted[Rows, tuple[tuple[Concept, ...], ...] | None]


def as_rows(rows: Rows, known: Sequence[Concept]) -> tuple[tuple[Concept, ...], ...] | None:
    """One tuple of concepts per prompt of the batch. None means the same concepts for every prompt."""
    if rows is None:
        return None
    if isinstance(rows, (str, Concept)) or not isinstance(rows, Sequence):
        raise TypeError(
            f"Expected `rows` to hold one list of concepts per prompt, got {checks.shown(rows)}. "
            "Write for example [['alcohol'], []] for two prompts."
        )
    return tuple(as_concepts(row, known) for row in rows)


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
        """Returns the delta (`efface.Delta`) that erases `concepts`. Leaves `pipe` unchanged, also after an
        exception."""
        ...


def config(method: Any) -> dict[str, Any]:
    """The name and the fields of a method as JSON types, as records store them.

    `efface.erase` and `api.build` find the method by this registered name. A class without a registered name gets
    `module:Class`. Register it by an entry point to rebuild it from records.
    """
    if hasattr(method, "config"):  # deltas describe themselves, without their tensors
        return dict(method.config())
    fields = json.loads(json.dumps(dataclasses.asdict(method)))
    return {"method": name_of(type(method)), **fields}


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
        replace: replaces it with a changed eraser.
        remove: removes it from the pipeline.
        record: returns what it did.
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
            raise AttributeError(
                f"{type(self.eraser).__name__} has no field {', '.join(sorted(unknown))}. Set only the fields it has."
            )
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
        """What the eraser did during the latest pipeline call, as JSON types.

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
