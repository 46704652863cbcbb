"""CRG: takes out of the prompt's prediction just enough of the direction towards the concept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..core import ConceptsField, RowsField
from ..fields import Converted
from ..hooks import Method, Prediction

__all__ = ["CRG"]


@dataclass(frozen=True)
class CRG(Method):
    """Concept Removal Guidance: limits how far the prompt's prediction lies towards the concept's.

    e_u is the prediction for the unconditional text or the negative prompt, e_p for the prompt, e_c for the concept.
    At each step, for each picture:

        D   = e_c - e_u
        a   = <e_p - e_u, D> / |D|^2                       the share of the concept in the prompt's prediction
        e_p = e_p - strength max(a - threshold, 0) D       then guidance

    With strength = 1 the new share is the threshold. With strength = 2 it is mirrored at the threshold: a becomes
    2 threshold - a, so at the default threshold a prompt equal to the concept becomes the unconditional prediction.

    Paper: "Concept Removal Guidance", ICML 2026, arXiv 2606.29801. The authors' names and the equation numbers were not
    available, and no official code was found: the idea and the closed form are those of its abstract.

    Differs: the paper compares CP = |D|^2 (a - 1/2) with a threshold tau. |D|^2 grows with the number of latent pixels,
    so tau would depend on the resolution; `threshold` limits a itself, and 1/2 is tau = 0. The paper's sum over earlier
    steps is omitted, because its constants could not be confirmed. The default strength is that of a third-party
    description. Velocities (SD 2.x, SD 3, FLUX, CogView4) are combined in the same way. FLUX needs true guidance
    (`true_cfg_scale` above 1, a negative prompt).

    Limits: CRG sees the sum over a picture, so a concept in a small part of it has a small share and may stay below the
    threshold. A negative prompt replaces e_u: if it repeats the prompt, a = 0 and CRG has no effect. This
    implementation has not been measured on a large model.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them. All
            phrases form one text.
        strength: >= 0, without unit; 1 stops at the threshold, 2 mirrors. 0 is the base model, without further rows.
        threshold: the share a above which CRG acts, without unit; below 0 it acts on nearly all prompts. The paper's
            tau = 0 is 0.5.
        window: (start, end), the part of the trajectory in which it acts: 0 is pure noise, 1 the picture.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: predictions [B, C, h, w] (FLUX: [B, L, C]), a [B]. Adds one denoiser row per conditional row: a step costs
    1.5 times a base step. On FLUX and CogView4 it adds two rows: 2 times.

    Raises:
        ValueError: a concept is unknown, a field is out of range, or there is no concept. On `apply`: the text encoder
            belongs to another model, or a phrase has no tokens or is over the encoder's limit. During a call: guidance
            is off, the batch lacks the unconditional rows, or the numbers of `rows` and prompts differ.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.CRG("alcohol").apply(pipe):
        ...     image = pipe("a glass of wine", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"SD 1.x/2.x": {}}
    needs: ClassVar[tuple[str, ...]] = ("guidance",)
    guides: ClassVar[bool] = True

    concepts: ConceptsField = Converted(())
    strength: float = 2.0
    threshold: float = 0.5
    window: tuple[float, float] = (0.0, 1.0)
    rows: RowsField = Converted(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", checks.number("threshold", self.threshold))

    def guide(self, seen: Prediction) -> Tensor:
        towards, each = seen.concept - seen.negative, tuple(range(1, seen.prompt.ndim))
        size = towards.square().sum(each, keepdim=True).clamp_min(torch.finfo(towards.dtype).tiny)
        share = ((seen.prompt - seen.negative) * towards).sum(each, keepdim=True) / size
        return -self.strength * (share - self.threshold).clamp_min(0) * towards
