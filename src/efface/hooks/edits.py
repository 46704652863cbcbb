"""The methods' edits of a layer's output, by rows of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..families import Family
from . import watch
from .attention import CrossAttention, SelfAttention
from .batch import Batch
from .carried import Carried
from .joint import Function, Inputs, JointAttention, Parts, attended
from .layers import Layer
from .prompts import Applied
from .texts import ErasurePrompts

Acting = Sequence[tuple[Applied, Tensor | float]]
"""The methods that edit attention in this denoiser call, with the weight of their windows."""


See = Callable[[Applied, Any, "Tensor | None"], CrossAttention]
"""Returns a layer on these rows as a method sees it. The last argument is its output on conditional rows; None for rows
that guidance pushes away from."""


def edited(batch: Batch, acting: Acting, see: See, hidden: Tensor) -> Tensor:
    """The picture's output [rows, Q, C] of a layer that reads text, after the edits of every method in turn."""
    if batch.conditional:
        at = slice(batch.first, batch.last)
        given = out = hidden[at]
        for applied, weight in acting:
            seen = see(applied, at, given)
            for prompts in applied.acting:
                out = _on_rows(out, prompts.at, weight, _edit(applied, seen, prompts))
        hidden = hidden if out is given else batch.replaced(hidden, out)
    if batch.repelled is not None:
        given = out = hidden[batch.repelled.at]
        for applied, weight in acting:
            if not applied.method.touches_uncond:
                continue
            seen = see(applied, batch.repelled.at, None)
            for prompts in applied.acting:
                out = _on_rows(out, batch.repelled.rows_of(prompts), weight, _edit(applied, seen, prompts))
        hidden = hidden if out is given else hidden.index_copy(0, batch.repelled.at, out)
    return hidden


def carry(batch: Batch, acting: Acting, facts: Family, arguments: dict[str, Any]) -> Carried | None:
    """The texts that a denoiser call with joint attention carries for these methods; None if no row needs them."""
    if not acting or not facts.joint_attention or not (batch.conditional or batch.repelled is not None):
        return None
    if torch.compiler.is_compiling():
        raise ValueError(watch.JOINT_COMPILED)
    texts = [text for applied, _ in acting for text in applied.carried()]
    rows = slice(batch.first, batch.last) if batch.repelled is None else slice(0, batch.rows)
    return Carried(texts, rows, arguments[facts.text_argument].shape[1], facts)


def edited_joint(
    batch: Batch,
    acting: Acting,
    layer: Layer,
    carried: Carried,
    function: Function,
    inputs: Inputs,
    options: dict[str, Any],
) -> Tensor:
    """Joint attention [rows, heads, L, d] with carried texts, after the edits of the picture's output."""
    if len(inputs.query) != batch.rows:
        raise RuntimeError(watch.other_rows(layer.name, len(inputs.query), batch.rows))
    carried.check(layer.name, inputs.query, inputs.key, options)
    biases = carried.biases(layer.name, options.get("attn_mask"), inputs.query.shape[2])

    def edit(parts: Parts, hidden: Tensor) -> Tensor:
        return edited(batch, acting, in_joint_attention(batch, layer, carried, parts), hidden)

    return attended(carried, function, inputs, options, biases, edit)


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


def in_cross_attention(batch: Batch, layer: Layer, query: Tensor) -> See:
    """A cross-attention layer, from its query of all rows."""

    def see(applied: Applied, rows: Any, output: Tensor | None) -> CrossAttention:
        if output is not None:
            return cross(batch, applied, layer, query[rows], output)
        empty, repelled = batch.empty, batch.repelled
        if empty is not None and repelled is not None and len(empty) > 1:
            empty = empty[repelled.of]
        state = layer.attn, query[rows], None, layer.name, applied.memory
        return CrossAttention(*state, None, applied.neutral, empty, unconditional=True)

    return see


def in_joint_attention(batch: Batch, layer: Layer, carried: Carried, parts: Parts) -> See:
    """A joint attention layer, from the parts of the rows that carry texts."""
    query, start = parts.query.transpose(1, 2).flatten(2), carried.rows.start

    def see(applied: Applied, rows: Any, output: Tensor | None) -> CrossAttention:
        at = slice(rows.start - start, rows.stop - start) if isinstance(rows, slice) else rows - start
        return JointAttention(
            *(layer.attn, query[at], output, layer.name, applied.memory),
            prompt=None if output is None else batch.prompt,
            neutral=applied.neutral,
            unconditional=output is None,
            parts=parts.at(at),
            carried=carried,
        )

    return see


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
