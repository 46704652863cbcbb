"""Latents of pictures, their noisy versions, and what a denoiser learns to predict from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from .. import checks


@dataclass(frozen=True, eq=False)
class Noising:
    """How a pipeline's scheduler adds noise.

        diffusion:      z_t = a z_0 + b e, a^2 + b^2 = 1; the target is e, z_0 or v = a e - b z_0
        flow matching:  z_s = (1 - s) z_0 + s e; the target is e - z_0

    Args:
        kind: "epsilon", "sample", "v_prediction" or "flow".
        signal: a for each training step [T]; empty for flow matching.
        steps: T, the training steps.
    """

    kind: str
    signal: Tensor
    steps: int

    @classmethod
    def of(cls, pipe: Any) -> Noising:
        """Reads the scheduler.

        Raises:
            ValueError: the scheduler is of another kind.
        """
        config, steps = pipe.scheduler.config, int(pipe.scheduler.config.num_train_timesteps)
        kept = getattr(pipe.scheduler, "alphas_cumprod", None)
        kind = config.get("prediction_type", "epsilon")
        if kept is None or kind.startswith("flow") or config.get("use_flow_sigmas"):
            if not type(pipe.scheduler).__name__.startswith("FlowMatch") and not kind.startswith("flow"):
                raise ValueError(
                    f"Expected a scheduler with `alphas_cumprod` or flow matching, got "
                    f"{type(pipe.scheduler).__name__}. Attacks by gradients of the denoiser need to know its noise; "
                    "use a scheduler such as DDIMScheduler."
                )
            return cls("flow", torch.empty(0), steps)
        return cls(checks.choice("prediction_type", kind, ("epsilon", "sample", "v_prediction")), kept.sqrt(), steps)

    def time(self, noise: float) -> float:
        """The time, in training steps, at a share of the trajectory in (0, 1): 1 is pure noise."""
        return noise * self.steps if self.kind == "flow" else float(min(self.steps - 1, int(noise * self.steps)))

    def noisy(self, latents: Tensor, noise: Tensor, time: float) -> Tensor:
        a, b = self._parts(time, latents)
        return a * latents + b * noise

    def target(self, latents: Tensor, noise: Tensor, time: float) -> Tensor:
        """What the denoiser learns to predict."""
        a, b = self._parts(time, latents)
        if self.kind == "v_prediction":
            return a * noise - b * latents
        return {"epsilon": noise, "sample": latents, "flow": noise - latents}[self.kind]

    def clean(self, prediction: Tensor, noisy: Tensor, time: float) -> Tensor:
        """z_0 as a prediction implies it."""
        a, b = self._parts(time, noisy)
        if self.kind == "v_prediction":
            return a * noisy - b * prediction
        return {
            "epsilon": (noisy - b * prediction) / a,
            "sample": prediction,
            "flow": noisy - b * prediction,
        }[self.kind]

    def moved(self, prediction: Tensor, change: Tensor, time: float) -> Tensor:
        """The prediction that implies z_0 + `change`."""
        a, b = self._parts(time, prediction)
        return (
            prediction + {"epsilon": -a / b, "v_prediction": -1 / b, "sample": 1.0, "flow": -1 / b}[self.kind] * change
        )

    def _parts(self, time: float, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "flow":
            b = torch.tensor(time / self.steps).to(like)
            return 1 - b, b
        a = self.signal[int(time)].to(like.device)
        return a.to(like.dtype), (1 - a**2).sqrt().to(like.dtype)


@dataclass(frozen=True, eq=False)
class Point:
    """Noisy latents with what an attack wants predicted from them. All rows share the time.

    Args:
        time: the time in training steps.
        noisy: latents [B, ...].
        goal: the wanted prediction [B, ...].
        earlier: times and latents of denoiser calls that precede this one, for erasers with a memory.
    """

    time: float
    noisy: Tensor
    goal: Tensor
    earlier: tuple[tuple[float, Tensor], ...] = ()


def noisy_points(
    noising: Noising, latents: Tensor, noises: Sequence[float], batch: int, generator: Generator, earlier: int
) -> list[Point]:
    """Points at shares of the trajectory, whose goal is what the denoiser learns to predict. See `WhiteBox.points`."""
    made = []
    for share in noises:
        which = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[which.to(latents.device)]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        time = noising.time(share)
        run = [noising.time(1 - (1 - share) * k / (earlier + 1)) for k in range(earlier)]
        before = tuple((t, noising.noisy(clean, noise, t)) for t in run)
        made.append(Point(time, noising.noisy(clean, noise, time), noising.target(clean, noise, time), before))
    return made
