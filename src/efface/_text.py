"""Encodes texts as the pipeline does: erasure prompts, prompts with masked tokens, and training texts."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checks
from ._encodings import kept
from ._weights import denoiser_of
from .families import FAMILIES, Family, Reading, encode_parameters, encoder_name, family, tokenizer_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LEARNED = re.compile(r"<[a-z0-9][a-z0-9*.,:_-]*>")
"""A learned word, as `Tokens` name them."""
# The `Site` of each denoiser with erasers, which knows the pipeline's original `encode_prompt`.
SITES: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Encoded:
    """Texts as the pipeline encodes its prompts: `text` [N, L, D], `pooled` [N, P] or None, and facts on the columns.

    `mask` [N, L] is False for columns that the denoiser does not read (None: it reads all). `own` holds, per text, the
    columns of its own tokens in the first encoder's states, without start, end and padding tokens. `padding` [N, L], on
    the CPU, is 0 for tokens, and for padding a number of the encoder; another number if the pipeline lacks it.
    """

    text: Tensor
    pooled: Tensor | None
    own: tuple[slice, ...]
    padding: Tensor
    mask: Tensor | None = None


def own_encode(pipe: DiffusionPipeline) -> Any:
    """The pipeline's original `encode_prompt`, without Efface's wrapper."""
    return getattr(pipe.encode_prompt, "original", pipe.encode_prompt)


def encode_call(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The output of the pipeline's original `encode_prompt` for arguments of a call, as `Family.returns` names it."""
    taken = encode_parameters(pipe)
    given = {n: list(v) if isinstance(v, list) else v for n, v in arguments.items() if n in taken}
    return family(pipe).unlisted(own_encode(pipe)(**given), arguments)


