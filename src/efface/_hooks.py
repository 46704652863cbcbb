"""The only file that touches diffusers internals: where erasers meet a pipeline.

Each denoiser has one `Site`: the ordered list of erasers that are on, and one hook named `efface` on every module
that has to be watched. The list is walked on each call, so erasers come off in any order; when it is empty, every
hook is gone.

- `encode_prompt` is wrapped on the pipeline: it tells which rows will be conditional and encodes erasure prompts anew
  for each call (so a LoRA loaded or a device changed in between is seen; there is nothing to invalidate).
- The denoiser hook reads the time and checks the batch against what `encode_prompt` returned. There a method may change
  the text that conditional rows read, and the noise predicted for them: texts it asks for are predicted as further rows
  of the same call, and the pipeline's own guidance then works on the changed prediction, whatever the scheduler.
- In every cross-attention layer the query is seen behind `to_q`, and the attention output is edited in front of
  `to_out[0]`, on conditional rows only. Processors stay as they are (slicing, LoRA, IP-Adapter). Further rows are not
  edited: they have to show the concept.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch import Tensor, nn

from .core import Concept, Handle
from .families import Family, family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HOOK = "efface"
WRAPPED = ("encode_prompt", "maybe_free_model_hooks")  # of the pipeline object


# ---------------------------------------------------------------- text


@dataclass(frozen=True)
class Encoded:
    """Texts as the pipeline encodes its prompts: `text` [N, L, D], `pooled` [N, P] or None, and `own`.

    `own` holds for each text the columns of its own tokens: not the start, end or padding tokens.
    """

    text: Tensor
    pooled: Tensor | None
    own: tuple[slice, ...]


def _own_columns(tokenizer: Any, text: str) -> slice:
    """Where a text's own tokens stand; ValueError if it has none or does not fit."""
    ids, whole = tokenizer(text, add_special_tokens=False).input_ids, tokenizer(text).input_ids
    limit = tokenizer.model_max_length
    if text and not ids:
        raise ValueError(f"The phrase {text!r} has no tokens for this pipeline: write the concept in other words.")
    if len(whole) > limit:
        raise ValueError(
            f"The phrase {text!r} is {len(whole)} tokens long, but the text encoder takes {limit}: write a shorter one."
        )
    start = next(k for k in range(len(whole) + 1) if whole[k : k + len(ids)] == ids)
    return slice(start, start + len(ids))


def encode(pipe: DiffusionPipeline, texts: Sequence[str], **settings: Any) -> Encoded:
    """The one place that encodes texts, by the pipeline's own `encode_prompt`.

    Args:
        pipe: the pipeline.
        texts: texts, each within the encoder's limit; "" is the neutral text.
        settings: further arguments of `encode_prompt`, such as `clip_skip`.

    Raises:
        ValueError: a text without tokens, or over the limit.
    """
    places = [[_own_columns(getattr(pipe, t), text) for text in texts] for t in family(pipe).tokenizers]
    if any(p != places[0] for p in places):
        raise ValueError(f"The pipeline's tokenizers place the tokens of {list(texts)} differently: use other words.")
    return Encoded(*_encode(pipe, texts, settings), tuple(places[0]))


