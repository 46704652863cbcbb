"""The methods' edits of a layer's output, by rows of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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

Edit = Callable[[Tensor, Any, ErasurePrompts], Tensor]
"""`Method.edit` or `Method.edit_self`."""


def conditional(batch: Batch, layer: CrossAttention, hidden: Tensor, start: int = 0, **fields: Any) -> CrossAttention:
    """A layer, which has the rows from `start` on, on the conditional rows, whose output is `hidden` [B, Q, C]."""
    rows = slice(batch.first - start, batch.last - start)
    return layer.at(rows, output=hidden, prompt=batch.prompt, empty=batch.empty, **fields)


def edited(batch: Batch, acting: Acting, layer: CrossAttention, hidden: Tensor, start: int = 0) -> Tensor:
    """The picture's output [rows, Q, C] of a layer that reads text, after the edits of every method in turn.

    Args:
        batch: the rows.
        acting: the methods.
        layer: the layer on the rows from `start` on, without output and texts.
        hidden: its output, on all rows.
        start: the first row of `layer`.
    """
    if batch.conditional:
        given = out = hidden[batch.first : batch.last]
        for applied, weight in acting:
            seen = conditional(batch, layer, given, start, memory=applied.memory, neutral=applied.neutral)
            for prompts in applied.acting:
                out = _on_rows(applied.method.edit, out, seen, prompts, prompts.at, weight)
        hidden = hidden if out is given else batch.replaced(hidden, out)
    repelled, touching = batch.repelled, [pair for pair in acting if pair[0].method.touches_uncond]
    if repelled is not None and touching:
        given = out = hidden[repelled.at]
        empty = batch.empty if batch.empty is None or len(batch.empty) == 1 else batch.empty[repelled.of]
        pushed = layer.at(repelled.at - start, empty=empty, unconditional=True)
        for applied, weight in touching:
            seen = replace(pushed, memory=applied.memory, neutral=applied.neutral)
            for prompts in applied.acting:
                out = _on_rows(applied.method.edit, out, seen, prompts, repelled.rows_of(prompts), weight)
        hidden = hidden if out is given else hidden.index_copy(0, repelled.at, out)
    return hidden


def edited_self(batch: Batch, acting: Acting, seen: SelfAttention, hidden: Tensor) -> Tensor:
    """The self-attention output [rows, Q, C], after the edits of every method on conditional rows."""
    given = out = hidden[batch.first : batch.last]
    for applied, weight in acting:
        if not applied.method.edits_self_attention:
            continue
        seen = replace(seen, memory=applied.memory)
        for prompts in applied.acting:
            out = _on_rows(applied.method.edit_self, out, seen, prompts, prompts.at, weight)
    return hidden if out is given else batch.replaced(hidden, out)


def _on_rows(
    edit: Edit,
    out: Tensor,
    seen: CrossAttention | SelfAttention,
    prompts: ErasurePrompts,
    rows: Tensor | None,
    weight: Tensor | float,
) -> Tensor:
    """`out` with the edit of these rows; None: all. The weight is a tensor only if a window is compiled."""
    if rows is None:
        changed = edit(out, seen, prompts)
    elif len(rows):
        changed = out.index_copy(0, rows, edit(out[rows], seen.at(rows), prompts))
    else:
        return out
    return torch.lerp(out, changed, weight.to(out)) if isinstance(weight, Tensor) else changed


# ---------------------------------------------------------------- joint attention


def carry(batch: Batch, acting: Acting, facts: Family, arguments: dict[str, Any]) -> Carried | None:
    """The texts that a denoiser call with joint attention carries for these methods; None if no row needs them."""
    if not acting or not facts.joint_attention or not (batch.conditional or batch.repelled is not None):
        return None
    if torch.compiler.is_compiling():
        raise ValueError(watch.JOINT_COMPILED)
    texts = [text for applied, _ in acting for text in applied.carried()]
    rows = slice(batch.first, batch.last) if batch.repelled is None else slice(0, batch.rows)
    return Carried(texts, rows, facts.text_columns(arguments), facts)


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
    if (turned := batch.turned) is not None:
        mask = options.get("attn_mask")
        options = options if mask is None or len(mask) == 1 else {**options, "attn_mask": turned(mask)}
        inputs = Inputs(*map(turned, inputs))
    if len(inputs.query) != batch.rows:
        raise RuntimeError(watch.other_rows(layer.name, len(inputs.query), batch.rows))
    carried.check(layer.name, inputs.query, inputs.key, options)
    biases = carried.biases(layer.name, options.get("attn_mask"), inputs.query.shape[2])

    def edit(parts: Parts, hidden: Tensor) -> Tensor:
        query = parts.query.transpose(1, 2).flatten(2)
        seen = JointAttention(layer.attn, query, name=layer.name, parts=parts, carried=carried)
        return edited(batch, acting, seen, hidden, carried.rows.start)

    out = attended(carried, function, inputs, options, biases, edit)
    return out if turned is None else turned(out)
