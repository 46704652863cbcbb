"""The methods that are on a denoiser: one ordered list, walked in each call of the denoiser."""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .._text import SITES, check_width
from .._weights import check_unfused, denoiser_of
from ..core import Handle
from ..families import Family, family, without_cross_attention
from . import watch
from .attention import ErasurePrompts, SelfAttention, Text
from .batch import Batch, compiled_first_row, first_row, negated_rows, repelled
from .contract import Contract, DenoiserCall, Seen
from .copies import Copies, wake
from .edits import cross, edited, edited_self
from .forward import Entered, Forward
from .layers import Layer, SelfLayer
from .pipeline import Call, Calls
from .prediction import guided, needs_guidance, pooled_text, repelled_rows, with_concepts, with_pooled
from .prompts import Applied, Encoder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_GUARD = threading.Lock()
Plan = list[tuple[Applied, Tensor | float, str]]
"""Of each method in a denoiser call: the weight of its window, and why it has nothing to do, if so."""


class Site:
    """All that Efface keeps about one denoiser while methods are on."""

    def __init__(self, denoiser: nn.Module, facts: Family) -> None:
        self.facts = facts
        self._denoiser = weakref.ref(denoiser)
        self.layers: list[Layer] = []
        self.self_layers: list[SelfLayer] = []
        self._find_layers()
        self._projection: nn.Module | None = None
        self._projecting: Forward | None = None  # on it
        self.parameters = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.applied: list[Applied] = []
        self.copies = Copies(lambda: [applied.method for applied in self.applied], _apply_all)
        self.calls = Calls(self)
        self._hook: weakref.ref[Forward] | None = None  # on the denoiser, which holds it
        self.entered: Entered | None = None
        self.given: tuple[int, int] | None = None  # the number of unconditional and of all rows, if the caller says it
        self.train_timesteps = 1000
        self.batch: Batch | None = None  # while a denoiser call is going on
        self.acting: list[tuple[Applied, Tensor | float]] = []  # on attention, in this denoiser call
        self._seen: Seen | None = None  # in a call without methods
        self._by_the_way = False  # whether this call of the denoiser came by
        self._checked: tuple[Tensor, int] | None = None  # the text whose rows are known, and the first conditional one
        self._repelled: Any = None  # of the call before
        self._busy: int | None = None  # the thread that is inside

    @property
    def denoiser(self) -> nn.Module:
        found = self._denoiser()
        if found is None:
            raise ValueError("The denoiser of these erasers is gone.")
        return found

    @property
    def hook(self) -> Forward | None:
        return None if self._hook is None else self._hook()

    @property
    def edited_layers(self) -> int:
        """How many layers a method edits that edits cross-attention."""
        return len(self.layers)

    # ---- the list

    def add(self, pipe: DiffusionPipeline, method: Contract) -> Handle:
        self._check(pipe, method)
        applied = Applied(method)
        check_width(pipe)
        self.prepare(pipe, applied, Encoder(pipe, None))
        self.calls.follow(pipe)
        self.applied.append(applied)
        self.refit()
        owner = weakref.ref(pipe)

        def swap(changed: Contract) -> None:
            present = owner()
            if present is None:
                raise ValueError("The pipeline of this eraser is gone.")
            self._change(present, applied, changed)

        def remove() -> None:
            self.applied.remove(applied)
            self.refit()
            if not self.applied:
                self._close()

        applied.handle = Handle(method, swap, remove, lambda: applied.record.as_json())
        return applied.handle

    def _check(self, pipe: DiffusionPipeline, method: Contract) -> None:
        """ValueError if the method cannot work on this pipeline."""
        if hasattr(type(pipe), "set_pag_applied_layers"):
            raise ValueError(
                f"{type(pipe).__name__} adds rows of its own to each denoiser call (perturbed attention guidance), so "
                "it is not known which rows are conditional. Use the pipeline without PAG, or an editor such as UCE."
            )
        if method.edits_attention and not self.layers:
            raise ValueError(without_cross_attention(type(method).__name__, pipe))
        if method.calls_denoiser and getattr(pipe, self.facts.denoiser) is not self._denoiser():
            raise ValueError(watch.UNCOMPILED)
        for layer in self.layers if method.edits_attention else ():
            check_unfused(layer.attn, self.facts.denoiser)
        for layer in self.self_layers if method.edits_self_attention else ():
            check_unfused(layer.attn, self.facts.denoiser)

    def _change(self, pipe: DiffusionPipeline, applied: Applied, changed: Contract) -> None:
        """Puts a changed method in place of one that is on; after an error the old one is still there."""
        call = self.calls.call if self.calls.drawing is not None else None
        if call is not None and changed.guides != applied.method.guides:
            raise ValueError(
                f"This change moves {type(changed).__name__} to other rows of the batch, which cannot be done "
                "while the pipeline is drawing. Set it between two calls."
            )
        trial = Applied(changed, memory=applied.memory, record=applied.record)
        trial.check_rows(self.images_per_prompt, len(call.positive) if call else None)
        self.prepare(pipe, trial, Encoder(pipe, call.encoding if call else None))
        vars(applied).update(vars(trial) | {"handle": applied.handle})
        self._checked = None

    def prepare(self, pipe: DiffusionPipeline, applied: Applied, encoder: Encoder, *, blind: bool = False) -> None:
        """Encodes a method's erasure prompts; `blind`: what was encoded stays, because the text encoder is gone."""
        if blind and applied.prompts is not None:
            applied.place(self.images_per_prompt)
            return
        applied.method.check(pipe)
        self.train_timesteps = 1 if self.facts.unit_time else pipe.scheduler.config.num_train_timesteps
        applied.prepare(pipe, self.images_per_prompt, encoder)

    @property
    def images_per_prompt(self) -> int:
        return self.calls.call.images_per_prompt if self.calls.call else 1

    def forget_if_empty(self) -> None:
        """Without a method nothing is kept about the denoiser."""
        if not self.applied and (denoiser := self._denoiser()) is not None:
            SITES.pop(denoiser, None)

    def _close(self) -> None:
        if self.hook is not None:
            self.hook.take_off()
        if self.entered is not None:
            self.entered.take_off()
        self._hook = self.entered = None
        self.forget_if_empty()
        self.calls.close()

    # ---- hooks on modules

    def _find_layers(self) -> None:
        """The attention layers that the denoiser has now; those that it no longer has lose their hooks."""
        known: dict[nn.Module, Layer] = {layer.attn: layer for layer in (*self.layers, *self.self_layers)}
        named = [(n, m) for n, m in self.denoiser.named_modules() if isinstance(m, Attention)]
        kinds = {True: Layer, False: SelfLayer}
        found = [known.pop(m) if m in known else kinds[bool(m.is_cross_attention)](self, n, m) for n, m in named]
        for gone in known.values():
            gone.unhook()
        self.layers = [layer for layer in found if not isinstance(layer, SelfLayer)]
        self.self_layers = [layer for layer in found if isinstance(layer, SelfLayer)]

    def refit(self) -> None:
        """Hooks on the denoiser while a method is on, and on the attention layers exactly while one needs them."""
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
        wanted = any(applied.method.edits_attention for applied in self.applied)
        self._fit_projection(wanted)
        for layer in self.layers:
            layer.fit() if wanted else layer.unhook()
        wanted = any(applied.method.edits_self_attention for applied in self.applied)
        for self_layer in self.self_layers:
            self_layer.fit() if wanted else self_layer.unhook()

    def _fit_projection(self, wanted: bool) -> None:
        projection, hook = getattr(self._denoiser(), "caption_projection", None), self._projecting
        if hook is not None and (not wanted or projection is not self._projection or not hook.on_top()):
            hook.take_off()
            hook = None
        self._projection = projection
        if wanted and hook is None and projection is not None:
            hook = Forward(projection, self._project)
        self._projecting = hook

    def check_pipeline(self, pipe: DiffusionPipeline | None) -> None:
        """In front of a call: the denoiser is still ours, no other thread draws, and all hooks are on top."""
        present = getattr(pipe, self.facts.denoiser, None)
        denoiser = self._denoiser()
        if getattr(present, "_orig_mod", present) is not denoiser or denoiser is None:
            raise RuntimeError(watch.swapped(self.facts.denoiser, type(pipe).__name__))
        if self.calls.drawing not in (None, threading.get_ident()):
            raise RuntimeError(watch.TWO_THREADS)
        cache = watch.cache_on(denoiser.modules())
        if cache and any((m.edits_attention or m.guides) and not m.is_off() for m in self._methods()):
            raise RuntimeError(watch.cached(self.facts.denoiser, cache))
        self._find_layers()
        self._fit()

    def _methods(self) -> list[Contract]:
        return [applied.method for applied in self.applied]

    # ---- a call of the denoiser

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One thread at a time: what this denoiser's methods know of the present call cannot be shared."""
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
        """The rows of denoiser calls inside: unconditional ones first."""
        before, self.given, self._checked = self.given, (conditional.count(False), len(conditional)), None
        try:
            yield
        finally:
            self.given, self._checked = before, None

    def check_no_rows_given(self) -> None:
        if self.given is not None:
            raise RuntimeError(
                "The pipeline was called inside `efface.conditional_rows`, which tells the rows of denoiser calls that "
                "are made without it. Leave that block first: a call of the pipeline tells its rows itself."
            )

    def _on_entering(self) -> None:
        if not torch.compiler.is_compiling():
            self._by_the_way = False

    def _on_leaving(self) -> None:
        if not torch.compiler.is_compiling() and not self._by_the_way:
            self._fit()
            raise RuntimeError(watch.bypassed(self.facts.denoiser))

    def _enter(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the denoiser's `forward`."""
        if torch.compiler.is_compiling():
            return self._denoise(forward, args, kwargs)
        with self.alone():
            try:
                return self._denoise(forward, args, kwargs)
            finally:
                self.batch = None

    def _denoise(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The text read anew, the methods around the call, the concepts predicted with it, the prediction changed."""
        names = self.parameters[: len(args)]
        arguments = dict(zip(names, args, strict=True)) | kwargs
        text: Tensor = arguments["encoder_hidden_states"]
        self.acting = []
        self.batch = batch = self._begin(arguments["timestep"], text, arguments.get("encoder_attention_mask"))
        time = 1 - torch.as_tensor(batch.time, dtype=torch.float32, device=text.device) / self.train_timesteps
        arguments = self._reread(batch, arguments, time)
        run = partial(self._predict, batch, forward, names, arguments, time)
        for applied in reversed(self.applied):
            if applied.method.is_off() or type(applied.method).around is Contract.around:
                continue
            if applied.method.calls_denoiser and torch.compiler.is_compiling():
                raise ValueError(watch.UNCOMPILED)
            call = self._seen_by(applied, batch, forward, arguments)
            run = partial(applied.method.around, call, run)
        return run()

    def _begin(self, timestep: Tensor | float, text: Tensor, mask: Tensor | None) -> Batch:
        """Which rows are conditional, what time it is, and what the rows read."""
        call, given, compiling = self.calls.call, self.given, torch.compiler.is_compiling()
        if compiling:
            first = compiled_first_row(text, call, given, self.facts)
        else:
            self._by_the_way = True
            self._fit()
            first = self._first_row(text, call)
        if given is not None and first:
            self._check_negatives(text[:first], call)
        reads = call.unconditional if call is not None and given is None else None
        empty = None if reads is None else Text(reads.text, reads.mask)
        self._repelled = repelled(negated_rows(first, call, given), text.device, self._repelled)
        prompt = Text(text[first:], mask[first:].bool() if mask is not None and mask.ndim == 2 else None)
        if not compiling:
            for applied in self.applied:
                applied.check_text(text)
            for layer in self.self_layers if any(m.edits_self_attention for m in self._methods()) else ():
                check_unfused(layer.attn, self.facts.denoiser)
        time = timestep.flatten()[0] if isinstance(timestep, Tensor) and timestep.ndim else timestep
        self.calls.guarded = True
        n = len(text)
        return Batch(first, n, n, prompt, empty, time, self._repelled, empty, self._projection is None)

    def _first_row(self, text: Tensor, call: Call | None) -> int:
        """The number of unconditional rows; texts are compared once, and the methods get their rows then."""
        if self.given is None:
            self.calls.check_thread()
        if self._checked is None or self._checked[0] is not text:
            first = first_row(text, call, self.given, self.facts)
            if first < len(text):
                for applied in self.applied:
                    applied.place(1 if self.given is not None else self.images_per_prompt, len(text) - first)
            self._checked = text, first
        edits = any(m.edits_attention and not m.is_off() for m in self._methods())
        if edits and torch.is_grad_enabled() and getattr(self.denoiser, "is_gradient_checkpointing", False):
            raise RuntimeError(watch.CHECKPOINTED)
        return self._checked[1]

    def _check_negatives(self, text: Tensor, call: Call | None) -> None:
        """A method that changes negative prompts cannot act on a text that it has not made."""
        acting = [method for method in self._methods() if method.negates and not method.is_off()]
        made = None if call is None else call.negative
        if acting and (made is None or made.shape != text.shape or not torch.equal(made, text)):
            raise RuntimeError(
                f"{type(acting[0]).__name__} changes the negative prompt in `encode_prompt`, but the unconditional "
                "rows of this denoiser call read another text. Call the pipeline, or give the denoiser what "
                "`pipe.encode_prompt` returns now."
            )

    def _reread(self, batch: Batch, arguments: dict[str, Any], time: Tensor) -> dict[str, Any]:
        """The arguments with the text that conditional rows read at this time."""
        text, all_pooled = arguments["encoder_hidden_states"], pooled_text(arguments)
        given = prompt, pooled = text[batch.first :], None if all_pooled is None else all_pooled[batch.first :]
        for applied in self.applied if batch.conditional else ():
            if not applied.method.is_off():
                prompt, pooled = applied.method.reread(prompt, pooled, time, applied.memory)
        if prompt is given[0] and pooled is given[1]:
            return arguments
        batch.prompt = replace(batch.prompt, states=prompt)
        arguments = arguments | {"encoder_hidden_states": torch.cat([text[: batch.first], prompt])}
        if all_pooled is not None and pooled is not None:
            return with_pooled(arguments, torch.cat([all_pooled[: batch.first], pooled]))
        return arguments

    def _seen_by(
        self, applied: Applied, batch: Batch, forward: Callable[..., Any], arguments: dict[str, Any]
    ) -> DenoiserCall:
        """The call as a method sees it."""
        call, noisy = self.calls.call if self.given is None else None, self.parameters[0]
        others = {name: value for name, value in arguments.items() if name != noisy}

        def plain(sample: Tensor | None, seen: Seen) -> Tensor:
            return self._plain(batch, lambda: forward(arguments[noisy] if sample is None else sample, **others), seen)

        return DenoiserCall(
            arguments[noisy],
            batch.first,
            batch.prompt,
            batch.time,
            lambda: applied.prompts if applied.acting else None,
            None if call is None else call.pipe(),
            applied.memory,
            plain,
        )

    def _plain(self, batch: Batch, call: Callable[[], Any], seen: Seen) -> Tensor:
        """A call of the denoiser in which no method acts."""
        acting, self.acting, self._seen = self.acting, [], seen
        batch.rows = batch.last
        try:
            return self._run(call)[0]
        finally:
            self.acting, self._seen = acting, None

    def _plan(self, batch: Batch) -> Plan:
        time = 1 - batch.time / self.train_timesteps
        found: Plan = []
        for applied in self.applied:
            method, weight, exempt = applied.method, 0.0, ""
            if method.is_off():
                exempt = watch.OFF
            elif not batch.conditional and not self._acts_on_unconditional(batch, method):
                exempt = watch.NO_CONDITIONAL_ROWS
            elif (method.edits_attention or method.guides) and not applied.acting:
                exempt = watch.NO_CONCEPTS
            else:
                weight = method.weight(time)
                if not isinstance(weight, Tensor) and not weight:
                    exempt = watch.OUTSIDE_WINDOW
            found.append((applied, weight, exempt))
        return found

    def _acts_on_unconditional(self, batch: Batch, method: Contract) -> bool:
        """Whether it has something to do, or to refuse, in a call without conditional rows."""
        if method.edits_attention:
            return method.touches_uncond and batch.repelled is not None
        return method.touches_uncond or (method.guides and not self.facts.apart)

    def _predict(
        self,
        batch: Batch,
        forward: Callable[..., Any],
        names: Sequence[str],
        arguments: dict[str, Any],
        time: Tensor,
    ) -> Any:
        """The denoiser's output, with attention edited and the prediction of the conditional rows changed."""
        beside = self._negatives_beside(batch) if self.facts.apart else []
        plan = self._plan(batch)
        self.acting = [(a, weight) for a, weight, exempt in plan if a.method.edits_attention and not exempt]
        acts = batch.conditional or not self.facts.apart
        guiding = [(a, weight) for a, weight, exempt in plan if a.method.guides and acts and not exempt]
        batch.rows = batch.last
        if not guiding:
            out = self._run(lambda: _call(forward, names, arguments))
            self._keep(batch, plan, time)
            return out
        if arguments.get("skip_layers") is not None:
            raise ValueError(
                f"{type(guiding[0][0].method).__name__} changes the conditional prediction, which "
                "`skip_guidance_layers` compares with one of its own. Leave them out, or use method 'safree'."
            )
        if not 0 < batch.first < batch.last and not beside:
            raise ValueError(needs_guidance(guiding[0][0].method, self._denoiser(), self.facts))
        every = torch.arange(batch.conditional, device=time.device)
        concepts = [prompts for applied, _ in guiding for prompts in applied.acting]
        rows = [every if prompts.at is None else prompts.at for prompts in concepts]
        asked, places = [*beside, *concepts], [*(every[k : k + 1] for k in range(len(beside))), *rows]
        owners = negated_rows(batch.first, self.calls.call, self.given)
        owners |= repelled_rows(guiding, batch.conditional, batch.last)
        batch.repelled = self._repelled = repelled(owners, time.device, self._repelled)
        longer = with_concepts(arguments, asked, places, batch.first)
        batch.rows = len(longer["encoder_hidden_states"])
        out = self._run(lambda: _call(forward, names, longer))
        scale = self.calls.call.guidance_scale if self.calls.call else math.nan
        if self.calls.call and not torch.compiler.is_compiling():  # a callback may have changed it
            scale = getattr(self.calls.call.pipe(), self.facts.scale, math.nan)
        sample = guided(out[0], guiding, rows, batch.first, batch.last, scale, time)
        self._keep(batch, plan, time)
        return (sample, *out[1:]) if isinstance(out, tuple) else type(out)(sample=sample)

    def _keep(self, batch: Batch, plan: Plan, time: Tensor) -> None:
        """After a denoiser call: keeps what ran."""
        if torch.compiler.is_compiling():
            return
        for applied, _, exempt in plan:
            exempt = exempt or applied.method.exempt(time)
            if not exempt:
                batch_rows = [prompts.batch_rows for prompts in applied.acting]
                everywhere = range(batch.conditional)
                rows = {row for some in batch_rows for row in (everywhere if some is None else some)}
                applied.record.add(sorted(rows) if batch_rows else everywhere)
            else:
                applied.record.add((), exempt)

    def _negatives_beside(self, batch: Batch) -> list[ErasurePrompts]:
        """The negative prompt of each conditional row, where unconditional predictions have a call of their own."""
        call = self.calls.call
        if call is None or not batch.conditional:
            return []
        text, pooled = call.negative, call.negative_pooled
        if text is None or pooled is None:
            self.refuse_without_guidance()
            return []
        if batch.conditional != len(text):
            raise ValueError(
                f"The call has {batch.conditional} rows of prompts, but {len(text)} of negative prompts. Give a list, "
                "one for each."
            )
        return [ErasurePrompts(Text(text[k : k + 1]), (), pooled=pooled[k : k + 1]) for k in range(len(text))]

    def refuse_without_guidance(self) -> None:
        for applied in self.applied:
            method = applied.method
            acts = applied.prompts is not None if method.guides else method.negates
            if acts and not method.is_off():
                raise ValueError(needs_guidance(method, self._denoiser(), self.facts))

    # ---- layers

    @property
    def _needed(self) -> bool:
        """Whether the cross-attention layers have something to do in this denoiser call."""
        return bool(self.acting) or self._seen is not None

    def _run(self, call: Callable[[], Any]) -> Any:
        """A call of the denoiser below, in which every layer that is needed comes by, or an error."""
        out, missed = self._ran(call)
        if missed and not torch.compiler.is_compiling():  # a processor that skips `to_q` or `to_out`
            for layer in missed:
                layer.take_whole()
            out, missed = self._ran(call)
        if missed:
            raise RuntimeError(watch.missed([layer.name for layer in missed], len(self.layers)))
        return out

    def _ran(self, call: Callable[[], Any]) -> tuple[Any, list[Layer]]:
        for layer in (*self.layers, *self.self_layers):
            layer.begin()
        out = call()
        return out, [layer for layer in self.layers if not layer.came] if self._needed else []

    def edit(self, layer: Layer, hidden: Tensor) -> Tensor:
        """The attention output [rows, Q, C] in front of `to_out`, edited by every active method in turn."""
        batch, query = self.batch, layer.to_q
        if batch is None:
            raise RuntimeError(watch.outside(layer.name))
        if query is None or not self._needed or not batch.projected:
            return hidden
        if len(hidden) != batch.rows:
            raise RuntimeError(watch.other_rows(layer.name, len(hidden), batch.rows))
        layer.came = True
        if self._seen is not None:
            at = slice(batch.first, batch.last)
            self._seen(layer.name, cross(batch, None, layer, query[at], hidden[at]))
            return hidden
        return edited(batch, self.acting, layer, query, hidden)

    def edit_self(self, layer: Layer, hidden: Tensor) -> Tensor:
        """The self-attention output [rows, Q, C] in front of `to_out`."""
        batch = self.batch
        if batch is None:
            raise RuntimeError(watch.outside(layer.name))
        if not batch.conditional:
            return hidden
        if layer.to_q is None or layer.to_k is None or layer.to_v is None:
            raise RuntimeError(watch.missed([layer.name], len(self.self_layers)))
        query, output, key, value = (x[batch.first : batch.last] for x in (layer.to_q, hidden, layer.to_k, layer.to_v))
        seen = SelfAttention(layer.attn, query, output, layer.name, key=key, value=value)
        if self._seen is not None:
            self._seen(layer.name, seen)
            return hidden
        return edited_self(batch, self.acting, seen, hidden)

    def _project(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of what projects the text for all layers, where there is such a module (PixArt).

        Our texts are projected while its weights are there: offloading loads them for this moment only.
        """
        out, batch = forward(*args, **kwargs), self.batch
        if batch is not None:
            batch.prompt, batch.projected = replace(batch.prompt, states=out[batch.first : batch.last]), True
            with torch.no_grad():
                if batch.encoded_empty is not None:
                    batch.empty = replace(batch.encoded_empty, states=forward(batch.encoded_empty.states))
                for applied in self.applied:
                    applied.project(forward)
        return out


def _call(function: Callable[..., Any], positional: Sequence[str], arguments: dict[str, Any]) -> Any:
    """The function with its arguments by position and by keyword, as they were given."""
    named = {name: value for name, value in arguments.items() if name not in positional}
    return function(*(arguments[name] for name in positional), **named)


def site(pipe: DiffusionPipeline) -> Site:
    """The site of a pipeline's denoiser; TypeError for a pipeline Efface does not know."""
    facts = family(pipe)
    wake(pipe)
    denoiser = denoiser_of(pipe)
    if denoiser not in SITES:
        SITES[denoiser] = Site(denoiser, facts)
    return SITES[denoiser]


def handles(pipe: DiffusionPipeline) -> list[Handle]:
    """Of the methods that are on, in their order."""
    facts = family(pipe)
    wake(pipe)
    present = getattr(pipe, facts.denoiser)
    found = SITES.get(getattr(present, "_orig_mod", present))
    return [applied.handle for applied in found.applied if applied.handle is not None] if found else []


@contextmanager
def rows_given(pipe: DiffusionPipeline, conditional: Sequence[bool]) -> Iterator[None]:
    """See `efface.conditional_rows`; without methods on there is nothing to tell."""
    family(pipe)
    wake(pipe)
    found = SITES.get(denoiser_of(pipe))
    if found is None:
        yield
        return
    with found.rows_given(conditional):
        yield


def _apply_all(pipe: DiffusionPipeline, methods: Sequence[Any]) -> None:
    for method in methods:
        method.apply(pipe)
