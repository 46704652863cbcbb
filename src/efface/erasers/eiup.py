"""EIUP: attends to an erasure prompt, and removes the features that it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from .. import checks
from ..core import Concepts, ConceptsField, RowsField
from ..fields import Converted
from ..hooks import CrossAttention, ErasurePrompts, Method, Text, computed

__all__ = ["EIUP"]

Normalization = Literal["projected", "separate", "gated"]
STRENGTHS = {"projected": 2.25, "separate": 1.0, "gated": 1.0}
THINGS = ("dog", "tree", "car", "cup", "house", "star", "book", "hat", "flower", "fish", "shoe", "chair")


@dataclass(frozen=True)
class EIUP(Method):
    """Erases concepts during drawing, without training or changes of weights.

    In each cross-attention layer, with `A(q, X)` the softmax of the image queries against the keys of text X, P the
    text that the row reads, E the erasure prompt (the concept's phrases), N the empty text, w = -strength:

        separate (E1):   O = A(q, P) V_P + sum_{k in C} w A(q, E)_k V_E,k  C: E's own tokens
        gated (E1g):     O = A(q, P) V_P + g softmax_C(q K_E) w V_E,C      g = sigmoid(LSE_C(q K_E) - LSE(q K_P))
        projected:       t = A(q, T) V_T - A(q, N) V_N          what a neutral text T adds, for each T
                         d = A(q, E) V_E - A(q, N) V_N          what the concept adds, less its component along the t
                         a = max(0, <O - A(q, N) V_N, d> / <d, d>)          how much of it the row's text adds
                         O = O - strength a d                               per query, over heads and channels

    In joint attention (SD 3, FLUX, CogView4), the projected form takes other outputs, with I the picture's columns:

        A(q, X) V_X becomes A(q, [X, I]) V_[X, I], for X = P, N, T, E, where q are the picture's queries

    The denoiser carries N, T and E beside the prompt. Each attends to itself and to the picture, and passes the blocks
    as the prompt does. Prompt and picture do not attend to them, and only the picture's O changes.

    The projected form edits unconditional rows with a negative prompt differently. P_d projects onto the span of the d
    of all phrases: O = O - min(strength, 1) P_d (O - A(q, N) V_N).

    Paper: D. Chen, Z. Li, M. Fan, C. Chen, W. Zhou, Y. Li, 2024, "EIUP: A Training-Free Approach to Erase Non-Compliant
    Concepts Conditioned on Implicit Unsafe Prompts", arXiv 2408.01014 v1. Only the abstract of v1 was available, so
    there are no equation numbers. `separate` is the best-supported reconstruction. It follows the public code of the
    paper's second version (GIE, ICLR 2025), which takes a softmax over the erasure prompt alone, weights the concept's
    columns, and adds the result to the prompt's output. A figure of that version shows negative weights. The weights
    and the window of v1 are unknown; `EIUP.reconstruction()` uses the window of that code.

    Differs: `projected`, the default, is Efface's and not in the paper. With text encoders that have no start token to
    absorb attention, E1 pushes every prompt away from the concept. The projection changes only outputs that point
    towards it. N is the text of the pipeline's unconditional rows without a negative prompt (SDXL base: zeros), or the
    encoded "" without guidance. The user's negative prompt never affects the edit of the conditional rows. T are mean
    states of neutral texts. Removing what all things share would damage other pictures. A text that equals N is not
    edited. `gated` is also Efface's. All columns of the prompt stay, whereas GIE's code drops one padding column per
    concept token; so zero strength equals the base model bitwise. There is one trajectory, not two. Outside the window
    there is no edit. Joint attention is not in the paper. There, each encoder's padding of N, T and E becomes one
    column, its mean, which counts in the softmax as often as the padding has columns.

    Negative prompts: guidance pushes away from the unconditional rows. If these contained the concept, guidance would
    damage pictures of other things. If they contained less of it than the empty text, guidance would push towards the
    concept. The projected form therefore leaves in them as much of the concept as the empty text has. It treats the
    further rows of `NegativePrompt` with a strength in the same way. With an empty negative prompt it edits no
    unconditional row, at no cost. `separate` and `gated` never edit unconditional rows. With them, a negative prompt
    that names the concept increases the removal.

    The pooled text embeddings of SDXL, SD 3 and FLUX bypass attention and are not edited. On PixArt, whose T5 has no
    start token, text is projected and its padding masked as in the pipeline.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them. Projected:
            each phrase is an erasure prompt with its direction, and directions are removed one after the other (joined
            phrases would dilute each other). Separate and gated: phrases are packed into as few prompts as fit the
            encoder.
        strength: >= 0. Projected: the removed share of the concept's component; 1 removes all of it. Values above 1
            push the other way. Guidance amplifies that, so large values damage pictures. Separate and gated: the weight
            -w of each concept token; with CLIP, values above 1 are usual. Guidance amplifies the edit: a strength for
            guidance 7.5 is weak without guidance. 0 is the base model. Default: 2.25 for the projected form, the
            smallest that meets the targets on `emoji`, and not calibrated in joint attention; 1 for the others.
        window: (start, end), the part of the trajectory with the edit, as fractions: 0 is pure noise, 1 the picture.
        normalization: "projected", "separate" or "gated". The latter two need cross-attention.
        neutral: groups of neutral texts, which name ordinary things. The mean of each group is a T. Projected only; ()
            means none.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: queries and outputs [B, Q, C], text [N, L, D]; Q counts the picture's columns. Only the projected form edits
    unconditional rows, and only if they have a negative prompt; this doubles the cost of the edit.

    Raises:
        ValueError: a concept or `normalization` is unknown, `strength` is negative, `window` is outside [0, 1], a group
            of neutral texts is empty, or there is no concept. On `apply`: the pipeline lacks the attention layers that
            the form needs, or has fused cross-attention projections, or a phrase has no tokens or is over the encoder's
            limit. In a call: the numbers of `rows` and prompts differ.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.
        RuntimeError: in a call, the attention of a joint layer cannot be seen, as with other attention backends than
            diffusers' "native".

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.EIUP(["alcohol"]).apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    needs: ClassVar[tuple[str, ...]] = computed(
        lambda self: ("cross_text|joint_text",) if self.normalization == "projected" else ("cross_text",)
    )
    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f'`normalization="{form}"`': {"normalization": form} for form in ("separate", "gated")
    }
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "emoji": {}}  # the strength's
    edits_attention: ClassVar[bool] = True
    touches_uncond: ClassVar[bool] = computed(lambda self: self.normalization == "projected")
    packs: ClassVar[bool] = computed(lambda self: self.normalization != "projected")
    references: ClassVar[tuple[tuple[str, ...], ...]] = computed(
        lambda self: (("",), *self.neutral) if self.normalization == "projected" else Method.references
    )

    concepts: ConceptsField = Converted(())
    strength: Converted[float | None, float] = Converted(None)
    window: tuple[float, float] = (0.0, 1.0)
    normalization: Normalization = "projected"
    neutral: tuple[tuple[str, ...], ...] = (tuple(f"a {thing}" for thing in THINGS),)
    rows: RowsField = Converted(None)

    def __post_init__(self) -> None:
        checks.choice("normalization", self.normalization, get_args(Normalization))
        if self.strength is None:
            object.__setattr__(self, "strength", STRENGTHS[self.normalization])
        super().__post_init__()
        groups = self.neutral if isinstance(self.neutral, (tuple, list)) else ("",)
        if not all(isinstance(g, (tuple, list)) and g and all(isinstance(t, str) for t in g) for g in groups):
            cure = "Write for example (('a dog', 'a tree'),)."
            raise ValueError(checks.refusal("`neutral` to be groups of texts", self.neutral, cure))
        object.__setattr__(self, "neutral", tuple(tuple(group) for group in groups))

    @classmethod
    def reconstruction(cls, concepts: Concepts, strength: float = 1.0) -> EIUP:
        """E1, the form that the paper's abstract suggests, in the published window (the first 80 %)."""
        return cls(concepts, strength=strength, window=(0.0, 0.8), normalization="separate")

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        if self.normalization == "projected":
            # Guidance would bring back any difference from the empty text.
            strength = min(self.strength, 1.0) if cross.unconditional else self.strength
            added = projected(out, cross, prompts.text, len(self.neutral), strength)
        else:
            added = (separate if self.normalization == "separate" else gated)(cross, prompts, self.strength)
        return (out + added).to(out.dtype)


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


