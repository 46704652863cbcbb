"""The only file that touches diffusers internals: where erasers meet a pipeline.

Each denoiser has one `Site`: the ordered list of erasers that are on, and one hook named `efface` on every module
that has to be watched. The list is walked on each call, so erasers come off in any order; when it is empty, every
hook is gone.

- `encode_prompt` is wrapped on the pipeline: it tells which rows will be conditional and encodes erasure prompts anew
  for each call (so a LoRA loaded or a device changed in between is seen; there is nothing to invalidate).
- The denoiser hook reads the time and checks the batch against what `encode_prompt` returned.
- In every cross-attention layer the query is seen behind `to_q`, and the attention output is edited in front of
  `to_out[0]`, on conditional rows only. Processors stay as they are (slicing, LoRA, IP-Adapter).
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
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
        texts: texts, each within the encoder's limit; "" is the pipeline's empty prompt.
        settings: further arguments of `encode_prompt`, such as `clip_skip`.

    Raises:
        ValueError: a text without tokens, or over the limit.
    """
    places = [[_own_columns(getattr(pipe, t), text) for text in texts] for t in family(pipe).tokenizers]
    if any(p != places[0] for p in places):
        raise ValueError(f"The pipeline's tokenizers place the tokens of {list(texts)} differently: use other words.")
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
    return Encoded(out[0], out[2] if len(out) > 2 else None, tuple(places[0]))


def fits(pipe: DiffusionPipeline, text: str) -> bool:
    """Whether a text is within the encoder's limit."""
    tokenizers = [getattr(pipe, name) for name in family(pipe).tokenizers]
    return all(len(t(text).input_ids) <= t.model_max_length for t in tokenizers)


def pack(pipe: DiffusionPipeline, phrases: Sequence[str], separator: str = " ") -> list[str]:
    """Phrases joined, greedily and in order, into as few texts as fit the encoder."""
    texts = [phrases[0]]
    for phrase in phrases[1:]:
        joined = f"{texts[-1]}{separator}{phrase}"
        if fits(pipe, joined):
            texts[-1] = joined
        else:
            texts.append(phrase)
    return texts


# ---------------------------------------------------------------- what a method sees of one cross-attention layer


@dataclass(frozen=True)
class Term:
    """Erasure prompts that act together: `text` [N, L, D], the columns of the own tokens of each, and their batch rows.

    They act one after the other, in order; `rows` None means all rows.
    """

    text: Tensor
    own: tuple[slice, ...]
    rows: Tensor | None = None


