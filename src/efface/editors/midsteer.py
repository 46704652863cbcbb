"""MidSteer: moves the mean output of a concept to its anchor's, by the smallest affine map; no weight changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import checks
from ..core import Concepts
from ..delta import Steering
from ..families import family
from ._outputs import SUBJECTS, Moments, check_drawing, moments, turns, wanted
from ._settings import FamilyDefaults

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["MidSteer"]


@dataclass(frozen=True)
class MidSteer(FamilyDefaults):
    """Moves a concept's mean output in each cross-attention layer, along the direction that neutral outputs use least.

    x [D] is a token of a layer's output, after `to_out`. c, a, m are its means for the concept, its anchor and neutral
    texts, and S is the covariance for neutral texts:

        x' = x - strength g(<p, x - m>) d,     p = S^-1 e / (e^T S^-1 e)
        mode "erase":    e = c - m,  d = c - m
        mode "switch":   e = c - m,  d = c - a
        mode "leace":    e = c - a,  d = c - a

    g is the identity, or the positive part with `positive`. With strength = 1 and without `positive`, "erase" sends the
    concept's mean to m and "switch" sends it to a; m stays. "leace" makes concept and anchor alike along p. Among all p
    with <p, e> = 1, this one moves neutral tokens least: it minimises p^T S p.

    Paper: "MidSteer", ICML 2026, arXiv 2605.05220. The authors' names and the equation numbers were not available: the
    source was a description of the authors' code. There, p and d are written with S^1/2 and S^-1/2, which gives the
    same map.

    Differs: the authors measure c on 1,000 captions and S on 50,000, in one step of SDXL-Turbo, and use them in every
    step of SDXL. Here they are measured in all steps of the model's own pictures. S gets `ridge` times its mean
    eigenvalue on the diagonal, because fewer pictures give no full rank. In the code the neutral mean becomes 0 when a
    concept is erased, because it is subtracted from itself; this is not repeated. Only conditional rows are edited.
    With several concepts the changes are summed.

    Limits: the map moves means, so single tokens keep what the mean does not have. This implementation has not been
    measured on a large model.

    Args:
        mode: "erase", "switch" or "leace", see above. "leace" is the second published form of switching.
        neutral: the neutral texts; code: 50,000 captions.
        strength: >= 0, the first strength of the result; code: 0.5 to 3 ("erase"), 1 to 5 ("switch"). None: the
            family's default.
        positive: whether only tokens that point towards the concept change; code: False.
        ridge: > 0, the share of the mean eigenvalue on the diagonal of S.
        pictures: pictures per concept and per anchor, >= 1.
        sampler_steps: steps of each picture; code: 1, on SDXL-Turbo. None: the family's default.
        guidance: guidance scale of the pictures, >= 1.
        window: (start, end), the part of the steps with the edit, which is also the part that is measured.
        batch: pictures per pipeline call.

    Shapes: x [B, Q, D]; p, d, m [K, 1, D] per layer for K concepts; S [D, D].

    Raises:
        ValueError: a field is out of range, or there are no neutral texts. On `fit`: the pipeline has no
            cross-attention or has run-time erasers, a text is over the encoder's limit, a phrase is also a neutral
            text, or the means are equal, so that there is no direction.
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> cat = efface.Concept("cat", anchor="a dog")
        >>> fit = efface.MidSteer("switch", neutral=("a tree",), pictures=1, sampler_steps=2)
        >>> steering = fit.fit(pipe, cat)
        >>> with steering.apply(pipe):
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"strength": 2.0, "sampler_steps": 10},
        "": {"strength": 1.0, "sampler_steps": 25},
    }

    mode: Literal["erase", "switch", "leace"] = "erase"
    neutral: tuple[str, ...] = SUBJECTS
    strength: float | None = None
    positive: bool = False
    ridge: float = 0.01
    pictures: int = 8
    sampler_steps: int | None = None
    guidance: float = 7.5
    window: tuple[float, float] = (0.0, 1.0)
    batch: int = 8

    def __post_init__(self) -> None:
        checks.choice("mode", self.mode, ("erase", "switch", "leace"))
        checks.choice("positive", self.positive, (True, False))
        checks.each(self, checks.texts, "neutral")
        checks.each(self, checks.window, "window")
        checks.each(self, checks.number, "strength", least=0)
        checks.each(self, checks.number, "ridge", least=0, above=True)
        check_drawing(self)
        checks.whole("pictures", self.pictures)
        if not self.neutral:
            raise ValueError(checks.refusal("at least one of `neutral`", self.neutral, "Write ('a dog', 'a tree')."))

    def fit(self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0) -> Steering:
        """Returns the steering that erases `concepts`. Only reads `pipe`.

        Args:
            pipe: the pipeline. Its deltas are part of the model.
            concepts: their phrases are drawn, each in turn, and their anchors unless the mode is "erase".
            seed: seed of the first picture of each kind.
        """
        method = self.resolved(pipe)
        found, prefix = wanted(pipe, concepts, *self.neutral), family(pipe).denoiser
        for concept in found:
            aims = self.neutral if self.mode == "erase" else (concept.anchor,)
            if same := set(concept.phrases) & set(aims):
                raise ValueError(
                    f"Expected texts without {checks.shown(concept.name)}, got its phrase {min(same)!r} as "
                    f"{'a neutral text' if self.mode == 'erase' else 'its anchor'}. Give others."
                )
        drawing = {"steps": method.sampler_steps or 1, "guidance": self.guidance, "batch": self.batch}

        def measured(texts: Sequence[str], second: bool = False) -> dict[str, Moments]:
            seeds = range(seed, seed + len(texts))
            return moments(pipe, texts, second, seeds=seeds, window=self.window, **drawing)

        neutral = measured(self.neutral, second=True)
        vectors: dict[str, list[Tensor]] = {}
        for concept in found:
            own = measured(turns(concept.phrases, self.pictures))
            anchor = neutral if self.mode == "erase" else measured([concept.anchor] * self.pictures)
            for module, rest in neutral.items():
                c, a, m = own[module].mean, anchor[module].mean, rest.mean
                read, taken = direction(c, a, m, rest.covariance, self.mode, self.ridge)
                for part, each in (("read", read), ("taken", taken), ("middle", m)):
                    vectors.setdefault(f"{prefix}.{module}:{part}", []).append(each)
        made = {name: torch.stack(each)[:, None] for name, each in vectors.items()}
        use: dict[str, Any] = {"times": (0.0,), "positive": self.positive, "window": self.window}
        info = {"neutral texts": len(self.neutral), "pictures": self.pictures}
        return Steering.fitted(
            method, pipe, made, found, seed=seed, info=info, form="direction", strength=method.strength or 0.0, **use
        )


def direction(
    concept: Tensor, anchor: Tensor, middle: Tensor, covariance: Tensor, mode: str, ridge: float
) -> tuple[Tensor, Tensor]:
    """p and d [D] of the class, for means [D] and the covariance [D, D] of neutral tokens.

    Raises:
        ValueError: the means are equal.
    """
    taken = concept - middle if mode == "erase" else concept - anchor
    reads = taken if mode == "leace" else concept - middle
    if not bool(taken.any()) or not bool(reads.any()):
        raise ValueError(
            "The mean outputs of concept and anchor are equal, so there is no direction. Give phrases that the model "
            "draws, and another anchor."
        )
    whole = covariance.clone()
    whole.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(torch.finfo(whole.dtype).tiny))
    solved = torch.cholesky_solve(reads[:, None], torch.linalg.cholesky(whole))[:, 0]
    return solved / (solved @ reads), taken
