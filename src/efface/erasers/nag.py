"""NAG: attention guidance away from a negative text, with a cap on the growth of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..core import ConceptsField, RowsField
from ..fields import Converted
from ..hooks import CrossAttention, Encoding, ErasurePrompts, Memory, Method
from ._keys import remembered, would_be

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["NAG"]


@dataclass(frozen=True)
class NAG(Method):
    """Normalized Attention Guidance: moves each attention output away from that of the concept's text.

    NAG edits the conditional rows in each layer that reads text. Z+ is the layer's output for the text that the row
    reads, Z- its output for the concept's text. In joint attention (SD 3, FLUX, CogView4) both are outputs for the
    picture's queries, over the columns of the text and of the picture. There, the denoiser carries the concept's text
    beside the prompt; it attends to itself and to the picture, which do not attend to it. |.|_1 sums magnitudes over
    the channels of one token; s = strength + 1:

        G = s Z+ - (s - 1) Z-                           equal to Z+ + strength (Z+ - Z-)
        r = |G|_1 / |Z+|_1                              per token
        Z = alpha G min(r, tau) / r + (1 - alpha) Z+    Z replaces Z+

    If strength = 0, alpha = 0 or Z- = Z+, the output stays Z+. Always |Z|_1 <= (1 + alpha (tau - 1)) |Z+|_1.

    Paper: D.-Y. Chen, H. Bandyopadhyay, K. Zou, Y.-Z. Song, 2025, "Normalized Attention Guidance: Universal Negative
    Guidance for Diffusion Models", arXiv 2505.21179. There are no equation numbers, because the source was a
    description of the method and of the authors' code.

    Differs: the negative text is the concept's, not the user's `negative_prompt`. Each concept has one text: its
    phrases separated by spaces. Several concepts, or phrases that need several texts, add up under one cap: G = Z+ +
    strength sum_k (Z+ - Z-_k), so their order does not matter. The paper has one negative text, in which several
    concepts would dilute each other. If |Z+|_1 = 0, r is undefined in the published code for SDXL; here the output
    stays 0. If another method edited the layer's output before, Z+ is the edited output. In joint attention, padding of
    the concept's text becomes one column, its mean, which counts as often as the padding has columns.

    Limits: if the prompt equals the concept's text, Z- = Z+ and NAG has no effect. The smaller Z+ - Z-, the smaller its
    effect: expect little on prompts that name only the concept. This implementation has not been measured on a large
    model. The defaults are the published ones.

    Negative prompts: NAG does not edit unconditional rows, and its edit of the conditional rows does not depend on
    them. A negative prompt therefore acts as without NAG; if it names the concept, it pushes away from it a second
    time. Guidance amplifies the difference of the two predictions, and with it NAG's edit. Whether a negative prompt
    can bring a concept back has not been measured.

    The pooled text embeddings of SDXL, SD 3 and FLUX bypass attention and are not edited. On PixArt, the padding of the
    concept's text is masked as in the pipeline.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them.
        strength: >= 0, the paper's phi = s - 1, without unit: the factor of Z+ - Z- in G. 0 equals the base model
            bitwise. Published: 4 (s = 5) for most models, 2 for SDXL with DMD2, 8 for Wan. The cap limits the effect of
            large values. The pipeline's guidance amplifies the edit.
        tau: >= 1, the largest r; the published value is 2.5. At 1, no token of G is larger than that of Z+.
        alpha: in [0, 1], the share of G in the output. Published: 0.5 for SDXL, the default, 0.25 for FLUX and Wan,
            0.125 for SD 3. 0 equals the base model bitwise.
        window: (start, end), the part of the trajectory in which it acts, as fractions: 0 is pure noise, 1 the picture.
            Published: all of it. The early part has most of the effect.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: Z+, G and Z [B, Q, C], Z- [N, B, Q, C] for the N texts of a row, r [B, Q, 1]. The denoiser gets no further
    rows. Each layer computes attention once more per text.

    Raises:
        ValueError: a concept is unknown, `strength` is negative, `tau` is below 1, `alpha` or `window` is outside [0,
            1], or there is no concept. On `apply`: the pipeline has fused cross-attention projections, or a phrase has
            no tokens or is over the encoder's limit. In a call: the numbers of `rows` and prompts differ.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.NAG(["alcohol"]).apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    needs: ClassVar[tuple[str, ...]] = ("cross_text|joint_text",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "SDXL": {}}  # the published ones
    edits_attention: ClassVar[bool] = True
    references: ClassVar[tuple[tuple[str, ...], ...]] = ()  # it reads only the concept's text

    concepts: ConceptsField = Converted(())
    strength: float = 4.0
    tau: float = 2.5
    alpha: float = 0.5
    window: tuple[float, float] = (0.0, 1.0)
    rows: RowsField = Converted(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most, cure in (
            ("tau", inf, "Give 1 or more, such as the published 2.5."),
            ("alpha", 1, "Give a share, and raise `strength` or `tau` for a larger effect."),
        ):
            least = 1 if name == "tau" else 0
            object.__setattr__(self, name, checks.number(name, getattr(self, name), least, most, cure=cure))

    def is_off(self) -> bool:
        return super().is_off() or not self.alpha

    def prepared(
        self, pipe: DiffusionPipeline, erasure_prompts: Sequence[str], call: Encoding | None, memory: Memory
    ) -> Memory:
        return remembered(pipe, memory)

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        wide = torch.promote_types(out.dtype, torch.float32)
        positive, negative = out.to(wide), would_be(cross, prompts.text).to(wide)
        return guided(positive, negative, self.strength, self.tau, self.alpha).to(out.dtype)


def guided(positive: Tensor, negative: Tensor, strength: float, tau: float, alpha: float) -> Tensor:
    """Z for Z+ [..., C] and the Z- of N texts [N, ..., C]: the formula of the class.

    Uses min(r, tau) / r = min(|G|, tau |Z+|) / |G|, which does not divide by |Z+|.
    """
    pushed = positive + strength * (positive - negative).sum(0)
    size, most = (x.abs().sum(-1, keepdim=True) for x in (pushed, tau * positive))
    share = torch.minimum(size, most) / size.clamp_min(torch.finfo(size.dtype).tiny)
    return positive + alpha * (share * pushed - positive)
