"""NAG: attention guidance away from a negative text, with a cap on how much each token grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..core import ConceptsField, RowsField
from ..fields import Converted
from ..hooks import CrossAttention, ErasurePrompts, Method

__all__ = ["NAG"]


@dataclass(frozen=True)
class NAG(Method):
    """Normalized Attention Guidance: moves each cross-attention output away from that of the concept's text.

    NAG edits the conditional rows in each cross-attention layer. Z+ is the layer's output for the text that the row
    reads, Z- its output for the concept's text. |.|_1 sums magnitudes over the channels of one token; s = strength + 1:

        G = s Z+ - (s - 1) Z-                           equal to Z+ + strength (Z+ - Z-)
        r = |G|_1 / |Z+|_1                              per token
        Z = alpha G min(r, tau) / r + (1 - alpha) Z+    Z replaces Z+

    strength = 0, alpha = 0 or Z- = Z+ leaves Z+. In all cases |Z|_1 <= (1 + alpha (tau - 1)) |Z+|_1.

    Paper: D.-Y. Chen, H. Bandyopadhyay, K. Zou, Y.-Z. Song, 2025, "Normalized Attention Guidance: Universal Negative
    Guidance for Diffusion Models", arXiv 2505.21179. Equation numbers cannot be given: written from a
    description of the method and of the authors' code.

    Differs: the negative text is the concept's, not the user's `negative_prompt`. Each concept has a text of its own,
    its phrases separated by spaces. Several concepts, or phrases that need several texts, add their pushes under one
    cap: G = Z+ + strength sum_k (Z+ - Z-_k), so their order does not matter. The paper has one negative text; its users
    would write all concepts into it, where each dilutes the others. Where |Z+|_1 = 0, r is undefined in the published
    code for SDXL; here the output stays 0. If another method edited the layer's output before, Z+ is the edited output.
    NAG covers cross-attention only; the paper also covers joint attention (SD 3, FLUX).

    Limits: a prompt that is the concept's own text gives Z- = Z+, so NAG draws what the base model draws. The smaller
    Z+ - Z-, the less NAG does: expect little of it on prompts that name the concept and nothing else. Nobody has
    measured this implementation on a large model; the defaults are the published ones.

    Negative prompts: NAG leaves unconditional rows alone, and what it adds to the conditional rows does not depend on
    them. A user's negative prompt therefore acts as without NAG; one that names the concept pushes away from it a
    second time. Guidance multiplies the difference of the two predictions, so it multiplies what NAG adds. Whether some
    negative prompt brings a concept back is not measured.

    SDXL's pooled text embedding does not pass cross-attention and is not edited.
    On PixArt, the padding of the concept's text is masked as the pipeline masks it.

    Args:
        concepts: what to erase: names of shipped concepts, `Concept` objects, or a sequence of them.
        strength: >= 0, the paper's phi = s - 1, without unit: how many times Z+ - Z- is added to Z+. 0 is the base
            model to the bit. Published: 4 (s = 5) for most models, 2 for SDXL with DMD2, 8 for Wan. The cap limits the
            effect of large values. The pipeline's guidance multiplies what NAG does.
        tau: >= 1, the largest r; the published value is 2.5. At 1 no token of G is larger than that of Z+.
        alpha: in [0, 1], the share of G in the output. Published: 0.5 for SDXL, the default, 0.25 for FLUX and Wan,
            0.125 for SD 3. 0 is the base model to the bit.
        window: (start, end), the part of the trajectory in which it acts, as fractions: 0 is pure noise, 1 the picture.
            Published: all of it; the early part has most of the effect.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: Z+, G and Z [B, Q, C], Z- [N, B, Q, C] for the N texts of a row, r [B, Q, 1]. The denoiser gets no further
    rows; each layer computes attention once more for each text.

    Raises:
        ValueError: unknown concept, negative strength, `tau` below 1, `alpha` outside [0, 1], a window outside [0, 1],
            no concept at all; on `apply`: a pipeline without cross-attention, fused projections, a phrase without
            tokens or over the encoder's limit; in a call: `rows` that are not as many as the prompts.
        TypeError: a pipeline of another family; `rows` or concepts that are no lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.NAG(["alcohol"]).apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "SDXL": {}}  # the published ones
    edits_attention: ClassVar[bool] = True
    references: ClassVar[tuple[tuple[str, ...], ...]] = ()  # it reads no text but the concept's

    concepts: ConceptsField = Converted(())
    strength: float = 4.0
    tau: float = 2.5
    alpha: float = 0.5
    window: tuple[float, float] = (0.0, 1.0)
    rows: RowsField = Converted(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most, cure in (
            ("tau", inf, "A smaller cap would shrink every token; the published value is 2.5."),
            ("alpha", 1, "It is a share; raise `strength` or `tau` for a larger effect."),
        ):
            least = 1 if name == "tau" else 0
            object.__setattr__(self, name, checks.number(name, getattr(self, name), least, most, cure=cure))

    def is_off(self) -> bool:
        return super().is_off() or not self.alpha

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        wide = torch.promote_types(out.dtype, torch.float32)
        positive, negative = out.to(wide), cross.would_be(prompts.text).to(wide)
        return guided(positive, negative, self.strength, self.tau, self.alpha).to(out.dtype)


def guided(positive: Tensor, negative: Tensor, strength: float, tau: float, alpha: float) -> Tensor:
    """Z for Z+ [..., C] and the Z- of N texts [N, ..., C]: the formula of the class.

    Written with min(r, tau) / r = min(|G|, tau |Z+|) / |G|, which has no division by |Z+|.
    """
    pushed = positive + strength * (positive - negative).sum(0)
    size, most = (x.abs().sum(-1, keepdim=True) for x in (pushed, tau * positive))
    share = torch.minimum(size, most) / size.clamp_min(torch.finfo(size.dtype).tiny)
    return positive + alpha * (share * pushed - positive)
