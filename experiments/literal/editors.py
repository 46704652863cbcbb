"""UCE and RECE layer by layer, with explicit float32 inverses: what `closed_form.py` compares with.

Written from the description of the published code. `quadratic` (2023) computes the outputs of all layers again for each
layer and uses one of them; `once` (2025) computes them once. Both sum outer products by one matrix product, which is
kinder to them. `anew` is how many layers waste their outputs for real; the time of the others is that of these, so a
run need not last an hour. Weights W [C, D]; rows C, G [N, D], P [M, D].
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Clock:
    """Seconds spent, and seconds that layers over the limit would have spent on what they left out."""

    budget: float
    measured: float = 0.0
    added: float = 0.0
    layers: int = 0
    skipped: int = 0
    _wasted: list[float] = field(default_factory=list)

    def all_outputs(self, weights: list[Tensor], rows: list[Tensor], layer: int) -> list[Tensor]:
        """The outputs of `rows` at `layer`, by way of those of every layer while the budget lasts."""
        start = time.perf_counter()
        if self.measured < self.budget or not self._wasted:
            outputs = [[w @ r.T for w in weights] for r in rows]
            self._wasted.append(time.perf_counter() - start)
            chosen = [o[layer] for o in outputs]
        else:
            chosen = [weights[layer] @ r.T for r in rows]
            self.added += sum(self._wasted) / len(self._wasted) - (time.perf_counter() - start)
            self.skipped += 1
        self.layers += 1
        self.measured += time.perf_counter() - start
        return chosen


def solve(w: Tensor, c: Tensor, value: Tensor, p: Tensor, kept: Tensor, a: float, b: float, lam: float) -> Tensor:
    """(a V C + b W P^T P + lam W) (a C^T C + b P^T P + lam I)^-1 with the inverse made, in float32."""
    k = a * c.T @ c + b * p.T @ p + lam * torch.eye(c.shape[1])
    return (a * value @ c + b * kept @ p + lam * w) @ torch.linalg.inv(k)


def uce_quadratic(
    weights: list[Tensor], c: Tensor, g: Tensor, p: Tensor, a: float, b: float, lam: float, clock: Clock
) -> list[Tensor]:
    edited = []
    for layer, w in enumerate(weights):
        value, kept = clock.all_outputs(weights, [g, p], layer)
        edited.append(solve(w, c, value, p, kept, a, b, lam))
    return edited


def uce_once(
    weights: list[Tensor], c: Tensor, g: Tensor, p: Tensor, a: float, b: float, lam: float, clock: Clock
) -> list[Tensor]:
    values, kept = ([w @ rows.T for w in weights] for rows in (g, p))
    return [solve(w, c, v, p, k, a, b, lam) for w, v, k in zip(weights, values, kept, strict=True)]


def rece(
    weights: list[Tensor],
    edited: list[Tensor],
    c: Tensor,
    g: Tensor,
    p: Tensor,
    mu: float,
    b: float,
    lam: float,
    rounds: int,
    clock: Clock,
) -> list[Tensor]:
    """From the weights that UCE has edited; the sums over layers once a round, for all concepts together."""
    now = edited
    for _ in range(rounds):
        ww = mu * torch.eye(c.shape[1]) + sum(w.T @ w for w in now)
        wo = sum(w.T @ o for w, o in zip(now, weights, strict=True))
        derived = (torch.linalg.inv(ww) @ wo @ c.T).T
        now = uce_quadratic(now, derived, g, p, 1.0, b, lam, clock)
    return now
