"""SLD: guidance away from the prediction for a safety concept, only where the prompt's prediction is near it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..core import Concepts, ConceptsField, RowsField
from ..fields import Converted
from ..hooks import Method, Prediction, computed

__all__ = ["SLD"]


@dataclass(frozen=True)
class SLD(Method):
    """Safe Latent Diffusion: subtracts a masked, smoothed direction towards the concept from the guidance.

    e_u is the prediction for the unconditional text or the negative prompt, e_p for the prompt, e_S for the concept;
    s_g is the guidance scale. At each step, element by element:

        mu    = min(1, s_S |e_p - e_S|)  where e_p - e_S < lambda, else 0
        gamma = mu (e_S - e_u) + s_m nu
        nu    = beta_m nu + (1 - beta_m) gamma                      nu = 0 at first
        e     = e_u + s_g (e_p - e_u - strength gamma)              gamma only after the warm-up

    Paper: P. Schramowski, M. Brack, B. Deiseroth, K. Kersting, 2023, "Safe Latent Diffusion: Mitigating Inappropriate
    Degeneration in Diffusion Models", CVPR, arXiv 2211.05105, equations 3 to 8.

    Differs: mu is at most 1, as in the authors' code (the paper prints a maximum, which would amplify the direction).
    `strength` is Efface's: 1 is the paper's form. s_S does not scale the effect: mu reaches 1 at |e_p - e_S| = 1 / s_S,
    so values above about 1000 change nothing. The warm-up is a fraction of the steps. The paper counts steps of 50: 10
    steps are 0.2. Schedulers that call the denoiser twice per step (PNDM, Heun, DPM2) do not shorten it; the authors'
    code counts calls. `SLD.weak()` has diffusers' s_S = 20; `SLD.weak_paper()` has the paper's 200. The concept's text
    is `concepts`, not the paper's list of harms. Phrases that do not fit into one text are split into several texts,
    whose predictions are averaged. For v-prediction models (SD 2.x), e_u, e_p and e_S are v, so the threshold has
    another scale. SD 3, FLUX and CogView4 predict a velocity, which guidance and gamma combine in the same way; lambda
    and s_S have its unit and are not calibrated there. FLUX needs true guidance (`true_cfg_scale` above 1, a negative
    prompt). FLUX and CogView4 predict e_u in a separate call, and SLD predicts it again in the call of e_p.
    `guidance_rescale` takes its target from e_p - strength gamma.

    If the prompt equals the concept's text, e_p = e_S and SLD has no effect, as in the paper; combine it with EIUP. The
    edits of several SLDs add up; each uses the unedited e_p. During the warm-up, SLD predicts the concept only if s_m >
    0.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them. All
            phrases form one safety text, so few words have a stronger effect than many.
        strength: >= 0, the factor of gamma. 0 is the base model, without further rows.
        sld_guidance_scale: s_S >= 0; the paper has 200, 1000, 2000, 5000.
        threshold: lambda, in units of predicted noise; the paper has 0, 0.01, 0.025, 1. Compared with the signed
            difference; larger values change more elements.
        momentum_scale: s_m >= 0; the paper has 0, 0.3, 0.5, 0.5.
        momentum_beta: beta_m in [0, 1); the paper has 0, 0.4, 0.7, 0.7.
        warmup: in [0, 1], the fraction of the steps without gamma. The paper has 15, 10, 7 and 0 of 50 steps: 0.3, 0.2,
            0.14, 0. For direct denoiser calls, the fraction of the noise levels.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: predictions [B, C, h, w] (FLUX: [B, L, C]). Adds one denoiser row per conditional row: a step costs 1.5
    times a base step. On FLUX and CogView4 it adds two rows: 2 times. If the concept's text and the prompt differ in
    length (CogView4, or given embeddings), it needs a separate denoiser call.

    Raises:
        ValueError: a concept is unknown, a field is out of range, or there is no concept. On `apply`: the text encoder
            belongs to another model, or a phrase has no tokens or is over the encoder's limit. During a call: guidance
            is off, the model is guidance-distilled, the batch lacks the unconditional rows, the numbers of `rows` and
            prompts differ, or the call has SD 3's `skip_guidance_layers`.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.SLD.strong("alcohol").apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"SD 1.x/2.x": {}}  # the paper's settings
    needs: ClassVar[tuple[str, ...]] = ("guidance",)
    touches_uncond: ClassVar[bool] = False
    guides: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = True
    # During the warm-up, only the momentum needs the concept's prediction.
    window = computed(lambda self: (0.0 if self.momentum_scale else self.warmup, 1.0))

    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    sld_guidance_scale: float = 1000.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4
    warmup: float = 0.2
    rows: RowsField = Converted(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.each(self, checks.number, "sld_guidance_scale", "momentum_scale", least=0)
        checks.each(self, checks.number, "threshold")
        object.__setattr__(self, "momentum_beta", checks.number("momentum_beta", self.momentum_beta, 0, 1, below=True))
        object.__setattr__(self, "warmup", checks.share("warmup", self.warmup))

    @classmethod
    def weak(cls, concepts: Concepts, **fields: Any) -> SLD:
        """diffusers' setting of this name, with a tenth of the paper's s_S."""
        return cls(concepts, **{**_setting(20, 0.0, 0.0, 0.0, 15), **fields})

    @classmethod
    def weak_paper(cls, concepts: Concepts, **fields: Any) -> SLD:
        """The paper's Hyp-Weak."""
        return cls(concepts, **{**_setting(200, 0.0, 0.0, 0.0, 15), **fields})

    @classmethod
    def medium(cls, concepts: Concepts, **fields: Any) -> SLD:
        """The paper's Hyp-Medium, the default."""
        return cls(concepts, **{**_setting(1000, 0.01, 0.3, 0.4, 10), **fields})

    @classmethod
    def strong(cls, concepts: Concepts, **fields: Any) -> SLD:
        """The paper's Hyp-Strong."""
        return cls(concepts, **{**_setting(2000, 0.025, 0.5, 0.7, 7), **fields})

    @classmethod
    def max(cls, concepts: Concepts, **fields: Any) -> SLD:
        """The paper's Hyp-Max, which changes pictures strongly."""
        return cls(concepts, **{**_setting(5000, 1.0, 0.5, 0.7, 0), **fields})

    def is_off(self) -> bool:
        return super().is_off() or not self.sld_guidance_scale

    def exempt(self, time: Tensor) -> str:
        return "" if bool(time >= self.warmup) else "warm-up"

    def guide(self, seen: Prediction) -> Tensor:
        difference = seen.prompt - seen.concept
        mu = (self.sld_guidance_scale * difference.abs()).clamp(max=1)
        mu = torch.where(difference < self.threshold, mu, 0)
        nu = seen.memory.get("nu", torch.zeros_like(mu))
        gamma = mu * (seen.concept - seen.negative) + self.momentum_scale * nu
        seen.memory["nu"] = self.momentum_beta * nu + (1 - self.momentum_beta) * gamma
        return torch.where(seen.time >= self.warmup, -self.strength * gamma, 0)


def _setting(scale: float, threshold: float, momentum: float, beta: float, steps: int) -> dict[str, float]:
    """The paper's table: s_S, lambda, s_m, beta_m, and the warm-up in steps of 50."""
    return {
        "sld_guidance_scale": scale,
        "threshold": threshold,
        "momentum_scale": momentum,
        "momentum_beta": beta,
        "warmup": steps / 50,
    }
