"""Efface's part of a module's `forward` and of a pipeline's methods: put on, found again, copied and taken off.

diffusers' own `ModelHook` is lost when something else restores a `forward` that it saved earlier: CPU offload does so
after every call. A `Forward` is therefore checked before each use, and goes back on top of whatever is there then.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Act = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What to do in place of a `forward`: it gets the one below, and the arguments."""


class Forward:
    """What stands in front of a module's `forward`; without `act` it only passes calls on.

    Args:
        module: whose `forward` it is.
        act: what to do instead.
        copied: called with a deep copy of the module, when such a copy is called for the first time.
    """

    def __init__(self, module: nn.Module, act: Act, copied: Copies | None = None) -> None:
        below = _ours(module)
        self.below: Callable[..., Any] = module.forward
        while below is not None and below.act is None:  # retired ones on top are of no use
            self.below, below = below.below, _of(below.below)
        self.act: Act | None = act
        self.copies = copied
        self.module = weakref.ref(module)
        self.outer = functools.update_wrapper(functools.partial(_run, self), self.below)
        module.forward = self.outer

    def on_top(self) -> bool:
        """Whether a call of the module comes here first."""
        return self.act is not None and vars(self.module()).get("forward") is self.outer

    def take_off(self) -> None:
        """The module is called as without it; where something was put on top, it stays below and passes calls on."""
        self.act, module = None, self.module()
        if module is None:
            return
        for name in ("forward", "_old_forward"):  # the second is what accelerate put its own on
            if vars(module).get(name) is self.outer:
                if name == "forward" and _is_own(module, self.below):
                    del module.forward
                else:
                    setattr(module, name, self.below)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.act is None:
            return self.below(*args, **kwargs)
        return self.act(self.below, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """In a copy of the module, that copy's own forward."""
        made = Forward.__new__(Forward)
        memo[id(self)] = made
        made.act, made.copies = None, None
        copied: nn.Module = memo[id(self.module())]
        made.module = weakref.ref(copied)
        below: Any = self.below
        made.below = made.outer = deepcopy(below, memo)
        if self.act is not None and self.copies is not None:
            waiting = self.copies.of(memo)

            def first(below: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                waiting.wake()
                return getattr(made.module(), "forward", below)(*args, **kwargs)

            made.act = first
            waiting.forwards.append(made)
        return made


def _run(forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
    return forward(args, kwargs)


def _of(function: Any) -> Forward | None:
    return function.args[0] if isinstance(function, functools.partial) and function.func is _run else None


def _ours(module: nn.Module) -> Forward | None:
    return _of(vars(module).get("forward"))


def _is_own(module: nn.Module, function: Any) -> bool:
    return getattr(function, "__func__", None) is type(module).forward and function.__self__ is module


class Entered:
    """Two of torch's hooks on a module: whether a call of it came by `act` too, which a replaced `forward` skips.

    Args:
        before: called before each `forward`.
        after: called after it.
    """

    def __init__(self, module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.handles = (
            module.register_forward_pre_hook(_Quiet(before)),
            module.register_forward_hook(_Quiet(after)),
        )

    def take_off(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Quiet:
    """A hook of torch's that calls a function without arguments, and in a copy of the module does nothing."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def __call__(self, *_: Any) -> None:
        self.function()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Quiet:
        return _Quiet(_nothing)


def _nothing() -> None:
    pass


# ---------------------------------------------------------------- methods of a pipeline


class Hidden:
    """What stands in for a method of one pipeline object; deep copies of the pipeline get its erasers."""

    def __init__(self, pipe: DiffusionPipeline, name: str, act: Callable[..., Any], copies: Copies) -> None:
        self.pipe, self.name, self.act, self.copies = weakref.ref(pipe), name, act, copies
        self.hidden = vars(pipe).get(name)

    @property
    def original(self) -> Callable[..., Any]:
        """The pipeline's own method."""
        pipe = self.pipe()
        if pipe is None:
            raise RuntimeError(
                f"This pipeline is a shallow copy of one that had erasers on and is gone, so `{self.name}` has no "
                f"pipeline to work on. Make the copy with `copy.deepcopy` or `from_pipe`, or `del pipe.{self.name}`."
            )
        return self.hidden or MethodType(getattr(type(pipe), self.name), pipe)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.act(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        waiting = self.copies.of(memo)
        return waiting.method(self, memo)


class Copies:
    """What a deep copy of a guarded pipeline needs to be guarded as well.

    Args:
        erasers: those that are on now.
        apply: puts them on a pipeline.
    """

    def __init__(self, erasers: Callable[[], Sequence[Any]], apply: Callable[[Any, Sequence[Any]], None]) -> None:
        self.erasers, self.apply = erasers, apply

    def of(self, memo: dict[int, Any]) -> Waiting:
        """Of the one copy that is being made; the same for all that belongs to it."""
        if id(self) not in memo:
            memo[id(self)] = Waiting(tuple(self.erasers()), self.apply)
            memo.setdefault(id(memo), []).append(self)  # keeps its id until the copy is done
        return memo[id(self)]


class Waiting:
    """A deep copy that has not been used yet; its erasers go on when it is."""

    def __init__(self, erasers: Sequence[Any], apply: Callable[[Any, Sequence[Any]], None]) -> None:
        self.erasers, self.apply = erasers, apply
        self.copies = Copies(lambda: erasers, apply)  # of the copy
        self.pipe: weakref.ref[DiffusionPipeline] | None = None  # None: a denoiser was copied without its pipeline
        self.hidden: dict[str, Any] = {}
        self.forwards: list[Forward] = []

    def method(self, of: Hidden | _First, memo: dict[int, Any]) -> Any:
        pipe = memo[id(of.pipe())]
        self.pipe = weakref.ref(pipe)
        self.hidden[of.name] = deepcopy(of.hidden, memo)
        return _First(self, of.name)

    def wake(self) -> None:
        """Puts the erasers on the copy."""
        pipe, self.pipe = self.pipe() if self.pipe is not None else None, None
        for forward in self.forwards:
            forward.act = None
        if pipe is None:
            return
        for name, hidden in self.hidden.items():
            if isinstance(vars(pipe).get(name), _First):
                delattr(pipe, name)
                if hidden is not None:
                    setattr(pipe, name, hidden)
        self.apply(pipe, self.erasers)


class _First:
    """A method of a deep copy, until it is called for the first time."""

    def __init__(self, waiting: Waiting, name: str) -> None:
        self.waiting, self.name, self.hidden = waiting, name, waiting.hidden[name]

    def pipe(self) -> DiffusionPipeline | None:
        return self.waiting.pipe() if self.waiting.pipe is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.waiting.copies.of(memo).method(self, memo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pipe = self.pipe()
        if pipe is None:
            raise RuntimeError(f"`{self.name}` belongs to a pipeline that is gone: copy the pipeline again.")
        self.waiting.wake()
        return getattr(pipe, self.name)(*args, **kwargs)


def wake(pipe: DiffusionPipeline) -> None:
    """Puts the erasers on a deep copy of a guarded pipeline, if it has not been used yet."""
    for value in tuple(vars(pipe).values()):
        if isinstance(value, _First):
            value.waiting.wake()
            return


def hide(pipe: DiffusionPipeline, acts: Mapping[str, Callable[..., Any]], copies: Copies) -> dict[str, Hidden]:
    """Puts `acts` in place of the pipeline's methods of these names."""
    made = {name: Hidden(pipe, name, act, copies) for name, act in acts.items() if hasattr(pipe, name)}
    for name, method in made.items():
        setattr(pipe, name, method)
    return made


def show(methods: Mapping[str, Hidden]) -> None:
    """Puts back what `hide` hid, where nobody put something else in its place since."""
    for name, method in methods.items():
        pipe = method.pipe()
        if pipe is not None and vars(pipe).get(name) is method:
            delattr(pipe, name)
            if method.hidden is not None:
                setattr(pipe, name, method.hidden)
        method.act = _as_it_was


def _as_it_was(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
