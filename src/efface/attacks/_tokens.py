"""Soft tokens: rows in place of the input embeddings of some words, without changing the text encoder or its tokenizer.

The words stay in the prompt, so the encoder's `input_ids`, its end token and its pooled state are those of real text.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .._text import cut_off, readers
from ..delta.embeddings import Rows, tables
from ..families import tokenizer_of
from ._vocabulary import common, whole_words


def check_tokens(pipe: Any) -> None:
    """Raises ValueError unless soft tokens work on this pipeline: tables of tokens, shared words, embeddings."""
    for name in readers(pipe):
        whole_words(tokenizer_of(pipe, name))
    if not common(pipe):
        raise ValueError(
            "Expected tokenizers that share at least one word of one token, got none. Attacks that search for tokens "
            "cannot run on this pipeline; use one that writes whole texts."
        )
    tables(pipe)


# ---------------------------------------------------------------- from soft tokens to tokens


def nearest(rows: Rows, table: Rows) -> Tensor:
    """The entries [k] of a vocabulary with the highest cosine, summed over the encoders."""
    unit = nn.functional.normalize
    cosines = (unit(rows[n].float(), dim=-1) @ unit(table[n].float(), dim=-1).T for n in rows)
    return reduce(operator.add, cosines).argmax(-1)


def projected(rows: Rows, table: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """The nearest entries [k] and their embeddings, whose gradients pass to `rows` unchanged (straight through)."""
    entries = nearest(rows, table)
    return entries, {n: each + (table[n][entries] - each).detach() for n, each in rows.items()}


def simplex(rows: Tensor) -> Tensor:
    """The Euclidean projection of every row [..., V] to non-negative entries with sum 1.

        max(x - theta, 0), where theta makes the sum 1

    Source: sorting finds theta in closed form (J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, 2008, ICML).
    """
    ordered = rows.sort(-1, descending=True).values
    counts = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=rows.dtype)
    excess = (ordered.cumsum(-1) - 1) / counts
    last = (ordered > excess).sum(-1, keepdim=True) - 1
    return (rows - excess.gather(-1, last)).clamp(min=0)


def sampled(shares: Tensor, generator: torch.Generator) -> Tensor:
    """One-hot rows [k, V], drawn with the probabilities of each row of `shares`."""
    drawn = torch.multinomial(shares.cpu(), 1, generator=generator)[:, 0].to(shares.device)
    return nn.functional.one_hot(drawn, shares.shape[-1]).to(shares)


def check_prompt(pipe: Any, text: str, count: int) -> None:
    """Raises ValueError if a prompt with `count` soft tokens exceeds an encoder's limit."""
    if lost := cut_off(pipe, text):
        raise ValueError(
            f"Expected a prompt that fits the text encoder with {count} further tokens, but {checks.shown(lost)} of "
            f"{checks.shown(text)} does not. Use fewer tokens, or a shorter prompt."
        )
