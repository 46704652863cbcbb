"""The three forms of `Steering`: how a module's output changes, token by token. Also the checks of their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Concept

Form = Literal["direction", "surrogate", "adapter"]
PARTS: dict[str, tuple[str, ...]] = {
    "direction": ("read", "taken", "middle"),
    "surrogate": ("toward", "read", "target", "surrogate", "gate", "general", "centre", "slope"),
    "adapter": ("down", "down_bias", "up", "up_bias"),
}
"""The parts of each form; every one has one entry per concept first."""
Parts = Mapping[str, Tensor]


def modules_of(vectors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The sorted modules of tensors that are named "module:part"."""
    return tuple(sorted({name.rpartition(":")[0] for name in vectors}))


def check_parts(vectors: Mapping[str, Tensor], form: Form, concepts: Sequence[Concept], times: Sequence[float]) -> None:
    """Raises ValueError unless each module has the finite parts of the form, for each concept and each of the times."""
    if not vectors:
        raise ValueError("Expected the tensors of at least one module, got none. Fit them with an editor.")
    if len(set(concepts)) < len(concepts):
        raise ValueError("Expected different concepts, got one twice. Leave one out.")
    for module in modules_of(vectors):
        parts = {name.rpartition(":")[2] for name in vectors if name.rpartition(":")[0] == module}
        if parts != set(PARTS[form]):
            raise ValueError(
                f"Expected the parts {', '.join(PARTS[form])} of {module!r}, got {', '.join(sorted(parts))}. Fit them "
                "again."
            )
    for name, each in vectors.items():
        if not each.ndim or len(each) != len(concepts) or (form == "direction" and each.shape[1:2] != (len(times),)):
            raise ValueError(
                f"Expected one entry for each of {len(concepts)} concepts and {len(times)} times in {name!r}, got the "
                f"shape {list(each.shape)}. Fit them again."
            )
        if not bool(each.isfinite().all()):
            raise ValueError(f"The tensor {name!r} is not finite. Fit it again, with the model in float32.")


def nearest(parts: Parts, times: Tensor, timestep: Tensor | float) -> dict[str, Tensor]:
    """The parts of a direction at the recorded time that is nearest to `timestep`: [K, T, D] becomes [K, D]."""
    at = (times - torch.as_tensor(timestep, dtype=times.dtype, device=times.device)).abs().argmin()
    return {name: each.index_select(1, at.reshape(1))[:, 0] for name, each in parts.items()}


def without_direction(x: Tensor, parts: Parts, acts: Tensor, strength: float, positive: bool, length: bool) -> Tensor:
    """x - strength sum_k g(<p_k, x - m_k>) q_k, with g the positive part or the identity; then with the length of x.

    Args:
        x: [B, Q, D].
        parts: p, q and m [K, D], as `read`, `taken` and `middle`.
        acts: bool [B, K], whether concept k acts on the row.
        strength: the factor.
        positive: whether only positive shares count.
        length: whether each token keeps its length.
    """
    share = x @ parts["read"].T - (parts["read"] * parts["middle"]).sum(-1)
    share = (share.clamp_min(0) if positive else share) * acts[:, None, :]
    changed = x - strength * share @ parts["taken"]
    if not length:
        return changed
    tiny = torch.finfo(x.dtype).tiny
    return changed * (x.norm(dim=-1, keepdim=True) / changed.norm(dim=-1, keepdim=True).clamp_min(tiny))


def blended(x: Tensor, parts: Parts, acts: Tensor, strength: float) -> Tensor:
    """x + strength k (x' - x), per token for the concept with the largest gate k. See `efface.GLoCE`.

    Args:
        x: [B, Q, D].
        parts: per concept: `toward` [K, D, R], `read` [K, R, D], `target`, `surrogate` and `general` [K, D], `gate` [K,
            G, D], `centre` and `slope` [K].
        acts: bool [B, K].
        strength: the factor of the change.
    """
    most = torch.zeros_like(x[..., :1])
    chosen = torch.zeros_like(x)
    for k in range(acts.shape[1]):
        at = {name: each[k] for name, each in parts.items()}
        open_ = torch.sigmoid(at["slope"] * (gate_share(x, at) - at["centre"])) * acts[:, k, None]
        moved = at["surrogate"] + (x - at["target"]) @ at["read"].T @ at["toward"].T - x
        better = open_[..., None] > most
        most, chosen = torch.where(better, open_[..., None], most), torch.where(better, moved, chosen)
    return x + strength * most * chosen


def gate_share(x: Tensor, part: Parts) -> Tensor:
    """r = |V_g unit(x - m_g)|^2 in [0, 1] per token [B, Q], for one concept with `gate` [G, D] and `general` [D]."""
    return (F.normalize(x - part["general"], dim=-1) @ part["gate"].T).square().sum(-1)


def adapted(x: Tensor, parts: Parts, acts: Tensor, strength: float) -> Tensor:
    """x + strength sum_k adapter_k(x), for the concepts that act."""
    for k in range(acts.shape[1]):
        change = adapter(x, {name: each[k] for name, each in parts.items()})
        x = x + strength * change * acts[:, k, None, None]
    return x


def adapter(x: Tensor, part: Parts) -> Tensor:
    """up GELU(down x + b) + c, with `down` [W, D], `up` [D, W]."""
    return F.linear(F.gelu(F.linear(x, part["down"], part["down_bias"])), part["up"], part["up_bias"])
