"""What the forms of EIUP add to the output of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..hooks import CrossAttention, ErasurePrompts, Text

SLOPE = 5.0  # of the swap form's gate


def separate(cross: CrossAttention, prompts: ErasurePrompts, strength: float) -> Tensor:
    """E1: `sum_{k in C} w A(q, E)_k V_E,k`, summed over the erasure prompts E: [B, Q, C]."""
    key, value = cross.keys_values(prompts.text.states)
    return cross.attend_texts(key, prompts.weights(strength) * value, prompts.text.mask).sum(0)


def gated(cross: CrossAttention, prompts: ErasurePrompts, strength: float) -> Tensor:
    """E1g: `g softmax_C(q K_E) w V_E,C`, summed over the erasure prompts E: [B, Q, C].

    The gate g is implicit: it is the share of E's own tokens C in one softmax over them and the prompt.
    """
    if cross.prompt is None:
        raise ValueError(
            "The gated form needs the text of the prompt, so it edits only conditional rows. Give their text."
        )
    key, value = cross.keys_values(prompts.text.states)
    prompt_key, _ = cross.keys_values(cross.prompt.states)
    rows, added = len(cross.query), torch.zeros_like(cross.query)
    for n, columns in enumerate(prompts.token_columns):
        own_key, own_value = (x[n : n + 1, :, columns].expand(rows, -1, -1, -1) for x in (key, value))
        own_value = torch.cat([torch.zeros_like(prompt_key), -strength * own_value], 2)
        mask = cross.prompt.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(rows, columns.stop - columns.start)], 1)
        added = added + cross.attend(torch.cat([prompt_key, own_key], 2), own_value, mask)
    return added


class Taken(NamedTuple):
    """What the projected form takes out of the output of conditional rows.

    Args:
        empty: the layer's output N for the empty text.
        anchors: its outputs for the A anchors.
        toward: O - N.
        others: the outputs for the T + P neutral texts and phrases, less N.
        neutral: T.
        directions: the neutral texts, and the phrases without their shares of these, as sums of `others`.
        gram: inner products of the directions.
        along: inner products of the directions with `toward`.
        least: the smallest squared length of a direction that is not rounding.
        smallest: the same of `toward`.

    Shapes: `smallest` [B, Q]; `empty` and `toward` [B, Q, C]; `anchors` [A, B, Q, C]; `others` [B, Q, T + P, C];
    `directions` and `gram` [B, Q, T + P, T + P]; `along` and `least` [B, Q, T + P].
    """

    empty: Tensor
    anchors: Tensor
    toward: Tensor
    others: Tensor
    neutral: int
    directions: Tensor
    gram: Tensor
    along: Tensor
    least: Tensor
    smallest: Tensor

    def shares(self, strength: float) -> Tensor:
        """The removed amount of each direction, one after the other: each removal affects the next."""
        along, found = self.along, [torch.zeros_like(self.along[..., 0])] * self.neutral
        for k in range(self.neutral, self.along.shape[-1]):
            length = torch.maximum(self.gram[..., k, k], self.least[..., k])
            found.append(strength * (along[..., k] / length).clamp_min(0))
            along = along - found[k][..., None] * self.gram[..., k]
        return torch.stack(found, -1)

    def removed(self, shares: Tensor) -> Tensor:
        """The sum of the directions with these shares: [B, Q, C]."""
        return ((shares[..., None, :] @ self.directions) @ self.others).squeeze(-2)


def projected(out: Tensor, cross: CrossAttention, text: Text, neutral: int, strength: float) -> Tensor:
    """The change that the projected form adds to `out`: [B, Q, C], float32 or wider. `neutral` is the number of T.

    N, T and P are the layer's outputs for the empty text, the neutral texts and the phrases:

        d_T = T - N;  d_P = P - N, less its share of every d_T;  o = out - N
        added = -strength sum_P max(0, <o, d_P> / |d_P|^2) d_P              one after the other
    """
    taken = _taken(out, cross, text, neutral)
    return -taken.removed(taken.shares(strength))


def swapped(
    out: Tensor,
    cross: CrossAttention,
    text: Text,
    neutral: int,
    strength: float,
    threshold: float,
    anchor_of: Sequence[int],
) -> Tensor:
    """The change that the swap form adds to `out`: [B, Q, C]. `anchor_of` has the number of each phrase's anchor.

    With `removed(s)` what the projected form takes out at strength s, and A the layer's output for an anchor:

        c = |removed(1)| / |out - N|
        g = min(1, strength) clamp(SLOPE (c - threshold), 0, 1)
        added = -removed(strength) + g (A - (out - removed(strength)))

    With several anchors, each query reads the anchor of the phrases of which it has most: of all squared lengths of
    their shares at strength 1, the largest sum.
    """
    taken = _taken(out, cross, text, neutral)
    once, lengths = taken.shares(1.0), taken.gram.diagonal(dim1=-2, dim2=-1)
    size = (once[..., None, :] @ taken.gram @ once[..., None]).flatten(-2)
    whole = torch.maximum(taken.toward.square().sum(-1), taken.smallest)[..., None]
    read = (size / whole).clamp_min(torch.finfo(size.dtype).tiny).sqrt()  # with a gradient at 0
    gate = min(1.0, strength) * (SLOPE * (read - threshold)).clamp(0, 1)
    anchor = taken.anchors[0]
    if len(taken.anchors) > 1:
        amounts = (once.square() * lengths)[..., neutral:]
        of = torch.nn.functional.one_hot(torch.tensor(anchor_of, device=out.device), len(taken.anchors))
        most = (amounts @ of.to(amounts)).argmax(-1)
        anchor = taken.anchors.gather(0, most[None, ..., None].expand_as(taken.anchors[:1]))[0]
    removed = taken.removed(taken.shares(strength))
    return gate * (anchor - out) - (1 - gate) * removed


def cleared(out: Tensor, cross: CrossAttention, text: Text, neutral: int, strength: float) -> Tensor:
    """The change that both forms add to rows that guidance pushes away from: [B, Q, C].

    Removes the projection of `out - N` onto the span of all d_P. Guidance would bring back any difference from the
    empty text, so a strength above 1 counts as 1.
    """
    empty, _, others, least = _outputs(out, cross, text, neutral)
    table, identity, least = _table(out - empty, others, least)
    texts, shares, pivots = others.shape[2], [], []
    for k in range(texts):
        pivot, length, table = _without(table, k, least)
        if k < neutral:
            shares.append(torch.zeros_like(least[..., 0]))
            pivots.append(identity[..., k, :])
        else:  # the rest of a phrase is orthogonal to the phrases before it
            shares.append(min(1.0, strength) * (pivot[..., texts] / length[..., 0]).squeeze(-1))
            pivots.append(pivot[..., 0, texts + 1 :])
    return -((torch.stack(shares, -1)[..., None, :] @ torch.stack(pivots, -2)) @ others).squeeze(-2)


def _outputs(out: Tensor, cross: CrossAttention, text: Text, neutral: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs for the empty text, for the anchors, and for neutral texts and phrases less the first; and the
    smallest squared length [B, Q], below which a text differs from the empty one by rounding."""
    would_be = cross.with_empty(text).to(torch.promote_types(out.dtype, torch.float32))
    first = len(would_be) - len(text)
    empty, anchors = would_be[0], would_be[1 + neutral : first]
    others = torch.cat([would_be[1 : 1 + neutral], would_be[first:]]) - empty
    return empty, anchors, others.permute(1, 2, 0, 3), 1e-10 * (empty * empty).sum(-1)