class CrossAttention:
    """One cross-attention call, conditional rows only: `query` [B, Q, C] and `prompt` [B, L, D], the layer's own
    projections, and a text that stands for "some picture", `neutral` [1, L, D]."""

    def __init__(self, attn: Attention, query: Tensor, prompt: Tensor | None, neutral: Tensor) -> None:
        self.attn, self.query, self.prompt, self.neutral = attn, query, prompt, neutral

    def at(self, rows: Tensor) -> CrossAttention:
        """The same call, on some rows."""
        prompt = None if self.prompt is None else self.prompt[rows]
        return CrossAttention(self.attn, self.query[rows], prompt, self.neutral)

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
        """Softmax attention of the query to `key`, `value` [B, heads, L, d]: [B, Q, C]."""
        return self._attend(self.query, key, value)

    def attend_texts(self, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention of every row to each of N key sets [N, heads, L, d]: [N, B, Q, C].

        The batch is folded into the queries: one fused call for all texts and rows, no copy of the keys.
        """
        query = self.query.flatten(0, 1).expand(len(key), -1, -1)
        return self._attend(query, key, value).unflatten(1, self.query.shape[:2])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = self._heads(query)
        query = query if self.attn.norm_q is None else self.attn.norm_q(query)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def would_be(self, text: Tensor) -> Tensor:
        """What the layer would put out for other texts [N, L, D] in place of the prompt: [N, B, Q, C]."""
        return self.attend_texts(*self.keys_values(text))


# ---------------------------------------------------------------- erasers


class Hooked:
    """Base of run-time erasers: `apply` puts them on the pipeline's list.

    A subclass is a frozen dataclass with `concepts` and overrides `edit` (attention) or `rewrite` (text).
    """

    off: ClassVar[dict[str, Any] | None] = None
    touches_uncond: ClassVar[bool] = False
    edits_attention: ClassVar[bool] = False
    packs = True  # phrases share erasure prompts; a method may need one prompt per phrase
    neutral: tuple[str, ...] = ("",)  # the mean of these texts stands for "some picture"

    concepts: tuple[Concept, ...]
    rows: tuple[tuple[Concept, ...], ...] | None = None
    window: tuple[float, float] = (0.0, 1.0)

    def is_off(self) -> bool:
        return self.off is not None and all(getattr(self, k) == v for k, v in self.off.items())

    def edit(self, out: Tensor, cross: CrossAttention, term: Term) -> Tensor:
        """The attention output [B, Q, C] of conditional rows, without the concept of `term`."""
        return out

    def rewrite(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: inspect.BoundArguments
    ) -> tuple[Any, ...]:
        """What `encode_prompt` returned, changed."""
        return encoded

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

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        text = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        self.site.begin(timestep, text)
        return args, kwargs


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
    """An eraser that is on, and its erasure prompts."""

    eraser: Hooked
    of: tuple[Concept, ...] = ()  # whose each erasure prompt is
    prompts: Term | None = None
    neutral: Tensor | None = None
    acting: tuple[Term, ...] = ()  # with the rows of the present batch


@dataclass(frozen=True)
class _Call:
    """What the latest `encode_prompt` said about the batches to come."""

    positive: Tensor
    negative: Tensor | None
    images_per_prompt: int
    settings: dict[str, Any]  # of the encoding


class Site:
    """All that Efface keeps about one denoiser while erasers are on."""

    def __init__(self, denoiser: nn.Module, facts: Family) -> None:
        self.facts = facts
        self._denoiser = weakref.ref(denoiser)
        attns = [m for m in denoiser.modules() if isinstance(m, Attention) and m.is_cross_attention]
        self.layers = [_Layer(self, m) for m in attns]
        self.entries: list[_Entry] = []
        self.pipes: list[tuple[weakref.ref[DiffusionPipeline], dict[str, Any]]] = []  # with what WRAPPED hid
        self.call: _Call | None = None
        self.first = 0
        self.prompt: Tensor | None = None
        self.time: Tensor | float = 0.0
        self.train_timesteps = 1000
        self._checked: Tensor | None = None

    # ---- the list

    def add(self, pipe: DiffusionPipeline, eraser: Hooked) -> Handle:
        if eraser.edits_attention:
            if not self.layers:
                raise ValueError(
                    f"{type(eraser).__name__} works in cross-attention, but this {type(pipe).__name__} has no "
                    "cross-attention layers."
                )
            for layer in self.layers:
                _check_unfused(layer.attn)
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
            trial = _Entry(changed)
            self._prepare(present, trial, **(self.call.settings if self.call else {}))
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
        self.call = self.prompt = self._checked = None

    # ---- text

    def original_encode(self, pipe: DiffusionPipeline) -> Callable[..., Any]:
        """The pipeline's own `encode_prompt`. Nothing here holds the pipeline, which can be freed with erasers on."""
        attributes = next((hidden for ref, hidden in self.pipes if ref() is pipe), vars(pipe))
        return attributes.get("encode_prompt") or MethodType(type(pipe).encode_prompt, pipe)

    def _prepare(self, pipe: DiffusionPipeline, entry: _Entry, **settings: Any) -> None:
        """Encodes the eraser's erasure prompts, and its neutral texts beside them."""
        eraser = entry.eraser
        self.train_timesteps = pipe.scheduler.config.num_train_timesteps
        if not eraser.edits_attention:
            return
        concepts = eraser.concepts if eraser.rows is None else itertools.chain(*eraser.rows)
        texts = [
            (concept, text)
            for concept in dict.fromkeys(concepts)
            for text in (pack(pipe, concept.phrases) if eraser.packs else concept.phrases)
        ]
        n = len(eraser.neutral)
        encoded = encode(pipe, [*eraser.neutral, *(text for _, text in texts)], **settings)
        entry.neutral = encoded.text[:n].mean(0, keepdim=True)
        entry.of = tuple(concept for concept, _ in texts)
        entry.prompts = Term(encoded.text[n:], encoded.own[n:])
        entry.acting = (entry.prompts,)
        self._place(entry, self.call.images_per_prompt if self.call else 1)

    def _wrap(self, pipe: DiffusionPipeline) -> None:
        """Wraps `encode_prompt` (which rows are conditional) and the end of a call, on this pipeline object."""
        if any(ref() is pipe for ref, _ in self.pipes):
            return
        encode_prompt, end_of_call = pipe.encode_prompt, pipe.maybe_free_model_hooks
        signature = inspect.signature(MethodType(type(pipe).encode_prompt, pipe))

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            settings = {
                k: bound.arguments[k] for k in ("clip_skip", "lora_scale") if bound.arguments.get(k) is not None
            }
            encoded = encode_prompt(*args, **kwargs)
            for entry in self.entries:
                encoded = entry.eraser.rewrite(pipe, encoded, bound)
                self._prepare(pipe, entry, **settings)
            negative = encoded[1] if bound.arguments["do_classifier_free_guidance"] else None
            self.call = _Call(encoded[0], negative, bound.arguments["num_images_per_prompt"], settings)
            self._checked = None
            self._fit()  # once more in `begin`, but not when compiled
            for entry in self.entries:
                self._place(entry, self.call.images_per_prompt, len(encoded[0]))
            return encoded

        def ended() -> Any:
            self.call = self._checked = None
            return end_of_call()

        self.pipes.append((weakref.ref(pipe), {name: vars(pipe)[name] for name in WRAPPED if name in vars(pipe)}))
        pipe.encode_prompt, pipe.maybe_free_model_hooks = wrapped, ended

    # ---- batches

    def _place(self, entry: _Entry, images_per_prompt: int, batch: int | None = None) -> None:
        """Gives the erasure prompts of an eraser with `rows` their rows of the batch, `batch` conditional ones."""
        rows = entry.eraser.rows
        if rows is None or entry.prompts is None:
            return
        if batch is not None and len(rows) * images_per_prompt != batch:
            raise ValueError(
                f"`rows` has {len(rows)} entries, but the call has {batch // images_per_prompt} prompts: give one list "
                "of concepts per prompt."
            )
        alike: dict[tuple[int, ...], list[int]] = {}  # erasure prompts in the order of a row -> its images
        for r, row in enumerate(rows):
            chosen = tuple(k for concept in dict.fromkeys(row) for k, of in enumerate(entry.of) if of == concept)
            alike.setdefault(chosen, []).extend(range(r * images_per_prompt, (r + 1) * images_per_prompt))
        text, own = entry.prompts.text, entry.prompts.own
        entry.acting = tuple(
            Term(text[list(chosen)], tuple(own[k] for k in chosen), torch.tensor(images, device=text.device))
            for chosen, images in alike.items()
            if chosen
        )

    def begin(self, timestep: Tensor | float, text: Tensor) -> None:
        """Called in front of each denoiser call: which rows are conditional, what time it is."""
        if not torch.compiler.is_compiling():
            self._fit()
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
        if query is None or self.first == len(hidden):
            return hidden
        out = hidden[self.first :]
        changed = False
        for entry in self.entries:
            eraser = entry.eraser
            if not eraser.edits_attention or eraser.is_off():
                continue
            weight = self._weight(eraser.window)
            if not isinstance(weight, Tensor) and weight == 0:
                continue
            cross = CrossAttention(attn, query[self.first :], self.prompt, entry.neutral)
            for term in entry.acting:
                if term.rows is None:
                    edited = eraser.edit(out, cross, term)
                else:
                    edited = out.index_copy(0, term.rows, eraser.edit(out[term.rows], cross.at(term.rows), term))
                out, changed = (torch.lerp(out, edited, weight.to(out)) if isinstance(weight, Tensor) else edited), True
        if not changed:
            return hidden
        return out if self.first == 0 else torch.cat([hidden[: self.first], out])


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


# ---------------------------------------------------------------- weights


def part(pipe: DiffusionPipeline, name: str) -> nn.Module:
    """A component of the pipeline, such as "unet", without what `torch.compile` wraps around it."""
    module = getattr(pipe, name, None)
    if not isinstance(module, nn.Module):
        raise ValueError(f"Expected a pipeline with a {name!r}, but this {type(pipe).__name__} has none.")
    return getattr(module, "_orig_mod", module)


def weight(root: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path; behind a LoRA (PEFT) it is the base layer's.

    Raises:
        ValueError: no such tensor, or one that cannot be edited in place: quantised, offloaded to disk, or fused away.
    """
    found: Any = root
    for name in path.split("."):
        if isinstance(found, Attention) and name in ("to_q", "to_k", "to_v"):
            _check_unfused(found)
        while name != "base_layer" and isinstance(getattr(found, "base_layer", None), nn.Module):
            found = found.base_layer
        found = getattr(found, name, None)
    if not isinstance(found, Tensor):
        raise ValueError(f"{type(root).__name__} has no weight {path!r}: this is another architecture.")
    if type(found) not in (Tensor, nn.Parameter) or not found.is_floating_point() or found.element_size() < 2:
        raise ValueError(
            f"{path!r} is quantised ({type(found).__name__}, {found.dtype}), and a quantised weight cannot be edited: "
            "load the model in float32, float16 or bfloat16."
        )
    if found.is_meta:
        raise ValueError(f"{path!r} is not in memory: load the model without sequential or disk offload.")
    return found


def keys_values(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """What reads the text: `to_k` and `to_v` [C, D] of every cross-attention layer, by canonical name."""
    root, name = _denoiser(pipe), family(pipe).denoiser
    layers = [n for n, m in root.named_modules() if isinstance(m, Attention) and m.is_cross_attention]
    if not layers:
        raise ValueError(
            f"This {type(pipe).__name__} has no cross-attention layers, so no keys and values of the text."
        )
    paths = [f"{layer}.{projection}.weight" for layer in layers for projection in ("to_k", "to_v")]
    return {f"{name}.{path}": weight(root, path) for path in paths}


def _check_unfused(attn: Attention) -> None:
    if isinstance(attn.processor, FusedAttnProcessor2_0):  # `fused_projections` stays set after unfusing
        raise ValueError("The attention projections are fused: call `pipe.unet.unfuse_qkv_projections()` first.")


def text_hash(pipe: DiffusionPipeline, unedited: Mapping[str, Tensor]) -> str:
    """sha256 over sorted (name, shape, dtype, bytes) of the denoiser's cross-attention keys and values.

    `unedited`: the values, by canonical name, of what a delta has changed just now.
    """
    digest = hashlib.sha256()
    denoiser, prefix = _denoiser(pipe), family(pipe).denoiser
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, Attention) and m.is_cross_attention}
    for name in sorted(layers):
        for projection in ("to_k", "to_v"):
            present = getattr(layers[name], projection).weight
            value = unedited.get(f"{prefix}.{name}.{projection}.weight", present).detach().cpu().contiguous()
            digest.update(f"{name}.{projection} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Condition:
    """What the pipeline hands its denoiser beside latents and time, a row per text; row 0 is the unconditional one."""

    text: Tensor
    added: dict[str, Tensor]

    def at(self, rows: Tensor) -> dict[str, Any]:
        """Keyword arguments of a denoiser call for these rows."""
        rows = rows.to(self.text.device)
        return {
            "encoder_hidden_states": self.text[rows],
            "added_cond_kwargs": {name: value[rows] for name, value in self.added.items()},
        }


def condition(pipe: DiffusionPipeline, texts: Sequence[str]) -> Condition:
    """Texts as the denoiser gets them in a call of the pipeline, behind the unconditional row of such a call.

    Raises:
        ValueError: run-time erasers are on; a text without tokens, or over the encoder's limit.
    """
    present = _SITES.get(_denoiser(pipe))
    if present is not None and present.entries:
        names = ", ".join(type(entry.eraser).__name__ for entry in present.entries)
        raise ValueError(f"{names} is on, and would take part in the training: call `handle.remove()` before `fit`.")
    for text in texts:
        for name in family(pipe).tokenizers:
            _own_columns(getattr(pipe, name), text)
    with torch.no_grad():
        out = pipe.encode_prompt(
            prompt=list(texts),
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
    text = torch.cat([out[1][:1], out[0]])
    if not family(pipe).pooled:
        return Condition(text, {})
    pooled = torch.cat([out[3][:1], out[2]])
    side = pipe.default_sample_size * pipe.vae_scale_factor
    size = {"original_size": (side, side), "crops_coords_top_left": (0, 0), "target_size": (side, side)}
    width = pipe.text_encoder_2.config.projection_dim
    ids = pipe._get_add_time_ids(*size.values(), dtype=text.dtype, text_encoder_projection_dim=width)
    return Condition(text, {"text_embeds": pooled, "time_ids": ids.to(text.device).repeat(len(text), 1)})
