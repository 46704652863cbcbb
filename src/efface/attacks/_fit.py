"""Fits the weights of a composition, and measures how well it rebuilds the guidance vector of the erased concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._compose import Denoiser, Seen
from ._texts import encoded

if TYPE_CHECKING:
    from ._contract import Victim

BUCKETS = 3  # of the trajectory, for the cosine


@dataclass(frozen=True)
class Fitted:
    """Weights w [k] with `sum_i w_i v'(c_i) = g v(target)` in the least squares, and how well that holds.

    Args:
        weights: one per text.
        cosines: cosine between both sides on inputs that were not fitted, from noise to picture.
        signal: the norm of v(target) as a share of the norm of e0. Near 0, every composition "matches".
    """

    weights: tuple[float, ...]
    cosines: tuple[float, ...]
    signal: float


def solved(vectors: Tensor, wanted: Tensor, ridge: float = 1e-3) -> Tensor:
    """The weights [k] that minimise the mean of |sum_i w_i V_i - y|^2 + lam |w|^2, lam = ridge * trace(A) / k.

    Args:
        vectors: V [k, n, d].
        wanted: y [n, d].
        ridge: share of the mean squared norm.

    Raises:
        ValueError: all vectors are zero.
    """
    v, y = vectors.double(), wanted.double()
    a = torch.einsum("ind,jnd->ij", v, v) / len(y)
    b = torch.einsum("ind,nd->i", v, y) / len(y)
    if not float(a.trace()) > 0:
        raise ValueError("The texts of the fit change nothing in the guarded model. Give other texts.")
    lam = ridge * a.trace() / len(a)
    return torch.linalg.solve(a + lam * torch.eye(len(a), dtype=a.dtype), b)


def fit(
    victim: Victim,
    target: str,
    texts: Sequence[str],
    guidance: float,
    ridge: float = 1e-3,
    points: int = 5,
    settings: Mapping[str, Any] | None = None,
) -> Fitted:
    """Fits the weights of `texts` on trajectories of the base model with the prompt `target` and the attacker's seeds.

    Half of the seeds are fitted, the others measured. At least two are needed.

    Raises:
        ValueError: fewer than two seeds, or no text changes anything.
    """
    if len(victim.seeds) < 2:
        raise ValueError(f"Expected two or more seeds for the fit, got {len(victim.seeds)}. Give more.")
    pipe = victim.pipe
    seen: list[Seen] = []
    with victim.original():
        prompt, negative = encoded(pipe, [target, ""], settings)
        denoiser = Denoiser(pipe)
        with denoiser.watched(seen.append, prompt, negative):
            victim.draw_original(target)
    chosen = [seen[int(k)] for k in torch.linspace(0, len(seen) - 1, min(points, len(seen))).round().unique()]
    wanted = torch.stack([guidance * (each.conditional - each.unconditional).flatten(1) for each in chosen])
    base = torch.stack([each.unconditional.flatten(1) for each in chosen])
    with victim.guarded():
        *rows, spoken = encoded(pipe, [*texts, ""], settings)
        denoiser = Denoiser(pipe, settings or {})
        found = []
        for call in chosen:
            empty = denoiser.unconditional_texts(call.arguments, call.first).rows(1) if call.first else spoken
            made = denoiser.predict(call, [*rows, empty])
            found.append(torch.stack([(p - made[-1]).flatten(1) for p in made[:-1]]))
    vectors = torch.stack(found)  # [points, k, seeds, d]
    v, y = vectors.float().permute(1, 0, 2, 3), wanted.float()  # [k, points, seeds, d], [points, seeds, d]
    weights = solved(v[:, :, 0::2].flatten(1, 2), y[:, 0::2].flatten(0, 1), ridge)
    rebuilt = torch.einsum("i,ipsd->psd", weights.float(), v[:, :, 1::2])
    cosine = torch.nn.functional.cosine_similarity(rebuilt, y[:, 1::2], dim=-1).mean(1)
    buckets = [float(part.mean()) for part in cosine.chunk(min(BUCKETS, len(cosine)))]
    signal = float((wanted / guidance).norm() / base.norm())
    return Fitted(tuple(weights.tolist()), tuple(buckets), signal)
