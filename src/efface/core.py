"""The words everything else is written in: `Concept`, `Handle`, `Row`, `Suite`, `Score`, and what an eraser, a detector
and a metric are. No model code."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar, cast, overload

from .registry import name_of, near

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    class Pipeline(DiffusionPipeline):
        """A pipeline that can be called. diffusers declares the call in each kind of pipeline, not in their base."""

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


def as_texts(what: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Texts as a tuple; TypeError for one text, which would fall apart into letters, and for what is no text."""
    if isinstance(texts, str):
        raise TypeError(f"{what} should be a sequence of texts, but got one text, {texts!r}: write ({texts!r},).")
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{what} should be a sequence of texts, but got {texts!r}.")
    return tuple(texts)


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
        TypeError: a name that is no text, or `phrases` or `keep` that are no sequence of texts.

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
        if not isinstance(self.name, str):
            raise TypeError(f"A concept's name should be a text, but got {self.name!r}.")
        phrases, keep = (as_texts(f"Concept `{field}`", getattr(self, field)) for field in ("phrases", "keep"))
        if not self.name.strip():
            raise ValueError("A concept needs a name, but got an empty one: write what to erase, for example 'beer'.")
        object.__setattr__(self, "phrases", phrases or (self.name,))
        object.__setattr__(self, "keep", keep)
        if not all(p.strip() for p in self.phrases):
            raise ValueError(f"Concept {self.name!r} has an empty phrase: remove it, an empty text erases nothing.")


ConceptLike = Concept | str
Concepts = ConceptLike | Sequence[ConceptLike]
ConceptsField = Converted[Concepts, tuple[Concept, ...]]


@functools.cache
def shipped_concepts() -> Mapping[str, Concept]:
    """The concepts that come with Efface, by name."""
    return {name: found for name, (found, _) in _shipped().items()}


@functools.cache
def concept_sources() -> Mapping[str, str]:
    """Where the phrases of a shipped concept were published, by name; concepts with phrases of ours are left out."""
    return {name: source for name, (_, source) in _shipped().items() if source}


def _shipped() -> dict[str, tuple[Concept, str]]:
    """The shipped concepts with their sources. Ours have a list of phrases; published ones name their source."""
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
        name: one of those that `efface list concepts` shows; upper and lower case differ. Names with a dot, such as
            "nudity.safree", are published word lists; the list shows their sources.

    Raises:
        ValueError: no such concept; the message lists near matches. A free text is written `Concept("...")`.
        TypeError: the name is no text.

    Example:
        >>> import efface
        >>> efface.concept("alcohol").phrases[:2]
        ('beer mug', 'wine glass')
        >>> efface.concept("unsafe.uce").phrases
        ('violence', 'nudity', 'harm')
    """
    known = shipped_concepts()
    if not isinstance(name, str):
        raise TypeError(f"Expected the name of a shipped concept, such as 'alcohol', but got {name!r}.")
    if not name.strip():
        raise ValueError("The concept is empty: name what to erase. `efface list concepts` shows the shipped ones.")
    if name not in known:
        hint = near(name, known)
        raise ValueError(
            f"{name!r} is not a shipped concept. {hint}{' ' if hint else ''}"
            f"`efface list concepts` shows all; for a text of your own write Concept({name!r}), "
            f"on the command line --phrase."
        )
    return known[name]


def as_concepts(concepts: Concepts, known: Sequence[Concept] = ()) -> tuple[Concept, ...]:
    """Concepts from names and `Concept` objects; a bare name must be one of `known` or a shipped one."""
    if isinstance(concepts, (Concept, str)):
        concepts = (concepts,)
    names = {c.name: c for c in known}
    if not isinstance(concepts, Sequence) or not all(isinstance(c, (Concept, str)) for c in concepts):
        raise TypeError(f"Expected a Concept, a shipped name, or a sequence of these, but got {concepts!r}.")
    return tuple(c if isinstance(c, Concept) else names[c] if c in names else concept(c) for c in concepts)


Rows = Sequence[Concepts] | None
RowsField = Converted[Rows, tuple[tuple[Concept, ...], ...] | None]


def as_rows(rows: Rows, known: Sequence[Concept]) -> tuple[tuple[Concept, ...], ...] | None:
    """One tuple of concepts per prompt of the batch, or None for "the same everywhere"."""
    if rows is None:
        return None
    if isinstance(rows, (str, Concept)) or not isinstance(rows, Sequence):
        raise TypeError(f"`rows` should hold one list of concepts per prompt, but got {rows!r}.")
    return tuple(as_concepts(row, known) for row in rows)


def check_strength(strength: float, name: str = "strength") -> float:
    """A strength as float; ValueError unless it is finite and >= 0."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < float("inf"):
        raise ValueError(f"Expected `{name}` to be a finite number >= 0, but got {strength!r}.")
    return float(strength)


