"""The distance of edited weights from the base model on a prompt, and calibration points that limit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Generator, Tensor

from ._denoiser import Denoiser, Points, Weights

TIMES = 4  # measured steps of a trajectory, evenly spread
POINTS = 8  # distilled steps of a trajectory, random
CHUNK = 32  # prompts in a trajectory


class Misalignment:
    """MD(p) = mean over times of || e_edited(x_t, p, t) - e_base(x_t, p, t) ||^2 / elements.

    x_t lies on the base model's trajectory of p, from a noise that all prompts share. The trajectory includes the base
    model's predictions and is drawn once per prompt, for all comparisons.

    Args:
        net: the denoiser, to whose condition prompts are added.
        base: the base model's trained tensors.
        seed: seed of the noise.
        guidance: guidance scale of the trajectory; 1 means no guidance.
    """

    def __init__(self, net: Denoiser, base: Weights, seed: int, guidance: float = 1.0) -> None:
        self.net, self.base, self.guidance = net, base, guidance
        self.noise = torch.randn(1, *net.shape, generator=Generator().manual_seed(seed))
        steps = len(net.scheduler.timesteps)
        self.stops = torch.tensor(sorted({int((k + 0.5) * steps / TIMES) for k in range(TIMES)}))
        self.known: dict[str, Points] = {}

    def __call__(self, prompts: Sequence[str], edited: Weights | None) -> Tensor:
        """MD [N] of each prompt. None: the current weights of the pipeline."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        for k in range(0, len(new), CHUNK):
            self._draw(new[k : k + CHUNK])
        found = []
        for k in range(0, len(prompts), CHUNK):
            points = Points.cat([self.known[p] for p in prompts[k : k + CHUNK]])
            with torch.no_grad():
                error = self.net(points.x, points.t, points.prompt, edited) - cast("Tensor", points.own)
            found.append(error.square().flatten(1).mean(1).unflatten(0, (-1, len(self.stops))).mean(1))
        return torch.cat(found)

    def _draw(self, prompts: Sequence[str]) -> None:
        stops = self.stops[:, None].expand(-1, len(prompts))
        rng = Generator().manual_seed(0)  # for schedulers that add noise at each step
        rows, given = self.net.add(prompts), {"keep": True, "noise": self.noise}
        drawn = self.net.trajectory(rows, stops, self.base, self.guidance, rng, **given)
        for k, prompt in enumerate(prompts):
            self.known[prompt] = drawn[slice(k, None, len(prompts))]


def calibration(net: Denoiser, prompts: Sequence[str], teacher: Weights | None, guidance: float, seed: int) -> Points:
    """Points on a guided trajectory of the teacher per prompt, with the teacher's predictions."""
    rng, rows = Generator().manual_seed(seed), net.add(prompts)
    chunks = []
    for part in rows.split(CHUNK):
        stops = torch.randint(len(net.scheduler.timesteps), (POINTS, len(part)), generator=rng)
        chunks.append(net.trajectory(part, stops, teacher, guidance, rng, keep=True))
    return Points.cat(chunks)
