"""What the public code of GIE takes from the text of prompt and concept joined.

With n tokens of the prompt and m of the concept, the code's text of L columns has the joined text in columns 0 to n,
the concept's own tokens in n + 1 to n + m, then the joined text's column n + 1 as the end token, then its columns from
n + m + 2 on. The prompt's maps go with it: column n + 1 is the end token, columns n + 2 to n + m + 1 are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._attention import CrossAttention, Term


def swapped(cross: CrossAttention, term: Term) -> Tensor:
    """What the prompt's maps put out with the official values, less what they do with its own: [B, Q, C]."""
    prompt, joins, lengths = _official(cross, term)
    key, value = cross.keys_values(prompt)
    difference = torch.zeros_like(value)
    for own, joined in zip(term.own, joins, strict=True):
        behind = torch.arange(key.shape[2], device=key.device) - lengths[:, None]  # 1: the end token
        kept = (behind < 2) | (behind > 1 + own.stop - own.start)
        difference = difference + cross.keys_values(joined)[1] * kept[:, None, :, None].to(value) - value
    return cross.attend(key, difference)


def afterwards(cross: CrossAttention, term: Term) -> Tensor:
    """What the text with the concept inserted puts out, less what the prompt does: the code's last steps."""
    prompt, joins, lengths = _official(cross, term)
    change = torch.zeros_like(cross.query)
    for text, own, joined in zip(term.text, term.own, joins, strict=True):
        m = own.stop - own.start
        rows = []
        for row, n in zip(joined, lengths.tolist(), strict=True):  # columns 1 to n are the prompt's
            rows.append(torch.cat([row[: n + 1], text[own], row[n + 1 : n + 2], row[n + 2 + m :]]))
        inserted = torch.stack(rows)
        change = change + cross.attend(*cross.keys_values(inserted)) - cross.attend(*cross.keys_values(prompt))
    return change


def _official(cross: CrossAttention, term: Term) -> tuple[Tensor, Tensor, Tensor]:
    """The prompt, each prompt and erasure prompt joined, and the prompts' lengths."""
    if cross.prompt is None or term.joined is None or term.lengths is None:
        raise ValueError('values="official" needs the text of each prompt. Call the pipeline with `prompt` alone.')
    return cross.prompt, term.joined, term.lengths
