"""The networks of the reward model: folds, training, and results on held-out pictures."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..intervals import area, clustered, wilson
from .evidence import Evidence

FOLDS, HIDDEN, STEPS, LR, DROPOUT, DECAY = 5, 64, 200, 3e-3, 0.1, 0.01
BINS = 5


# ---------------------------------------------------------------- folds


def deal(evidence: Evidence, seed: int) -> dict[str, int]:
    """A fold for each judged picture. Pictures of one set share it; the others are dealt by their answer."""
    yes = [name for name, share in evidence.shares.items() if share >= 0.5]
    no = [name for name in evidence.shares if name not in set(yes)]
    sets = sorted({name for _, _, name in evidence.pairs})
    usable = len(sets) >= 2 or min(len(yes), len(no)) >= 2
    if not usable:
        raise ValueError(
            f"Expected at least 2 pictures that show {checks.shown(evidence.concept)} and 2 that do not, or 2 ranked "
            f"sets, got {len(yes)}, {len(no)} and {len(sets)} sets. Judge more pictures."
        )
    found: dict[str, int] = {}
    chance = random.Random(seed)
    k = min(FOLDS, max(len(sets), min(len(yes), len(no))))
    names = sorted(set(evidence.sets.values()))
    chance.shuffle(names)
    fold = {name: n % k for n, name in enumerate(names)}
    found |= {picture: fold[name] for picture, name in evidence.sets.items()}
    for group in (yes, no):
        alone = sorted(name for name in group if name not in found)
        chance.shuffle(alone)
        found |= {name: n % k for n, name in enumerate(alone)}
    return found


@dataclasses.dataclass(frozen=True)
class Task:
    """What the networks learn: `y` [N] (NaN: not judged), pairs `better`, `worse` [P], `fold` [N], `k` folds."""

    y: Tensor
    better: Tensor
    worse: Tensor
    fold: Tensor
    k: int

    @classmethod
    def of(cls, evidence: Evidence, names: Sequence[str], folds: Mapping[str, int]) -> Task:
        place = {name: n for n, name in enumerate(names)}
        y = torch.tensor([evidence.shares.get(name, torch.nan) for name in names])
        better, worse = (
            torch.tensor([place[pair[side]] for pair in evidence.pairs], dtype=torch.long) for side in (0, 1)
        )
        fold = torch.tensor([folds[name] for name in names])
        return cls(y, better, worse, fold, int(fold.max()) + 1)

    def loss(self, r: Tensor) -> Tensor:
        """The loss of networks with outputs r [K, N], each on the pictures outside of its fold."""
        known, folds = ~self.y.isnan(), torch.arange(self.k)[:, None]
        total = r.new_zeros(())
        if bool(known.any()):
            use = (self.fold[known] != folds).float()
            error = (r[:, known].sigmoid() - self.y[known]).square()
            total = total + ((error * use).sum(1) / use.sum(1).clamp_min(1)).sum()
        if len(self.better):
            use = ((self.fold[self.better] != folds) & (self.fold[self.worse] != folds)).float()
            error = F.softplus(r[:, self.worse] - r[:, self.better])
            total = total + ((error * use).sum(1) / use.sum(1).clamp_min(1)).sum()
        return total


# ---------------------------------------------------------------- the networks


def logits_of(weights: Mapping[str, Tensor], x: Tensor, drop: Tensor | None = None) -> Tensor:
    """The outputs [K, N] for embeddings [N, D] of length 1, which are scaled to unit variance."""
    hidden = torch.einsum("nd,kdh->knh", x * x.shape[1] ** 0.5, weights["up"]) + weights["bias"][:, None]
    hidden = F.relu(hidden) if drop is None else F.relu(hidden) * drop
    return torch.einsum("knh,kh->kn", hidden, weights["out"]) + weights["offset"][:, None]


def trained(x: Tensor, task: Task, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    d, sizes = x.shape[1], {"up": (task.k, x.shape[1], HIDDEN), "out": (task.k, HIDDEN)}
    weights = {
        name: torch.randn(size, generator=rng) * (d if name == "up" else HIDDEN) ** -0.5 for name, size in sizes.items()
    }
    weights |= {"bias": torch.zeros(task.k, HIDDEN), "offset": torch.zeros(task.k)}
    for tensor in weights.values():
        tensor.requires_grad_()
    adam = torch.optim.AdamW(weights.values(), lr=LR, weight_decay=DECAY)
    with torch.enable_grad():
        for _ in range(STEPS):
            drop = (torch.rand(task.k, len(x), HIDDEN, generator=rng) >= DROPOUT).float() / (1 - DROPOUT)
            loss = task.loss(logits_of(weights, x, drop))
            adam.zero_grad()
            loss.backward()
            adam.step()
    found = {name: tensor.detach() for name, tensor in weights.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise RuntimeError("The reward model's weights are not finite. Check the embeddings of the pictures.")
    return found


# ---------------------------------------------------------------- held-out results


def held_out(evidence: Evidence, names: Sequence[str], task: Task, logits: Tensor) -> dict[str, Any]:
    """AUC and pair accuracy on held-out pictures, with intervals and calibration; None for a kind not judged."""
    own = logits[task.fold, torch.arange(len(names))]
    found: dict[str, Any] = {"binary": None, "ranking": None}
    known = ~task.y.isnan()
    yes = task.y[known] >= 0.5
    if bool(yes.any()) and not bool(yes.all()):
        value, ends = area(own[known][yes].tolist(), own[known][~yes].tolist())
        shown = _calibration(own[known].sigmoid(), yes)
        found["binary"] = {
            "n": len(yes),
            "yes": int(yes.sum()),
            "auc": value,
            "interval": list(ends),
            "calibration": shown,
        }
    inside = task.fold[task.better] == task.fold[task.worse]
    if bool(inside.any()):
        gap = own[task.better[inside]] - own[task.worse[inside]]
        sets = [name for (_, _, name), held in zip(evidence.pairs, inside.tolist(), strict=True) if held]
        right = (gap > 0).int()
        found["ranking"] = {
            **{"pairs": len(gap), "sets": len(set(sets)), "accuracy": float(right.float().mean())},
            **{
                "interval": list(clustered(right.tolist(), sets)),
                "calibration": _calibration(gap.abs().sigmoid(), gap > 0),
            },
        }
    return found


def _calibration(predicted: Tensor, seen: Tensor) -> list[dict[str, Any]]:
    """Predicted against observed shares, in bins of equal width that hold something."""
    place = (predicted * BINS).long().clamp_max(BINS - 1)
    found = []
    for k in range(BINS):
        if n := int((place == k).sum()):
            hits = int(seen[place == k].sum())
            mean = float(predicted[place == k].mean())
            found.append({"n": n, "predicted": mean, "observed": hits / n, "interval": list(wilson(hits, n))})
    return found
