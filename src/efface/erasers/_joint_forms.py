"""Forms of EIUP that its brief derives for joint attention: text-only, oblique, and the pooled text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._text import encode
from ..core import Concept
from ..hooks import CrossAttention, JointAttention, Text
from ._terms import cleared, projected

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RIDGE = 0.05  # of a text's squared length, in the oblique form


def text_only(out: Tensor, cross: CrossAttention, text: Text, neutral: int, strength: float) -> Tensor:
    """The change that the text-only form adds to the output of a joint layer: [B, Q, C].

    p, N, T and E are what the picture's queries read of the prompt and of each text alone, without the picture's own
    columns; m is the prompt's share in the layer's softmax, per query and head:

        added = m (projected(p) - p)              with N, T and E as in the projected form

    On rows that guidance pushes away from, `cleared` takes the place of `projected`.
    """
    if not isinstance(cross, JointAttention):
        raise ValueError(
            "The text-only form needs a joint attention layer, got cross-attention. Use the projected form, which is "
            "the same there."
        )
    own, share, texts = cross.read_alone(text)
    change = (cleared if cross.unconditional else projected)(own, texts, neutral, len(text), strength)
    heads = share.shape[-1]
    return (change.unflatten(-1, (heads, -1)) * share[..., None]).flatten(-2)


def oblique(out: Tensor, would_be: Tensor, neutral: int, strength: float) -> Tensor:
    """The change that the oblique form adds to `out`: [B, Q, C], float32 or wider.

    t and e are what the neutral texts and the phrases add to the empty text N. Least squares with a ridge explains
    `out - N` by all of them together, so a phrase's share c is what no other text explains. The phrase's output is
    taken out, and the mean of the neutral texts' takes its place:

        D = (t_1 .. t_T, e_1 .. e_P)     G = D^T D      c = (G + 0.05 diag G)^-1 D^T (out - N)
        added = -strength sum_k clamp(c_k, 0, 1) (e_k - mean t)                              k: the phrases

    Args:
        out: [B, Q, C].
        would_be: the layer's outputs for N, the T neutral texts and the P phrases: [1 + T + P, B, Q, C].
        neutral: T.
        strength: as in the formula.
    """
    would_be = would_be.to(torch.promote_types(out.dtype, torch.float32))
    added = (would_be[1:] - would_be[0]).permute(1, 2, 0, 3)  # [B, Q, T + P, C]
    gram = added @ added.mT
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    least = 1e-10 * torch.linalg.vecdot(would_be[0], would_be[0])[..., None]  # below, only rounding errors remain
    ridge = RIDGE * lengths + least.clamp_min(torch.finfo(gram.dtype).tiny)
    found = torch.linalg.solve(gram + torch.diag_embed(ridge), added @ (out - would_be[0])[..., None])
    shares = found[..., neutral:, 0].clamp(0, 1)
    phrases, others = added[..., neutral:, :], added[..., :neutral, :]
    gone = phrases - (others.mean(-2, keepdim=True) if neutral else 0)
    return -strength * (shares[..., None, :] @ gone).squeeze(-2)


# ---------------------------------------------------------------- the pooled text


def pooled_texts(
    pipe: DiffusionPipeline,
    sets: Sequence[tuple[Concept, ...]],
    neutral: Sequence[Sequence[str]],
    settings: Mapping[str, Any],
) -> dict[tuple[Concept, ...], Tensor]:
    """For each set of concepts, the pooled vectors of the empty text, the means of T groups of neutral texts, and those
    of the P phrases: [1 + T + P, D]."""
    phrases = {some: list(dict.fromkeys(p for each in some for p in each.phrases)) for some in sets}
    texts = list(
        dict.fromkeys(["", *(t for group in neutral for t in group), *(p for all_ in phrases.values() for p in all_)])
    )
    vectors = encode(pipe, texts, constant=True, **settings).pooled
    if vectors is None:
        raise RuntimeError("The pipeline has no pooled text.")
    of = dict(zip(texts, vectors, strict=True))
    means = [torch.stack([of[text] for text in group]).mean(0) for group in neutral]
    return {some: torch.stack([of[""], *means, *(of[p] for p in named)]) for some, named in phrases.items()}


def pooled_projected(pooled: Tensor, texts: Tensor, neutral: int, strength: float) -> Tensor:
    """Pooled vectors [B, D] without the phrases, in the projected form, from `pooled_texts` of one set."""
    rows = texts.to(pooled)[:, None, None].expand(-1, len(pooled), -1, -1)
    change = projected(pooled[:, None], rows, neutral, len(texts) - 1 - neutral, strength)
    return (pooled + change[:, 0]).to(pooled.dtype)
