"""Efface's wrappers of pipeline methods, and the erasers of deep copies, which are applied at the copy's first use."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Hidden:
    """A wrapper of a method of one pipeline object: calls `act(pipe, original, ...)` instead.

    Deep copies of the pipeline receive its erasers. `original` is the pipeline's own method; `efface._text` asks for it
    by that name.
    """

    waiting: Waiting | None = None  # of a deep copy before its first use

    def __init__(self, pipe: DiffusionPipeline, name: str, act: Callable[..., Any], copies: Copies) -> None:
        self.pipe, self.name, self.act, self.copies = weakref.ref(pipe), name, act, copies
        self.hidden = vars(pipe).get(name)

    @property
    def original(self) -> Callable[..., Any]:
        """The pipeline's own method."""
        pipe = self.pipe()
        if pipe is None:
            raise RuntimeError(
                f"`{self.name}` belongs to a deleted pipeline with erasers, of which this one is a shallow copy. Make "
                f"copies with `copy.deepcopy` or `from_pipe`, or `del pipe.{self.name}`."
            )
        return self.hidden or MethodType(getattr(type(pipe), self.name), pipe)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = self.original
        return self.act(self.pipe(), original, *args, **kwargs)

    def take_off(self) -> None:
        """Restores the pipeline's method, unless other code replaced it since then."""
        pipe = self.pipe()
        if pipe is not None and vars(pipe).get(self.name) is self:
            delattr(pipe, self.name)
            if self.hidden is not None:
                setattr(pipe, self.name, self.hidden)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.copies.of(memo).method(self, memo)


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
        self.methods: list[Hidden] = []  # empty if a denoiser was copied without its pipeline
        self.retire: list[Callable[[], None]] = []  # the copies of hooks on modules

    def method(self, of: Hidden, memo: dict[int, Any]) -> Hidden:
        """The copy of a wrapper."""
        made = Hidden(memo[id(of.pipe())], of.name, partial(self._first, of.name), self.copies)
        made.hidden, made.waiting = deepcopy(of.hidden, memo), self
        self.methods.append(made)
        return made

    def _first(
        self, name: str, pipe: DiffusionPipeline, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self.wake()
        return getattr(pipe, name)(*args, **kwargs)

    def wake(self) -> None:
        """Applies the erasers to the copy."""
        methods, self.methods = self.methods, []
        for retire in self.retire:
            retire()
        for method in methods:
            method.take_off()
        if methods and (pipe := methods[0].pipe()) is not None:
            self.apply(pipe, self.erasers)


def wake(pipe: DiffusionPipeline) -> None:
    """Applies the erasers to a deep copy of a pipeline, before its first use."""
    for value in tuple(vars(pipe).values()):
        if isinstance(value, Hidden) and value.waiting is not None:
            value.waiting.wake()


def hide(pipe: DiffusionPipeline, acts: Mapping[str, Callable[..., Any]], copies: Copies) -> list[Hidden]:
    """Replaces the pipeline's methods of these names by `acts`."""
    made = [Hidden(pipe, name, act, copies) for name, act in acts.items() if hasattr(pipe, name)]
    for method in made:
        setattr(pipe, method.name, method)
    return made


def show(methods: Sequence[Hidden]) -> None:
    """Restores the methods that `hide` replaced."""
    for method in methods:
        method.take_off()
        method.act = _as_it_was


def _as_it_was(pipe: Any, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
