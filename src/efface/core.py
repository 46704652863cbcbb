"""The words everything else is written in: `Concept`, `Handle`, what an eraser and a detector are. No model code."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import resources
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from .registry import near

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Concept:
    """Something that must not be drawn.

    Args:
        name: what to call it in files and reports.
        phrases: short texts that evoke it; `(name,)` if left empty. They become erasure prompts.
        anchor: text to map the concept onto, for methods that need one; "" is the unconditional text.
        keep: neighbours that must survive, for methods that can preserve.

    Raises:
        ValueError: an empty name or phrase.

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
        for field in ("phrases", "keep"):
            if isinstance(getattr(self, field), str):
                raise TypeError(
                    f"Concept `{field}` should be a sequence of texts, but got one text, {getattr(self, field)!r}: "
                    f"write ({getattr(self, field)!r},)."
                )
        if not self.name.strip():
            raise ValueError("A concept needs a name, but got an empty one: write what to erase, for example 'beer'.")
        object.__setattr__(self, "phrases", tuple(self.phrases) or (self.name,))
        object.__setattr__(self, "keep", tuple(self.keep))
        if not all(p.strip() for p in self.phrases):
            raise ValueError(f"Concept {self.name!r} has an empty phrase: remove it, an empty text erases nothing.")


ConceptLike = Concept | str
Concepts = ConceptLike | Sequence[ConceptLike]


@functools.cache
def shipped_concepts() -> Mapping[str, Concept]:
    """The concepts that come with Efface, by name."""
    data = json.loads((resources.files("efface") / "concepts.json").read_text("utf-8"))
    return {name: Concept(name, tuple(phrases)) for group in data.values() for name, phrases in group.items()}


def concept(name: str) -> Concept:
    """The shipped concept of that name.

    Raises:
        ValueError: no such concept; the message lists near matches. A free text is written `Concept("...")`.

    Example:
        >>> import efface
        >>> efface.concept("alcohol").phrases[:2]
        ('alcohol', 'alcoholic drink')
    """
    known = shipped_concepts()
    if name not in known:
        hint = near(name, known)
        raise ValueError(
            f"{name!r} is not a shipped concept. {hint}{' ' if hint else ''}"
            f"`efface list concepts` shows all; for a text of your own write Concept({name!r})."
        )
    return known[name]


def as_concepts(concepts: Concepts, known: Sequence[Concept] = ()) -> tuple[Concept, ...]:
    """Concepts from names and `Concept` objects; a bare name must be one of `known` or a shipped one."""
    if isinstance(concepts, (Concept, str)):
        concepts = (concepts,)
    names = {c.name: c for c in known}
    return tuple(c if isinstance(c, Concept) else names[c] if c in names else concept(c) for c in concepts)


Rows = Sequence[Concepts] | None


def as_rows(rows: Rows, known: Sequence[Concept]) -> tuple[tuple[Concept, ...], ...] | None:
    """One tuple of concepts per prompt of the batch, or None for "the same everywhere"."""
    if isinstance(rows, (str, Concept)):
        raise TypeError(f"`rows` should hold one list of concepts per prompt, but got {rows!r}.")
    return None if rows is None else tuple(as_concepts(row, known) for row in rows)


def check_strength(strength: float) -> float:
    """A strength as float; ValueError unless it is finite and >= 0."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < float("inf"):
        raise ValueError(f"Expected `strength` to be a finite number >= 0, but got {strength!r}.")
    return float(strength)


def check_window(window: Sequence[float]) -> tuple[float, float]:
    """A window (start, end) as fractions of the trajectory; ValueError unless 0 <= start <= end <= 1."""
    numbers = isinstance(window, (tuple, list)) and all(isinstance(x, (int, float)) for x in window)
    if not numbers or len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
        raise ValueError(
            f"Expected `window` to be two numbers with 0 <= start <= end <= 1 (0 is pure noise, 1 the finished "
            f"picture), but got {window!r}."
        )
    return float(window[0]), float(window[1])


class Eraser(Protocol):
    """Changes what a pipeline draws, reversibly. The object is its own configuration (a frozen dataclass)."""

    off: ClassVar[Mapping[str, Any] | None]
    """Field values that make it the identity, or None."""
    touches_uncond: ClassVar[bool]
    """Whether it changes the unconditional (negative) rows."""

    def apply(self, pipe: DiffusionPipeline) -> Handle: ...


def config(method: Any) -> dict[str, Any]:
    """What a record stores of a method: its name and its fields, as JSON types."""
    fields = json.loads(json.dumps(dataclasses.asdict(method)))
    return {"method": type(method).__module__.rsplit(".", 1)[-1], **fields}


class Handle(AbstractContextManager["Handle"]):
    """An applied eraser: change it while it is on, take it off with `remove()` or by leaving the `with` block.

    `strength` and `rows` can be set and take effect at the next denoiser call.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> handle = efface.EIUP("alcohol").apply(pipe)
        >>> handle.strength = 1.5
        >>> handle.config()["strength"]
        1.5
        >>> handle.remove()
    """

    def __init__(self, eraser: Any, replace: Callable[[Any], None], remove: Callable[[], None]) -> None:
        self.eraser = eraser
        self._replace, self._remove = replace, remove
        self.active = True

    def _set(self, **fields: Any) -> None:
        if not self.active:
            raise ValueError("This eraser was already removed: apply it again to change it.")
        unknown = fields.keys() - {f.name for f in dataclasses.fields(self.eraser)}
        if unknown:
            raise AttributeError(f"{type(self.eraser).__name__} has no {', '.join(sorted(unknown))} to set.")
        eraser = dataclasses.replace(self.eraser, **fields)
        self._replace(eraser)
        self.eraser = eraser

    @property
    def strength(self) -> float | None:
        return None if self.eraser.strength is None else float(self.eraser.strength)

    @strength.setter
    def strength(self, value: float | None) -> None:
        self._set(strength=value)

    @property
    def rows(self) -> tuple[tuple[Concept, ...], ...] | None:
        return self.eraser.rows

    @rows.setter
    def rows(self, value: Rows) -> None:
        self._set(rows=value)

    def config(self) -> dict[str, Any]:
        """The eraser's name and fields as JSON types, as stored in records."""
        return config(self.eraser)

    def remove(self) -> None:
        """Takes the eraser off; a second call does nothing."""
        if self.active:
            self.active = False
            self._remove()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Handles(AbstractContextManager["Handles"]):
    """Several handles as one, as `efface.stack` returns them; taken off last to first."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self._handles = tuple(handles)

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

    def remove(self) -> None:
        for handle in reversed(self._handles):
            handle.remove()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Detector(Protocol):
    """Says whether a concept is in a picture."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] in [0, 1] to bool [J, N]: one row per judge; the worse judge is reported."""
        ...