def projected(out: Tensor, cross: CrossAttention, text: Text, neutral: int, strength: float) -> Tensor:
    """The change that the projected form adds to `out`: [B, Q, C], float32 or wider. `neutral` is the number of T.

    N, T and P are the layer's outputs for the empty text, the neutral texts and the phrases:

        d_T = T - N;  d_P = P - N, less its share of every d_T;  o = out - N
        added = -strength sum_P max(0, <o, d_P> / |d_P|^2) d_P              one after the other
    """
    would_be = cross.with_empty(text).to(torch.promote_types(out.dtype, torch.float32))
    empty, others = would_be[0], would_be[1:] - would_be[0]
    others = others.permute(1, 2, 0, 3)
    least = 1e-10 * (empty * empty).sum(-1)  # of a squared length; below, texts differ from the empty one by rounding
    shares, directions = _shares(out - empty, others, neutral, strength, cross.unconditional, least)
    return -((shares[..., None, :] @ directions) @ others).squeeze(-2)


def _shares(
    toward: Tensor, others: Tensor, neutral: int, strength: float, unconditional: bool, smallest: Tensor
) -> tuple[Tensor, Tensor]:
    """The removed amount of each direction [B, Q, texts], and the directions as sums of `others` [.., texts, texts].

    `toward` [B, Q, C] and `others` [B, Q, neutral + phrases, C] exclude the empty text's output. All is linear in
    `others`, so their inner products suffice.
    """
    gram, texts = others @ others.mT, others.shape[2]
    least = gram.diagonal(dim1=-2, dim2=-1) * 1e-6  # of a squared length; below, only rounding errors remain
    least = torch.maximum(least, smallest[..., None]).clamp_min(torch.finfo(gram.dtype).tiny)
    identity = torch.eye(texts, dtype=gram.dtype, device=gram.device).expand_as(gram)
    # One row per text: its inner products with all texts, that with `toward`, and its coefficients.
    table = torch.cat([gram, others @ toward[..., None], identity], -1)
    shares = [torch.zeros_like(toward[..., 0])] * neutral
    pivots = [identity[..., k, :] for k in range(neutral)]
    for k in range(texts if unconditional else neutral):  # removes the share of text k from every text
        pivot = table[..., k : k + 1, :]
        length = pivot[..., k : k + 1].clamp_min(least[..., k, None, None])
        if k >= neutral:  # the rest of a phrase is orthogonal to the phrases before it
            shares.append(strength * (pivot[..., texts] / length[..., 0]).squeeze(-1))
            pivots.append(pivot[..., 0, texts + 1 :])
        table = table - table[..., k : k + 1] / length * pivot
    if unconditional:
        return torch.stack(shares, -1), torch.stack(pivots, -2)
    gram, along, parts = table.split([texts, 1, texts], -1)
    along = along.squeeze(-1)
    for k in range(neutral, texts):  # one after the other: each removal affects the next
        length = torch.maximum(gram[..., k, k], least[..., k])
        shares.append(strength * (along[..., k] / length).clamp_min(0))
        along = along - shares[k][..., None] * gram[..., k]
    return torch.stack(shares, -1), parts
