"""Encodes a prompt with some of its tokens masked."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._text import encode_cut, encoder_of, read, readers
from .families import Family, Reading, family, tokenizer_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def encode_masked(
    pipe: DiffusionPipeline,
    text: str,
    columns: Mapping[str, Sequence[Sequence[int]]],
    others: Sequence[str] = (),
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Encodes a prompt once per set of masked columns: states [N, L, D], and pooled texts.

    `others`: the other prompts of its batch, to whose length it is padded if the family does so. `columns`: per
    tokenizer, the masked columns of the first text, the second, ..., as `own_tokens` counts them. The mask is the
    tokenizer's mask token, or "!", the first word of CLIP's vocabulary, if there is none.
    """
    placed, here, facts = [], threading.get_ident(), family(pipe)
    for name, sets in columns.items():
        tokenizer, encoder = tokenizer_of(pipe, name), encoder_of(pipe, name)
        mask = tokenizer.mask_token_id
        mask = tokenizer.convert_tokens_to_ids("!") if mask is None else mask
        put = functools.partial(masked, here, mask, iter(sets), facts, name, read(pipe, text, name, **settings))
        placed.append(encoder.register_forward_pre_hook(put, with_kwargs=True))
    try:
        n, more = max(map(len, columns.values())), [] if facts.padded_to_limit else _longest(pipe, others, settings)
        padded = [] if facts.masked else more  # masked padding changes nothing
        states, pooled, _ = encode_cut(pipe, [*[text] * n, *padded], settings, differentiable=True)
        lengths = [len(read(pipe, each, name, **settings).ids) for each in more for name in columns if facts.masked]
        states = facts.padded(states, max([states.shape[1], *lengths]))
        return states[:n], None if pooled is None else pooled[:n]
    finally:
        for handle in placed:
            handle.remove()


def _longest(pipe: DiffusionPipeline, texts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """The text that determines the padding of the others, for each of the pipeline's encoders."""
    names = readers(pipe) if texts else ()
    return [max(texts, key=lambda text: len(read(pipe, text, name, **settings).ids)) for name in names]


def masked(
    thread: int,
    mask: int,
    sets: Iterator[Sequence[int]],
    facts: Family,
    name: str,
    reading: Reading,
    encoder: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of an encoder call with masked tokens, those of the next `sets`. None changes nothing."""
    if threading.get_ident() != thread:  # another pipeline may share the text encoder
        return None
    ids = (args[0] if args else kwargs["input_ids"]).clone()
    more = reading.dropped + facts.shift(name, reading, ids.shape[1] - reading.dropped)
    for row, columns in zip(range(len(ids)), sets, strict=False):  # a family may encode texts one by one
        ids[row, [column + more for column in columns]] = mask
    return ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": ids})
