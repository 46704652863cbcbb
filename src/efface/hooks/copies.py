"""Efface's wrappers of pipeline methods, and the erasers of deep copies, which are applied at the copy's first use."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Hidden:
    """A wrapper of a method of one pipeline object. Deep copies of the pipeline receive its erasers.

    `original` is the pipeline's own method: `texts` asks for it by that name.
    """

    def __init__(self, pipe: DiffusionPipeline, name: str, act: Callable[..., Any], copies: Copies) -> None:
        self.pipe, self.name, self.act, self.copies = weakref.ref(pipe), name, act, copies
        self.hidden = vars(pipe).get(name)

    @property
    def original(self) -> Callable[..., Any]:
        """The pipeline's own method."""
        pipe = self.pipe()
        if pipe is None:
            raise RuntimeError(
                f"This pipeline is a shallow copy of a deleted pipeline with erasers, so `{self.name}` has no "
                f"pipeline. Make the copy with `copy.deepcopy` or `from_pipe`, or `del pipe.{self.name}`."
            )
        return self.hidden or MethodType(getattr(type(pipe), self.name), pipe)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.act(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        waiting = self.copies.of(memo)
        return waiting.method(self, memo)


class Copies:
    """The data with which a deep copy of a pipeline receives its erasers.

    Args:
        erasers: the current erasers.
        apply: applies them to a pipeline.
    """

    def __init__(self, erasers: Callable[[], Sequence[Any]], apply: Callable[[Any, Sequence[Any]], None]) -> None:
        self.erasers, self.apply = erasers, apply

    def of(self, memo: dict[int, Any]) -> Waiting:
        """Of the one copy that is being made; the same for all that belongs to it."""
        if id(self) not in memo:
            memo[id(self)] = Waiting(tuple(self.erasers()), self.apply)
            memo.setdefault(id(memo), []).append(self)  # keeps its id until the copy is done
        found: Waiting = memo[id(self)]
        return found


class Waiting:
    """A deep copy before its first use, which will apply its erasers."""

    def __init__(self, erasers: Sequence[Any], apply: Callable[[Any, Sequence[Any]], None]) -> None:
        self.erasers, self.apply = erasers, apply
        self.copies = Copies(lambda: erasers, apply)  # of the copy
        self.pipe: weakref.ref[DiffusionPipeline] | None = None  # None: a denoiser was copied without its pipeline
        self.hidden: dict[str, Any] = {}
        self.retire: list[Callable[[], None]] = []  # the copies of hooks on modules

    def method(self, of: Hidden | _First, memo: dict[int, Any]) -> Any:
        pipe = memo[id(of.pipe())]
        self.pipe = weakref.ref(pipe)
        self.hidden[of.name] = deepcopy(of.hidden, memo)
        return _First(self, of.name)

    def wake(self) -> None:
        """Applies the erasers to the copy."""
        pipe, self.pipe = self.pipe() if self.pipe is not None else None, None
        for retire in self.retire:
            retire()
        if pipe is None:
            return
        for name, hidden in self.hidden.items():
            if isinstance(vars(pipe).get(name), _First):
                delattr(pipe, name)
                if hidden is not None:
                    setattr(pipe, name, hidden)
        self.apply(pipe, self.erasers)


class _First:
    """A method of a deep copy before its first call."""

    def __init__(self, waiting: Waiting, name: str) -> None:
        self.waiting, self.name, self.hidden = waiting, name, waiting.hidden[name]

    def pipe(self) -> DiffusionPipeline | None:
        return self.waiting.pipe() if self.waiting.pipe is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.waiting.copies.of(memo).method(self, memo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pipe = self.pipe()
        if pipe is None:
            raise RuntimeError(f"`{self.name}` belongs to a deleted pipeline. Copy the pipeline again.")
        self.waiting.wake()
        return getattr(pipe, self.name)(*args, **kwargs)


def wake(pipe: DiffusionPipeline) -> None:
    """Applies the erasers to a deep copy of a pipeline, before its first use."""
    for value in tuple(vars(pipe).values()):
        if isinstance(value, _First):
            value.waiting.wake()
            return


def hide(pipe: DiffusionPipeline, acts: Mapping[str, Callable[..., Any]], copies: Copies) -> dict[str, Hidden]:
    """Replaces the pipeline's methods of these names by `acts`."""
    made = {name: Hidden(pipe, name, act, copies) for name, act in acts.items() if hasattr(pipe, name)}
    for name, method in made.items():
        setattr(pipe, name, method)
    return made


def show(methods: Mapping[str, Hidden]) -> None:
    """Restores the methods that `hide` replaced, unless other code replaced them since then."""
    for name, method in methods.items():
        pipe = method.pipe()
        if pipe is not None and vars(pipe).get(name) is method:
            delattr(pipe, name)
            if method.hidden is not None:
                setattr(pipe, name, method.hidden)
        method.act = _as_it_was


def _as_it_was(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
