"""Texts as the pipeline encodes them: erasure prompts, prompts with masked tokens, and what a denoiser trains on."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checks
from ._weights import denoiser_of
from .families import FAMILIES, Family, Reading, encode_parameters, encoder_name, family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# The `Site` of each denoiser that has erasers on, which knows the pipeline's own `encode_prompt`.
SITES: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Encoded:
    """Texts as the pipeline encodes its prompts: `text` [N, L, D], `pooled` [N, P] or None, `own`, and `mask`.

    `mask` [N, L] is False where the denoiser sees no text (None: it sees all columns). `own` holds for each text the
    columns of its own tokens, those of the first encoder's states: not the start, end or padding tokens.
    """

    text: Tensor
    pooled: Tensor | None
    own: tuple[slice, ...]
    mask: Tensor | None = None


def own_encode(pipe: DiffusionPipeline) -> Any:
    """The pipeline's own `encode_prompt`, without Efface's part."""
    return getattr(pipe.encode_prompt, "original", pipe.encode_prompt)


def readers(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The tokenizers whose text encoders are there: SD 3 does without T5."""
    return tuple(name for name in family(pipe).tokenizers if encoder_of(pipe, name) is not None)


def encoder_of(pipe: DiffusionPipeline, tokenizer: str) -> Any:
    """The text encoder that goes with a tokenizer, by its name; None if the pipeline does without."""
    return getattr(pipe, encoder_name(tokenizer), None)


def places(pipe: DiffusionPipeline, length: int | None = None, **settings: Any) -> dict[str, tuple[slice, slice]]:
    """Where each encoder's states stand in a text [`length`, D]: columns and features, by the tokenizer's name."""
    return family(pipe).places(pipe, length, settings)


def unknown(tokenizer: Any, text: str) -> list[str]:
    """The words of a text that hold characters unknown to the tokenizer: it puts one and the same token in their place.

    CLIP's tokenizer knows every byte, and names its end token as the unknown one: it has no unknown characters.
    """
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    mark = tokenizer.unk_token_id
    if mark is None or mark in marks:
        return []

    def strange(part: str) -> bool:
        return mark in tokenizer(part, add_special_tokens=False).input_ids

    return ([word for word in text.split() if strange(word)] or [text]) if strange(text) else []


def check_phrases(pipe: DiffusionPipeline, phrases: Sequence[str], **settings: Any) -> None:
    """ValueError unless every text encoder can read all of each phrase.

    A phrase needs tokens, has to fit into the encoder, and may hold only characters that the tokenizer knows.
    """
    facts = family(pipe)
    for name in readers(pipe):
        tokenizer = getattr(pipe, name)
        for phrase, text in zip(phrases, facts.cleaned(pipe, tokenizer, phrases, settings), strict=True):
            _whole(facts, pipe, name, text, settings)
            if strange := unknown(tokenizer, text):
                raise ValueError(
                    f"The phrase {checks.shown(phrase)} has characters that the pipeline's {name} does not know "
                    f"({checks.short(', '.join(strange))}); the model would read {tokenizer.unk_token} instead. "
                    "Write the phrase in words that the model knows."
                )


def _whole(facts: Family, pipe: DiffusionPipeline, name: str, text: str, settings: Mapping[str, Any]) -> Reading:
    """How an encoder reads a cleaned text; ValueError if the text has no tokens or does not fit."""
    found, limit = facts.read(pipe, name, text), facts.limit(pipe, name, settings)
    if text and found.own.start == found.own.stop:
        raise ValueError(f"The phrase {text!r} has no tokens for this pipeline: write the concept in other words.")
    if (length := len(found.ids)) > limit:
        raise ValueError(
            f"The phrase {text!r} is {length} tokens long, but the text encoder takes {limit}: write a shorter one."
        )
    return found


def encode(pipe: DiffusionPipeline, texts: Sequence[str], *, differentiable: bool = False, **settings: Any) -> Encoded:
    """The one place that encodes texts, by the pipeline's own `encode_prompt`.

    Args:
        pipe: the pipeline.
        texts: texts, each within the encoder's limit; "" is the pipeline's empty prompt.
        differentiable: whether gradients reach the encoder, as they have to where the text holds the user's prompt.
        settings: further arguments of `encode_prompt`, such as `clip_skip`.

    Raises:
        ValueError: a text without tokens, or over the limit.
    """
    facts, found = family(pipe), {}
    for name in readers(pipe):
        written = facts.cleaned(pipe, getattr(pipe, name), texts, settings)
        found[name] = [_whole(facts, pipe, name, text, settings) for text in written]
    for first, *others in facts.texts:
        if any(a.own != b.own for name in others for a, b in zip(found[first], found[name], strict=True)):
            raise ValueError(
                f"The pipeline's tokenizers place the tokens of {list(texts)} differently: use other words."
            )
    text, pooled, mask = encode_cut(pipe, texts, settings, differentiable)
    first = facts.texts[0][0]
    shifts = [facts.shift(first, reading, text.shape[1]) for reading in found[first]]
    own = [slice(r.own.start + by, r.own.stop + by) for r, by in zip(found[first], shifts, strict=True)]
    return Encoded(text, pooled, tuple(own), mask)


