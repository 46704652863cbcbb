"""Efface's wrapper of a module's `forward`: installing, finding, copying and removing it.

diffusers' `ModelHook` is lost when other code restores an earlier `forward`, as CPU offload does after every call.
Efface therefore checks a `Forward` before each use, and installs it again as the outermost wrapper.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from torch import nn

from .copies import Copies, Waiting

Act = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Replaces a `forward`: receives the inner one and the arguments."""


class Forward:
    """A wrapper of a module's `forward`. Without `act` it only forwards calls.

    Args:
        module: the module.
        act: replaces the `forward`.
        copied: called with a deep copy of the module at the copy's first call.
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
        """Whether this wrapper is the outermost."""
        return self.act is not None and vars(self.module()).get("forward") is self.outer

    def take_off(self) -> None:
        """Removes the wrapper. Under other wrappers it stays, and only forwards calls."""
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
        """In a copy of the module, the copy's wrapper."""
        made = Forward.__new__(Forward)
        memo[id(self)] = made
        made.act, made.copies = None, None
        copied: nn.Module = memo[id(self.module())]
        made.module = weakref.ref(copied)
        below: Any = self.below
        made.below = made.outer = deepcopy(below, memo)
        if self.act is not None and self.copies is not None:
            waiting = self.copies.of(memo)
            made.act = functools.partial(made._first, waiting)
            waiting.retire.append(functools.partial(setattr, made, "act", None))
        return made

    def _first(self, waiting: Waiting, below: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first call of a copy, which applies the erasers first."""
        waiting.wake()
        return getattr(self.module(), "forward", below)(*args, **kwargs)


def _run(forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
    return forward(args, kwargs)


def _of(function: Any) -> Forward | None:
    return function.args[0] if isinstance(function, functools.partial) and function.func is _run else None


def _ours(module: nn.Module) -> Forward | None:
    return _of(vars(module).get("forward"))


def _is_own(module: nn.Module, function: Any) -> bool:
    return getattr(function, "__func__", None) is type(module).forward and function.__self__ is module


class Hooks:
    """Wrappers of some modules, each the outermost of its module."""

    def __init__(self) -> None:
        self._on: dict[nn.Module, Forward] = {}

    def __iter__(self) -> Iterator[Forward]:
        return iter(self._on.values())

    def fit(self, acts: Mapping[nn.Module, Act]) -> None:
        """Wraps these modules, and no others. What a module's wrapper does never changes."""
        for module, hook in tuple(self._on.items()):
            if module not in acts or not hook.on_top():
                self._on.pop(module).take_off()
        for module, act in acts.items():
            if module not in self._on:
                self._on[module] = Forward(module, act)


class Entered:
    """Two torch hooks on a module, which detect calls that skip `act` because `forward` was replaced.

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
    """A torch hook that calls a function without arguments, and has no effect in copies of the module."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def __call__(self, *_: Any) -> None:
        self.function()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Quiet:
        return _Quiet(_nothing)


def _nothing() -> None:
    pass
