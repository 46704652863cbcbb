"""The official values of GIE's public code, from prompt and concept encoded together.

With n tokens of the prompt and m of the concept, the code's text of L columns is:

- columns 0 to n: the joined text;
- columns n + 1 to n + m: the concept's own tokens;
- the next column, as the end token: the joined text's column n + 1;
- the rest: the joined text's columns from n + m + 2 on.

The prompt's maps change accordingly: column n + 1 is the end token, columns n + 2 to n + m + 1 are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import checks
from ..._text import cleaned, encode, readers
from ...hooks import CrossAttention, ErasurePrompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class Joined:
    """Each prompt followed by each erasure prompt: `states` [N, B, L, D]; `lengths` [B] of the prompts in tokens."""

    states: Tensor
    lengths: Tensor


def joined(pipe: DiffusionPipeline, prompts: Sequence[str], erasure_prompts: Sequence[str], **settings: Any) -> Joined:
    """Joins and encodes prompts and erasure prompts.

    Raises:
        ValueError: the tokens of two texts change when joined, or the joined text is too long.
    """
    pairs, lengths = [], []
    for text, prompt in itertools.product(erasure_prompts, prompts):
        pairs.append(prompt + " " * (not prompt.endswith(" ")) + text)
        for tokenizer in (getattr(pipe, name) for name in readers(pipe)):
            three = cleaned(pipe, tokenizer, (prompt, text, pairs[-1]), **settings)
            n, m, both = (len(tokenizer(each, add_special_tokens=False).input_ids) for each in three)
            limit = tokenizer.model_max_length - 2
            if n + m != both or both > limit:
                raise ValueError(
                    f"Expected prompt and erasure prompt to join into {n} + {m} and at most {limit} tokens, got {both} "
                    f"for {checks.shown(pairs[-1])}. Shorten one of them, or use values='paper'."
                )
        lengths.append(n)
    states = encode(pipe, pairs, differentiable=True, **settings).text.unflatten(0, (len(erasure_prompts), -1))
    return Joined(states, torch.tensor(lengths[: len(prompts)], device=states.device))


def swapped(cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
    """The output of the prompt's maps with the official values, minus that with its own values: [B, Q, C]."""
    prompt, joins, lengths = _official(cross, prompts)
    key, value = cross.keys_values(prompt)
    difference = torch.zeros_like(value)
    for columns, text in zip(prompts.token_columns, joins, strict=True):
        behind = torch.arange(key.shape[2], device=key.device) - lengths[:, None]  # 1: the end token
        kept = (behind < 2) | (behind > 1 + columns.stop - columns.start)
        difference = difference + cross.keys_values(text)[1] * kept[:, None, :, None].to(value) - value
    return cross.attend(key, difference)


def afterwards(cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
    """The output for the text with the inserted concept, minus that for the prompt, as in the code's last steps."""
    prompt, joins, lengths = _official(cross, prompts)
    change = torch.zeros_like(cross.query)
    for text, columns, of_rows in zip(prompts.text.states, prompts.token_columns, joins, strict=True):
        m = columns.stop - columns.start
        rows = []
        for row, n in zip(of_rows, lengths.tolist(), strict=True):  # columns 1 to n are the prompt's
            rows.append(torch.cat([row[: n + 1], text[columns], row[n + 1 : n + 2], row[n + 2 + m :]]))
        change = change + cross.attend(*cross.keys_values(torch.stack(rows)))
        change = change - cross.attend(*cross.keys_values(prompt))
    return change


def _official(cross: CrossAttention, prompts: ErasurePrompts) -> tuple[Tensor, Tensor, Tensor]:
    """The prompts of the rows [B, L, D], joined with each erasure prompt [N, B, L, D], and their lengths [B]."""
    if cross.prompt is None or "joined" not in cross.memory:
        raise ValueError(
            'values="official" needs the text of each prompt. Call the pipeline with `prompt`, without embeddings.'
        )
    found: Joined = cross.memory["joined"]
    states = found.states[list(prompts.which)]
    if prompts.at is not None:
        return cross.prompt.states, states[:, prompts.at], found.lengths[prompts.at]
    return cross.prompt.states, states, found.lengths