def readers(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The tokenizers whose text encoders exist. SD 3 may lack T5."""
    return tuple(name for name in family(pipe).tokenizers if encoder_of(pipe, name) is not None)


def encoder_of(pipe: DiffusionPipeline, tokenizer: str) -> Any:
    """The text encoder of a tokenizer, by name; None if the pipeline lacks it."""
    return getattr(pipe, encoder_name(tokenizer), None)


def places(pipe: DiffusionPipeline, length: int | None = None, **settings: Any) -> dict[str, tuple[slice, slice]]:
    """The position of each encoder's states in a text [`length`, D]: columns and features, by the tokenizer's name."""
    return family(pipe).places(pipe, length, settings)


def unknown(tokenizer: Any, text: str) -> list[str]:
    """The words of a text with characters that the tokenizer replaces by its unknown token.

    CLIP's tokenizer knows every byte, and uses its end token as the unknown token, so it has no unknown characters.
    """
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    mark = tokenizer.unk_token_id
    if mark is None or mark in marks:
        return []

    def strange(part: str) -> bool:
        return mark in tokenizer(part, add_special_tokens=False).input_ids

    return ([word for word in text.split() if strange(word)] or [text]) if strange(text) else []


def check_phrases(pipe: DiffusionPipeline, phrases: Sequence[str], **settings: Any) -> None:
    """Raises ValueError unless every text encoder can read each phrase completely.

    A phrase needs tokens, must not exceed the encoder's limit, and may have only characters that the tokenizer knows.
    A learned word in angle brackets must be on the pipeline; otherwise the model would read its letters.
    """
    facts = family(pipe)
    learned = {word for phrase in phrases for word in LEARNED.findall(phrase.lower())}
    for name in readers(pipe):
        tokenizer = tokenizer_of(pipe, name)
        if learned and (absent := sorted(learned - tokenizer.get_vocab().keys())):
            raise ValueError(
                f"Expected the learned word {absent[0]!r} to be on this pipeline, got a pipeline without it. Apply the "
                "`Tokens` that hold it first, or write the concept in other words."
            )
        for phrase, text in zip(phrases, facts.cleaned(pipe, tokenizer, phrases, settings), strict=True):
            _whole(facts, pipe, name, text, settings)
            if strange := unknown(tokenizer, text):
                raise ValueError(
                    f"The phrase {checks.shown(phrase)} has characters that the pipeline's {name} does not know "
                    f"({checks.short(', '.join(strange))}); the model would read {tokenizer.unk_token} instead. "
                    "Write the phrase in words that the model knows."
                )


def check_whole(pipe: DiffusionPipeline, texts: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a text has no tokens for one of the encoders, or is over its limit."""
    facts = family(pipe)
    for name in readers(pipe):
        for text in facts.cleaned(pipe, tokenizer_of(pipe, name), texts, settings):
            _whole(facts, pipe, name, text, settings)


def _whole(facts: Family, pipe: DiffusionPipeline, name: str, text: str, settings: Mapping[str, Any]) -> Reading:
    """A cleaned text as an encoder reads it. Raises ValueError if it has no tokens or is too long."""
    found, limit = facts.read(pipe, name, text, settings), facts.limit(pipe, name, settings)
    if text and found.own.start == found.own.stop:
        raise ValueError(
            f"The phrase {checks.shown(text)} has no tokens for this pipeline. Write the concept in other words."
        )
    if (length := len(found.ids)) > limit:
        raise ValueError(
            f"The phrase {checks.shown(text)} is {length} tokens long, but the text encoder takes {limit}. Write a "
            "shorter one."
        )
    return found


def encode(
    pipe: DiffusionPipeline,
    texts: Sequence[str],
    *,
    differentiable: bool = False,
    constant: bool = False,
    **settings: Any,
) -> Encoded:
    """Encodes texts with the pipeline's original `encode_prompt`. All encoding goes through this function.

    Args:
        pipe: the pipeline.
        texts: texts, each within the encoder's limit. "" is the pipeline's empty prompt.
        differentiable: whether gradients reach the encoder, which texts with the user's prompt need.
        constant: whether these are texts of an eraser, whose encoding may be kept across calls (`_encodings`). Never
            for texts with a user's words.
        settings: further arguments of `encode_prompt`, such as `clip_skip`.

    Raises:
        ValueError: a text has no tokens, or is over the limit.
    """
    facts, found = family(pipe), {}
    for name in readers(pipe):
        written = facts.cleaned(pipe, tokenizer_of(pipe, name), texts, settings)
        found[name] = [_whole(facts, pipe, name, text, settings) for text in written]
    for first, *others in facts.texts:
        if any(a.own != b.own for name in others for a, b in zip(found[first], found[name], strict=True)):
            raise ValueError(f"The pipeline's tokenizers split {list(texts)!s:.80} differently. Use other words.")
    ids = [reading.ids for readings in found.values() for reading in readings] if constant else None
    text, pooled, mask = encode_cut(pipe, texts, settings, differentiable, ids)
    first = facts.texts[0][0]
    shifts = [facts.shift(first, reading, text.shape[1]) for reading in found[first]]
    own = [slice(r.own.start + by, r.own.stop + by) for r, by in zip(found[first], shifts, strict=True)]
    return Encoded(text, pooled, tuple(own), _padding(pipe, found, text, settings), mask)


def _padding(
    pipe: DiffusionPipeline, found: dict[str, list[Reading]], text: Tensor, settings: dict[str, Any]
) -> Tensor:
    """`Encoded.padding` of texts [N, L, D], which were `found` as each encoder reads them."""
    facts, length = family(pipe), text.shape[1]
    padding = torch.full(text.shape[:2], len(found) + 1)
    where = facts.places(pipe, length, settings)
    for k, name in enumerate(group[0] for group in facts.texts if group[0] in found):
        columns, _ = where[name]
        padding[:, columns] = k + 1
        for row, reading in zip(padding, found[name], strict=True):
            start = columns.start + facts.shift(name, reading, columns.stop - columns.start)
            row[start : start + len(reading.ids)] = 0
    return padding


def check_width(pipe: DiffusionPipeline) -> None:
    """Raises ValueError unless the encoder's width matches the denoiser's."""
    read = family(pipe).text_width(denoiser_of(pipe))
    made = encode(pipe, [""], constant=True).text.shape[-1]
    if read is not None and made != read:
        raise ValueError(
            f"The text encoder of this {type(pipe).__name__} returns states of width {made}, but its denoiser reads "
            f"width {read}. Load the two from one model."
        )


def cleaned(pipe: DiffusionPipeline, tokenizer: Any, texts: Sequence[str], **settings: Any) -> list[str]:
    """Texts as the pipeline passes them to a tokenizer."""
    return family(pipe).cleaned(pipe, tokenizer, texts, settings)


def encode_cut(
    pipe: DiffusionPipeline,
    texts: Sequence[str],
    settings: dict[str, Any],
    differentiable: bool,
    constant: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Texts [N, L, D], and pooled texts [N, P] and the mask [N, L] if there are any. Cuts texts at the limit.

    `constant`: the tokens of texts whose encoding may be kept.
    """
    method, facts = own_encode(pipe), family(pipe)
    arguments = facts.encoding_arguments(pipe, texts, settings)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        made = partial(facts.encoded, pipe, method, texts, settings)
        out = made() if constant is None else kept(pipe, method, _decided(pipe, arguments, settings), constant, made)
    if len(out) != len(facts.returns):
        raise TypeError(
            f"`encode_prompt` of this {type(pipe).__name__} returns {len(out)} values, but pipelines of {facts.name} "
            f"return {len(facts.returns)}. Use the text-to-image pipeline of the family."
        )
    parts = dict(zip(facts.returns, out, strict=True))
    mask = parts.get("mask")
    return parts["text"], parts.get("pooled"), None if mask is None else mask.bool()


def encode_empty(pipe: DiffusionPipeline, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """As `encode_call`, for a call of empty texts only; kept."""
    ids = [read(pipe, "", name, **settings).ids for name in readers(pipe)]
    given = _decided(pipe, arguments, settings)
    return kept(pipe, own_encode(pipe), given, ids, lambda: encode_call(pipe, arguments))


def _decided(pipe: DiffusionPipeline, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `encode_prompt`, with the settings, which may hold more, such as a call's pictures."""
    taken = encode_parameters(pipe).items()
    return {name: each.default for name, each in taken if name != "self"} | dict(settings) | dict(arguments)


def own_tokens(pipe: DiffusionPipeline, text: str, name: str, **settings: Any) -> range:
    """The columns of a text's own tokens for one tokenizer, without leading padding. Cuts texts at the limit.

    The end token, if there is one, follows them.
    """
    own = read(pipe, text, name, **settings).own
    return range(own.start, own.stop)


def read(pipe: DiffusionPipeline, text: str, name: str, **settings: Any) -> Reading:
    """A text as one of the pipeline's encoders reads it. Cuts the text at the limit."""
    facts = family(pipe)
    found, limit = _read(facts, pipe, name, text, settings), facts.limit(pipe, name, settings)
    if (more := len(found.ids) - limit) <= 0:
        return found
    stop = max(found.own.start, found.own.stop - more)
    ids = found.ids[:stop] + found.ids[found.own.stop :]
    return found._replace(ids=ids, own=slice(found.own.start, stop))


def _read(facts: Family, pipe: DiffusionPipeline, name: str, text: str, settings: Mapping[str, Any]) -> Reading:
    (text,) = facts.cleaned(pipe, tokenizer_of(pipe, name), [text], settings)
    return facts.read(pipe, name, text, settings)


def encoding_settings(call: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of an `encode_prompt` call that change the encoding of any text."""
    names = dict.fromkeys(name for each in FAMILIES for name in each.settings)
    return {k: call.arguments[k] for k in names if call.arguments.get(k) is not None}


def fits(pipe: DiffusionPipeline, text: str) -> bool:
    """Whether a text is within the limit of every encoder."""
    return not any(_cut_off(pipe, text))


def cut_off(pipe: DiffusionPipeline, text: str, **settings: Any) -> str:
    """The end of a prompt that no text encoder of the pipeline reads; "" if one reads the whole prompt."""
    return min(_cut_off(pipe, text, **settings), key=len)


def _cut_off(pipe: DiffusionPipeline, text: str, **settings: Any) -> list[str]:
    facts, lost = family(pipe), []
    for name in readers(pipe):
        found = _read(facts, pipe, name, text, settings)
        own = found.ids[found.own]
        room = facts.limit(pipe, name, settings) - (len(found.ids) - len(own))
        lost.append(tokenizer_of(pipe, name).decode(own[room:]))
    return lost


def pack(pipe: DiffusionPipeline, phrases: Sequence[str], separator: str = " ") -> list[str]:
    """Joins phrases, greedily and in order, into as few texts as fit the encoder."""
    texts = [phrases[0]]
    for phrase in phrases[1:]:
        joined = f"{texts[-1]}{separator}{phrase}"
        if fits(pipe, joined):
            texts[-1] = joined
        else:
            texts.append(phrase)
    return texts


def check_bare(pipe: DiffusionPipeline) -> None:
    """Raises ValueError if run-time erasers are applied, which a fit would learn."""
    present = SITES.get(denoiser_of(pipe))
    if present is not None and present.applied:
        names = ", ".join(type(applied.method).__name__ for applied in present.applied)
        raise ValueError(
            f"{names} is applied to the pipeline and would affect the training. Call `handle.remove()` before `fit`."
        )
