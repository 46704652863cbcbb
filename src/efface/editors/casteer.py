"""CASteer: takes the direction of a concept out of the outputs of cross-attention; no weight changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..core import Concepts
from ..delta import Steering
from ..families import family
from ._outputs import SUBJECTS, Moments, check_drawing, read, wanted
from ._settings import FamilyDefaults

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["CASteer"]


@dataclass(frozen=True)
class CASteer(FamilyDefaults):
    """Measures a direction per cross-attention layer and step, and removes its positive part while drawing.

    o [D] is a token of a layer's output, after `to_out`. p_i are texts without the concept:

        v  = unit(mean o(p_i with the concept) - mean o(p_i))         over pictures and tokens, per layer and step
        o' = o - strength max(<o, v>, 0) v                            then rescaled to the length |o|

    With strength = 1 no token points towards the concept: <o', v> <= 0. Strength = 2 reflects the tokens that do:
    <o', v> = -|<o, v>|, and their length does not change.

    Paper: T. Gaintseva, A.-M. Oncescu, C. Ma, Z. Liu, M. Benning, G. Slabaugh, J. Deng, I. Elezi, 2025, "CASteer:
    Cross-Attention Steering for Controllable Concept Erasure", ICLR 2026, arXiv 2503.09630. There are no equation
    numbers, because the source was a description of the authors' code.

    Differs: only conditional rows are edited and measured; the code also steers the unconditional ones. The code finds
    a step's vector by a counter that is never reset; here it is the vector with the nearest time, so other numbers of
    steps work. The code has 50 pairs of ImageNet classes; `subjects` has ten ordinary things. With several concepts
    the changes are summed.

    Limits: the direction is a mean over all positions and subjects, so it also holds what the pairs differ in besides
    the concept. Measured on the prompts that it later erases, a direction proves nothing. This implementation has not
    been measured on a large model.

    Args:
        subjects: the texts p_i; code: 50.
        template: how p_i and a phrase become one text, such as "{subject} with {concept}"; "{subject}, {concept} style"
            for styles. None: the family's default.
        strength: >= 0, the first strength of the result; code: 2. None: the family's default.
        sampler_steps: steps of each picture, and so the number of vectors per layer; code: 50, on turbo models 1. None:
            the family's default.
        guidance: guidance scale of the pictures, >= 1; code: 7.5.
        window: (start, end), the part of the steps with the edit; code: (0, 1).
        batch: pictures per pipeline call.

    Shapes: o [B, Q, D]; per layer vectors [K, T, D] for K concepts and T steps.

    Raises:
        ValueError: a field is out of range, there are no subjects, or the template lacks {subject} or {concept}. On
            `fit`: the pipeline has no cross-attention or has run-time erasers, a text is over the encoder's limit, or
            the two means are equal, so that there is no direction.
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> steering = efface.CASteer(subjects=("a dog", "a tree"), sampler_steps=2).fit(pipe, "alcohol")
        >>> with steering.apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=3).images[0]
        >>> image.size
        (64, 64)
    """

    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"template": "{subject} and {concept}", "strength": 1.5, "sampler_steps": 10},
        "": {"template": "{subject} with {concept}", "strength": 2.0, "sampler_steps": 50},
    }

    subjects: tuple[str, ...] = SUBJECTS
    template: str | None = None
    strength: float | None = None
    sampler_steps: int | None = None
    guidance: float = 7.5
    window: tuple[float, float] = (0.0, 1.0)
    batch: int = 8

    def __post_init__(self) -> None:
        checks.each(self, checks.texts, "subjects")
        checks.each(self, checks.window, "window")
        checks.each(self, checks.number, "strength", least=0)
        check_drawing(self)
        if not self.subjects:
            raise ValueError(checks.refusal("at least one of `subjects`", self.subjects, "Write ('a dog', 'a tree')."))
        if self.template is not None and not all(word in self.template for word in ("{subject}", "{concept}")):
            cure = 'Write for example "{subject} with {concept}".'
            raise ValueError(checks.refusal("`template` with {subject} and {concept}", self.template, cure))

    @classmethod
    def paper(cls) -> CASteer:
        """The published strength and steps for Stable Diffusion. The authors' 50 subjects are not part of Efface."""
        return cls(template="{subject} with {concept}", strength=2.0, sampler_steps=50)

    @classmethod
    def style(cls) -> CASteer:
        """The published template for styles."""
        return cls(template="{subject}, {concept} style", strength=2.0)

    def fit(self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0) -> Steering:
        """Returns the steering that erases `concepts`. Only reads `pipe`.

        Args:
            pipe: the pipeline. Its deltas are part of the model.
            concepts: their phrases stand in the template, each in turn.
            seed: pictures of a pair share the seed `seed` + i.
        """
        method = self.resolved(pipe)
        found, prefix = wanted(pipe, concepts, *self.subjects), family(pipe).denoiser
        seeds = range(seed, seed + len(self.subjects))
        drawing = {"steps": method.sampler_steps or 1, "guidance": self.guidance, "batch": self.batch}
        without = self._means(pipe, self.subjects, seeds, drawing)
        times = list(dict.fromkeys(time for _, time in without))
        vectors: dict[str, list[Tensor]] = {}
        for concept in found:
            texts = [
                (method.template or "").format(subject=s, concept=concept.phrases[k % len(concept.phrases)])
                for k, s in enumerate(self.subjects)
            ]
            means = self._means(pipe, texts, seeds, drawing)
            for module in dict.fromkeys(module for module, _ in means):
                towards = torch.stack([means[module, t].mean - without[module, t].mean for t in times])
                size = towards.norm(dim=1, keepdim=True)
                if not bool((size > 1e-6).all()):
                    raise ValueError(
                        f"The pictures with and without {checks.shown(concept.name)} are alike in {module!r}, so there "
                        "is no direction. Give the concept phrases that the model draws."
                    )
                vectors.setdefault(f"{prefix}.{module}", []).append(towards / size)
        made = {
            f"{name}:{part}": torch.stack(each) * (part != "middle")
            for name, each in vectors.items()
            for part in ("read", "taken", "middle")
        }
        use: dict[str, Any] = {"times": times, "positive": True, "length": True, "window": self.window}
        info = {"pairs": len(self.subjects)}
        return Steering.fitted(
            method, pipe, made, found, seed=seed, info=info, form="direction", strength=method.strength or 0.0, **use
        )

    def _means(self, pipe: Any, texts: Any, seeds: Any, drawing: dict[str, Any]) -> dict[tuple[str, float], Moments]:
        """The mean output per module and time."""
        found: dict[tuple[str, float], Moments] = {}

        def see(module: str, time: float, out: Tensor, _: Any) -> None:
            found.setdefault((module, time), Moments(second=False)).add(out)

        read(pipe, texts, see, seeds=seeds, **drawing)
        return found
