"""EIUP: an erasure prompt takes part in cross-attention, and the features it finds are re-weighted away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from .._attention import CrossAttention, Term
from .._hooks import Hooked
from ..core import Concepts, Rows

__all__ = ["EIUP"]

Normalization = Literal["projected", "separate", "gated"]
THINGS = ("dog", "tree", "car", "cup", "house", "star", "book", "hat", "flower", "fish", "shoe", "chair")


@dataclass(frozen=True)
class EIUP(Hooked):
    """Erases concepts while a picture is drawn, without training and without touching weights.

    In each cross-attention layer, with `A(q, X)` the softmax of the image queries against the keys of text X, P the
    user's prompt, E the erasure prompt (the concept's phrases), N a neutral text, w = -strength:

        separate (E1):   O = A(q, P) V_P + sum_{k in C} w A(q, E)_k V_E,k  C: E's own tokens
        gated (E1g):     O = A(q, P) V_P + g softmax_C(q K_E) w V_E,C      g = sigmoid(LSE_C(q K_E) - LSE(q K_P))
        projected:       d = A(q, E) V_E - A(q, N) V_N                     what the concept would add here
                         a = max(0, <O - A(q, N) V_N, d> / <d, d>)         how much of it the prompt adds
                         O = O - strength a d                              per query, over heads and channels

    Paper: D. Chen, Z. Li, M. Fan, C. Chen, W. Zhou, Y. Li, 2024, "EIUP: A Training-Free Approach to Erase
    Non-Compliant Concepts Conditioned on Implicit Unsafe Prompts", arXiv 2408.01014 v1. Equation numbers cannot be
    given: only the abstract of v1 could be read. `separate` is the best supported reading of it, from its second
    version (GIE, ICLR 2025), whose published code takes the erasure prompt's softmax on its own, weights the concept's
    columns after it and adds the result to the prompt's, with weights that are drawn negative in that version's
    figure. The weights and the window of v1 are not known; `EIUP.paper()` uses the window of the second version's code.

    Differs: `projected`, the default, is our variant and is not in the paper: on text encoders without a start token
    that soaks up attention, E1 pushes every prompt away from the concept, the projection only those that move towards
    it. Each phrase goes twice: N is first the mean of the states of texts that name ordinary things, then the empty
    prompt. With the empty prompt alone, d holds what all pictures of things have in common, and taking that out spoils
    bystanders; with the things alone, prompts that imply the concept keep more of it. `gated` is ours too. All of the
    prompt's columns are kept (the published code of GIE drops one padding column for each concept token), so zero
    strength is the plain pipeline to the bit. One trajectory, not two. Outside the window the plain prompt is drawn.
    SDXL's pooled text embedding does not pass cross-attention and is not edited. A prompt that equals N is left alone
    by that N only: with the default two, the empty prompt is changed where things move towards the concept.
    On PixArt, whose T5 has no start token either, text is projected and its padding masked as the pipeline does it.

    Args:
        concepts: what to erase: names of shipped concepts, `Concept` objects, or a sequence of them. Projected: each
            phrase is an erasure prompt with a direction of its own, taken out one after the other (joined phrases
            dilute one another). Separate and gated: phrases are packed into as few prompts as fit the encoder.
        strength: >= 0. Projected: the share of the concept's component that is taken out, 1 = all of it. Above 1 it
            pushes the other way, and guidance multiplies that: pictures suffer soon. Separate and gated: the weight -w
            of each concept token; on CLIP values above 1 are usual. Guidance multiplies it too: what suits 7.5 is weak
            without guidance. 0 is the plain pipeline.
        window: (start, end), the part of the trajectory in which it acts, as fractions: 0 is pure noise, 1 the picture.
        normalization: "projected", "separate" or "gated".
        neutral: groups of texts; the mean of each group is an N, "some picture", and they take turns. Projected only.
            `(("",),)` is the pipeline's empty prompt alone.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: queries and outputs [B, Q, C] on conditional rows, text [N, L, D]. Unconditional rows are never edited.

    Raises:
        ValueError: unknown concept or normalization, negative strength, a window outside [0, 1], no neutral text, no
            concept at all; on `apply`: a pipeline without cross-attention, fused projections, a phrase without tokens
            or over the encoder's limit; in a call: `rows` that are not as many as the prompts.
        TypeError: a pipeline of another family; `rows` or concepts that are no lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.EIUP(["alcohol"], strength=1.0).apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    touches_uncond: ClassVar[bool] = False
    edits_attention: ClassVar[bool] = True

    concepts: Concepts = ()  # type: ignore[assignment]
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    normalization: Normalization = "projected"
    neutral: tuple[tuple[str, ...], ...] = (tuple(f"a {thing}" for thing in THINGS), ("",))
    rows: Rows = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalization not in get_args(Normalization):
            raise ValueError(
                f"Expected `normalization` to be one of {get_args(Normalization)}, but got {self.normalization!r}."
            )
        groups = self.neutral if isinstance(self.neutral, (tuple, list)) else ()
        if not groups or not all(
            isinstance(g, (tuple, list)) and g and all(isinstance(t, str) for t in g) for g in groups
        ):
            raise ValueError(f"Expected `neutral` to be groups of texts, such as (('',),), but got {self.neutral!r}.")
        object.__setattr__(self, "neutral", tuple(tuple(group) for group in groups))

    @classmethod
    def paper(cls, concepts: Concepts, strength: float = 1.0) -> EIUP:
        """The paper's form, E1, in the published window (the first 80 % of the trajectory)."""
        return cls(concepts, strength=strength, window=(0.0, 0.8), normalization="separate")

    @property
    def packs(self) -> bool:  # type: ignore[override]
        return self.normalization != "projected"

    @property
    def references(self) -> tuple[tuple[str, ...], ...]:  # type: ignore[override]
        return self.neutral if self.normalization == "projected" else Hooked.references

    def edit(self, out: Tensor, cross: CrossAttention, term: Term) -> Tensor:
        if self.normalization == "projected":
            texts, mask = torch.cat([cross.neutral, term.text]), cross.mask_with(term.mask)
            would_be = cross.would_be(texts, mask).to(torch.promote_types(out.dtype, torch.float32))
            return (out + self._projected(out - would_be[0], would_be - would_be[0], len(texts) - len(term.text))).to(
                out.dtype
            )
        key, value = cross.keys_values(term.text)
        if self.normalization == "separate":
            weight = torch.zeros(len(value), 1, value.shape[2], 1, dtype=value.dtype, device=value.device)
            for n, own in enumerate(term.own):
                weight[n, :, own] = -self.strength
            return out + cross.attend_texts(key, weight * value, term.mask).sum(0)
        prompt_key, _ = cross.keys_values(cross.prompt)
        added = out
        for n, own in enumerate(term.own):
            own_key, own_value = (x[n : n + 1, :, own].expand(len(out), -1, -1, -1) for x in (key, value))
            own_value = torch.cat([torch.zeros_like(prompt_key), -self.strength * own_value], 2)
            mask = cross.prompt_mask
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(out), own.stop - own.start)], 1)
            added = added + cross.attend(torch.cat([prompt_key, own_key], 2), own_value, mask)
        return added

    def _projected(self, out: Tensor, would_be: Tensor, references: int) -> Tensor:
        """What the projected form adds [B, Q, C]; `would_be` [R + N, B, Q, C] and `out` are less the first N.

        Every d is a difference of two texts, so the inner products of the texts are all that is needed.
        """
        texts, phrases = len(would_be), len(would_be) - references
        ones = torch.eye(texts, dtype=would_be.dtype, device=would_be.device)
        # [phrases * R, texts]: all N for each phrase
        d = (ones[references:, None] - ones[None, :references]).flatten(0, 1)
        neutral = ones[:references].repeat(phrases, 1)
        each = would_be.permute(1, 2, 0, 3)  # [B, Q, texts, C]
        inner = each @ each.mT
        toward = (d * ((each @ out[..., None]).mT - neutral @ inner)).sum(-1).permute(2, 0, 1)
        gram = (d @ inner @ d.mT).permute(2, 3, 0, 1)
        # One after the other, in the coordinates <., d_n>: taking a_k d_k out lowers the n-th by a_k <d_k, d_n>.
        shares = torch.zeros_like(toward)
        for k in range(len(d)):
            length = gram[k, k].clamp_min(torch.finfo(d.dtype).tiny)
            shares[k] = self.strength * (toward[k] / length).clamp_min(0)
            toward = toward - shares[k] * gram[k]
        return -((shares.permute(1, 2, 0) @ d)[..., None, :] @ each).squeeze(-2)