def check_width(pipe: DiffusionPipeline) -> None:
    """ValueError unless the encoder makes texts of the width that the denoiser reads."""
    read = family(pipe).text_width(denoiser_of(pipe))
    made = encode(pipe, [""]).text.shape[-1]
    if read is not None and made != read:
        raise ValueError(
            f"The text encoder of this {type(pipe).__name__} makes states of width {made}, but its denoiser reads "
            f"width {read}: load the two from one model."
        )


def cleaned(pipe: DiffusionPipeline, tokenizer: Any, texts: Sequence[str], **settings: Any) -> list[str]:
    """Texts as the pipeline gives them to a tokenizer."""
    return family(pipe).cleaned(pipe, tokenizer, texts, settings)


def encode_cut(
    pipe: DiffusionPipeline, texts: Sequence[str], settings: dict[str, Any], differentiable: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Texts [N, L, D], pooled [N, P], and the mask [N, L], where there are any; what is over the limit is cut."""
    method, facts = own_encode(pipe), family(pipe)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        out = method(**facts.encoding_arguments(pipe, texts, settings))
    if len(out) != len(facts.returns):
        raise TypeError(
            f"`encode_prompt` of this {type(pipe).__name__} returns {len(out)} values, but pipelines of {facts.name} "
            f"return {len(facts.returns)}: it is not of a tested family. Use the text-to-image pipeline of the family."
        )
    parts = dict(zip(facts.returns, out, strict=True))
    mask = parts.get("mask")
    return parts["text"], parts.get("pooled"), None if mask is None else mask.bool()


def own_tokens(pipe: DiffusionPipeline, text: str, name: str, **settings: Any) -> range:
    """The columns of a text's own tokens for one tokenizer, not counting padding in front. What is too long is cut.

    The end token, where there is one, stands behind them.
    """
    own = read(pipe, text, name, **settings).own
    return range(own.start, own.stop)


def read(pipe: DiffusionPipeline, text: str, name: str, **settings: Any) -> Reading:
    """How one of the pipeline's encoders reads a text. What is too long is cut."""
    facts = family(pipe)
    found, limit = _read(facts, pipe, name, text, settings), facts.limit(pipe, name, settings)
    if (more := len(found.ids) - limit) <= 0:
        return found
    stop = max(found.own.start, found.own.stop - more)
    ids = found.ids[:stop] + found.ids[found.own.stop :]
    return found._replace(ids=ids, own=slice(found.own.start, stop))


def _read(facts: Family, pipe: DiffusionPipeline, name: str, text: str, settings: Mapping[str, Any]) -> Reading:
    (text,) = facts.cleaned(pipe, getattr(pipe, name), [text], settings)
    return facts.read(pipe, name, text)


def encoding_settings(call: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of an `encode_prompt` call that change how any text is encoded."""
    names = dict.fromkeys(name for each in FAMILIES for name in each.settings)
    return {k: call.arguments[k] for k in names if call.arguments.get(k) is not None}


@dataclass(frozen=True)
class Unconditional:
    """The empty text of a call, and which of its unconditional rows read another one.

    The empty text is what the unconditional rows read without a negative prompt: "" as the pipeline encodes it, or what
    it takes instead (SDXL base: zeros). `text` [B, L, D], or [1, L, D] if all rows share it; `mask` [B or 1, L] where
    the denoiser masks text; `others` are the rows that a negative prompt changes.
    """

    text: Tensor
    mask: Tensor | None
    others: tuple[int, ...]


SAME = 1e-4  # a text as near as this to the empty one, relative to its length, is the empty one


@torch.no_grad()
def unconditional(
    pipe: DiffusionPipeline,
    call: inspect.BoundArguments,
    negative: Tensor,
    negative_mask: Tensor | None,
    untouched: bool,
) -> Unconditional:
    """What a call's unconditional rows would read without a negative prompt, and which of them read something else.

    Args:
        pipe: the pipeline.
        call: the arguments of its `encode_prompt`, with guidance on.
        negative: [B, L, D], what the unconditional rows will read, however it was given.
        negative_mask: [B, L] of it, where the denoiser masks text.
        untouched: whether `negative` is what the pipeline itself made of these arguments.
    """
    given = [value for name, value in call.arguments.items() if name.startswith("negative")]
    nothing = untouched and all(_is_empty(value) for value in given)
    if getattr(pipe.config, "force_zeros_for_empty_prompt", False):  # SDXL base: "" is not the same as None
        nothing = untouched and all(value is None for value in given)
    mask = None if negative_mask is None else negative_mask.bool()
    length = max(columns.stop for columns, _ in places(pipe, **encoding_settings(call)).values())
    if nothing and negative.shape[1] == length:
        empty, empty_mask = negative.detach(), mask
    else:  # encoded as the pipeline would, in a batch of the same size, so that it is the same to the bit
        defaults = {n: p.default for n, p in encode_parameters(pipe).items()}
        texts = ("prompt", "pooled", "negative")  # texts, embeddings and masks
        arguments = {name: defaults[name] if name.startswith(texts) else v for name, v in call.arguments.items()}
        arguments["prompt"] = [""] * (len(negative) // call.arguments["num_images_per_prompt"])
        encoded = own_encode(pipe)(**arguments)
        parts = dict(zip(family(pipe).returns, encoded, strict=True))
        empty, empty_mask = parts["negative"], parts["negative_mask"].bool() if family(pipe).masked else None
    others = () if nothing else _other_rows(negative, mask, empty, empty_mask)
    if bool((empty == empty[:1]).all()) and (empty_mask is None or bool((empty_mask == empty_mask[:1]).all())):
        empty, empty_mask = empty[:1], None if empty_mask is None else empty_mask[:1]
    return Unconditional(empty, empty_mask, others)


def _is_empty(negative: Any) -> bool:
    """Whether a negative prompt says nothing; embeddings may say something."""
    if isinstance(negative, Tensor):
        return False
    return not negative or (not isinstance(negative, str) and not any(negative))


def _other_rows(text: Tensor, mask: Tensor | None, empty: Tensor, empty_mask: Tensor | None) -> tuple[int, ...]:
    """Which rows [B, L, D] differ from those of `empty`, by more than rounding."""
    if text.shape != empty.shape:
        return tuple(range(len(text)))
    wide, wide_empty = text.float().flatten(1), empty.to(text.device).float().flatten(1)
    other = (wide - wide_empty).norm(dim=1) > SAME * wide_empty.norm(dim=1)
    if mask is not None and empty_mask is not None:
        other = other | (mask != empty_mask.to(mask.device)).any(1)
    return tuple(other.nonzero().flatten().tolist())


def fits(pipe: DiffusionPipeline, text: str) -> bool:
    """Whether a text is within the limit of every encoder."""
    return not any(_cut_off(pipe, text))


def cut_off(pipe: DiffusionPipeline, text: str, **settings: Any) -> str:
    """The end of a prompt that no text encoder of the pipeline reads; "" if all of it is read by one."""
    return min(_cut_off(pipe, text, **settings), key=len)


def _cut_off(pipe: DiffusionPipeline, text: str, **settings: Any) -> list[str]:
    facts, lost = family(pipe), []
    for name in readers(pipe):
        found = _read(facts, pipe, name, text, settings)
        own = found.ids[found.own]
        room = facts.limit(pipe, name, settings) - (len(found.ids) - len(own))
        lost.append(getattr(pipe, name).decode(own[room:]))
    return lost


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


@dataclass(frozen=True)
class Condition:
    """What a denoiser gets beside latents and time, one row per text; row 0 is the unconditional one."""

    text: Tensor
    added: dict[str, Tensor]
    facts: Family

    def at(self, rows: Tensor) -> dict[str, Any]:
        """Keyword arguments of a denoiser call for these rows."""
        rows = rows.to(self.text.device)
        return self.facts.training_arguments(self.text[rows], {name: v[rows] for name, v in self.added.items()})


def condition(pipe: DiffusionPipeline, texts: Sequence[str]) -> Condition:
    """Texts as the denoiser gets them in a call of the pipeline, behind the unconditional row of such a call.

    The pipeline is of a family that offers `training`.

    Raises:
        ValueError: run-time erasers are on; a text without tokens, or over the encoder's limit.
    """
    present = SITES.get(denoiser_of(pipe))
    if present is not None and present.applied:
        names = ", ".join(type(applied.method).__name__ for applied in present.applied)
        raise ValueError(f"{names} is on, and would take part in the training: call `handle.remove()` before `fit`.")
    facts = family(pipe)
    for name in readers(pipe):
        for text in facts.cleaned(pipe, getattr(pipe, name), texts, {}):
            _whole(facts, pipe, name, text, {})
    with torch.no_grad():
        out = pipe.encode_prompt(
            prompt=list(texts),
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
    made = dict(zip(facts.returns, out, strict=True))
    pairs = {"text": "negative", "pooled": "negative_pooled"}.items()
    parts = {name: torch.cat([made[negative][:1], made[name]]) for name, negative in pairs if name in made}
    return Condition(parts["text"], facts.training_added(pipe, parts), facts)