def _table(toward: Tensor, others: Tensor, smallest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row per text: its inner products with all texts, that with `toward`, and its coefficients. All is linear in
    `others`, so inner products suffice. Also the identity, and the least squared lengths [B, Q, texts]."""
    gram, texts = others @ others.mT, others.shape[2]
    least = gram.diagonal(dim1=-2, dim2=-1) * 1e-6  # of a squared length; below, only rounding errors remain
    least = torch.maximum(least, smallest[..., None]).clamp_min(torch.finfo(gram.dtype).tiny)
    identity = torch.eye(texts, dtype=gram.dtype, device=gram.device).expand_as(gram)
    return torch.cat([gram, others @ toward[..., None], identity], -1), identity, least


def _without(table: Tensor, k: int, least: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Text k's row and squared length, and the table without its share in every text."""
    pivot = table[..., k : k + 1, :]
    length = pivot[..., k : k + 1].clamp_min(least[..., k, None, None])
    return pivot, length, table - table[..., k : k + 1] / length * pivot


def _taken(out: Tensor, cross: CrossAttention, text: Text, neutral: int) -> Taken:
    empty, anchors, others, smallest = _outputs(out, cross, text, neutral)
    toward, texts = out - empty, others.shape[2]
    table, _, least = _table(toward, others, smallest)
    for k in range(neutral):
        *_, table = _without(table, k, least)
    smallest = max(1e-5, 2 * torch.finfo(out.dtype).eps) ** 2 * (empty * empty).sum(-1)
    gram, along, directions = table.split([texts, 1, texts], -1)
    return Taken(empty, anchors, toward, others, neutral, directions, gram, along.squeeze(-1), least, smallest)
