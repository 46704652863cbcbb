"""The deltas on a pipeline: applying, checking, changing, copying and removing them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .._weights import part
from ..core import Handle
from ..hooks.copies import Hidden, wake
from ..hooks.watch import swapped
from .overlay import OVERLAYS, Changes, Overlay

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FIRST = "check_inputs"  # the first method of a pipeline call


class AppliedDelta(Hidden):
    """An applied delta.

    It wraps the pipeline's first method, inside the wrappers of run-time erasers and earlier deltas. So each call first
    checks that the pipeline still has the modules with the delta.

    Args:
        delta: the delta at its current strength, which a handle changes.
        pipe: its pipeline. None for a copy of the modules alone.
    """

    pipe: Any  # a weak reference

    def __init__(self, delta: Changes, pipe: DiffusionPipeline | None) -> None:
        self.delta, self.name, self.hidden = delta, FIRST, None
        self.pipe = (lambda: None) if pipe is None else weakref.ref(pipe)
        self.modules: list[Callable[[], Any]] = []  # a pipeline with deltas can be freed
        self.listed = True

    @property
    def parts(self) -> list[str]:
        """The edited parts, such as "unet"."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.delta.weights))

    def overlays(self) -> list[Overlay]:
        """The overlays with this delta."""
        found = [OVERLAYS[module] for ref in self.modules if (module := ref()) in OVERLAYS]
        return [overlay for overlay in found if self in overlay.on]

    def put(self) -> Handle:
        """Applies the delta. If this fails, nothing stays applied."""
        pipe = self.pipe()
        modules = {name: part(pipe, name) for name in self.parts}
        for name, module in modules.items():
            if module not in OVERLAYS:
                Overlay(module, name).put(module)
        overlays = [OVERLAYS[module] for module in modules.values()]
        self.modules = [overlay.module for overlay in overlays]
        with self._rewriting(overlays):
            for overlay in overlays:
                overlay.on = [*overlay.on, self]
        above = stand_ins(pipe)
        if above:
            self.hidden, above[-1].hidden = above[-1].hidden, self
        elif hasattr(pipe, FIRST):
            self.hidden = vars(pipe).get(FIRST)
            setattr(pipe, FIRST, self)
        return self.handle()

    def handle(self) -> Handle:
        return Handle(self.delta, self.change, self.remove)

    def change(self, delta: Changes) -> None:
        """Replaces the delta by one with another strength.

        Raises:
            ValueError: the delta was removed, or its weights cannot be written now.
            RuntimeError: other code changed the edited weights.
        """
        if not self.listed:
            raise ValueError("This delta was already removed. Apply it again to change it.")
        overlays = self.overlays()
        for overlay in overlays:
            overlay.check()
        with self._rewriting(overlays):
            self.delta = delta

    def remove(self) -> None:
        """Removes the delta.

        Raises:
            ValueError: its weights cannot be written now.
            RuntimeError: other code changed the edited weights.
        """
        overlays = self.overlays()
        for overlay in overlays:
            overlay.check(keep_loaded=True)
        with self._rewriting(overlays):
            for overlay in overlays:
                overlay.on = [entry for entry in overlay.on if entry is not self]
        self.leave()

    @contextmanager
    def _rewriting(self, overlays: Sequence[Overlay]) -> Iterator[None]:
        """Writes the modules again after the block. If this fails, everything stays as before."""
        delta, before = self.delta, [overlay.on for overlay in overlays]
        try:
            yield
            for overlay in overlays:
                overlay.write(delta.weights)
        except BaseException:
            self.delta = delta
            for overlay, on in zip(overlays, before, strict=True):
                overlay.on = on
            for overlay in overlays:
                overlay.write(delta.weights)
            raise
        finally:
            for overlay in overlays:
                if not overlay.on:
                    overlay.release()

    def leave(self) -> None:
        """Restores the pipeline's first method. A shallow copy keeps this wrapper, which then has no effect."""
        self.listed, pipe = False, self.pipe()
        for above in stand_ins(pipe) if pipe is not None else ():
            if above.hidden is self:
                above.hidden = self.hidden
        if pipe is not None and vars(pipe).get(FIRST) is self:
            delattr(pipe, FIRST)
            if self.hidden is not None:
                setattr(pipe, FIRST, self.hidden)

    def check(self) -> None:
        """Raises RuntimeError unless the delta is in effect on the pipeline's current modules."""
        pipe = self.pipe()
        for name in self.parts if self.listed else ():
            called = getattr(pipe, name, None)
            module: Any = getattr(called, "_orig_mod", called)
            if module not in OVERLAYS or all(entry.delta is not self.delta for entry in OVERLAYS[module].on):
                raise RuntimeError(swapped(name, type(pipe).__name__))
            if called is not module or getattr(module, "_compiled_call_impl", None):  # compiled: its hooks do not run
                OVERLAYS[module].check()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = self.original
        self.check()
        return original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedDelta:
        pipe = memo.get(id(self.pipe()))
        made = AppliedDelta(self.delta, pipe)  # copies of its modules add themselves
        made.listed, made.hidden = self.listed, None if pipe is None else deepcopy(self.hidden, memo)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.pipe(), FIRST)  # a pickle has no deltas


