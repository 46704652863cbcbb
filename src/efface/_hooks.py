"""Where erasers meet a pipeline: the hooks, and the list of what is on.

Only this file and those that it imports (`_weights`, `_text`, `_attention`, `_method`, `_prompts`, `_guidance`,
`_forward` and `_layers`) touch diffusers internals.

Each denoiser has one `Site`: the ordered list of erasers that are on. The list is walked on each call, so erasers come
off in any order; when it is empty, every hook is gone.

- A call of the pipeline is followed from `check_inputs` to `maybe_free_model_hooks`, by methods of the pipeline object
  that are wrapped. `encode_prompt` tells which rows will be conditional; erasure prompts are encoded anew there for
  each call (so a LoRA loaded or a device changed in between is seen; there is nothing to invalidate).
- The denoiser's hook reads the time and compares the batch with what `encode_prompt` returned; a denoiser that is
  called by itself is told the rows by `conditional_rows`. There a method may change the text that conditional rows
  read, and the noise predicted for them: texts it asks for are predicted as further rows of the same call, and the
  pipeline's own guidance then works on the changed prediction, whatever the scheduler. FLUX predicts unconditionally in
  another call: there the unconditional text is such a row as well.
- In every cross-attention layer the query is seen behind `to_q`, and the attention output is edited in front of
  `to_out[0]`, on conditional rows. Processors stay as they are (slicing, LoRA, IP-Adapter). Where a method says so
  (`touches_uncond`), it also edits the unconditional rows that read another text than the empty one, and further rows
  that guidance pushes away from (`repels`). Other further rows are not edited: they have to show the concept.
- An eraser may ask for denoiser calls of its own: a plain one in front of the first, which measures the attention that
  its erasure prompts get (`measures`), or one in each step, which draws the plain picture beside (`twins`).
- What ran is compared with what was planned (`_records`): a step that does not come by, a layer that is not seen, or
  rows that are not known raise. Nothing is drawn without the erasers and without a word.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from . import _records as records
from ._attention import Beside, CrossAttention, Repelled, Term
from ._forward import Copies, Entered, Forward, Hidden, hide, show, wake
from ._guidance import guided, needs_guidance, pooled_text, repelled_rows, with_concepts, with_pooled
from ._layers import Layer, SelfLayer
from ._method import Method
from ._prompts import Entry
from ._records import Record
from ._text import SITES, Unconditional, check_width, cut_off, encoder_of, encoding_settings, readers, unconditional
from ._weights import check_unfused, denoiser_of
from .core import Handle
from .families import Family, family, without_cross_attention

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_GUARD = threading.Lock()


class Hooked(Method):
    """Base of run-time erasers: `apply` puts them on the pipeline's list."""

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        """Takes effect at once; returns the handle that takes it off again (also a context manager)."""
        here = site(pipe)
        try:
            return here.add(pipe, self)
        except BaseException:
            here.forget_if_empty()
            raise


@dataclass
class _Opening:
    """A call of the pipeline, from `check_inputs` on."""

    thread: int
    prompts: bool = False  # whether they were encoded


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
    inside: bool  # of a call of the pipeline, not an `encode_prompt` by itself
    thread: int = field(default_factory=threading.get_ident)
    blind: bool = False  # no text encoder any more: what the unconditional rows read cannot be compared with ""
    negative_pooled: Tensor | None = None  # where unconditional predictions come apart


