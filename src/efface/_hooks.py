"""Where erasers meet a pipeline: the hooks, and the list of what is on.

Only this file and those that it imports (`_weights`, `_text`, `_attention`, `_method`, `_prompts`, `_guidance` and
`_layers`) touch diffusers internals.

Each denoiser has one `Site`: the ordered list of erasers that are on, and one hook named `efface` on every module
that has to be watched. The list is walked on each call, so erasers come off in any order; when it is empty, every
hook is gone.

- `encode_prompt` is wrapped on the pipeline: it tells which rows will be conditional and encodes erasure prompts anew
  for each call (so a LoRA loaded or a device changed in between is seen; there is nothing to invalidate).
- The denoiser hook reads the time and checks the batch against what `encode_prompt` returned. There a method may change
  the text that conditional rows read, and the noise predicted for them: texts it asks for are predicted as further rows
  of the same call, and the pipeline's own guidance then works on the changed prediction, whatever the scheduler. FLUX
  predicts unconditionally in another call: there the unconditional text is such a row as well.
- In every cross-attention layer the query is seen behind `to_q`, and the attention output is edited in front of
  `to_out[0]`, on conditional rows. Processors stay as they are (slicing, LoRA, IP-Adapter). Where a method says so
  (`touches_uncond`), it also edits the unconditional rows that read another text than the empty one, and further rows
  that guidance pushes away from (`repels`). Other further rows are not edited: they have to show the concept.
- An eraser may ask for denoiser calls of its own: a plain one in front of the first, which measures the attention that
  its erasure prompts get (`measures`), or one in each step, which draws the plain picture beside (`twins`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ._attention import Beside, CrossAttention, Repelled, Term
from ._guidance import guided, needs_guidance, pooled_text, repelled_rows, with_concepts, with_pooled
from ._layers import Layer, SelfLayer, WatchDenoiser, register, unregister
from ._method import Method
from ._prompts import Entry, projected
from ._text import SITES, Unconditional, check_width, cut_off, encoding_settings, unconditional
from ._weights import check_unfused, denoiser_of
from .core import Handle
from .families import Family, family, without_cross_attention

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

UNCOMPILED = (
    "This eraser makes a denoiser call of its own, which a compiled denoiser does not allow: give it a pipeline that "
    "is not compiled, or a fixed strength and one trajectory."
)
_TWO_THREADS = (
    "Two threads use one pipeline with erasers on, which would mix up their pictures: let them take turns, or give "
    "each a pipeline of its own."
)
_GUARD = threading.Lock()
WRAPPED = ("encode_prompt", "maybe_free_model_hooks")  # of the pipeline object


class Hooked(Method):
    """Base of run-time erasers: `apply` puts them on the pipeline's list."""

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        """Takes effect at once; returns the handle that takes it off again (also a context manager)."""
        return site(pipe).add(pipe, self)


@dataclass(frozen=True)
class _Call:
    """What the latest `encode_prompt` said about the batches to come."""

    positive: Tensor
    negative: Tensor | None
    unconditional: Unconditional | None  # where text is read in cross-attention
    images_per_prompt: int
    settings: dict[str, Any]  # of the encoding
    prompts: list[str] | None  # None: the user gave embeddings
    pipe: weakref.ref[DiffusionPipeline]
    guidance_scale: float
    inside: bool  # of the pipeline's `__call__`, not an `encode_prompt` by itself
    thread: int = field(default_factory=threading.get_ident)
    line: int = 0  # of the pipeline's `__call__` that asked for it; 0: something else did
    negative_pooled: Tensor | None = None  # where unconditional predictions come apart


@dataclass
class _Twin:
    """The plain picture, drawn beside from the same noise with a scheduler of its own."""

    latents: Tensor
    scheduler: Any
    step: int = -1
    seen: dict[Attention, tuple[Tensor, Tensor]] = field(default_factory=dict)  # query and output, or query and key

    @property
    def moment(self) -> tuple[int, int]:
        """The number of this denoiser call, and how many steps were asked for."""
        return self.step, self.scheduler.num_inference_steps