def stand_ins(pipe: DiffusionPipeline) -> list[Hidden]:
    """The wrappers of the first method, outermost first, without those that a shallow copy has from its original."""
    wake(pipe)
    found, below = [], vars(pipe).get(FIRST)
    while isinstance(below, Hidden) and below.pipe() is pipe:
        found.append(below)
        below = below.hidden
    return found


def overlays(pipe: DiffusionPipeline) -> list[Overlay]:
    """The overlays of the pipeline's modules with deltas."""
    modules = [part(pipe, name) for name, module in pipe.components.items() if isinstance(module, nn.Module)]
    return [OVERLAYS[module] for module in modules if module in OVERLAYS]


def entries(pipe: DiffusionPipeline) -> list[AppliedDelta]:
    """The deltas on the pipeline's modules, in the order of application."""
    found = [entry for overlay in overlays(pipe) for entry in overlay.on if isinstance(entry, AppliedDelta)]
    return list(dict.fromkeys(found))


def _all(pipe: DiffusionPipeline) -> list[AppliedDelta]:
    """All deltas, also those whose modules the pipeline no longer has."""
    return list(dict.fromkeys([*entries(pipe), *(each for each in stand_ins(pipe) if isinstance(each, AppliedDelta))]))


def check_written(pipe: DiffusionPipeline) -> None:
    """Raises unless the applied deltas are in effect.

    Compares at most 4096 elements of each edited tensor, bit by bit. Accepts LoRAs (PEFT) that were fused or unfused,
    and a moved or cast model.

    Raises:
        RuntimeError: the pipeline has another module than the edited one, or other code, such as `load_state_dict`,
            wrote to an edited tensor. The message names the tensor and the cure.
    """
    for each in stand_ins(pipe):
        if isinstance(each, AppliedDelta):
            each.check()
    for overlay in overlays(pipe):
        overlay.check()


def forget(pipe: DiffusionPipeline) -> None:
    """Forgets all deltas. The current weights become the model's own.

    Use it after other code changed the weights, so that they cannot be restored. The handles then have no effect.
    """
    for each in _all(pipe):
        each.leave()
    for overlay in overlays(pipe):
        overlay.release()


def handles(pipe: DiffusionPipeline) -> list[Handle]:
    """One handle per applied delta, in the order of application.

    Use it for lost handles, and for a copy from `copy.deepcopy`, which has the original's deltas without handles. The
    list includes deltas whose module was replaced.
    """
    return [each.handle() for each in _all(pipe)]


def unedited(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The model's own values of the tensors that deltas change, by canonical name."""
    return {name: own for overlay in overlays(pipe) for name, own in overlay.own().items()}
