"""The calls of pipelines that share one denoiser, and which of them the current code is in.

A denoiser belongs to one call at a time. Code outside of it, such as another thread, is refused. A callback may draw
inside a step: the inner call has its own record, and afterwards the erasers continue with their state of the outer one.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..families import Family
from . import watch
from .contract import Encoding
from .copies import Copies
from .layers import Layers
from .prompts import Applied, Encoder
from .unconditional import Unconditional

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class Texts:
    """The facts on the coming batches from the latest `encode_prompt`.

    Args:
        positive: the text of the conditional rows.
        unconditional: if methods edit attention to text: the empty text, and the rows with another text.
        images_per_prompt: as in the call.
        encoding: the prompts and the settings.
        pipe: the pipeline.
        guidance_scale: the guidance scale of the call; NaN if the pipeline does not expose it.
        blind: whether the text encoder was removed, so that the unconditional text cannot be compared with "".
        negative: the text of the unconditional rows; None without guidance.
        negative_mask, negative_pooled: its mask and pooled text, if there are any.
        apart: whether another loop than the pipeline's follows, with separate denoiser calls for unconditional rows.
    """

    positive: Tensor
    unconditional: Unconditional | None
    images_per_prompt: int
    encoding: Encoding
    pipe: weakref.ref[DiffusionPipeline]
    guidance_scale: float
    blind: bool
    negative: Tensor | None
    negative_mask: Tensor | None
    negative_pooled: Tensor | None
    apart: bool = False

    @property
    def size(self) -> tuple[int, bool, int]:
        """The number of conditional rows, whether there is guidance, and the number of columns."""
        return len(self.positive), self.negative is not None, self.positive.shape[1]


@dataclass(eq=False)
class Call:
    """A call of a pipeline, or an `encode_prompt` outside of a call, after which code calls the denoiser itself.

    Args:
        owner: follows the calls of the denoiser.
        entered: whether it began with `check_inputs`.
        texts: the facts on its rows; None before `encode_prompt`.
        drawing: whether its steps are running.
        over: whether they ended.
        guarded: whether the denoiser was called in this step.
        counted: whether the number of steps is known.
        done, steps: the number of finished steps, and of all.
        kept: the erasers and their states in this call, while another call draws inside it.
    """

    owner: Calls
    entered: bool
    texts: Texts | None = None
    drawing: bool = False
    over: bool = False
    guarded: bool = False
    counted: bool = False
    done: int = 0
    steps: int = 1
    kept: tuple[tuple[Applied, Applied], ...] = ()


CALLS: ContextVar[tuple[Call, ...]] = ContextVar("efface_calls", default=())
"""The calls that the current code is in, the innermost last."""


class Guarded(Protocol):
    """The interface of the denoiser whose pipelines are followed."""

    facts: Family
    applied: list[Applied]
    copies: Copies
    layers: Layers
    given: tuple[int, int] | None

    def alone(self) -> Any: ...

    def check_pipeline(self, pipe: DiffusionPipeline) -> None: ...

    def refuse_without_guidance(self) -> None: ...

    def prepare(self, pipe: DiffusionPipeline, applied: Applied, encoder: Encoder, *, blind: bool = False) -> None: ...

    def restore(self, applied: Applied, state: Applied) -> None: ...

    def check_no_rows_given(self) -> None: ...

    def refit(self) -> None: ...


class Calls:
    """The calls of one denoiser.

    Attributes:
        call: the call to which the denoiser belongs. Compiled code reads it, because it cannot read `CALLS`.
        progress: the middle of the current step, as a share of all steps. A step may need several denoiser calls.
    """

    def __init__(self, site: Guarded) -> None:
        self.site = site
        self.call: Call | None = None
        self.progress = torch.zeros(())  # one tensor for all calls, which a compiled denoiser reads

    @property
    def texts(self) -> Texts | None:
        """The facts on the rows of the call."""
        return None if self.call is None else self.call.texts

    @property
    def apart(self) -> bool:
        """Whether unconditional predictions come from separate denoiser calls."""
        return self.site.facts.guidance_in_two_calls or (
            self.site.given is None and self.texts is not None and self.texts.apart
        )

    def ended_guidance(self, first: int) -> bool:
        """Whether a pipeline that ends guidance has left out the unconditional rows (`first`) of a step."""
        ends, texts = self.site.facts.ends_guidance and self.drawing is not None, self.texts
        return ends and not first and texts is not None and texts.negative is not None

    @property
    def drawing(self) -> Call | None:
        """The call, while its steps are running."""
        return self.call if self.call is not None and self.call.drawing else None

    # ---- the call that the current code is in

    def here(self, *, encoded: bool = False) -> Call | None:
        """The innermost call of this denoiser that the current code is in. `encoded`: of those with texts."""
        own = (each for each in reversed(CALLS.get()) if each.owner is self)
        return next((each for each in own if each.texts is not None or not encoded), None)

    def check_free(self) -> None:
        """Raises RuntimeError if a call draws that the current code is not in."""
        if self.drawing is not None and self.drawing not in CALLS.get():
            raise RuntimeError(watch.TWO_THREADS)

    def check_here(self) -> None:
        """Raises RuntimeError if the denoiser belongs to another call than the current code.

        Code in no call may use the texts of the latest `encode_prompt` while no pipeline draws: in notebooks, each cell
        may have a context of its own.
        """
        here = self.here(encoded=True)
        if self.texts is not None and here is not self.call and (here is not None or self.drawing is not None):
            raise RuntimeError(watch.TWO_THREADS)

    def open(self, *, entered: bool) -> Call:
        """A new call. Former calls of this denoiser enclose it only if they draw."""
        call = Call(self, entered)
        CALLS.set((*(each for each in CALLS.get() if each.owner is not self or each.drawing), call))
        return call

    def claim(self, call: Call) -> None:
        """Gives the denoiser to a call."""
        if self.drawing is not None and self.drawing is not call:
            self.drawing.kept = tuple((each, replace(each)) for each in self.site.applied)
        self.call = call

    def resume(self, call: Call) -> None:
        """Gives the denoiser back to a call in whose step another one began."""
        if not call.drawing:
            return
        CALLS.set((*takewhile(lambda each: each is not call, CALLS.get()), call))
        if self.call is call:
            return
        self.call = call
        for applied, state in call.kept:
            if applied in self.site.applied:
                self.site.restore(applied, state)
        call.kept = ()
        self._measure(call)
        self.site.refit()

    def leave(self, call: Call) -> None:
        """Ends a call."""
        CALLS.set(tuple(each for each in CALLS.get() if each is not call))
        self.stop(call)
        if self.call is not call:
            return
        self.call, outer = None, self.here()
        for applied in self.site.applied:
            applied.forget()
        if outer is not None and outer.drawing:
            self.resume(outer)
        self.site.refit()  # offloading has put its own hooks on anew

    def close(self) -> None:
        """Ends all calls."""
        for call in (each for each in CALLS.get() if each.owner is self):
            self.stop(call)
        CALLS.set(tuple(each for each in CALLS.get() if each.owner is not self))
        self.call = None

    # ---- steps

    def start(self, steps: int | None = None) -> Call:
        """Called before the first step."""
        call = self.here() or self.open(entered=False)
        self.check_here()
        self.site.check_no_rows_given()
        call.drawing, call.counted = True, bool(steps)
        call.done, call.steps = 0, steps or 1
        self._measure(call)
        return call

    def step(self, call: Call) -> None:
        """Called after each step."""
        self.resume(call)
        if self.site.applied and call.texts is not None and not call.guarded:
            raise RuntimeError(watch.not_entered(self.site.facts.denoiser))
        call.guarded = False
        call.done += 1
        self._measure(call)

    def at(self, call: Call, step: int, steps: int) -> None:
        """Called before each step of a loop that is not the pipeline's."""
        call.counted, call.done, call.steps = True, step, steps
        self._measure(call)

    def stop(self, call: Call) -> None:
        """Called after the last step."""
        call.drawing, call.over, call.counted = False, True, False

    def _measure(self, call: Call) -> None:
        self.progress.fill_((call.done + 0.5) / call.steps)
