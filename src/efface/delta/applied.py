"""The deltas that are on a pipeline: put on, checked, changed, copied and taken off."""

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

FIRST = "check_inputs"  # the method that a call of a pipeline begins with


class AppliedDelta(Hidden):
    """A delta that is on a pipeline.

    It stands in for the pipeline's first method, below what run-time erasers and earlier deltas put there. So each call
    begins with the check that the pipeline still has the modules that the delta is on.

    Args:
        delta: at its present strength, which a handle changes.
        pipe: what it was applied to; None for a copy of the modules alone.
    """

    pipe: Any  # a weak reference

    def __init__(self, delta: Changes, pipe: DiffusionPipeline | None) -> None:
        self.delta, self.name, self.hidden = delta, FIRST, None
        self.pipe = (lambda: None) if pipe is None else weakref.ref(pipe)
        self.modules: list[Callable[[], Any]] = []  # a pipeline can be freed with deltas on
        self.listed = True

    @property
    def parts(self) -> list[str]:
        """What it edits, such as "unet"."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.delta.weights))

    def overlays(self) -> list[Overlay]:
        """Those that have the delta on."""
        found = [OVERLAYS[module] for ref in self.modules if (module := ref()) in OVERLAYS]
        return [overlay for overlay in found if self in overlay.on]

    def put(self) -> Handle:
        """Puts the delta on the pipeline, or leaves nothing if that breaks half way."""
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
        """Puts the delta with another strength in its place.

        Raises:
            ValueError: it is off, or its weights cannot be written now.
            RuntimeError: something else has changed what it edits.
        """
        if not self.listed:
            raise ValueError("This delta is no longer on. Apply it again to change it.")
        overlays = self.overlays()
        for overlay in overlays:
            overlay.check()
        with self._rewriting(overlays):
            self.delta = delta

    def remove(self) -> None:
        """Takes the delta off.

        Raises:
            ValueError: its weights cannot be written now.
            RuntimeError: something else has changed what it edits.
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
        """Writes the modules anew after the block. If that breaks, everything stays as before."""
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
        """Gives the pipeline its first method back; a shallow copy of it keeps this one, which does nothing more."""
        self.listed, pipe = False, self.pipe()
        for above in stand_ins(pipe) if pipe is not None else ():
            if above.hidden is self:
                above.hidden = self.hidden
        if pipe is not None and vars(pipe).get(FIRST) is self:
            delattr(pipe, FIRST)
            if self.hidden is not None:
                setattr(pipe, FIRST, self.hidden)

    def check(self) -> None:
        """Raises RuntimeError unless the delta is in effect on the modules that the pipeline has now."""
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
    """What stands in for the first method, the outermost first, without what a shallow copy has from its original."""
    wake(pipe)
    found, below = [], vars(pipe).get(FIRST)
    while isinstance(below, Hidden) and below.pipe() is pipe:
        found.append(below)
        below = below.hidden
    return found


def overlays(pipe: DiffusionPipeline) -> list[Overlay]:
    """Those of the pipeline's modules that have deltas on."""
    modules = [part(pipe, name) for name, module in pipe.components.items() if isinstance(module, nn.Module)]
    return [OVERLAYS[module] for module in modules if module in OVERLAYS]


def entries(pipe: DiffusionPipeline) -> list[AppliedDelta]:
    """The deltas that are on the pipeline's modules, in the order in which they were applied."""
    found = [entry for overlay in overlays(pipe) for entry in overlay.on if isinstance(entry, AppliedDelta)]
    return list(dict.fromkeys(found))


def _all(pipe: DiffusionPipeline) -> list[AppliedDelta]:
    """Also those whose modules the pipeline no longer has."""
    return list(dict.fromkeys([*entries(pipe), *(each for each in stand_ins(pipe) if isinstance(each, AppliedDelta))]))


def check_written(pipe: DiffusionPipeline) -> None:
    """Raises if the deltas that are on are not in effect as they were applied.

    It compares at most 4096 elements of each edited tensor, bit for bit. LoRAs (PEFT) may be fused and unfused, and the
    model moved and cast.

    Raises:
        RuntimeError: the pipeline has another module than the one that a delta edits, or `load_state_dict` or something
            else has written to an edited tensor. The message names it, with the cure.
    """
    for each in stand_ins(pipe):
        if isinstance(each, AppliedDelta):
            each.check()
    for overlay in overlays(pipe):
        overlay.check()


def forget(pipe: DiffusionPipeline) -> None:
    """Takes all deltas off the list and leaves the weights as they are now, which become the model's own.

    Use it after something else has changed the weights, so that nothing can be put back. The handles then do nothing.
    """
    for each in _all(pipe):
        each.leave()
    for overlay in overlays(pipe):
        overlay.release()


def handles(pipe: DiffusionPipeline) -> list[Handle]:
    """A handle for each delta that is on, in the order in which they were applied.

    Use it for lost handles, and for a copy made by `copy.deepcopy`, which has the original's deltas without handles. A
    delta whose module was replaced is listed too.
    """
    return [each.handle() for each in _all(pipe)]


def unedited(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The model's own values of what deltas have changed just now, by canonical name."""
    return {name: own for overlay in overlays(pipe) for name, own in overlay.own().items()}
