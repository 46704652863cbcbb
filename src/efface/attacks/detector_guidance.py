"""Detector guidance: pushes the picture, step by step, to where a detector sees the concept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from .._latents import pictures_of, scaling
from ._contract import Access, Attack, Proposal, Target
from ._noising import Noising

if TYPE_CHECKING:
    from ._contract import Victim

__all__ = ["DetectorGuidance"]


@dataclass(frozen=True)
class DetectorGuidance(Attack):
    """Guides the guarded model with the gradient of the detector of the search.

        z_0' = z_0 + s rms(z_0) g / rms(g),    g = d l(D(z_0)) / d z_0

    z_0 are the latents that the model predicts after its guidance, D is the decoder, l the detector's log-odds of the
    concept. The prediction moves with z_0, and the scheduler goes on from there. A model that only lost the way from
    the words can finish what the gradient begins; one that lost the concept is pushed towards noise that fools the
    detector. Another detector judges, but what fools one may fool the other: read the rate with the pictures, or with
    labels of people.

    Paper: Bansal, Chu, Schwarzschild et al. 2023, "Universal Guidance for Diffusion Models", arXiv 2302.07121,
    backward guidance (section 3.2), as remembered.

    Differs: the gradient is scaled to the size of z_0, and taken at z_0 without the denoiser's own gradient, so that it
    costs no denoiser rows. There is no recurrence. Decoder and detector are not part of the budget.

    Args:
        strengths: the lengths s of a push, as shares of z_0's size, above 0, from least to most.
        pushes: gradient steps for each denoising step, from 1.
        prompts: the prompts; "{target}" is the target prompt, "" the empty one.

    Shapes: latents [B, C, h, w]; FLUX and Chroma [B, L, C], of square pictures.

    Raises:
        ValueError: a strength or `pushes` is out of range; the scheduler is of another kind; the latents are no
            pictures that the VAE can decode one by one; or the detector of the search has no `log_odds`, which maps
            pictures [N, 3, H, W] to log-odds [J, N] with gradients.

    Example:
        >>> DetectorGuidance(strengths=(0.1,)).pushes
        1
    """

    access: ClassVar[Access] = "sampler"

    strengths: tuple[float, ...] = (0.05, 0.1, 0.2)
    pushes: int = 1
    prompts: tuple[str, ...] = ("{target}", "")

    def __post_init__(self) -> None:
        strengths = tuple(checks.number("strengths", s, 0, above=True) for s in self.strengths)
        object.__setattr__(self, "strengths", strengths)
        checks.whole("pushes", self.pushes)
        for each in self.prompts:
            checks.text("prompts", each, empty=True)

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        Noising.of(pipe)
        scaling(pipe)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        victim.log_odds(torch.zeros(1, 3, 64, 64))
        for strength in self.strengths:
            for text in self.prompts:
                prompt = text.replace("{target}", target.prompt)
                about = f"guided by a detector, pushes of {strength:g}, prompt {prompt!r}"
                yield Proposal(prompt, about=about, inside=Guided(victim.log_odds, strength, self.pushes))


@dataclass(frozen=True, eq=False)
class Guided:
    """Moves the predicted picture before each step of the scheduler, as a context around a pipeline's calls.

    Args:
        log_odds: maps pictures [N, 3, H, W] to log-odds [N] with gradients.
        strength: the length of a push.
        pushes: pushes for each step.
    """

    log_odds: Callable[[Tensor], Tensor]
    strength: float
    pushes: int

    @contextlib.contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        noising, scheduler = Noising.of(pipe), pipe.scheduler
        step, pushed = scheduler.step, 0

        def guided(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal pushed
            noisy = sample
            if callable(getattr(scheduler, "scale_model_input", None)):
                noisy = scheduler.scale_model_input(sample, timestep)
            clean = noising.clean(model_output, noisy, float(timestep))
            change = self._pushed(pipe, clean) - clean
            pushed += 1
            return step(noising.moved(model_output, change, float(timestep)), timestep, sample, *args, **kwargs)

        scheduler.step = guided
        try:
            yield
        finally:
            del scheduler.step
        if not pushed:
            raise RuntimeError("The pipeline did not step its own scheduler, so nothing was guided. Use another one.")

    def _pushed(self, pipe: Any, clean: Tensor) -> Tensor:
        dims = tuple(range(1, clean.ndim))
        for _ in range(self.pushes):
            with torch.enable_grad():
                at = clean.detach().float().requires_grad_()
                (slope,) = torch.autograd.grad(self.log_odds(pictures_of(pipe, at)).sum(), at)
            size, length = (x.square().mean(dims, keepdim=True).sqrt() for x in (at.detach(), slope))
            clean = clean + (self.strength * size * slope / length.clamp_min(1e-12)).to(clean)
        return clean
