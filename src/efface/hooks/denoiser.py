"""The ordered list of methods on a denoiser, which each denoiser call runs."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._text import SITES, check_width
from .._weights import check_unfused
from ..core import Handle
from ..families import Family, check, filled, refusal, uncalibrated
from . import watch
from .batch import Batch, compiled_first_row, first_row, negated_rows, repelled
from .calls import Calls, Texts
from .contract import Contract
from .copies import Copies
from .forward import Entered, Forward
from .layers import Layers
from .outputs import Outputs
from .pipeline import Pipelines
from .prediction import needs_guidance
from .prompts import Applied, Encoder
from .step import Step
from .texts import Text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_GUARD = threading.Lock()


class Site:
    """Efface's state for one denoiser while methods are applied."""

    def __init__(self, denoiser: nn.Module, facts: Family) -> None:
        self.facts = facts
        self._denoiser = weakref.ref(denoiser)
        self.layers = Layers(facts, self.running, self._project)
        self.layers.find(denoiser)
        self.outputs = Outputs(facts, self.running)
        self.parameters = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.applied: list[Applied] = []
        self.copies = Copies(lambda: [(applied.method, applied.handle) for applied in self.applied], _apply_all)
        self.calls = Calls(self)
        self.pipelines = Pipelines(self, self.calls)
        self._hook: weakref.ref[Forward] | None = None  # on the denoiser, which holds it
        self.entered: Entered | None = None
        self.given: tuple[int, int] | None = None  # the number of unconditional and of all rows, if the caller says it
        self.train_timesteps = 1000
        self.step: Step | None = None  # a denoiser call that is going on
        self._passed = False  # whether the current call of the denoiser passed the erasers
        self._checked: tuple[Tensor, int] | None = None  # the text whose rows are known, and the first conditional one
        self._repelled: Any = None  # of the call before
        self._busy: int | None = None  # the thread that is inside

    @property
    def denoiser(self) -> nn.Module:
        found = self._denoiser()
        if found is None:
            raise ValueError("The denoiser of these erasers was deleted. Load the pipeline again.")
        return found

    @property
    def hook(self) -> Forward | None:
        return None if self._hook is None else self._hook()

    # ---- the list

    def add(self, pipe: DiffusionPipeline, method: Contract) -> Handle:
        note, method = uncalibrated(method, pipe), filled(method, pipe)
        self._check(pipe, method)
        applied, encodings = Applied(method), self.pipelines.held(pipe)
        check_width(pipe)
        self.prepare(pipe, applied, Encoder(pipe, None))
        self.pipelines.follow(pipe, encodings)
        self.applied.append(applied)
        self.refit()
        owner = weakref.ref(pipe)

        def swap(changed: Contract) -> Contract:
            present = owner()
            if present is None:
                raise ValueError("The pipeline of this eraser was deleted. Apply the eraser to another pipeline.")
            return self._change(present, applied, filled(changed, present))

        def remove() -> None:
            self.applied.remove(applied)
            applied.drop()
            self.refit()
            if not self.applied:
                self._close()

        applied.handle = Handle(method, swap, remove, lambda: applied.record.as_json(), note)
        return applied.handle

    def _check(self, pipe: DiffusionPipeline, method: Contract) -> None:
        """Raises ValueError if the method cannot work on this pipeline."""
        if self.facts.adds_rows(pipe):
            raise ValueError(
                f"{type(pipe).__name__} adds rows to each denoiser call (perturbed attention guidance), so Efface "
                "cannot identify the conditional rows. Use the pipeline without PAG, or an editor such as UCE."
            )
        if method.edits_attention:
            check(method, pipe)
            reads = self.facts.cross_attention or any("joint_text" in need.split("|") for need in method.needs)
            if not (self.layers.cross and reads):
                raise ValueError(refusal(type(method).__name__, method.needs or ("cross_text",), pipe))
        if method.calls_denoiser and getattr(pipe, self.facts.denoiser) is not self._denoiser():
            raise ValueError(watch.UNCOMPILED)
        for layer in self.layers.cross if method.edits_attention and self.facts.cross_attention else ():
            check_unfused(layer.attn, self.facts.denoiser)
        for layer in self.layers.own if method.edits_self_attention else ():
            check_unfused(layer.attn, self.facts.denoiser)

    def _change(self, pipe: DiffusionPipeline, applied: Applied, changed: Contract) -> Contract:
        """Replaces an applied method by a changed one, and returns it. After an error the old one stays."""
        texts = None if self.calls.drawing is None else self.calls.texts
        if texts is not None and changed.guides != applied.method.guides:
            raise ValueError(
                f"This change moves {type(changed).__name__} to other rows of the batch while the pipeline is drawing. "
                "Set it between two calls."
            )
        trial = Applied(changed, memory=applied.memory, record=applied.record, handle=applied.handle)
        trial.check_rows(self.images_per_prompt, len(texts.positive) if texts else None)
        self.prepare(pipe, trial, Encoder(pipe, texts.encoding if texts else None))
        applied.become(trial)
        self._checked = None
        return changed

    def restore(self, applied: Applied, state: Applied) -> None:
        """Gives an eraser its state in another call back, with the fields that it has by now."""
        changed, texts = applied.method, self.calls.texts
        applied.become(state)
        if changed is not state.method and texts is not None and (pipe := texts.pipe()) is not None:
            self._change(pipe, applied, changed)

    def prepare(self, pipe: DiffusionPipeline, applied: Applied, encoder: Encoder, *, blind: bool = False) -> None:
        """Encodes a method's erasure prompts. `blind`: keeps the earlier encoding, because the text encoder was
        removed."""
        if blind and applied.prompts is not None:
            applied.place(self.images_per_prompt)
            return
        applied.method.check(pipe)
        self.train_timesteps = self.facts.train_timesteps(pipe)
        applied.prepare(pipe, self.images_per_prompt, encoder)

    @property
    def images_per_prompt(self) -> int:
        return 1 if self.calls.texts is None else self.calls.texts.images_per_prompt

    def forget_if_empty(self) -> None:
        """Drops the state of a denoiser without methods."""
        if not self.applied and (denoiser := self._denoiser()) is not None:
            SITES.pop(denoiser, None)

    def _close(self) -> None:
        if self.hook is not None:
            self.hook.take_off()
        if self.entered is not None:
            self.entered.take_off()
        self._hook = self.entered = None
        self.forget_if_empty()
        self.pipelines.close()

    # ---- hooks on modules

    def refit(self) -> None:
        """Hooks the denoiser while methods are applied, and the attention layers while a method needs them."""
        self._checked = None
        self._fit()

    def _fit(self) -> None:
        denoiser = self._denoiser()
        if denoiser is not None and self.applied:
            if self.hook is None or not self.hook.on_top():
                if self.hook is not None:
                    self.hook.take_off()
                self._hook = weakref.ref(Forward(denoiser, self._enter, self.copies))
            if self.entered is None:
                self.entered = Entered(denoiser, self._on_entering, self._on_leaving)
        methods = self._methods()
        cross, own = any(m.edits_attention for m in methods), any(m.edits_self_attention for m in methods)
        self.layers.fit(denoiser, cross=cross, own=own)
        self.outputs.fit(denoiser, [name for method in methods for name in method.steers])

    def check_pipeline(self, pipe: DiffusionPipeline) -> None:
        """Checks before a call that the denoiser is unchanged, no other thread draws, and all hooks are outermost."""
        present = getattr(pipe, self.facts.denoiser, None)
        if getattr(present, "_orig_mod", present) is not self._denoiser():
            raise RuntimeError(watch.swapped(self.facts.denoiser, type(pipe).__name__))
        self.calls.check_free()
        cache = watch.cache_on(self.denoiser.modules())
        if cache and any((m.edits_attention or m.guides or m.steers) and not m.is_off() for m in self._methods()):
            raise RuntimeError(watch.cached(self.facts.denoiser, cache))
        self.layers.find(self.denoiser)
        self._fit()

    def _methods(self) -> list[Contract]:
        return [applied.method for applied in self.applied]

    # ---- a call of the denoiser

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Allows one thread at a time, because the methods' state of the current call cannot be shared."""
        here = threading.get_ident()
        with _GUARD:
            if self._busy not in (None, here):
                raise RuntimeError(watch.TWO_THREADS)
            outside, self._busy = self._busy, here
        try:
            yield
        finally:
            self._busy = outside

    @contextmanager
    def rows_given(self, conditional: Sequence[bool]) -> Iterator[None]:
        """Declares the rows of denoiser calls inside the block: unconditional rows first."""
        before, self.given, self._checked = self.given, (conditional.count(False), len(conditional)), None
        try:
            yield
        finally:
            self.given, self._checked = before, None

    def check_no_rows_given(self) -> None:
        if self.given is not None:
            raise RuntimeError(
                "The pipeline was called inside `efface.conditional_rows`, which is for direct denoiser calls. Leave "
                "that block first."
            )

    def _on_entering(self) -> None:
        if not torch.compiler.is_compiling():
            self._passed = False

    def _on_leaving(self) -> None:
        if not torch.compiler.is_compiling() and not self._passed:
            self._fit()
            raise RuntimeError(watch.bypassed(self.facts.denoiser))

    def _enter(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the denoiser's `forward`."""
        if torch.compiler.is_compiling():
            return self._run(forward, args, kwargs)
        with self.alone():
            try:
                return self._run(forward, args, kwargs)
            finally:
                self.step = None

    def _run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the denoiser call that begins."""
        names = self.parameters[: len(args)]
        arguments = dict(zip(names, args, strict=True)) | kwargs
        arguments = {(first := self.parameters[0]): arguments[first]} | arguments
        facts, texts = self.facts, None if self.given is not None else self.calls.texts
        of_call = (None, False, None) if texts is None else texts.size
        forward, arguments, restored, turned = facts.adapted(forward, arguments, *of_call)
        text, mask = arguments[facts.text_argument], facts.text_mask(arguments)
        batch = self._begin(facts.noise(arguments[facts.time_argument]), text, mask)
        batch.turned = turned
        self.step = Step(self, forward, names, arguments, batch)
        return restored(self.step.run())

    def running(self, name: str) -> Step:
        """The denoiser call in which a module runs. Raises RuntimeError if there is none."""
        if self.step is None:
            raise RuntimeError(watch.outside(name))
        return self.step

    def _begin(self, timestep: Tensor | float, text: Tensor, mask: Tensor | None) -> Batch:
        """Determines the conditional rows, the time, and the text of each row."""
        texts, given, compiling = self.calls.texts, self.given, torch.compiler.is_compiling()
        if compiling:
            first = compiled_first_row(text, texts, given, self.facts)
        else:
            self._passed = True
            self._fit()
            first = self._first_row(text, texts)
        if given is not None and first:
            self._check_negatives(text[:first], texts)
        reads = texts.unconditional if texts is not None and given is None else None
        empty = None if reads is None else Text(reads.text, reads.mask)
        self._repelled = repelled(negated_rows(first, texts, given), text.device, self._repelled)
        prompt = Text(text[first:], None if mask is None else mask[first:].bool())
        if not compiling:
            for applied in self.applied:
                applied.check_text(text)
            for layer in self.layers.own if any(m.edits_self_attention for m in self._methods()) else ():
                check_unfused(layer.attn, self.facts.denoiser)
        time = timestep.flatten()[0] if isinstance(timestep, Tensor) and timestep.ndim else timestep
        if self.calls.call is not None and given is None:
            self.calls.call.guarded = True
        return Batch(first, len(text), len(text), prompt, empty, time, self._repelled, empty, not self.layers.projects)

    def _first_row(self, text: Tensor, texts: Texts | None) -> int:
        """The number of unconditional rows. Compares texts once per batch, and assigns the methods their rows."""
        if self.given is None:
            self.calls.check_here()
        if self._checked is None or self._checked[0] is not text:
            first = first_row(text, texts, self.given, self.facts)
            separate = self.given is None and not self.facts.returns_negative
            if first == len(text) and separate and not self.calls.drawing:  # the steps of that call never ran
                raise RuntimeError(watch.unknown_rows(first, "outside of the steps of a pipeline call"))
            if first < len(text):
                for applied in self.applied:
                    applied.place(1 if self.given is not None else self.images_per_prompt, len(text) - first)
            self._checked = text, first
        edits = any((m.edits_attention or m.steers) and not m.is_off() for m in self._methods())
        if edits and torch.is_grad_enabled() and getattr(self.denoiser, "is_gradient_checkpointing", False):
            raise RuntimeError(watch.CHECKPOINTED)
        return self._checked[1]

    def _check_negatives(self, text: Tensor, texts: Texts | None) -> None:
        """Refuses negative prompts that a method which changes them did not make."""
        acting = [method for method in self._methods() if method.negates and not method.is_off()]
        made = None if texts is None else texts.negative
        if acting and (made is None or made.shape != text.shape or not torch.equal(made, text)):
            raise RuntimeError(
                f"{type(acting[0]).__name__} changes the negative prompt in `encode_prompt`, but the unconditional "
                "rows of this denoiser call have another text. Call the pipeline, or give the denoiser the current "
                "output of `pipe.encode_prompt`."
            )

    def refuse_without_guidance(self) -> None:
        """Raises ValueError if an applied method needs guidance."""
        for applied in self.applied:
            method = applied.method
            acts = applied.prompts is not None if method.guides else method.negates
            if acts and not method.is_off():
                raise ValueError(needs_guidance(method, self.denoiser, self.facts))

    def _project(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the `forward` of the module that projects the text for all layers, if there is one (PixArt)."""
        out = forward(*args, **kwargs)
        if self.step is not None:
            self.step.project(out, self.facts.projects(self.denoiser, forward))
        return out


def _apply_all(pipe: DiffusionPipeline, methods: Sequence[tuple[Any, Handle]]) -> None:
    for method, original in methods:
        vars(method.apply(pipe))["note"] = original.note  # the fields that were open are filled by now
