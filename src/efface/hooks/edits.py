"""The methods' edits of a layer's output, by rows of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import CrossAttention, SelfAttention
from .batch import Batch
from .layers import Layer
from .prompts import Applied
from .texts import ErasurePrompts, Repelled

Acting = Sequence[tuple[Applied, Tensor | float]]
"""The methods that edit attention in this denoiser call, with the weight of their windows."""


def edited(batch: Batch, acting: Acting, layer: Layer, query: Tensor, hidden: Tensor) -> Tensor:
    """The cross-attention output [rows, Q, C], after the edits of every method in turn."""
    if batch.conditional:
        at = slice(batch.first, batch.last)
        given = out = hidden[at]
        for applied, weight in acting:
            seen = cross(batch, applied, layer, query[at], given)
            for prompts in applied.acting:
                out = _on_rows(out, prompts.at, weight, _edit(applied, seen, prompts))
        hidden = hidden if out is given else batch.replaced(hidden, out)
    if batch.repelled is not None:
        given = out = hidden[batch.repelled.at]
        for applied, weight in acting:
            if not applied.method.touches_uncond:
                continue
            seen = _unconditional(batch, batch.repelled, applied, layer, query[batch.repelled.at])
            for prompts in applied.acting:
                out = _on_rows(out, batch.repelled.rows_of(prompts), weight, _edit(applied, seen, prompts))
        hidden = hidden if out is given else hidden.index_copy(0, batch.repelled.at, out)
    return hidden


def edited_self(batch: Batch, acting: Acting, seen: SelfAttention, hidden: Tensor) -> Tensor:
    """The self-attention output [rows, Q, C], after the edits of every method on conditional rows."""
    given = out = hidden[batch.first : batch.last]
    for applied, weight in acting:
        if not applied.method.edits_self_attention:
            continue
        seen.memory = applied.memory
        for prompts in applied.acting:
            out = _on_rows(out, prompts.at, weight, _edit_self(applied, seen, prompts))
    return hidden if out is given else batch.replaced(hidden, out)


def cross(batch: Batch, applied: Applied | None, layer: Layer, query: Tensor, output: Tensor) -> CrossAttention:
    """A layer on the conditional rows, as a method sees it."""
    memory, neutral = ({}, None) if applied is None else (applied.memory, applied.neutral)
    return CrossAttention(layer.attn, query, output, layer.name, memory, batch.prompt, neutral, batch.empty)


def _unconditional(batch: Batch, repelled: Repelled, applied: Applied, layer: Layer, query: Tensor) -> CrossAttention:
    empty = batch.empty
    if empty is not None and len(empty) > 1:
        empty = empty[repelled.of]
    return CrossAttention(layer.attn, query, None, layer.name, applied.memory, None, applied.neutral, empty, True)


Edit = Callable[[Tensor, Tensor | None], Tensor]


def _edit(applied: Applied, seen: CrossAttention, prompts: ErasurePrompts) -> Edit:
    def edit(out: Tensor, rows: Tensor | None) -> Tensor:
        return applied.method.edit(out, seen if rows is None else seen.at(rows), prompts)

    return edit


def _edit_self(applied: Applied, seen: SelfAttention, prompts: ErasurePrompts) -> Edit:
    def edit(out: Tensor, rows: Tensor | None) -> Tensor:
        return applied.method.edit_self(out, seen if rows is None else seen.at(rows), prompts)

    return edit


def _on_rows(out: Tensor, rows: Tensor | None, weight: Tensor | float, edit: Edit) -> Tensor:
    """`out` with edits of these rows. The weight is a tensor only if a window is compiled."""
    if rows is None:
        changed = edit(out, None)
    elif len(rows):
        changed = out.index_copy(0, rows, edit(out[rows], rows))
    else:
        return out
    return torch.lerp(out, changed, weight.to(out)) if isinstance(weight, Tensor) else changed
