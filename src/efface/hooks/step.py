"""One denoiser call: changes of the text, `around`, edits of attention, and changes of the prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import watch
from .attention import CrossAttention, SelfAttention
from .batch import Batch, negated_rows, repelled
from .calls import Calls, Guarded
from .carried import Carried
from .contract import Contract, DenoiserCall, Seen
from .edits import carry, conditional, edited, edited_joint, edited_self
from .joint import Function, Inputs
from .layers import Layer
from .prediction import Asked, by_call, concepts_of, guided, needs_guidance, negative_prompts, repelled_rows, with_rows
from .prompts import Applied
from .texts import ErasurePrompts

Plan = list[tuple[Applied, Tensor | float, str]]
"""Per method in a denoiser call: the weight of its window, and the reason if it does not act."""


class Where(Guarded, Protocol):
    """The called denoiser."""

    calls: Calls
    train_timesteps: int

    @property
    def denoiser(self) -> nn.Module: ...


class Step:
    """The current denoiser call.

    Args:
        where: the denoiser.
        forward: its original `forward`.
        names: names of the positional arguments.
        arguments: all arguments, by name; the first is the noisy sample.
        batch: the rows.
    """

    def __init__(
        self,
        where: Where,
        forward: Callable[..., Any],
        names: Sequence[str],
        arguments: dict[str, Any],
        batch: Batch,
    ) -> None:
        self.where, self.batch, self.arguments, self._forward, self._names = where, batch, arguments, forward, names
        text: Tensor = arguments[where.facts.text_argument]
        self.time = 1 - torch.as_tensor(batch.time, dtype=torch.float32, device=text.device) / where.train_timesteps
        self.acting: list[tuple[Applied, Tensor | float]] = []  # on attention
        self.seen: Seen | None = None  # in a call without methods
        self.carried: Carried | None = None  # the texts beside the prompt in joint attention
        self.plan: Plan = []
        self.steered: set[str] = set()  # the modules whose outputs were changed
        self._predicted = False  # whether all methods have had their turn

    def run(self) -> Any:
        """Runs the call, and returns the denoiser's output."""
        self._reread()
        run: Callable[[], Any] = self._predict
        for applied in reversed(self.where.applied):
            if applied.method.is_off() or type(applied.method).around is Contract.around:
                continue
            if applied.method.calls_denoiser and torch.compiler.is_compiling():
                raise ValueError(watch.UNCOMPILED)
            run = partial(applied.method.around, self._as_seen_by(applied), run)
        out = run()
        if not self._predicted:
            kinds = [type(applied.method) for applied in self.where.applied]
            raise RuntimeError(watch.not_forwarded([m.__name__ for m in kinds if m.around is not Contract.around]))
        due = {name for applied, _, exempt in self.plan if not exempt for name in applied.method.steers}
        if (missed := sorted(due - self.steered)) and not torch.compiler.is_compiling():
            raise RuntimeError(watch.not_steered(missed, self.where.facts.denoiser))
        return out

    def _reread(self) -> None:
        """Replaces the text of the conditional rows by that of this time."""
        batch, arguments, facts = self.batch, self.arguments, self.where.facts
        text, all_pooled = arguments[facts.text_argument], facts.pooled_text(arguments)
        given = prompt, pooled = text[batch.first :], None if all_pooled is None else all_pooled[batch.first :]
        for applied in self.where.applied if batch.conditional else ():
            if not applied.method.is_off():
                prompt, pooled = applied.method.reread(prompt, pooled, self._time(applied.method), applied.memory)
        if prompt is given[0] and pooled is given[1]:
            return
        batch.prompt = replace(batch.prompt, states=prompt)
        self.arguments = arguments | {facts.text_argument: torch.cat([text[: batch.first], prompt])}
        if all_pooled is not None and pooled is not None:
            self.arguments = facts.with_pooled(self.arguments, torch.cat([all_pooled[: batch.first], pooled]))

    def _time(self, method: Contract) -> Tensor:
        """The time in the method's unit."""
        calls = self.where.calls
        counted = calls.call is not None and calls.call.counted and self.where.given is None
        return calls.progress.to(self.time.device, copy=True) if counted and method.counts_steps else self.time

    # ---- without methods

    def _as_seen_by(self, applied: Applied) -> DenoiserCall:
        (_, sample), *others = self.arguments.items()
        texts = self.where.calls.texts if self.where.given is None else None

        def plain(other: Tensor | None, seen: Seen) -> Tensor:
            return self._plain(lambda: self._forward(sample if other is None else other, **dict(others)), seen)

        return DenoiserCall(
            sample,
            self.batch.first,
            self.batch.prompt,
            self.batch.time,
            lambda: applied.prompts if applied.acting else None,
            None if texts is None else texts.pipe(),
            applied.memory,
            plain,
        )

    def _plain(self, call: Callable[[], Any], seen: Seen) -> Tensor:
        """Runs the call without methods."""
        self.acting, self.seen, self.batch.rows = [], seen, self.batch.last
        try:
            return self._ran(call)[0]
        finally:
            self.seen = None

    # ---- with methods

    def _plan(self) -> Plan:
        batch = self.batch
        found: Plan = []
        noise = 1 - batch.time / self.where.train_timesteps
        for applied in self.where.applied:
            method, weight, exempt = applied.method, 0.0, ""
            if method.is_off():
                exempt = watch.OFF
            elif not batch.conditional and not self._acts_on_unconditional(method):
                exempt = watch.NO_CONDITIONAL_ROWS
            elif not applied.has_rows(batch.conditional):
                exempt = watch.NO_CONCEPTS
            elif (method.guides or method.negates) and self.where.calls.ended_guidance(batch.first):
                exempt = watch.NO_GUIDANCE
            else:
                weight = method.weight(self._time(method) if method.counts_steps else noise)
                if not isinstance(weight, Tensor) and not weight:
                    exempt = watch.OUTSIDE_WINDOW
            found.append((applied, weight, exempt))
        return found

    def _acts_on_unconditional(self, method: Contract) -> bool:
        """Whether a method acts on, or refuses, a call without conditional rows."""
        if method.edits_attention:
            return method.touches_uncond and self.batch.repelled is not None
        return method.touches_uncond or (method.guides and not self.where.calls.apart)

    def _predict(self) -> Any:
        """The denoiser's output, with edited attention and the changed prediction of the conditional rows."""
        batch, apart = self.batch, self.where.calls.apart
        texts = self.where.calls.texts if apart and batch.conditional else None
        if texts is not None and texts.negative is None:
            self.where.refuse_without_guidance()
        negatives = negative_prompts(texts, batch.conditional) if texts is not None else []
        plan = self.plan = self._plan()
        self.acting = [(a, weight) for a, weight, exempt in plan if a.method.edits_attention and not exempt]
        acts = batch.conditional or not apart
        guiding = [(a, weight) for a, weight, exempt in plan if a.method.guides and acts and not exempt]
        batch.rows = batch.last
        out = self._guided(guiding, negatives) if guiding else self._ran(lambda: self._call(self.arguments))
        self._keep(plan)
        self._predicted = True
        return out

    def _guided(self, guiding: list[tuple[Applied, Tensor | float]], negatives: list[ErasurePrompts]) -> Any:
        """The output, with concept predictions from further rows or calls, which are dropped after use."""
        batch, where, method = self.batch, self.where, guiding[0][0].method
        if self.arguments.get(where.facts.skip_argument) is not None:
            raise ValueError(
                f"{type(method).__name__} changes the conditional prediction, which `skip_guidance_layers` compares "
                "with a separate one. Leave them out, or use a method without guidance."
            )
        if not 0 < batch.first < batch.last and not negatives:
            raise ValueError(needs_guidance(method, where.denoiser, where.facts))
        every = torch.arange(batch.conditional, device=self.time.device)
        asked = [*self._asked_negatives(negatives, every), *concepts_of(guiding, every)]
        present, *others = by_call(where.facts, self.arguments, asked)
        out, predicted = self._with_further(asked, present)
        for group in others:
            predicted |= self._further_alone(asked, group)
        n, sample = len(negatives), out[0]
        negative = torch.cat([predicted[k] for k in range(n)]) if negatives else sample[: batch.first]
        changed = guided(
            sample[batch.first : batch.last],
            negative,
            [(each, predicted[n + k]) for k, each in enumerate(asked[n:])],
            guiding,
            self._guidance_scale(),
            [self._time(applied.method) for applied, _ in guiding],
        )
        sample = torch.cat([sample[: batch.first], changed])
        return (sample, *out[1:]) if isinstance(out, tuple) else type(out)(sample=sample)

    def _with_further(self, asked: Sequence[Asked], which: Sequence[int]) -> tuple[Any, dict[int, Tensor]]:
        """The denoiser's output with some predictions in further rows, and these predictions by number."""
        batch, where = self.batch, self.where
        some = [asked[k] for k in which]
        owners = negated_rows(batch.first, where.calls.texts, where.given) | repelled_rows(some, batch.last)
        batch.repelled = repelled(owners, self.time.device, batch.repelled)
        longer = with_rows(where.facts, self.arguments, some, batch.first)
        batch.rows = len(longer[where.facts.text_argument])
        out = self._ran(lambda: self._call(longer))
        return out, dict(zip(which, out[0][batch.last :].split([each.size for each in some]), strict=True))

    def _further_alone(self, asked: Sequence[Asked], which: Sequence[int]) -> dict[int, Tensor]:
        """The predictions, by number, of texts that need a separate call without the conditional rows."""
        batch, facts = self.batch, self.where.facts
        some = [asked[k] for k in which]
        owners = repelled_rows(some, 0)
        arguments = with_rows(facts, self.arguments, some, batch.first, alone=True)
        rows = len(arguments[facts.text_argument])
        self.batch = replace(batch, first=0, last=0, rows=rows, repelled=repelled(owners, self.time.device, None))
        try:
            out = self._ran(lambda: self._call(arguments))
        finally:
            self.batch = batch
        return dict(zip(which, out[0].split([each.size for each in some]), strict=True))

    def _asked_negatives(self, negatives: Sequence[ErasurePrompts], every: Tensor) -> list[Asked]:
        """The unconditional predictions. Other methods edit those with a negative prompt."""
        negated = negated_rows(len(negatives), self.where.calls.texts, self.where.given)
        pairs = enumerate(negatives)
        return [Asked(each, every[k : k + 1], (k,) if k in negated else ()) for k, each in pairs]

    def _guidance_scale(self) -> float:
        texts = self.where.calls.texts
        if texts is None or texts.apart or torch.compiler.is_compiling():
            return math.nan if texts is None else texts.guidance_scale
        return self.where.facts.scale_of(texts.pipe())  # a callback may have changed it

    def _keep(self, plan: Plan) -> None:
        """Records the edits that ran."""
        if torch.compiler.is_compiling():
            return
        for applied, _, exempt in plan:
            exempt = exempt or applied.method.exempt(self._time(applied.method))
            applied.record.add(() if exempt else applied.edited_rows(self.batch.conditional), exempt)

    def _call(self, arguments: dict[str, Any]) -> Any:
        """Calls the denoiser with the original positional and keyword arguments."""
        if (carried := carry(self.batch, self.acting, self.where.facts, arguments)) is not None:
            self.carried, arguments = carried, carried.beside(arguments)
        named = {name: value for name, value in arguments.items() if name not in self._names}
        facts, denoiser = self.where.facts, self.where.denoiser
        with facts.placed(denoiser, carried) if carried is not None else nullcontext():
            return self._forward(*(arguments[name] for name in self._names), **named)

    # ---- layers

    @property
    def _needed(self) -> bool:
        """Whether the cross-attention layers are needed."""
        return bool(self.acting) or self.seen is not None

    def _ran(self, call: Callable[[], Any]) -> Any:
        """Calls the denoiser. Raises unless every needed layer ran."""
        out, missed = self._once(call)
        if missed and not torch.compiler.is_compiling():  # a processor that skips `to_q` or `to_out`
            for layer in missed:
                layer.take_whole()
            out, missed = self._once(call)
        if missed:
            raise RuntimeError(missed[0].missed([layer.name for layer in missed], len(self._wanted)))
        return out

    def _once(self, call: Callable[[], Any]) -> tuple[Any, list[Layer]]:
        for layer in (*self.where.layers.cross, *self.where.layers.own):
            layer.begin()
        self.carried = None
        out = call()
        return out, [layer for layer in self._wanted if not layer.came]

    @property
    def _wanted(self) -> list[Layer]:
        """The layers that have to run in this call."""
        cross, own = self.where.layers.cross if self._needed else [], self.where.layers.own
        numbers = self.arguments.get(self.where.facts.skip_argument) or ()
        skipped = tuple(f"transformer_blocks.{k}." for k in numbers)
        cross = [layer for layer in cross if not layer.name.startswith(skipped)]
        edits = any(a.method.edits_self_attention and not a.method.is_off() for a in self.where.applied)
        return [*cross, *own] if edits and self._needed and self.batch.conditional else cross

    def edit(self, layer: Layer, hidden: Tensor) -> Tensor:
        """The cross-attention output [rows, Q, C] before `to_out`, after the edits of every active method in turn."""
        batch, query = self.batch, layer.to_q
        if query is None or not self._needed or not batch.projected:
            return hidden
        if len(hidden) != batch.rows:
            raise RuntimeError(watch.other_rows(layer.name, len(hidden), batch.rows))
        layer.came = True
        whole = CrossAttention(layer.attn, query, name=layer.name)
        if self.seen is not None:
            self.seen(layer.name, conditional(batch, whole, hidden[batch.first : batch.last]))
            return hidden
        return edited(batch, self.acting, whole, hidden)

    def attend(self, layer: Layer, function: Function, inputs: Inputs, options: dict[str, Any]) -> Tensor:
        """Joint attention [rows, heads, L, d] with the carried texts; the picture's output is edited."""
        if self.carried is None:
            return function(*inputs, **options)
        return edited_joint(self.batch, self.acting, layer, self.carried, function, inputs, options)

    def edit_self(self, layer: Layer, hidden: Tensor) -> Tensor:
        """The self-attention output [rows, Q, C] before `to_out`, after the edits."""
        batch = self.batch
        if not batch.conditional:
            return hidden
        if layer.to_q is None or layer.to_k is None or layer.to_v is None:
            raise RuntimeError(watch.missed([layer.name], len(self.where.layers.own)))
        layer.came = True
        query, output, key, value = (x[batch.first : batch.last] for x in (layer.to_q, hidden, layer.to_k, layer.to_v))
        layer_seen = SelfAttention(layer.attn, query, output, layer.name, key=key, value=value)
        if self.seen is not None:
            self.seen(layer.name, layer_seen)
            return hidden
        return edited_self(batch, self.acting, layer_seen, hidden)

    def project(self, projected: Tensor, projection: Callable[[Tensor], Tensor]) -> None:
        """The denoiser's projected text. Also projects the methods' texts while the weights are in memory.

        Offloading loads the weights only for this moment.
        """
        batch = self.batch
        batch.prompt, batch.projected = replace(batch.prompt, states=projected[batch.first : batch.last]), True
        with torch.no_grad():
            if batch.encoded_empty is not None:
                batch.empty = replace(batch.encoded_empty, states=projection(batch.encoded_empty.states))
            for applied in self.where.applied:
                applied.project(projection)