class _Loop:
    """The pipeline's progress bar; while it is open the pipeline draws, and each step of it has to be guarded."""

    def __init__(self, bar: Any, site: Site) -> None:
        self.bar, self.site = bar, site

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bar, name)

    def __enter__(self) -> _Loop:
        self.site.start()
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        self.site.drawing = None
        return self.bar.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Any]:
        self.site.start()
        try:
            yield from self.bar
        finally:
            self.site.drawing = None

    def update(self, n: float | None = 1) -> Any:
        self.site.step()
        return self.bar.update(n)


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
        self.layers: list[Layer] = []
        self.self_layers: list[SelfLayer] = []
        self._find_layers()
        self._projection = getattr(denoiser, "caption_projection", None)
        self._projecting: Forward | None = None  # on it
        self._texts_are_projected = False
        self._empty_read: Tensor | None = None
        self.parameters = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.entries: list[Entry] = []
        self.pipes: list[tuple[weakref.ref[DiffusionPipeline], dict[str, Hidden]]] = []  # with what hides their methods
        self.encoders: list[tuple[weakref.ref[DiffusionPipeline], tuple[str, ...]]] = []  # those it had, by tokenizer
        self.copies = Copies(lambda: [entry.eraser for entry in self.entries], _apply_all)
        self._hook: weakref.ref[Forward] | None = None  # on the denoiser, which holds it
        self.entered: Entered | None = None
        self.opening: _Opening | None = None
        self.drawing: int | None = None  # the thread whose call of the pipeline is in its steps
        self.call: _Call | None = None
        self.given: tuple[int, int] | None = None  # the first conditional row and how many rows, if the caller says it
        self.guarded = False  # whether this step of the pipeline came by
        self.stepped = False  # whether one did before
        self._by_the_way = False  # whether this call of the denoiser did
        self._inside = False  # a call of the denoiser
        self.first = self.last = 0  # the conditional rows; further ones come behind
        self.rows = 0  # of the denoiser call, further ones included
        self.prompt: Tensor | None = None
        self.prompt_mask: Tensor | None = None
        self.empty: Tensor | None = None  # what unconditional rows read without a negative prompt; one row if all alike
        self.empty_mask: Tensor | None = None
        self.repelled: Repelled | None = None
        self.time: Tensor | float = 0.0
        self.train_timesteps = 1000
        self.editing: list[tuple[Entry, Tensor | float]] = []  # attention, in this denoiser call
        self._checked: Tensor | None = None
        self._busy: int | None = None  # the thread that is inside
        self.twin: _Twin | None = None
        self._twin_runs = False
        self._measuring: list[Entry] = []
        self._seen: dict[str, list[tuple[Tensor, ...]]] | None = None  # while measuring: layer -> masses of each entry

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

    @property
    def hook(self) -> Forward | None:
        return None if self._hook is None else self._hook()

    @property
    def denoiser(self) -> nn.Module:
        found = self._denoiser()
        if found is None:
            raise ValueError("The denoiser of these erasers is gone.")
        return found

    # ---- the list

    def add(self, pipe: DiffusionPipeline, eraser: Hooked) -> Handle:
        if hasattr(type(pipe), "set_pag_applied_layers"):
            raise ValueError(
                f"{type(pipe).__name__} adds rows of its own to each denoiser call (perturbed attention guidance), so "
                "it is not known which rows are conditional. Use the pipeline without PAG, or an editor such as UCE."
            )
        if eraser.edits_attention:
            if not self.layers:
                raise ValueError(without_cross_attention(type(eraser).__name__, pipe))
            for layer in self.layers:
                check_unfused(layer.attn, self.facts.denoiser)
        if (eraser.measures or eraser.twins) and getattr(pipe, self.facts.denoiser) is not self._denoiser():
            raise ValueError(records.UNCOMPILED)
        if eraser.twins and not hasattr(type(pipe), "guidance_scale"):
            raise ValueError(
                f"Two trajectories need the guidance scale of the call, but {self.facts.name} pipelines do not tell "
                "it. Use one trajectory."
            )
        if eraser.twins and "mask_image" in inspect.signature(type(pipe).__call__).parameters:
            raise ValueError(
                f"Two trajectories draw the plain picture beside, but {type(pipe).__name__} puts the given picture "
                "back in after each step, which would not reach it. Use one trajectory."
            )
        for layer in self.self_layers if eraser.twins else ():
            check_unfused(layer.attn, self.facts.denoiser)
        entry = Entry(eraser)
        check_width(pipe)
        self._prepare(pipe, entry)
        self._wrap(pipe)
        self.entries.append(entry)
        self._checked = None
        self._fit()
        owner = weakref.ref(pipe)

        def swap(changed: Hooked) -> None:
            present = owner()
            if present is None:
                raise ValueError("The pipeline of this eraser is gone.")
            call = self.call if self.drawing is not None else None
            if call is not None and changed.guides != entry.eraser.guides:
                raise ValueError(
                    f"This change moves {type(changed).__name__} to other rows of the batch, which cannot be done "
                    "while the pipeline is drawing. Set it between two calls."
                )
            trial = Entry(changed, memory=entry.memory, record=entry.record)
            trial.check_rows(self.images_per_prompt, len(call.positive) if call else None)
            self._prepare(present, trial, call.prompts if call else None, **(call.settings if call else {}))
            if entry.prompts and (changed.concepts, changed.rows) == (entry.eraser.concepts, entry.eraser.rows):
                trial.change(self.images_per_prompt, weights=entry.prompts.weights)  # keep what was measured
            vars(entry).update(vars(trial) | {"handle": entry.handle})
            self._checked = None

        def remove() -> None:
            self.entries.remove(entry)
            self._fit()
            if not self.entries:
                self._close()

        entry.handle = Handle(eraser, swap, remove, lambda: entry.record.as_json())
        return entry.handle

    def forget_if_empty(self) -> None:
        """Without an eraser nothing is kept about the denoiser."""
        if not self.entries and (denoiser := self._denoiser()) is not None:
            SITES.pop(denoiser, None)

    def _fit(self) -> None:
        """Hooks on the denoiser while an eraser is on, and on the attention layers exactly while one needs them."""
        denoiser = self._denoiser()
        if denoiser is not None and self.entries:
            if self.hook is None or not self.hook.on_top():
                if self.hook is not None:
                    self.hook.take_off()
                self._hook = weakref.ref(Forward(denoiser, self._enter, self.copies))
            if self.entered is None:
                self.entered = Entered(denoiser, self._on_entering, self._on_leaving)
        wanted = any(e.eraser.edits_attention for e in self.entries)
        self._fit_projection(wanted)
        for layer in self.layers:
            layer.fit() if wanted else layer.unhook()
        twins = any(e.eraser.twins for e in self.entries)
        for self_layer in self.self_layers:
            self_layer.fit() if twins else self_layer.unhook()

    def _fit_projection(self, wanted: bool) -> None:
        projection, hook = getattr(self._denoiser(), "caption_projection", None), self._projecting
        if hook is not None and (not wanted or projection is not self._projection or not hook.on_top()):
            hook.take_off()
            hook = None
        self._projection = projection
        if wanted and hook is None and projection is not None:
            hook = Forward(projection, self._project)
        self._projecting = hook

    def _close(self) -> None:
        if self.hook is not None:
            self.hook.take_off()
        if self.entered is not None:
            self.entered.take_off()
        self._hook = self.entered = None
        if (denoiser := self._denoiser()) is not None:
            SITES.pop(denoiser, None)
        for _, methods in self.pipes:
            show(methods)
        self.pipes.clear()
        self.encoders.clear()
        self.call = self.opening = self.drawing = self.prompt = self._checked = self.twin = None

    @property
    def images_per_prompt(self) -> int:
        return self.call.images_per_prompt if self.call else 1

    def _prepare(
        self, pipe: DiffusionPipeline, entry: Entry, prompts: list[str] | None = None, **settings: Any
    ) -> None:
        if prompts is None and entry.prompts is not None and self._without_encoder(pipe):  # what was encoded stays
            entry.place(self.images_per_prompt)
            return
        entry.eraser.check(pipe)
        self.train_timesteps = 1 if self.facts.unit_time else pipe.scheduler.config.num_train_timesteps
        entry.prepare(pipe, self.images_per_prompt, prompts, **settings)

    def _without_encoder(self, pipe: DiffusionPipeline) -> bool:
        """Whether a text encoder was dropped since an eraser was applied, as people do to save memory."""
        had = next((names for ref, names in self.encoders if ref() is pipe), ())
        return any(encoder_of(pipe, name) is None for name in had)

    # ---- a call of the pipeline

    def _wrap(self, pipe: DiffusionPipeline) -> None:
        """Follows this pipeline object's calls: the beginning, the texts, the steps and the end."""
        if any(ref() is pipe for ref, _ in self.pipes):
            return
        owner = weakref.ref(pipe)
        signature = inspect.signature(type(pipe).encode_prompt.__get__(pipe))

        def begun(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._check_pipeline(owner())
            self.opening = _Opening(threading.get_ident())
            return original(*args, **kwargs)

        def encoded(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self.alone():
                self._check_pipeline(owner())
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                return self._encode(owner(), original, bound, args, kwargs)

        def looped(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return _Loop(original(*args, **kwargs), self)

        def ended(original: Callable[..., Any]) -> Any:
            call, self.drawing = self.call, None
            if call is None or call.thread != threading.get_ident():
                return original()
            inside, self.opening = call.inside, None
            self.call = self._checked = self.twin = None
            for entry in self.entries:
                entry.memory = {}
            returned = original()
            self._fit()  # offloading puts its own hooks on anew
            if inside and not (self.guarded or self.stepped):
                raise RuntimeError(records.not_entered(self.facts.denoiser))
            return returned

        def saved(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            names = ", ".join(type(entry.eraser).__name__ for entry in self.entries)
            warnings.warn(
                f"Erasers act at run time and are not saved: {names} is on now, but the pipeline that is loaded from "
                "this folder will be unguarded. Apply the erasers again after loading.",
                stacklevel=3,
            )
            return original(*args, **kwargs)

        self.encoders.append((owner, readers(pipe)))
        acts = {"check_inputs": begun, "encode_prompt": encoded, "progress_bar": looped}
        acts |= {"maybe_free_model_hooks": ended, "save_pretrained": saved}
        self.pipes.append((owner, hide(pipe, acts, self.copies)))

    def _check_pipeline(self, pipe: DiffusionPipeline | None) -> None:
        """In front of a call: the denoiser is still ours, no other thread draws, and all hooks are on top."""
        present = getattr(pipe, self.facts.denoiser, None)
        denoiser = self._denoiser()
        if getattr(present, "_orig_mod", present) is not denoiser or denoiser is None:
            raise RuntimeError(records.swapped(self.facts.denoiser, type(pipe).__name__))
        if self.drawing not in (None, threading.get_ident()):
            raise RuntimeError(records.TWO_THREADS)
        cache = records.cache_on(denoiser.modules())
        if cache and any((e.eraser.edits_attention or e.eraser.guides) and not e.eraser.is_off() for e in self.entries):
            raise RuntimeError(records.cached(self.facts.denoiser, cache))
        self._find_layers()
        self._fit()

    def start(self) -> None:
        """The steps of a call of the pipeline begin."""
        if self.call is not None and self.call.thread != threading.get_ident():
            raise RuntimeError(records.TWO_THREADS)
        if self.given is not None:
            raise RuntimeError(
                "The pipeline was called inside `efface.conditional_rows`, which tells the rows of denoiser calls that "
                "are made without it. Leave that block first: a call of the pipeline tells its rows itself."
            )
        self.drawing = threading.get_ident()

    def step(self) -> None:
        """A step of the pipeline is over."""
        if self.entries and self.call is not None and not self.guarded:
            raise RuntimeError(records.not_entered(self.facts.denoiser))
        self.guarded, self.stepped = False, True

    def _encode(
        self,
        pipe: DiffusionPipeline,
        encode_prompt: Callable[..., Any],
        bound: inspect.BoundArguments,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """`encode_prompt`, and what it says about the rows to come."""
        settings, images = encoding_settings(bound), bound.arguments["num_images_per_prompt"]
        guided = bound.arguments.get("do_classifier_free_guidance", False)
        if not guided and not self.facts.apart:
            self._refuse_without_guidance()
        made = encode_prompt(*args, **kwargs)
        opening = self.opening if self.opening and self.opening.thread == threading.get_ident() else None
        if self.facts.apart and opening is not None and opening.prompts:
            return self._negated(pipe, made, bound)
        self.call = self.twin = None
        self.guarded = self.stepped = False
        prompts, negatives = self._prompts(bound.arguments), bound.arguments.get("negative_prompt") or ()
        texts = [*(prompts or ()), *([negatives] if isinstance(negatives, str) else negatives)]
        for text in dict.fromkeys(texts):
            if lost := cut_off(pipe, text, **settings):  # Python says the same thing once
                warnings.warn(f"A prompt is longer than the text encoder takes; not read is {lost!r}.", stacklevel=5)
        given = made
        for entry in self.entries:
            entry.check_rows(images, len(made[0]))
            entry.memory, entry.record = {}, Record(layers=len(self.layers) if entry.eraser.edits_attention else 0)
            made = entry.eraser.rewrite(pipe, made, bound, entry.memory)
            self._prepare(pipe, entry, prompts, **settings)
        parts = dict(zip(self.facts.returns, made, strict=True))
        negative, mask = (parts.get(name) if guided else None for name in ("negative", "negative_mask"))
        apart = None
        blind = prompts is None and self._without_encoder(pipe)
        if negative is not None and self.facts.cross_attention and not blind:
            untouched = negative is given[self.facts.returns.index("negative")]
            apart = unconditional(pipe, bound, negative, mask, untouched)
        scale = getattr(pipe, self.facts.scale, math.nan)
        inside = opening is not None
        self.call = _Call(
            parts["text"], negative, apart, images, settings, prompts, weakref.ref(pipe), scale, inside, blind=blind
        )
        if opening is not None:
            opening.prompts = True
        self._checked = None
        self._fit()  # once more in `begin`, but not when compiled
        for entry in self.entries:
            entry.place(images, len(made[0]))
        return made

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
                raise RuntimeError(records.TWO_THREADS)
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

    def _on_entering(self) -> None:
        if not torch.compiler.is_compiling():
            self._by_the_way = False

    def _on_leaving(self) -> None:
        if not torch.compiler.is_compiling() and not self._by_the_way:
            self._fit()
            raise RuntimeError(records.bypassed(self.facts.denoiser))

    def _enter(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the denoiser's `forward`."""
        if torch.compiler.is_compiling():
            return self.denoise(forward, args, kwargs)
        with self.alone():
            try:
                return self.denoise(forward, args, kwargs)
            finally:
                self._inside = False

    def begin(self, timestep: Tensor | float, text: Tensor, mask: Tensor | None = None) -> None:
        """Called in front of each denoiser call: which rows are conditional, what time it is, what text is masked."""
        self._inside = True
        if not torch.compiler.is_compiling():
            self._by_the_way = True
            self._fit()
            direct = self.given is not None
            if self.call is not None and not direct and self.call.thread != threading.get_ident():
                raise RuntimeError(records.TWO_THREADS)
            for entry in self.entries if direct or self.call is None else ():
                entry.change(self.images_per_prompt, joined=None, lengths=None, weights=None)
            if text is not self._checked:
                self.first = self._first_row(text)
                if self.first < len(text):
                    for entry in self.entries:
                        entry.place(1 if direct else self.images_per_prompt, len(text) - self.first)
                self._checked = text
            edits = any(e.eraser.edits_attention and not e.eraser.is_off() for e in self.entries)
            if edits and torch.is_grad_enabled() and getattr(self.denoiser, "is_gradient_checkpointing", False):
                raise RuntimeError(records.CHECKPOINTED)
        elif self.given is not None:
            self.first = self.given[0]
        elif self.call is not None and self.call.negative is not None:
            if self.facts.apart:
                raise ValueError(
                    f"With `{self.facts.scale}` above 1, which call of a compiled denoiser is the unconditional one "
                    "cannot be told. Give a pipeline that is not compiled."
                )
            self.first = len(text) - len(self.call.positive)
        elif self.call is not None:
            self.first = 0
        else:
            raise RuntimeError(records.unknown_rows(len(text), "no call of the pipeline is going on"))
        if self.given is not None and self.first:
            self._check_negatives(text[: self.first])
        self.last = self.rows = len(text)
        self.prompt = text[self.first :]
        self.prompt_mask = mask[self.first :].bool() if mask is not None and mask.ndim == 2 else None
        apart = self.call.unconditional if self.call is not None and self.given is None else None
        self.empty, self.empty_mask = (None, None) if apart is None else (apart.text, apart.mask)
        self._empty_read, self._texts_are_projected = self.empty, self._projection is None
        self._repel(self._negated_rows(), text.device)
        if not torch.compiler.is_compiling():
            for entry in self.entries:
                entry.check_text(text)
            for layer in self.self_layers if any(e.eraser.twins for e in self.entries) else ():
                check_unfused(layer.attn, self.facts.denoiser)
        self.time = timestep.flatten()[0] if isinstance(timestep, Tensor) and timestep.ndim else timestep
        self.guarded = True

    def _check_negatives(self, text: Tensor) -> None:
        """A method that changes negative prompts cannot act on a text that it has not made."""
        acting = [e for e in self.entries if e.eraser.negates and not e.eraser.is_off()]
        made = None if self.call is None else self.call.negative
        if acting and (made is None or made.shape != text.shape or not torch.equal(made, text)):
            raise RuntimeError(
                f"{type(acting[0].eraser).__name__} changes the negative prompt in `encode_prompt`, but the "
                "unconditional rows of this denoiser call read another text. Call the pipeline, or give the denoiser "
                "what `pipe.encode_prompt` returns now."
            )

    def _negated_rows(self) -> dict[int, int]:
        """The unconditional rows of this denoiser call that may read another text than the empty one."""
        blind = self.call is not None and self.call.blind and self.call.negative is not None
        if self.given is not None or blind:  # not known: to the empty text nothing happens but rounding
            return {row: row for row in range(self.first)}
        apart = self.call.unconditional if self.call is not None else None
        return {row: row for row in apart.others} if apart is not None and self.first else {}

    def _repel(self, owners: dict[int, int], device: torch.device) -> None:
        """Sets which rows guidance pushes away from; `owners`: such a row, and the conditional row that it is for."""
        rows, of = tuple(owners), tuple(owners.values())
        if not rows:
            self.repelled = None
        elif (old := self.repelled) is None or (old.rows, old.owners, old.at.device) != (rows, of, device):
            self.repelled = Repelled(rows, of, torch.tensor(rows, device=device), torch.tensor(of, device=device))

    def _project(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of what projects the text for all layers, where there is such a module (PixArt).

        Our texts are projected while its weights are there: offloading loads them for this moment only.
        """
        out = forward(*args, **kwargs)
        if self._inside:
            self.prompt, self._texts_are_projected = out[self.first : self.last], True
            with torch.no_grad():
                if self._empty_read is not None:
                    self.empty = forward(self._empty_read)
                for entry in self.entries:
                    entry.project(forward)
        return out

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
            raise ValueError(records.UNCOMPILED)
        self._measuring, self._seen, self.rows = waiting, {}, self.last
        try:
            self._run(plain)
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
        pipe = self.call.pipe() if self.call is not None and self.given is None else None
        if pipe is None or self.prompt is None or self.first not in (0, len(self.prompt)):
            raise ValueError(
                "Two trajectories need a call of the pipeline, with guidance in the same denoiser call. Use one "
                "trajectory."
            )
        if getattr(pipe, "guidance_rescale", 0.0):
            raise ValueError("Two trajectories know no `guidance_rescale`. Leave it 0, or use one trajectory.")
        if torch.compiler.is_compiling():
            raise ValueError(records.UNCOMPILED)
        if self.twin is None:
            scheduler = copy.deepcopy(pipe.scheduler)
            scale = copy.deepcopy(scheduler).scale_model_input(torch.ones_like(sample[:1]), self.time)
            latents = sample[self.first :]
            self.twin = _Twin(latents.clone() if bool((scale == 1).all()) else latents / scale, scheduler)
        twin = self.twin
        twin.step += 1
        twin.seen.clear()
        scaled = twin.scheduler.scale_model_input(twin.latents, self.time)
        self._twin_runs, self.rows = True, self.last
        try:
            prediction = self._run(lambda: plain(torch.cat([scaled] * 2) if self.first else scaled))
        finally:
            self._twin_runs = False
        if self.first:
            uncond, cond = prediction.chunk(2)
            prediction = uncond + pipe.guidance_scale * (cond - uncond)
        twin.latents = twin.scheduler.step(prediction, self.time, twin.latents, return_dict=False)[0]

    def edit_self(self, layer: Layer, hidden: Tensor) -> Tensor:
        """The self-attention output [B, Q, C] in front of `to_out`, with the twin's maps where an eraser wants them."""
        first, last = self.first, self.last
        attn, query, key, value = layer.attn, layer.to_q, layer.to_k, layer.to_v
        if first == last:
            return hidden
        if query is None or key is None or value is None:
            raise RuntimeError(records.missed([layer.name], len(self.self_layers)))
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
        """Rows before it are unconditional."""
        n = len(text)
        if self.given is not None:
            first, expected = self.given
            if n != expected:
                raise RuntimeError(
                    f"`conditional_rows` was given {expected} rows, but the denoiser call has {n}. Give one truth "
                    "value for each row of the call."
                )
            return first
        if self.call is None:
            raise RuntimeError(records.unknown_rows(n, "no call of the pipeline is going on"))
        positive, negative = self.call.positive, self.call.negative
        p = len(positive)
        if self.facts.apart and text is negative:  # which may equal the prompt
            return n
        if n == p and torch.equal(text, positive):
            return 0
        if negative is not None:
            if n == 2 * p and torch.equal(text[p:], positive) and torch.equal(text[:p], negative):
                return p
            if n == len(negative) and torch.equal(text, negative):
                return n
        guidance = f"{p} conditional rows, guidance {'on' if negative is not None else 'off'}"
        raise RuntimeError(records.unknown_rows(n, guidance))

    def _weight(self, window: tuple[float, float]) -> Tensor | float:
        """1 inside the window, 0 outside; the time is 1 - t / num_train_timesteps."""
        if window == (0.0, 1.0):
            return 1.0
        time = 1 - self.time / self.train_timesteps
        if torch.compiler.is_compiling() and isinstance(time, Tensor):
            return ((time >= window[0]) & (time <= window[1])).float()
        return float(window[0] <= float(time) <= window[1])

    def _plan(self) -> list[tuple[Entry, Tensor | float, str]]:
        """Of each eraser in this denoiser call: the weight of its window, and why it has nothing to do, if so."""
        found: list[tuple[Entry, Tensor | float, str]] = []
        for entry in self.entries:
            eraser, weight, exempt = entry.eraser, 0.0, ""
            if eraser.is_off():
                exempt = records.OFF
            elif self.first == self.last and not self._acts_on_unconditional(eraser):
                exempt = records.NO_CONDITIONAL_ROWS
            elif (eraser.edits_attention or eraser.guides) and not entry.acting:
                exempt = records.NO_CONCEPTS
            else:
                weight = 1.0 if eraser.twins else self._weight(eraser.window)
                if not isinstance(weight, Tensor) and not weight:
                    exempt = records.OUTSIDE_WINDOW
            found.append((entry, weight, exempt))
        return found

    def _acts_on_unconditional(self, eraser: Method) -> bool:
        """Whether it has something to do, or to refuse, in a call without conditional rows."""
        if eraser.edits_attention:
            return eraser.touches_uncond and self.repelled is not None
        return eraser.touches_uncond or (eraser.guides and not self.facts.apart)

    def _keep(self, plan: Sequence[tuple[Entry, Tensor | float, str]], time: Tensor) -> None:
        """After a denoiser call: keeps what ran."""
        if torch.compiler.is_compiling():
            return
        for entry, _, exempt in plan:
            exempt = exempt or entry.eraser.exempt(time)
            if not exempt:
                images = [term.images for term in entry.acting]
                everywhere = range(self.last - self.first)
                rows = {row for some in images for row in (everywhere if some is None else some)}
                entry.record.add(sorted(rows) if images else everywhere)
            else:
                entry.record.add((), exempt)

    @property
    def _needed(self) -> bool:
        """Whether the cross-attention layers have something to do in this denoiser call."""
        return bool(self.editing) or self._twin_runs or self._seen is not None

    def _run(self, call: Callable[[], Any]) -> Any:
        """A call of the denoiser below, in which every layer that is needed comes by, or an error."""
        for layer in (*self.layers, *self.self_layers):
            layer.begin()
        out = call()
        missed = [layer for layer in self.layers if not layer.came] if self._needed else []
        if missed and not torch.compiler.is_compiling():  # a processor that skips `to_q` or `to_out`
            for layer in missed:
                layer.take_whole()
            for layer in (*self.layers, *self.self_layers):
                layer.begin()
            out = call()
            missed = [layer for layer in self.layers if not layer.came]
        if missed:
            raise RuntimeError(records.missed([layer.name for layer in missed], len(self.layers)))
        return out

    def edit(self, layer: Layer, hidden: Tensor) -> Tensor:
        """The attention output [B, Q, C] in front of `to_out`, edited by every active eraser in turn."""
        if not self._inside:
            raise RuntimeError(records.outside(layer.name))
        first, last, attn, query = self.first, self.last, layer.attn, layer.to_q
        if query is None or not self._needed or not self._texts_are_projected:
            return hidden
        if len(hidden) != self.rows:
            raise RuntimeError(records.other_rows(layer.name, len(hidden), self.rows))
        layer.came = True
        if self._twin_runs and self.twin is not None:
            self.twin.seen[attn] = query[first:last], hidden[first:last]
            return hidden
        if self._seen is not None:
            cross = CrossAttention(attn, query[first:last], self.prompt, prompt_mask=self.prompt_mask)
            prompts = (entry.prompts for entry in self._measuring)
            self._seen[layer.name] = [cross.mass(term) for term in prompts if term is not None]
            return hidden
        if first < last:
            given = hidden[first:last]
            out = self._edit_rows(attn, query[first:last], given, None)
            if out is not given:
                hidden = out if len(out) == len(hidden) else torch.cat([hidden[:first], out, hidden[last:]])
        if self.repelled is not None:
            at = self.repelled.at
            given = hidden[at]
            out = self._edit_rows(attn, query[at], given, self.repelled)
            hidden = hidden if out is given else hidden.index_copy(0, at, out)
        return hidden

    def _edit_rows(self, attn: Attention, query: Tensor, given: Tensor, repelled: Repelled | None) -> Tensor:
        """The attention output of the conditional or of the `repelled` rows; the same object if none is edited."""
        out = given
        for entry, weight in self.editing:
            eraser = entry.eraser
            if repelled is not None and not eraser.touches_uncond:
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
        self.editing = []
        self.begin(arguments["timestep"], text, arguments.get("encoder_attention_mask"))
        time = 1 - torch.as_tensor(self.time, dtype=torch.float32, device=text.device) / self.train_timesteps
        arguments = self._reread(arguments, time)
        noisy = self.parameters[0]
        others = {name: value for name, value in arguments.items() if name != noisy}
        self.measure(lambda: forward(arguments[noisy], **others))
        self.draw_beside(arguments[noisy], lambda beside: forward(beside, **others)[0])
        beside = self._negatives_beside() if self.facts.apart else []
        plan = self._plan()
        self.editing = [(e, weight) for e, weight, exempt in plan if e.eraser.edits_attention and not exempt]
        acts = self.first < self.last or not self.facts.apart
        guiding = [(e, weight) for e, weight, exempt in plan if e.eraser.guides and acts and not exempt]
        self.rows = self.last
        if not guiding:
            out = self._run(lambda: _call(forward, names, arguments))
            self._keep(plan, time)
            return out
        if arguments.get("skip_layers") is not None:
            raise ValueError(
                f"{type(guiding[0][0].eraser).__name__} changes the conditional prediction, which "
                "`skip_guidance_layers` compares with one of its own. Leave them out, or use method 'safree'."
            )
        if not 0 < self.first < self.last and not beside:
            raise ValueError(needs_guidance(guiding[0][0].eraser, self._denoiser(), self.facts))
        every = torch.arange(self.last - self.first, device=text.device)
        terms = [term for entry, _ in guiding for term in entry.acting]
        rows = [every if term.rows is None else term.rows for term in terms]
        asked, places = [*beside, *terms], [*(every[k : k + 1] for k in range(len(beside))), *rows]
        further = repelled_rows(guiding, self.last - self.first, self.last)
        self._repel(self._negated_rows() | further, text.device)
        longer = with_concepts(arguments, asked, places, self.first, masked=self.prompt_mask is not None)
        self.rows = len(longer["encoder_hidden_states"])
        out = self._run(lambda: _call(forward, names, longer))
        scale = self.call.guidance_scale if self.call else math.nan
        if self.call and not torch.compiler.is_compiling():  # a callback may have changed it
            scale = getattr(self.call.pipe(), self.facts.scale, math.nan)
        sample = guided(out[0], guiding, rows, self.first, self.last, scale, time)
        self._keep(plan, time)
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
        self.prompt = prompt
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
                f"The call has {n} rows of prompts, but {len(text)} of negative prompts. Give a list, one for each."
            )
        return [Term(text[k : k + 1], (), pooled=pooled[k : k + 1]) for k in range(len(text))]

    def _refuse_without_guidance(self) -> None:
        for entry in self.entries:
            acts = entry.prompts is not None if entry.eraser.guides else entry.eraser.negates
            if acts and not entry.eraser.is_off():
                raise ValueError(needs_guidance(entry.eraser, self._denoiser(), self.facts))


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
    """Of the erasers that are on, in their order."""
    facts = family(pipe)
    wake(pipe)
    present = getattr(pipe, facts.denoiser)
    found = SITES.get(getattr(present, "_orig_mod", present))
    return [entry.handle for entry in found.entries] if found else []


@contextmanager
def rows_given(pipe: DiffusionPipeline, conditional: Sequence[bool]) -> Iterator[None]:
    """See `efface.conditional_rows`; without erasers on there is nothing to tell."""
    family(pipe)
    wake(pipe)
    found = SITES.get(denoiser_of(pipe))
    if found is None:
        yield
        return
    with found.rows_given(conditional):
        yield


def _apply_all(pipe: DiffusionPipeline, erasers: Sequence[Hooked]) -> None:
    for eraser in erasers:
        eraser.apply(pipe)