def _encode(pipe: DiffusionPipeline, texts: Sequence[str], settings: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    site = _SITES.get(_denoiser(pipe))
    method = site.original_encode(pipe) if site else pipe.encode_prompt
    with torch.no_grad():
        out = method(
            prompt=list(texts),
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **settings,
        )
    return out[0], out[2] if len(out) > 2 else None


def length(pipe: DiffusionPipeline, text: str) -> int:
    """How many tokens of a text are encoded: start, own and end tokens. What is over the limit is cut."""
    tokenizer = getattr(pipe, family(pipe).tokenizers[0])
    convert = getattr(pipe, "maybe_convert_prompt", None)  # textual inversion: one word, several tokens
    text = convert(text, tokenizer) if convert else text
    return len(tokenizer(text, truncation=True, max_length=tokenizer.model_max_length).input_ids)


def encode_masked(
    pipe: DiffusionPipeline, text: str, columns: Sequence[Sequence[int]], **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """A prompt encoded once for each set of columns [N, L, D], with the tokens in these columns masked; and pooled.

    The mask is the tokenizer's own, or "!", the first word of CLIP's vocabulary, which has none.
    """
    placed = []
    for name in family(pipe).tokenizers:
        tokenizer, encoder = getattr(pipe, name), getattr(pipe, name.replace("tokenizer", "text_encoder"))
        mask = tokenizer.mask_token_id
        mask = tokenizer.convert_tokens_to_ids("!") if mask is None else mask

        def put(module: nn.Module, args: tuple[Any, ...], mask: int = mask) -> tuple[Any, ...]:
            ids = args[0].clone()
            for row, masked in enumerate(columns):
                ids[row, list(masked)] = mask
            return (ids, *args[1:])

        placed.append(encoder.register_forward_pre_hook(put))
    try:
        return _encode(pipe, [text] * len(columns), settings)
    finally:
        for handle in placed:
            handle.remove()


def encoding_settings(call: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of an `encode_prompt` call that change how any text is encoded."""
    return {k: call.arguments[k] for k in ("clip_skip", "lora_scale") if call.arguments.get(k) is not None}


def pack(pipe: DiffusionPipeline, phrases: Sequence[str], between: str = " ") -> list[str]:
    """Phrases joined, greedily and in order, into as few texts as fit the encoder."""
    tokenizers = [getattr(pipe, name) for name in family(pipe).tokenizers]

    def fits(text: str) -> bool:
        return all(len(t(text).input_ids) <= t.model_max_length for t in tokenizers)

    texts = [phrases[0]]
    for phrase in phrases[1:]:
        joined = f"{texts[-1]}{between}{phrase}"
        if fits(joined):
            texts[-1] = joined
        else:
            texts.append(phrase)
    return texts


# ---------------------------------------------------------------- what a method sees of one cross-attention layer


@dataclass(frozen=True)
class Term:
    """One erasure prompt: `text` [1, L, D], the columns of its own tokens, the batch rows it acts on (None: all)."""

    text: Tensor
    own: slice
    rows: Tensor | None = None
    pooled: Tensor | None = None


class CrossAttention:
    """One cross-attention call, conditional rows only: the query, the prompt and the layer's own projections."""

    def __init__(self, attn: Attention, query: Tensor, prompt: Tensor | None, neutral: Tensor) -> None:
        self.attn, self.query, self.prompt, self._neutral = attn, query, prompt, neutral
        self._neutral_out: Tensor | None = None

    def at(self, rows: Tensor) -> CrossAttention:
        """The same call, on some rows."""
        prompt = None if self.prompt is None else self.prompt[rows]
        return CrossAttention(self.attn, self.query[rows], prompt, self._neutral)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, C] to [B, heads, L, C / heads], without a copy."""
        return x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """`to_k` and `to_v` of a text [B, L, D], in heads [B, heads, L, d]."""
        if self.attn.norm_cross:
            text = self.attn.norm_encoder_hidden_states(text)
        key, value = self._heads(self.attn.to_k(text)), self._heads(self.attn.to_v(text))
        return (key if self.attn.norm_k is None else self.attn.norm_k(key)), value

    def attend(self, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention of the query to `key`, `value` [1 or B, heads, L, d]: [B, Q, C].

        One key set for all rows folds the batch into the queries: one fused call, no copy of the keys.
        """
        query = self.query
        shape = query.shape
        if key.shape[0] == 1:
            query = query.reshape(1, -1, shape[-1])
        query = self._heads(query)
        query = query if self.attn.norm_q is None else self.attn.norm_q(query)
        out = F.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).reshape(shape)

    def attend_text(self, text: Tensor) -> Tensor:
        """What the layer would put out for another text [1, L, D]: [B, Q, C]."""
        return self.attend(*self.keys_values(text))

    def neutral(self) -> Tensor:
        """What the layer would put out for the pipeline's empty prompt: [B, Q, C]."""
        if self._neutral_out is None:
            self._neutral_out = self.attend_text(self._neutral)
        return self._neutral_out


# ---------------------------------------------------------------- what a method sees of one denoiser call


@dataclass(frozen=True)
class Prediction:
    """What the denoiser predicts in one step, conditional rows only, float32 or wider.

    Args:
        prompt: [B, C, h, w] for the user's prompt, before any eraser changed it.
        negative: the same rows' unconditional prediction.
        concept: for the concept's text, all else (noise, pooled size, ControlNet, IP-Adapter) as in the prompt's row;
            the mean, if the phrases fill several texts.
        guidance_scale: of the pipeline's call.
        time: 0 is pure noise, 1 the picture; it broadcasts over [B, C, h, w].
        memory: kept from step to step for this eraser, and empty when a call of the pipeline begins.
    """

    prompt: Tensor
    negative: Tensor
    concept: Tensor
    guidance_scale: float | None
    time: Tensor
    memory: dict[str, Tensor]


# ---------------------------------------------------------------- erasers


class Hooked:
    """Base of run-time erasers: `apply` puts them on the pipeline's list.

    A subclass is a frozen dataclass with `concepts` and overrides `edit` (attention), `guide` (predicted noise),
    `rewrite` (text, once) or `rewrite` and `reread` (text, at each step).
    """

    off: ClassVar[dict[str, Any] | None] = None
    touches_uncond: ClassVar[bool] = False
    edits_attention: ClassVar[bool] = False
    guides: ClassVar[bool] = False  # changes the prediction, which takes guidance
    packs = True  # phrases share erasure prompts; a method may need one prompt per phrase

    concepts: tuple[Concept, ...]
    rows: tuple[tuple[Concept, ...], ...] | None = None
    window: tuple[float, float] = (0.0, 1.0)

    def is_off(self) -> bool:
        return self.off is not None and all(getattr(self, k) == v for k, v in self.off.items())

    def edit(self, out: Tensor, cross: CrossAttention, term: Term) -> Tensor:
        """The attention output [B, Q, C] of conditional rows, without the concept of `term`."""
        return out

    def guide(self, seen: Prediction) -> Tensor:
        """What to add to `seen.prompt` [B, C, h, w]. Every method sees the plain one: what they add is summed."""
        return torch.zeros_like(seen.prompt)

    def rewrite(
        self,
        pipe: DiffusionPipeline,
        encoded: tuple[Any, ...],
        call: inspect.BoundArguments,
        memory: dict[str, Tensor],
    ) -> tuple[Any, ...]:
        """What `encode_prompt` returned, changed; `memory` is empty and lasts for this call of the pipeline."""
        return encoded

    def reread(
        self, text: Tensor, pooled: Tensor | None, time: Tensor, memory: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The text [B, L, D] and pooled text that the conditional rows read at this time."""
        return text, pooled

    def groups(self, concepts: tuple[Concept, ...]) -> list[tuple[Concept, ...]]:
        """Which concepts share erasure prompts: those of a guided prediction do."""
        if self.guides:
            return [concepts] if concepts else []
        return [(concept,) for concept in dict.fromkeys(concepts)]

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        """Takes effect at once; returns the handle that takes it off again (also a context manager)."""
        return site(pipe).add(pipe, self)


# ---------------------------------------------------------------- hooks


class _SeeQuery(ModelHook):
    def __init__(self, layer: _Layer) -> None:
        super().__init__()
        self.layer = layer

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self.layer.query = output
        return output


class _EditOutput(ModelHook):
    def __init__(self, layer: _Layer) -> None:
        super().__init__()
        self.layer = layer

    def pre_forward(self, module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        query, self.layer.query = self.layer.query, None
        return (self.layer.site.edit(self.layer.attn, query, hidden), *args), kwargs


class _WatchDenoiser(ModelHook):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.site.denoise(self.fn_ref.original_forward, args, kwargs)
        with self.site.alone():
            return self.site.denoise(self.fn_ref.original_forward, args, kwargs)


class _Layer:
    """One cross-attention module and the two submodules that carry its hooks now."""

    def __init__(self, site: Site, attn: Attention) -> None:
        self.site, self.attn = site, attn
        self.query: Tensor | None = None
        self.hooked: tuple[nn.Module, nn.Module] | None = None

    def fit(self) -> None:
        """Hooks the present submodules; loading or unloading a LoRA swaps them."""
        present = (self.attn.to_q, self.attn.to_out[0])
        if self.hooked != present:
            self.unhook()
            _register(present[0], _SeeQuery(self))
            _register(present[1], _EditOutput(self))
            self.hooked = present

    def unhook(self) -> None:
        for module in self.hooked or ():
            _unregister(module)
        self.hooked = None


def _register(module: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)


def _unregister(module: nn.Module) -> None:
    registry = module._diffusers_hook
    registry.remove_hook(HOOK, recurse=False)
    if not registry.hooks:  # leave the module as it was found; someone else's `forward` stays
        if getattr(module.forward, "__func__", None) is type(module).forward:
            vars(module).pop("forward", None)
        del module._diffusers_hook


@dataclass
class _Entry:
    """An eraser that is on, its erasure prompts, and the handle that controls it."""

    eraser: Hooked
    terms: tuple[tuple[tuple[Concept, ...], Term], ...] = ()
    acting: tuple[Term, ...] = ()  # with the rows of the present batch
    memory: dict[str, Tensor] = field(default_factory=dict)  # of the present call


@dataclass(frozen=True)
class _Call:
    """What the latest `encode_prompt` said about the batches to come."""

    positive: Tensor
    negative: Tensor | None
    images_per_prompt: int
    settings: dict[str, Any]  # of the encoding
    pipe: weakref.ref[DiffusionPipeline]
    guidance_scale: float | None
    thread: int = field(default_factory=threading.get_ident)


class Site:
    """All that Efface keeps about one denoiser while erasers are on."""

    def __init__(self, denoiser: nn.Module, facts: Family) -> None:
        self.facts = facts
        self._denoiser = weakref.ref(denoiser)
        attns = [m for m in denoiser.modules() if isinstance(m, Attention) and m.is_cross_attention]
        self.layers = [_Layer(self, m) for m in attns]
        self.parameters = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.entries: list[_Entry] = []
        self.pipes: list[tuple[weakref.ref[DiffusionPipeline], dict[str, Any]]] = []  # with what WRAPPED hid
        self.neutral: Tensor | None = None
        self.call: _Call | None = None
        self.first = self.last = 0  # the conditional rows; further ones come behind
        self.prompt: Tensor | None = None
        self.time: Tensor | float = 0.0
        self.train_timesteps = 1000
        self._checked: Tensor | None = None
        self._busy: int | None = None  # the thread that is inside

    # ---- the list

    def add(self, pipe: DiffusionPipeline, eraser: Hooked) -> Handle:
        if eraser.edits_attention:
            if not self.layers:
                raise ValueError(
                    f"{type(eraser).__name__} works in cross-attention, but this {type(pipe).__name__} has no "
                    "cross-attention layers."
                )
            if any(isinstance(layer.attn.processor, FusedAttnProcessor2_0) for layer in self.layers):
                raise ValueError(
                    "The attention projections are fused: call `pipe.unet.unfuse_qkv_projections()` first."
                )
        entry = _Entry(eraser)
        self._prepare(pipe, entry)
        self._wrap(pipe)
        if not self.entries:
            _register(self._denoiser(), _WatchDenoiser(self))
        self.entries.append(entry)
        self._checked = None
        self._fit()
        owner = weakref.ref(pipe)

        def swap(changed: Hooked) -> None:
            present = owner()
            if present is None:
                raise ValueError("The pipeline of this eraser is gone.")
            if self.call is not None and changed.guides != entry.eraser.guides:
                raise ValueError(
                    f"This change moves {type(changed).__name__} to other rows of the batch, which cannot be done "
                    "while the pipeline is drawing: set it between two calls."
                )
            trial = _Entry(changed)
            self._prepare(present, trial, **(self.call.settings if self.call else {}))
            entry.eraser, entry.terms, entry.acting = trial.eraser, trial.terms, trial.acting
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

    def _close(self) -> None:
        if (denoiser := self._denoiser()) is not None:
            _unregister(denoiser)
            _SITES.pop(denoiser, None)
        for ref, hidden in self.pipes:
            if (pipe := ref()) is not None:
                for name in WRAPPED:
                    delattr(pipe, name)
                vars(pipe).update(hidden)
        self.pipes.clear()
        self.call = self.neutral = self.prompt = self._checked = None

    # ---- text

    def original_encode(self, pipe: DiffusionPipeline) -> Callable[..., Any]:
        """The pipeline's own `encode_prompt`. Nothing here holds the pipeline, which can be freed with erasers on."""
        attributes = next((hidden for ref, hidden in self.pipes if ref() is pipe), vars(pipe))
        return attributes.get("encode_prompt") or MethodType(type(pipe).encode_prompt, pipe)

    def _prepare(self, pipe: DiffusionPipeline, entry: _Entry, **settings: Any) -> None:
        """Encodes the eraser's erasure prompts, and the neutral text beside them."""
        eraser = entry.eraser
        self.train_timesteps = pipe.scheduler.config.num_train_timesteps
        if not (eraser.edits_attention or eraser.guides):
            return
        rows = [eraser.concepts] if eraser.rows is None else eraser.rows
        between = ", " if eraser.guides else " "
        texts = []
        for group in dict.fromkeys(group for row in rows for group in eraser.groups(row)):
            phrases = [phrase for concept in group for phrase in concept.phrases]
            texts += [(group, text) for text in (pack(pipe, phrases, between) if eraser.packs else phrases)]
        encoded = encode(pipe, ["", *(text for _, text in texts)], **settings)
        self.neutral = encoded.text[:1]
        entry.terms = tuple(
            (group, Term(encoded.text[k : k + 1], encoded.own[k], pooled=_row(encoded.pooled, k)))
            for k, (group, _) in enumerate(texts, start=1)
        )
        entry.acting = tuple(term for _, term in entry.terms)
        self._place(entry, self.call.images_per_prompt if self.call else 1)

    def _wrap(self, pipe: DiffusionPipeline) -> None:
        """Wraps `encode_prompt` (which rows are conditional) and the end of a call, on this pipeline object."""
        if any(ref() is pipe for ref, _ in self.pipes):
            return
        encode_prompt, end_of_call = pipe.encode_prompt, pipe.maybe_free_model_hooks
        signature = inspect.signature(MethodType(type(pipe).encode_prompt, pipe))

        owner = weakref.ref(pipe)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.alone():
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                settings, images = encoding_settings(bound), bound.arguments["num_images_per_prompt"]
                guided = bound.arguments["do_classifier_free_guidance"]
                if not guided:
                    self._refuse_without_guidance()
                encoded = encode_prompt(*args, **kwargs)
                for entry in self.entries:
                    self._check_rows(entry, images, len(encoded[0]))
                    entry.memory = {}
                    encoded = entry.eraser.rewrite(owner(), encoded, bound, entry.memory)
                    self._prepare(owner(), entry, **settings)
                negative, scale = encoded[1] if guided else None, getattr(owner(), "guidance_scale", None)
                self.call = _Call(encoded[0], negative, images, settings, owner, scale)
                self._checked = None
                self._fit()  # once more in `begin`, but not when compiled
                for entry in self.entries:
                    self._place(entry, images, len(encoded[0]))
                return encoded

        def ended() -> Any:
            if self.call is not None and self.call.thread == threading.get_ident():
                self.call = self._checked = None
                for entry in self.entries:
                    entry.memory = {}
            return end_of_call()

        self.pipes.append((owner, {name: vars(pipe)[name] for name in WRAPPED if name in vars(pipe)}))
        pipe.encode_prompt, pipe.maybe_free_model_hooks = wrapped, ended

    # ---- batches

    def _place(self, entry: _Entry, images_per_prompt: int, batch: int | None = None) -> None:
        """Gives each term of an eraser with `rows` its rows of the batch, which has `batch` conditional rows."""
        rows, groups = entry.eraser.rows, entry.eraser.groups
        self._check_rows(entry, images_per_prompt, batch)
        if rows is None or not entry.terms:
            return
        # the n-th terms of all rows, then the next: a row's terms act in its own order, as they would alone
        orders = [[t for g in groups(row) for t, (of, _) in enumerate(entry.terms) if of == g] for row in rows]
        acting = []
        for step in itertools.zip_longest(*orders):
            for t in sorted({t for t in step if t is not None}):
                chosen = [k for k in range(len(rows) * images_per_prompt) if step[k // images_per_prompt] == t]
                term = entry.terms[t][1]
                acting.append(replace(term, rows=torch.tensor(chosen, device=term.text.device)))
        entry.acting = tuple(acting)

    @staticmethod
    def _check_rows(entry: _Entry, images_per_prompt: int, batch: int | None) -> None:
        rows = entry.eraser.rows
        if rows is not None and batch is not None and len(rows) * images_per_prompt != batch:
            raise ValueError(
                f"`rows` has {len(rows)} entries, but the call has {batch // images_per_prompt} prompts: give one list "
                "of concepts per prompt."
            )

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

    def begin(self, timestep: Tensor | float, text: Tensor) -> None:
        """Called in front of each denoiser call: which rows are conditional, what time it is."""
        if not torch.compiler.is_compiling():
            self._fit()
            if self.call is None:
                self._refuse_strangers()
            elif self.call.thread != threading.get_ident():
                raise RuntimeError(_TWO_THREADS)
            if text is not self._checked:
                self.first = self._first_row(text)
                if self.first < len(text):
                    for entry in self.entries:
                        self._place(entry, self.call.images_per_prompt if self.call else 1, len(text) - self.first)
                self._checked = text
        elif self.call is not None and self.call.negative is not None:
            self.first = len(text) - len(self.call.positive)
        else:
            self.first = 0
        self.last = len(text)
        self.prompt = text[self.first :]
        self.time = timestep

    def _first_row(self, text: Tensor) -> int:
        """Rows before it are unconditional. A call outside a pipeline is conditional throughout."""
        if self.call is None:
            return 0
        positive, negative = self.call.positive, self.call.negative
        n, p = len(text), len(positive)
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
        first, last = self.first, self.last
        if query is None or first == last:
            return hidden
        out = hidden[first:last]
        cross = CrossAttention(attn, query[first:last], self.prompt, self.neutral)
        changed = False
        for entry in self.entries:
            eraser = entry.eraser
            if not eraser.edits_attention or eraser.is_off():
                continue
            weight = self._weight(eraser.window)
            if not isinstance(weight, Tensor) and weight == 0:
                continue
            for term in entry.acting:
                if term.rows is None:
                    edited = eraser.edit(out, cross, term)
                else:
                    edited = out.index_copy(0, term.rows, eraser.edit(out[term.rows], cross.at(term.rows), term))
                out, changed = (torch.lerp(out, edited, weight.to(out)) if isinstance(weight, Tensor) else edited), True
        if not changed:
            return hidden
        return out if len(out) == len(hidden) else torch.cat([hidden[:first], out, hidden[last:]])

    # ---- predictions

    def denoise(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the denoiser: the text read anew, the concepts predicted beside it, the prediction changed."""
        names = self.parameters[: len(args)]
        arguments = dict(zip(names, args, strict=True)) | kwargs
        text: Tensor = arguments["encoder_hidden_states"]
        self.begin(arguments["timestep"], text)
        time = 1 - torch.as_tensor(self.time, dtype=torch.float32, device=text.device) / self.train_timesteps
        time = time[self.first : self.last, None, None, None] if time.ndim else time  # one for each row
        guiding = []
        for entry in self.entries:
            weight = self._weight(entry.eraser.window) if entry.eraser.guides and not entry.eraser.is_off() else 0
            if entry.acting and (isinstance(weight, Tensor) or weight):
                guiding.append((entry, weight))
        arguments = self._reread(arguments, time)
        terms = [term for entry, _ in guiding for term in entry.acting]
        every = torch.arange(self.last - self.first, device=text.device)
        rows = [every if term.rows is None else term.rows for term in terms]
        if guiding:
            if not 0 < self.first < self.last:
                raise ValueError(_needs_guidance(guiding[0][0].eraser))
            arguments = self._beside(arguments, terms, rows)
        positional = [arguments.pop(name) for name in names]
        out = forward(*positional, **arguments)
        if not guiding:
            return out
        guided = self._guide(out[0], guiding, time, rows)
        return (guided, *out[1:]) if isinstance(out, tuple) else type(out)(sample=guided)

    def _reread(self, arguments: dict[str, Any], time: Tensor) -> dict[str, Any]:
        """The arguments with the text that conditional rows read at this time."""
        text, more = arguments["encoder_hidden_states"], arguments.get("added_cond_kwargs") or {}
        all_pooled = more.get("text_embeds")
        prompt, pooled = text[self.first :], None if all_pooled is None else all_pooled[self.first :]
        for entry in self.entries if self.first < self.last else ():
            if not entry.eraser.is_off():
                prompt, pooled = entry.eraser.reread(prompt, pooled, time, entry.memory)
        self.prompt = prompt
        changed: dict[str, Any] = {"encoder_hidden_states": torch.cat([text[: self.first], prompt])}
        if all_pooled is not None and pooled is not None:
            changed["added_cond_kwargs"] = {**more, "text_embeds": torch.cat([all_pooled[: self.first], pooled])}
        return arguments | changed

    def _beside(self, arguments: dict[str, Any], terms: list[Term], rows: list[Tensor]) -> dict[str, Any]:
        """The arguments with further rows: the conditional rows once more, with a concept as their text."""
        text = arguments["encoder_hidden_states"]
        for term in terms:
            if term.text.shape[1:] != text.shape[1:]:
                raise ValueError(
                    f"The call's text has {text.shape[1]} columns, but a concept's {term.text.shape[1]}, so they do "
                    "not fit into one batch: give a prompt of the ordinary length, or use method 'eiup'."
                )
        again = self.first + torch.cat(rows)
        longer = {name: _with_rows(value, len(text), again) for name, value in arguments.items()}
        asked = [term.text.expand(len(r), -1, -1) for term, r in zip(terms, rows, strict=True)]
        longer["encoder_hidden_states"] = torch.cat([text, *asked])
        if "text_embeds" in (more := arguments.get("added_cond_kwargs") or {}):
            asked = [t.pooled.expand(len(r), -1) for t, r in zip(terms, rows, strict=True) if t.pooled is not None]
            longer["added_cond_kwargs"]["text_embeds"] = torch.cat([more["text_embeds"], *asked])
        return longer

    def _guide(
        self, out: Tensor, guiding: list[tuple[_Entry, Tensor | float]], time: Tensor, asked: list[Tensor]
    ) -> Tensor:
        """The prediction of the user's rows, the conditional ones changed by what each method adds."""
        first, last = self.first, self.last
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        negative, prompt, further = wide[:first], wide[first:last], iter(wide[last:].split([len(r) for r in asked]))
        scale = self.call.guidance_scale if self.call else None
        if self.call and not torch.compiler.is_compiling():  # a callback may have changed it
            scale = getattr(self.call.pipe(), "guidance_scale", None)
        places, changed = iter(asked), prompt
        for entry, weight in guiding:
            concept, count = torch.zeros_like(prompt), torch.zeros_like(prompt[:, :1, :1, :1])
            for _ in entry.acting:
                rows = next(places)
                concept = concept.index_add(0, rows, next(further))
                count = count.index_add(0, rows, torch.ones_like(count[: len(rows)]))
            seen = Prediction(prompt, negative, concept / count.clamp(min=1), scale, time, entry.memory)
            changed = changed + torch.where(count > 0, weight * entry.eraser.guide(seen), 0)
        return torch.cat([out[:first], changed.to(out.dtype)])

    def _refuse_without_guidance(self) -> None:
        for entry in self.entries:
            if entry.eraser.guides and not entry.eraser.is_off():
                raise ValueError(_needs_guidance(entry.eraser))

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


def _row(x: Tensor | None, k: int) -> Tensor | None:
    return None if x is None else x[k : k + 1]


def _with_rows(value: Any, rows: int, again: Tensor) -> Any:
    """An argument of the denoiser with some of its `rows` once more behind; what is not per row stays."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[again]]) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {name: _with_rows(each, rows, again) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_rows(each, rows, again) for each in value)
    return value


def _needs_guidance(eraser: Hooked) -> str:
    return (
        f"{type(eraser).__name__} needs guidance, with conditional and unconditional rows in one batch of a pipeline's "
        "call: set `guidance_scale` above 1 (a denoiser called by itself does not do), or use method 'eiup'."
    )


_TWO_THREADS = (
    "Two threads use one pipeline with erasers on, which would mix up their pictures: let them take turns, or give "
    "each a pipeline of its own."
)
_GUARD = threading.Lock()

# ---------------------------------------------------------------- sites

_SITES: weakref.WeakKeyDictionary[nn.Module, Site] = weakref.WeakKeyDictionary()


def _denoiser(pipe: DiffusionPipeline) -> nn.Module:
    module = getattr(pipe, family(pipe).denoiser)
    return getattr(module, "_orig_mod", module)  # torch.compile(unet) wraps it


def site(pipe: DiffusionPipeline) -> Site:
    """The site of a pipeline's denoiser; TypeError for a pipeline Efface does not know."""
    denoiser = _denoiser(pipe)
    if denoiser not in _SITES:
        _SITES[denoiser] = Site(denoiser, family(pipe))
    return _SITES[denoiser]


def text_hash(pipe: DiffusionPipeline) -> str:
    """sha256 over sorted (name, shape, dtype, bytes) of the denoiser's cross-attention keys and values."""
    digest = hashlib.sha256()
    denoiser = _denoiser(pipe)
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, Attention) and m.is_cross_attention}
    for name in sorted(layers):
        for part in ("to_k", "to_v"):
            weight = getattr(layers[name], part).weight.detach().cpu().contiguous()
            digest.update(f"{name}.{part} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.view(torch.uint8).numpy())
    return digest.hexdigest()