def check_window(window: Sequence[float]) -> tuple[float, float]:
    """A window (start, end) as fractions of the trajectory; ValueError unless 0 <= start <= end <= 1."""
    numbers = isinstance(window, (tuple, list)) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) for x in window
    )
    if not numbers or len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
        raise ValueError(
            f"Expected `window` to be two numbers with 0 <= start <= end <= 1 (0 is pure noise, 1 the finished "
            f"picture), but got {window!r}."
        )
    return float(window[0]), float(window[1])


def check_count(name: str, value: int, least: int = 1) -> int:
    """A whole number; ValueError if it is none, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected `{name}` to be a whole number >= {least}, but got {value!r}.")
    return value


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        return None


TUNING_SEEDS = 10_000


def check_tuning_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds for choosing settings; ValueError unless all are below 10,000, where no test seed is."""
    if not len(seeds) or min(seeds) < 0 or max(seeds) >= TUNING_SEEDS:
        raise ValueError(
            f"Expected tuning seeds from 0 to {TUNING_SEEDS - 1}, but got {list(seeds[:1])} to {list(seeds[-1:])}: "
            "what is chosen on test seeds cannot be measured on them."
        )
    return tuple(seeds)


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
        raise TypeError(f"Expected an eraser, but got the class: write {eraser.__name__}('alcohol'), for example.")
    if not callable(getattr(eraser, "apply", None)):
        cure = "efface.erase takes methods by name" if isinstance(eraser, str) else "see efface.Eraser"
        cure = "give several one by one" if isinstance(eraser, (list, tuple)) else cure
        cure = "fit it to a pipeline first, which gives a delta" if hasattr(eraser, "fit") else cure
        raise TypeError(f"Expected an eraser, such as efface.EIUP('alcohol') or a delta, but got {eraser!r}: {cure}.")


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
        f"`{name}` of {owner} cannot be set. {hint}{' ' if hint else ''}Settable: {names}; for all else call "
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
            raise ValueError("This eraser was already removed: apply it again to change it.")
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
            f"but got {detector!r}: see efface.Detector, or efface.detector for those that come with Efface."
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
        raise TypeError(
            f"{expected}, but got {type(images).__name__}. Give what a pipeline returns as output_type='pt'."
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:] or not images.is_floating_point():
        cure = (
            "Give what a pipeline returns as output_type='pt'" if images.is_floating_point() else "Divide bytes by 255"
        )
        raise ValueError(f"{expected}, but got {images.dtype} {tuple(images.shape)}. {cure}.")
    pictures = images.detach().float().cpu()
    if not bool(pictures.isfinite().all()):
        raise ValueError(
            f"{expected}, but some values are not finite: the model left its range of numbers. Lower the strength or "
            "the guidance scale, or load the model in float32."
        )
    if len(pictures) and not (float(pictures.min()) >= 0 and float(pictures.max()) <= 1):
        raise ValueError(
            f"{expected}, but the values reach from {float(pictures.min()):g} to {float(pictures.max()):g}. Scale them "
            "to [0, 1] first."
        )
    return pictures


