"""What the forms of EIUP add to the output of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hooks import CrossAttention, ErasurePrompts
from ._keys import keys_values

SLOPE = 5.0  # of the swap form's gate
BLOCK = 12  # texts whose inner products with the later ones are one multiplication


def separate(cross: CrossAttention, prompts: ErasurePrompts, strength: float) -> Tensor:
    """E1: `sum_{k in C} w A(q, E)_k V_E,k`, summed over the erasure prompts E: [B, Q, C]."""
    key, value = keys_values(cross, [prompts.text], [prompts.text.states])
    return cross.attend_texts(key, prompts.weights(strength) * value, prompts.text.mask).sum(0)


def gated(cross: CrossAttention, prompts: ErasurePrompts, strength: float) -> Tensor:
    """E1g: `g softmax_C(q K_E) w V_E,C`, summed over the erasure prompts E: [B, Q, C].

    The gate g is implicit: it is the share of E's own tokens C in one softmax over them and the prompt.
    """
    if cross.prompt is None:
        raise ValueError(
            "The gated form needs the text of the prompt, so it edits only conditional rows. Give their text."
        )
    key, value = keys_values(cross, [prompts.text], [prompts.text.states])
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


class Outputs(NamedTuple):
    """A layer's outputs for the constant texts, and what the row's text adds.

    Args:
        empty: the output N for the empty text.
        anchors: the outputs for the A anchors.
        others: the outputs for the T neutral texts, then for the P phrases, less N.
        toward: O - N.
        length: the squared length of N.

    Shapes: `length` [B, Q]; `empty` and `toward` [B, Q, C]; `anchors` [A, B, Q, C]; `others` [B, Q, T + P, C].
    """

    empty: Tensor
    anchors: Tensor
    others: Tensor
    toward: Tensor
    length: Tensor

    @classmethod
    def of(cls, out: Tensor, would_be: Tensor, neutral: int, phrases: int) -> Outputs:
        """From the outputs for the empty text, the neutral texts, the anchors and the phrases, in this order."""
        would_be = would_be.to(torch.promote_types(out.dtype, torch.float32))
        empty, first = would_be[0], len(would_be) - phrases
        anchors = would_be[1 + neutral : first]
        others = would_be[1:] if not len(anchors) else torch.cat([would_be[1 : 1 + neutral], would_be[first:]])
        others = (others - empty).permute(1, 2, 0, 3)
        return cls(empty, anchors, others, out - empty, torch.linalg.vecdot(empty, empty))

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """The inner products of the others with each other (only of a text with itself and later ones are needed),
        with `toward`, and the least squared lengths: [B, Q, T + P, T + P], and twice [B, Q, T + P]."""
        gram = _upper(self.others)
        least = gram.diagonal(dim1=-2, dim2=-1) * 1e-6  # of a squared length; below, only rounding errors remain
        least = torch.maximum(least, 1e-10 * self.length[..., None]).clamp_min(torch.finfo(gram.dtype).tiny)
        return gram, (self.toward[..., None, :] @ self.others.mT).squeeze(-2), least  # a row times a matrix is faster

    def combined(self, shares: Tensor) -> Tensor:
        """The sum of the others with these shares [B, Q, T + P]: [B, Q, C]."""
        return (shares[..., None, :] @ self.others).squeeze(-2)


def _upper(others: Tensor) -> Tensor:
    """The inner products of each text with itself and the later ones; below, some are 0 instead."""
    texts = others.shape[2]
    if texts <= BLOCK:
        return others @ others.mT
    rows = [others[:, :, k : k + BLOCK] @ others[:, :, k:].mT for k in range(0, texts, BLOCK)]
    return torch.cat([F.pad(row, (texts - row.shape[-1], 0)) for row in rows], -2)


class Eliminated(NamedTuple):
    """The first K of M texts without their shares in those before them, by their inner products.

    Args:
        ratios: per text k, the inner products of its rest with texts k to M - 1, over its squared length.
        along: per text k, that of its rest with `toward`, over its squared length.
        gram, toward, least: the inner products and least squared lengths of the other texts without these shares.

    Shapes: `ratios[k]` [B, Q, M - k], `along[k]` [B, Q, 1], `gram` [B, Q, M - K, M - K], `toward` and `least`
    [B, Q, M - K].
    """

    ratios: list[Tensor]
    along: list[Tensor]
    gram: Tensor
    toward: Tensor
    least: Tensor

    @classmethod
    def of(cls, gram: Tensor, toward: Tensor, least: Tensor, first: int) -> Eliminated:
        ratios, along = [], []
        for _ in range(first):
            row = gram[..., 0, :]
            size = torch.maximum(row[..., :1], least[..., :1])
            ratio = row / size
            ratios.append(ratio)
            along.append(toward[..., :1] / size)
            toward = torch.addcmul(toward[..., 1:], toward[..., :1], ratio[..., 1:], value=-1)
            gram = torch.addcmul(gram[..., 1:, 1:], ratio[..., 1:, None], row[..., None, 1:], value=-1)
            least = least[..., 1:]
        return cls(ratios, along, gram, toward, least)

    def as_texts(self, rests: Sequence[Tensor], shares: Tensor) -> Tensor:
        """The shares [B, Q, M] of all texts in a sum of the rests of the first ones, with shares `rests`, and of the
        other texts, with `shares` [B, Q, M - K]."""
        for ratio, share in zip(reversed(self.ratios), reversed(rests), strict=True):
            own = share - (ratio[..., 1:] * shares).sum(-1, keepdim=True)
            shares = torch.cat([own, shares], -1)
        return shares


class Taken(NamedTuple):
    """What the projected form takes out of the output of conditional rows.

    A phrase's direction is what it adds, without its shares of what the neutral texts add.

    Args:
        outputs: the layer's outputs.
        neutral: the neutral texts.
        lengths: the squared lengths of the P directions.
        along: the shares of the directions in `toward`.
        mixed: the share of each direction in each earlier one, by the earlier one first.

    Shapes: `lengths` and `along` [B, Q, P], `mixed` [B, Q, P, P].
    """

    outputs: Outputs
    neutral: Eliminated
    lengths: Tensor
    along: Tensor
    mixed: Tensor

    @classmethod
    def of(cls, outputs: Outputs, neutral: int) -> Taken:
        rest = Eliminated.of(*outputs.table(), neutral)
        lengths = rest.gram.diagonal(dim1=-2, dim2=-1)
        sizes = torch.maximum(lengths, rest.least)
        return cls(outputs, rest, lengths, rest.toward / sizes, rest.gram / sizes[..., None, :])

    def shares(self, strength: float) -> Tensor:
        """The share of each direction when its turn comes: each removal, with this strength, affects the later ones.

        [B, Q, P].
        """
        along, found = self.along, []
        for k in range(self.along.shape[-1] - 1):
            found.append(along[..., :1].clamp_min(0))
            along = torch.addcmul(along[..., 1:], found[k], self.mixed[..., k, k + 1 :], value=-strength)
        return torch.cat([*found, along.clamp_min(0)], -1)

    def removed(self, shares: Tensor) -> Tensor:
        """The sum of the directions with these shares [B, Q, P]: [B, Q, C]."""
        nothing = [torch.zeros_like(shares[..., :1])] * len(self.neutral.ratios)
        return self.outputs.combined(self.neutral.as_texts(nothing, shares))


def projected(out: Tensor, would_be: Tensor, neutral: int, phrases: int, strength: float) -> Tensor:
    """The change that the projected form adds to `out`: [B, Q, C], float32 or wider.

    N, T and P are the layer's outputs for the empty text, the neutral texts and the phrases:

        d_T = T - N;  d_P = P - N, less its share of every d_T;  o = out - N
        added = -strength sum_P max(0, <o, d_P> / |d_P|^2) d_P              one after the other

    Args:
        out: [B, Q, C].
        would_be: N, T, the anchors and P: [1 + T + A + P, B, Q, C].
        neutral: the number of T.
        phrases: the number of P.
        strength: as in the formula.
    """
    taken = Taken.of(Outputs.of(out, would_be, neutral, phrases), neutral)
    return taken.removed(-strength * taken.shares(strength))


def swapped(
    out: Tensor,
    would_be: Tensor,
    neutral: int,
    phrases: int,
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
    outputs = Outputs.of(out, would_be, neutral, phrases)
    taken = Taken.of(outputs, neutral)
    once = taken.shares(1.0)
    amounts = once.square() * taken.lengths
    size = 2 * ((once[..., None, :] @ taken.neutral.gram.triu(1)).squeeze(-2) * once).sum(-1) + amounts.sum(-1)
    whole = torch.linalg.vecdot(outputs.toward, outputs.toward)
    rounding = max(1e-5, 2 * torch.finfo(out.dtype).eps) ** 2 * outputs.length
    read = (size / torch.maximum(whole, rounding)).clamp_min(torch.finfo(size.dtype).tiny).sqrt()  # differentiable at 0
    gate = (min(1.0, strength) * (SLOPE * (read - threshold)).clamp(0, 1))[..., None]
    anchor = outputs.anchors[0]
    if len(outputs.anchors) > 1:
        of = F.one_hot(torch.tensor(anchor_of, device=out.device), len(outputs.anchors))
        most = (amounts @ of.to(amounts)).argmax(-1)
        anchor = outputs.anchors.gather(0, most[None, ..., None].expand_as(outputs.anchors[:1]))[0]
    removed = taken.removed(strength * taken.shares(strength))
    return gate * (anchor - out) - (1 - gate) * removed


def cleared(out: Tensor, would_be: Tensor, neutral: int, phrases: int, strength: float) -> Tensor:
    """The change that both forms add to rows that guidance pushes away from: [B, Q, C].

    Removes the projection of `out - N` onto the span of all d_P. Guidance would bring back any difference from the
    empty text, so a strength above 1 counts as 1.
    """
    outputs = Outputs.of(out, would_be, neutral, phrases)
    all_ = Eliminated.of(*outputs.table(), neutral + phrases)  # the rests of the phrases are orthogonal
    nothing = [torch.zeros_like(share) for share in all_.along[:neutral]]
    shares = all_.as_texts([*nothing, *all_.along[neutral:]], all_.toward)
    return outputs.combined(-min(1.0, strength) * shares)