class Site:
    """All that Efface keeps about one denoiser while erasers are on."""

    def __init__(self, denoiser: nn.Module, facts: Family) -> None:
        self.facts = facts
        self._denoiser = weakref.ref(denoiser)
        named = denoiser.named_modules()
        self.names = {m: name for name, m in named if isinstance(m, Attention) and m.is_cross_attention}
        self.layers = [Layer(self, m) for m in self.names]
        inner = (m for m in denoiser.modules() if isinstance(m, Attention) and not m.is_cross_attention)
        self.self_layers = [SelfLayer(self, m) for m in inner]
        self.parameters = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.entries: list[Entry] = []
        self.pipes: list[tuple[weakref.ref[DiffusionPipeline], dict[str, Any]]] = []  # with what WRAPPED hid
        self.call: _Call | None = None
        self.first = self.last = 0  # the conditional rows; further ones come behind
        self.prompt: Tensor | None = None
        self.prompt_mask: Tensor | None = None
        self.empty: Tensor | None = None  # what unconditional rows read without a negative prompt; one row if all alike
        self.empty_mask: Tensor | None = None
        self.repelled: Repelled | None = None
        self.time: Tensor | float = 0.0
        self.train_timesteps = 1000
        self._checked: Tensor | None = None
        self._busy: int | None = None  # the thread that is inside
        self.twin: _Twin | None = None
        self._twin_runs = False
        self._measuring: list[Entry] = []
        self._seen: dict[str, list[tuple[Tensor, ...]]] | None = None  # while measuring: layer -> masses of each entry

    # ---- the list

    def add(self, pipe: DiffusionPipeline, eraser: Hooked) -> Handle:
        if eraser.edits_attention:
            if not self.layers:
                raise ValueError(without_cross_attention(type(eraser).__name__, pipe))
            for layer in self.layers:
                check_unfused(layer.attn, self.facts.denoiser)
        if (eraser.measures or eraser.twins) and getattr(pipe, self.facts.denoiser) is not self._denoiser():
            raise ValueError(UNCOMPILED)
        if eraser.twins and not hasattr(type(pipe), "guidance_scale"):
            raise ValueError(
                f"Two trajectories need the guidance scale of the call, but {self.facts.name} pipelines do not tell "
                "it: use one trajectory."
            )
        if eraser.twins and "mask_image" in inspect.signature(type(pipe).__call__).parameters:
            raise ValueError(
                f"Two trajectories draw the plain picture beside, but {type(pipe).__name__} puts the given picture "
                "back in after each step, which would not reach it: use one trajectory."
            )
        for layer in self.self_layers if eraser.twins else ():
            check_unfused(layer.attn, self.facts.denoiser)
        entry = Entry(eraser)
        check_width(pipe)
        self._prepare(pipe, entry)
        self._wrap(pipe)
        if not self.entries:
            register(self._denoiser(), WatchDenoiser(self))
        self.entries.append(entry)
        self._checked = None
        self._fit()
        owner = weakref.ref(pipe)

        def swap(changed: Hooked) -> None:
            present = owner()
            if present is None:
                raise ValueError("The pipeline of this eraser is gone.")
            call = self._present()
            if call is not None and changed.guides != entry.eraser.guides:
                raise ValueError(
                    f"This change moves {type(changed).__name__} to other rows of the batch, which cannot be done "
                    "while the pipeline is drawing: set it between two calls."
                )
            trial = Entry(changed, memory=entry.memory)
            trial.check_rows(self.images_per_prompt, len(call.positive) if call else None)
            self._prepare(present, trial, call.prompts if call else None, **(call.settings if call else {}))
            if entry.prompts and (changed.concepts, changed.rows) == (entry.eraser.concepts, entry.eraser.rows):
                trial.change(self.images_per_prompt, weights=entry.prompts.weights)  # keep what was measured
            vars(entry).update(vars(trial))
            self._checked = None

        def remove() -> None:
            self.entries.remove(entry)
            self._fit()
            if not self.entries:
                self._close()

        return Handle(eraser, swap, remove)

    def _fit(self) -> None:
        """Hooks on the cross-attention layers exactly while an eraser needs them."""
        wanted = any(e.eraser.edits_attention for e in self.entries)
        for layer in self.layers:
            layer.fit() if wanted else layer.unhook()
        twins = any(e.eraser.twins for e in self.entries)
        for layer in self.self_layers:
            layer.fit() if twins else layer.unhook()

    def _close(self) -> None:
        if (denoiser := self._denoiser()) is not None:
            unregister(denoiser)
            SITES.pop(denoiser, None)
        for ref, hidden in self.pipes:
            if (pipe := ref()) is not None:
                for name in WRAPPED:
                    delattr(pipe, name)
                vars(pipe).update(hidden)
        self.pipes.clear()
        self.call = self.prompt = self._checked = self.twin = None

    def original_encode(self, pipe: DiffusionPipeline) -> Callable[..., Any]:
        """The pipeline's own `encode_prompt`. Nothing here holds the pipeline, which can be freed with erasers on."""
        attributes = next((hidden for ref, hidden in self.pipes if ref() is pipe), vars(pipe))
        return attributes.get("encode_prompt") or MethodType(type(pipe).encode_prompt, pipe)

    def _present(self) -> _Call | None:
        """The call that is going on; one that an exception ended is forgotten."""
        call = self.call  # its own thread may end it meanwhile
        if call is None or not call.inside or _calls(call.pipe(), call.thread):
            return call
        if self.call is call:
            self.call = None
        return None

    @property
    def images_per_prompt(self) -> int:
        return self.call.images_per_prompt if self.call else 1

    def _prepare(
        self, pipe: DiffusionPipeline, entry: Entry, prompts: list[str] | None = None, **settings: Any
    ) -> None:
        entry.eraser.check(pipe)
        self.train_timesteps = 1 if self.facts.unit_time else pipe.scheduler.config.num_train_timesteps
        entry.prepare(pipe, self.images_per_prompt, prompts, **settings)

    def _wrap(self, pipe: DiffusionPipeline) -> None:
        """Wraps `encode_prompt` (which rows are conditional) and the end of a call, on this pipeline object."""
        if any(ref() is pipe for ref, _ in self.pipes):
            return
        encode_prompt, end_of_call = pipe.encode_prompt, pipe.maybe_free_model_hooks
        signature = inspect.signature(MethodType(type(pipe).encode_prompt, pipe))

        owner = weakref.ref(pipe)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.alone():
                present = self._present()
                if present is not None and present.inside and present.thread != threading.get_ident():
                    raise RuntimeError(_TWO_THREADS)
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                settings, images = encoding_settings(bound), bound.arguments["num_images_per_prompt"]
                guided = bound.arguments.get("do_classifier_free_guidance", False)
                if not guided and not self.facts.apart:
                    self._refuse_without_guidance()
                encoded = encode_prompt(*args, **kwargs)
                line = _line_of_call(owner())
                if self.facts.apart and self.call and self.call.pipe is owner and 0 < self.call.line < line:
                    return self._negated(owner(), encoded, bound)
                self.call = self.twin = None
                prompts, negatives = self._prompts(bound.arguments), bound.arguments.get("negative_prompt") or ()
                texts = [*(prompts or ()), *([negatives] if isinstance(negatives, str) else negatives)]
                for text in dict.fromkeys(texts):
                    if lost := cut_off(owner(), text, **settings):  # Python says the same thing once
                        warnings.warn(
                            f"A prompt is longer than the text encoder takes; not read is {lost!r}.", stacklevel=2
                        )
                given = encoded
                for entry in self.entries:
                    entry.check_rows(images, len(encoded[0]))
                    entry.memory = {}
                    encoded = entry.eraser.rewrite(owner(), encoded, bound, entry.memory)
                    self._prepare(owner(), entry, prompts, **settings)
                parts = dict(zip(self.facts.returns, encoded, strict=True))
                negative, mask = (parts.get(name) if guided else None for name in ("negative", "negative_mask"))
                apart = None
                if negative is not None and self.facts.cross_attention:
                    untouched = negative is given[self.facts.returns.index("negative")]
                    apart = unconditional(owner(), bound, negative, mask, untouched)
                scale = getattr(owner(), self.facts.scale, math.nan)
                inside = _calls(owner(), threading.get_ident())
                said = _Call(parts["text"], negative, apart, images, settings, prompts, owner, scale, inside, line=line)
                self.call = said
                self._checked = None
                self._fit()  # once more in `begin`, but not when compiled
                for entry in self.entries:
                    entry.place(images, len(encoded[0]))
                return encoded

        def ended() -> Any:
            if self.call is not None and self.call.thread == threading.get_ident():
                self.call = self._checked = self.twin = None
                for entry in self.entries:
                    entry.memory = {}
            return end_of_call()

        self.pipes.append((owner, {name: vars(pipe)[name] for name in WRAPPED if name in vars(pipe)}))
        pipe.encode_prompt, pipe.maybe_free_model_hooks = wrapped, ended

    def _negated(self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], bound: inspect.BoundArguments) -> Any:
        """The negative prompts, which a pipeline of a family with predictions apart encodes after the prompts."""
        for entry in self.entries:
            encoded = entry.eraser.negate(pipe, encoded, bound)
        parts = dict(zip(self.facts.returns, encoded, strict=True))
        if self.call is not None:
            if parts["text"] is self.call.positive:  # given by the user; the calls are told apart by the object
                parts["text"] = parts["text"].clone()
            self.call = replace(self.call, negative=parts["text"], negative_pooled=parts["pooled"])
        return tuple(parts.values())

    @staticmethod
    def _prompts(arguments: dict[str, Any]) -> list[str] | None:
        """The texts of a call's prompts, one for each conditional row; None if it gave embeddings."""
        prompt, others = arguments["prompt"], [arguments.get("prompt_2"), arguments.get("prompt_3")]
        if prompt is None or arguments.get("prompt_embeds") is not None or any(o not in (None, prompt) for o in others):
            return None
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return [text for text in prompts for _ in range(arguments["num_images_per_prompt"])]

    # ---- batches

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One thread at a time: what this denoiser's erasers know of the present call cannot be shared."""
        here = threading.get_ident()
        with _GUARD:
            if self._busy not in (None, here):
                raise RuntimeError(_TWO_THREADS)
            outside, self._busy = self._busy, here
        try:
            yield
        finally:
            self._busy = outside

    def begin(self, timestep: Tensor | float, text: Tensor, mask: Tensor | None = None) -> None:
        """Called in front of each denoiser call: which rows are conditional, what time it is, what text is masked."""
        if not torch.compiler.is_compiling():
            self._fit()
            call = self._present()
            if call is None:
                self._refuse_strangers()
            elif call.thread != threading.get_ident():
                raise RuntimeError(_TWO_THREADS)
            for entry in self.entries if call is None else ():
                entry.change(self.images_per_prompt, joined=None, lengths=None, weights=None)
            if text is not self._checked:
                self.first = self._first_row(text)
                if self.first < len(text):
                    for entry in self.entries:
                        entry.place(self.images_per_prompt, len(text) - self.first)
                self._checked = text
        elif self.call is not None and self.call.negative is not None:
            if self.facts.apart:
                raise ValueError(
                    f"With `{self.facts.scale}` above 1, which call of a compiled denoiser is the unconditional one "
                    "cannot be told: give a pipeline that is not compiled."
                )
            self.first = len(text) - len(self.call.positive)
        else:
            self.first = 0
        self.last = len(text)
        self.prompt = projected(self._denoiser(), text[self.first :])
        self.prompt_mask = mask[self.first :].bool() if mask is not None and mask.ndim == 2 else None
        self.empty = self.empty_mask = None
        if self.call is not None and self.call.unconditional is not None:
            apart = self.call.unconditional
            with torch.no_grad():
                self.empty = projected(self._denoiser(), apart.text)
            self.empty_mask = apart.mask
        self._repel(self._negated_rows(), text.device)
        if not torch.compiler.is_compiling():
            for entry in self.entries:
                entry.check_text(self.prompt if entry.eraser.edits_attention else text)
            for layer in self.self_layers if any(e.eraser.twins for e in self.entries) else ():
                check_unfused(layer.attn, self.facts.denoiser)
        self.time = timestep.flatten()[0] if isinstance(timestep, Tensor) and timestep.ndim else timestep

    def _negated_rows(self) -> dict[int, int]:
        """The unconditional rows of this denoiser call that read another text than the empty one."""
        apart = self.call.unconditional if self.call is not None else None
        return {row: row for row in apart.others} if apart is not None and self.first else {}

    def _repel(self, owners: dict[int, int], device: torch.device) -> None:
        """Sets which rows guidance pushes away from; `owners`: such a row, and the conditional row that it is for."""
        rows, of = tuple(owners), tuple(owners.values())
        if not rows:
            self.repelled = None
        elif (old := self.repelled) is None or (old.rows, old.owners, old.at.device) != (rows, of, device):
            self.repelled = Repelled(rows, of, torch.tensor(rows, device=device), torch.tensor(of, device=device))

    def measure(self, plain: Callable[[], Any]) -> None:
        """In front of a picture's first denoiser call: one plain call, by which erasers set their weights.

        Outside a pipeline each call is a first one. What was measured is kept until `encode_prompt` runs again.
        """
        waiting = [
            e
            for e in self.entries
            if e.eraser.measures and not e.eraser.is_off() and e.acting and e.prompts and not e.prompts.weights
        ]
        if not waiting or self.prompt is None or not len(self.prompt):
            return
        if torch.compiler.is_compiling():
            raise ValueError(UNCOMPILED)
        self._measuring, self._seen = waiting, {}
        try:
            plain()
            seen = self._seen
        finally:
            self._measuring, self._seen = [], None
        for k, entry in enumerate(waiting):
            of_each = zip(*(masses[k] for masses in seen.values()), strict=True)  # erasure prompt: its mass by layer
            weights = [entry.eraser.weigh(torch.stack(by_layer, -1), tuple(seen)) for by_layer in of_each]
            entry.change(self.images_per_prompt, weights=tuple(weights))

    def draw_beside(self, sample: Tensor, plain: Callable[[Tensor], Tensor]) -> None:
        """Takes the plain picture one step further, if an eraser needs it, and keeps what its layers saw.

        Args:
            sample: what the denoiser gets now; at first, that is where the plain picture starts.
            plain: the denoiser's prediction for another sample, all else being the same.
        """
        if not any(e.eraser.twins and not e.eraser.is_off() for e in self.entries):
            return
        pipe = self.call.pipe() if self.call is not None else None
        if pipe is None or self.prompt is None or self.first not in (0, len(self.prompt)):
            raise ValueError(
                "Two trajectories need a call of the pipeline, with guidance in the same denoiser call: use one "
                "trajectory."
            )
        if getattr(pipe, "guidance_rescale", 0.0):
            raise ValueError("Two trajectories know no `guidance_rescale`: leave it 0, or use one trajectory.")
        if torch.compiler.is_compiling():
            raise ValueError(UNCOMPILED)
        if self.twin is None:
            scheduler = copy.deepcopy(pipe.scheduler)
            scale = copy.deepcopy(scheduler).scale_model_input(torch.ones_like(sample[:1]), self.time)
            latents = sample[self.first :]
            self.twin = _Twin(latents.clone() if bool((scale == 1).all()) else latents / scale, scheduler)
        twin = self.twin
        twin.step += 1
        twin.seen.clear()
        scaled = twin.scheduler.scale_model_input(twin.latents, self.time)
        self._twin_runs = True
        try:
            prediction = plain(torch.cat([scaled] * 2) if self.first else scaled)
        finally:
            self._twin_runs = False
        if self.first:
            uncond, cond = prediction.chunk(2)
            prediction = uncond + pipe.guidance_scale * (cond - uncond)
        twin.latents = twin.scheduler.step(prediction, self.time, twin.latents, return_dict=False)[0]

    def edit_self(
        self, attn: Attention, query: Tensor | None, key: Tensor | None, value: Tensor | None, hidden: Tensor
    ) -> Tensor:
        """The self-attention output [B, Q, C] in front of `to_out`, with the twin's maps where an eraser wants them."""
        first, last = self.first, self.last
        if query is None or key is None or value is None or first == last:
            return hidden
        twin = self.twin
        if twin is not None and self._twin_runs:
            twin.seen[attn] = query[first:last], key[first:last]
        if twin is None or self._twin_runs or self._seen is not None:
            return hidden
        wanting = [e for e in self.entries if e.eraser.twins and not e.eraser.is_off()]
        wanting = [e for e in wanting if e.eraser.copies(*twin.moment, query.shape[1])]
        if not wanting:
            return hidden
        its_query, its_key = twin.seen[attn]
        copied = CrossAttention.copied(attn, its_query, its_key, value[first:last])
        out = hidden[first:last]
        for term in itertools.chain(*(entry.acting for entry in wanting)):
            out = copied if term.rows is None else out.index_copy(0, term.rows, copied[term.rows])
        return out if len(out) == len(hidden) else torch.cat([hidden[:first], out, hidden[last:]])

    def _first_row(self, text: Tensor) -> int:
        """Rows before it are unconditional. A call outside a pipeline is conditional throughout."""
        if self.call is None:
            return 0
        positive, negative = self.call.positive, self.call.negative
        n, p = len(text), len(positive)
        if self.facts.apart and text is negative:  # which may equal the prompt
            return n
        if n == p and torch.equal(text, positive):
            return 0
        if negative is not None:
            if n == 2 * p and torch.equal(text[p:], positive) and torch.equal(text[:p], negative):
                return p
            if n == len(negative) and torch.equal(text, negative):
                return n
        raise ValueError(
            f"The denoiser got {n} rows of text that are not what `encode_prompt` returned ({p} conditional rows, "
            f"guidance {'on' if negative is not None else 'off'}), so it is not known which rows are conditional. "
            "Pipelines that add rows of their own are not supported."
        )

    def _weight(self, window: tuple[float, float]) -> Tensor | float:
        """1 inside the window, 0 outside; the time is 1 - t / num_train_timesteps."""
        if window == (0.0, 1.0):
            return 1.0
        time = 1 - self.time / self.train_timesteps
        if torch.compiler.is_compiling() and isinstance(time, Tensor):
            return ((time >= window[0]) & (time <= window[1])).float()
        return float(window[0] <= float(time) <= window[1])

    def edit(self, attn: Attention, query: Tensor | None, hidden: Tensor) -> Tensor:
        """The attention output [B, Q, C] in front of `to_out`, edited by every active eraser in turn."""
        first, last, repelled = self.first, self.last, self.repelled
        if query is None or (first == last and repelled is None):
            return hidden
        if self._twin_runs and self.twin is not None:
            self.twin.seen[attn] = query[first:last], hidden[first:last]
            return hidden
        if self._seen is not None:
            cross = CrossAttention(attn, query[first:last], self.prompt, prompt_mask=self.prompt_mask)
            prompts = (entry.prompts for entry in self._measuring)
            self._seen[self.names[attn]] = [cross.mass(term) for term in prompts if term is not None]
            return hidden
        if first < last:
            given = hidden[first:last]
            out = self._edit_rows(attn, query[first:last], given, None)
            if out is not given:
                hidden = out if len(out) == len(hidden) else torch.cat([hidden[:first], out, hidden[last:]])
        if repelled is not None:
            given = hidden[repelled.at]
            out = self._edit_rows(attn, query[repelled.at], given, repelled)
            hidden = hidden if out is given else hidden.index_copy(0, repelled.at, out)
        return hidden

    def _edit_rows(self, attn: Attention, query: Tensor, given: Tensor, repelled: Repelled | None) -> Tensor:
        """The attention output of the conditional or of the `repelled` rows; the same object if none is edited."""
        out = given
        for entry in self.entries:
            eraser = entry.eraser
            if not eraser.edits_attention or eraser.is_off() or (repelled is not None and not eraser.touches_uncond):
                continue
            weight = 1.0 if eraser.twins else self._weight(eraser.window)
            if not isinstance(weight, Tensor) and weight == 0:
                continue
            cross = CrossAttention(attn, query, neutral=entry.neutral, neutral_mask=entry.neutral_mask)
            cross.empty, cross.empty_mask, cross.unconditional = self.empty, self.empty_mask, repelled is not None
            if repelled is None:
                cross.prompt, cross.prompt_mask = self.prompt, self.prompt_mask
                if eraser.twins and self.twin is not None:
                    its_query, its_out = self.twin.seen[attn]
                    cross.beside = Beside(its_query, its_out - given, *self.twin.moment)
            elif self.empty is not None and len(self.empty) > 1:
                cross.empty = self.empty[repelled.of]
                cross.empty_mask = None if self.empty_mask is None else self.empty_mask[repelled.of]
            for term in entry.acting:
                rows = term.rows if repelled is None else repelled.rows_of(term)
                if rows is None:
                    edited = eraser.edit(out, cross, term)
                elif len(rows):
                    edited = out.index_copy(0, rows, eraser.edit(out[rows], cross.at(rows), term))
                else:
                    continue
                out = torch.lerp(out, edited, weight.to(out)) if isinstance(weight, Tensor) else edited
        return out

    # ---- predictions

    def denoise(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the denoiser: the text read anew, the concepts predicted beside it, the prediction changed."""
        names = self.parameters[: len(args)]
        arguments = dict(zip(names, args, strict=True)) | kwargs
        text: Tensor = arguments["encoder_hidden_states"]
        self.begin(arguments["timestep"], text, arguments.get("encoder_attention_mask"))
        time = 1 - torch.as_tensor(self.time, dtype=torch.float32, device=text.device) / self.train_timesteps
        arguments = self._reread(arguments, time)
        noisy = self.parameters[0]
        others = {name: value for name, value in arguments.items() if name != noisy}
        self.measure(lambda: forward(arguments[noisy], **others))
        self.draw_beside(arguments[noisy], lambda beside: forward(beside, **others)[0])
        beside = self._negatives_beside() if self.facts.apart else []
        guiding = []
        for entry in self.entries if self.first < self.last or not self.facts.apart else ():
            weight = self._weight(entry.eraser.window) if entry.eraser.guides and not entry.eraser.is_off() else 0
            if entry.acting and (isinstance(weight, Tensor) or weight):
                guiding.append((entry, weight))
        if not guiding:
            return _call(forward, names, arguments)
        if arguments.get("skip_layers") is not None:
            raise ValueError(
                f"{type(guiding[0][0].eraser).__name__} changes the conditional prediction, which "
                "`skip_guidance_layers` compares with one of its own: leave them out, or use method 'safree'."
            )
        if not 0 < self.first < self.last and not beside:
            raise ValueError(needs_guidance(guiding[0][0].eraser, self._denoiser(), self.facts))
        every = torch.arange(self.last - self.first, device=text.device)
        terms = [term for entry, _ in guiding for term in entry.acting]
        rows = [every if term.rows is None else term.rows for term in terms]
        asked, places = [*beside, *terms], [*(every[k : k + 1] for k in range(len(beside))), *rows]
        further = repelled_rows(guiding, self.last - self.first, self.last)
        self._repel(self._negated_rows() | further, text.device)
        out = _call(
            forward, names, with_concepts(arguments, asked, places, self.first, masked=self.prompt_mask is not None)
        )
        scale = self.call.guidance_scale if self.call else math.nan
        if self.call and not torch.compiler.is_compiling():  # a callback may have changed it
            scale = getattr(self.call.pipe(), self.facts.scale, math.nan)
        sample = guided(out[0], guiding, rows, self.first, self.last, scale, time)
        return (sample, *out[1:]) if isinstance(out, tuple) else type(out)(sample=sample)

    def _reread(self, arguments: dict[str, Any], time: Tensor) -> dict[str, Any]:
        """The arguments with the text that conditional rows read at this time."""
        text, all_pooled = arguments["encoder_hidden_states"], pooled_text(arguments)
        given = prompt, pooled = text[self.first :], None if all_pooled is None else all_pooled[self.first :]
        for entry in self.entries if self.first < self.last else ():
            if not entry.eraser.is_off():
                prompt, pooled = entry.eraser.reread(prompt, pooled, time, entry.memory)
        if prompt is given[0] and pooled is given[1]:
            return arguments
        self.prompt = projected(self._denoiser(), prompt)
        arguments = arguments | {"encoder_hidden_states": torch.cat([text[: self.first], prompt])}
        if all_pooled is not None and pooled is not None:
            return with_pooled(arguments, torch.cat([all_pooled[: self.first], pooled]))
        return arguments

    def _negatives_beside(self) -> list[Term]:
        """The negative prompt of each conditional row, where unconditional predictions have a call of their own."""
        if self.call is None or self.first == self.last:
            return []
        text, pooled = self.call.negative, self.call.negative_pooled
        if text is None or pooled is None:
            self._refuse_without_guidance()
            return []
        if (n := self.last - self.first) != len(text):
            raise ValueError(
                f"The call has {n} rows of prompts, but {len(text)} of negative prompts: give a list, one for each."
            )
        return [Term(text[k : k + 1], (), pooled=pooled[k : k + 1]) for k in range(len(text))]

    def _refuse_without_guidance(self) -> None:
        for entry in self.entries:
            acts = entry.prompts is not None if entry.eraser.guides else entry.eraser.negates
            if acts and not entry.eraser.is_off():
                raise ValueError(needs_guidance(entry.eraser, self._denoiser(), self.facts))

    def _refuse_strangers(self) -> None:
        """A pipeline's call that began without the erasers, or lost them: its unconditional rows cannot be told."""
        from diffusers import DiffusionPipeline

        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, DiffusionPipeline) and not any(ref() is caller for ref, _ in self.pipes):
                raise ValueError(
                    f"This {type(caller).__name__} shares its denoiser with a pipeline that has erasers on, but none "
                    "was applied to it, so it is not known which rows are conditional. Remove them there and apply "
                    "them to the pipeline that you call (erasers on one denoiser add up)."
                )
            if isinstance(caller, DiffusionPipeline) and frame.f_code.co_name == "__call__":
                raise RuntimeError(
                    "It is not known which rows of this call are conditional: another thread used the pipeline in "
                    f"between, or the eraser was applied in the middle of the call. {_TWO_THREADS}"
                )
            frame = frame.f_back


def _line_of_call(pipe: DiffusionPipeline | None) -> int:
    """Where in the pipeline's `__call__` the wrapped `encode_prompt` was called; 0 if something else called it."""
    frame = sys._getframe(2)
    inside = frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe
    return frame.f_lineno if inside else 0


def _call(function: Callable[..., Any], positional: Sequence[str], arguments: dict[str, Any]) -> Any:
    """The function with its arguments by position and by keyword, as they were given."""
    named = {name: value for name, value in arguments.items() if name not in positional}
    return function(*(arguments[name] for name in positional), **named)


def _calls(pipe: DiffusionPipeline | None, thread: int) -> bool:
    """Whether a thread is in a call of this pipeline."""
    frame = sys._current_frames().get(thread) if pipe is not None else None
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return True
        frame = frame.f_back
    return False


def site(pipe: DiffusionPipeline) -> Site:
    """The site of a pipeline's denoiser; TypeError for a pipeline Efface does not know."""
    denoiser = denoiser_of(pipe)
    if denoiser not in SITES:
        SITES[denoiser] = Site(denoiser, family(pipe))
    return SITES[denoiser]