MAX_SEED = 2**32
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One picture to draw.

    Args:
        id: unique within the suite, and safe as a file name: letters, digits, `.`, `_` and `-`.
        prompt: what to draw.
        seed: 0 <= seed < 2**32.
        kind: what the row asks: "explicit", "theme", "paraphrase", "benign", "dual", ...
        category: group shown in reports.
        concept: name of the concept whose presence is judged in this row; "" = none.
        keep: things of which at least one should survive.
        cluster: rows with the same value share a target, and the bootstrap resamples whole clusters; "" = its own.
        call: pipeline arguments of this row alone, such as {"guidance_scale": 7.5}.

    Raises:
        ValueError: an empty prompt, a seed out of range, or an id that is no file name.

    Example:
        >>> from efface import Row
        >>> Row("cat-0", "a cat", 1_000_000, kind="explicit", concept="cat").seed
        1000000
    """

    id: str
    prompt: str
    seed: int
    kind: str = ""
    category: str = ""
    concept: str = ""
    keep: tuple[str, ...] = ()
    cluster: str = ""
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.id):
            raise ValueError(
                f"Expected the id of a row to be a file name of letters, digits, '.', '_' and '-', but got {self.id!r}."
            )
        if not self.prompt.strip():
            raise ValueError(f"Row {self.id!r} has an empty prompt: remove the row, or write what to draw.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"Expected the seed of row {self.id!r} to be in 0 ... 2**32 - 1, but got {self.seed!r}.")
        if isinstance(self.keep, str):
            raise TypeError(f"`keep` of row {self.id!r} should be a sequence of names, but got {self.keep!r}.")
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "call", dict(self.call))


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A row and the picture that was drawn for it.

    Args:
        row: the row.
        path: a picture file, loaded on demand.
        pixels: or the picture itself, float [3, H, W] in [0, 1].

    Raises:
        ValueError: neither of them, or both.

    Example:
        >>> import torch
        >>> from efface import Row, Sample
        >>> Sample(Row("cat-0", "a cat", 1_000_000), pixels=torch.zeros(3, 64, 64)).image().shape
        torch.Size([3, 64, 64])
    """

    row: Row
    path: Path | None = None
    pixels: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.pixels is None):
            raise ValueError(f"Expected either `path` or `pixels` for row {self.row.id!r}, but got neither or both.")

    def image(self) -> Tensor:
        """The picture, float [3, H, W] in [0, 1].

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file cannot be decoded.
        """
        if self.path is None:
            return cast("Tensor", self.pixels)
        import numpy
        import torch
        from PIL import Image

        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}, the picture of row {self.row.id!r}, is missing: draw it again.")
        try:
            with Image.open(self.path) as picture:
                pixels = numpy.array(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self.path}, the picture of row {self.row.id!r}, cannot be decoded ({error}): "
                "delete it, and the command that made the run draws it again."
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@dataclasses.dataclass(frozen=True)
class Score:
    """One number that an auditor can defend.

    Args:
        metric: what was measured, such as "removal.absolute" or "detection/cat".
        value: the number; NaN where it is not defined, such as a removal rate where the plain model draws nothing.
        n: of how many pictures (or pairs).
        low, high: the 95 % interval.
        unit: "share", "cosine", ...
        higher_is_better: None where neither is.
        protocol: detector, label set, threshold, in words.
        per_sample: row id to value, where there is one value per row.

    Raises:
        ValueError: no name, or a negative n.

    Example:
        >>> from efface import Score
        >>> Score("removal.absolute", 0.9, 320, 0.86, 0.93, higher_is_better=True).value
        0.9
    """

    metric: str
    value: float
    n: int
    low: float
    high: float
    unit: str = "share"
    higher_is_better: bool | None = None
    protocol: str = ""
    per_sample: Mapping[str, float] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not self.metric or self.n < 0:
            raise ValueError(f"Expected a metric's name and n >= 0, but got {self.metric!r} and n = {self.n}.")


class Metric(Protocol):
    """Pictures to scores. The object is its own configuration (a frozen dataclass)."""

    name: ClassVar[str]
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool | None]

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """Scores of `samples`; `base` are the plain model's pictures of the same rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Suite:
    """Rows to draw and how to score them.

    Args:
        name: of the suite.
        version: changes whenever the rows do.
        rows: at least one, with unique ids.
        source: where the data comes from.
        licence: of the data.
        data_hash: sha256 of the data files; over the rows if left empty.
        call: pipeline arguments of all rows; a row's own `call` goes before them.
        metrics: what is measured unless others are asked for.

    Raises:
        ValueError: no rows, or an id used twice.

    Example:
        >>> from efface import Row, Suite
        >>> len(Suite("mine", "1", (Row("cat-0", "a cat", 1_000_000), Row("dog-0", "a dog", 1_000_001))).rows)
        2
    """

    name: str
    version: str
    rows: tuple[Row, ...]
    source: str = ""
    licence: str = ""
    data_hash: str = ""
    call: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"num_inference_steps": 25, "guidance_scale": 7.5}, hash=False
    )
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "call", dict(self.call))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.rows:
            raise ValueError(f"The suite {self.name!r} has no rows: raise its limit, or choose others.")
        ids = [row.id for row in self.rows]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"Expected row ids of the suite {self.name!r} to be unique, but {twice!r} is there twice.")
        if not self.data_hash:
            object.__setattr__(self, "data_hash", rows_hash(self.rows))


def rows_hash(rows: Sequence[Row]) -> str:
    """sha256 over the rows: one line of JSON each, keys sorted."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dataclasses.asdict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
