"""The change of one tensor, dense or as two thin factors. These functions know no model and no file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank change: dW = B A.

    Args:
        B: [out, r].
        A: [r, in], or [r, in, h, w] for a convolution.

    Raises:
        ValueError: the shapes do not match.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim not in (2, 4) or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"Expected factors B [out, r] and A [r, in] or [r, in, h, w], got {list(self.B.shape)} and "
                f"{list(self.A.shape)}. Give both the same rank r."
            )

    @property
    def rank(self) -> int:
        return int(self.B.shape[1])

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.B.shape[0], *self.A.shape[1:]])

    def dense(self) -> Tensor:
        return (self.B @ self.A.flatten(1)).reshape(self.shape)


Change: TypeAlias = "Factors | Tensor"


def dense(change: Change) -> Tensor:
    """The change as one tensor of the weight's shape."""
    return change.dense() if isinstance(change, Factors) else change


def tensors(change: Change) -> tuple[Tensor, ...]:
    """The tensors of a change: B and A, or the dense tensor."""
    return (change.B, change.A) if isinstance(change, Factors) else (change,)


def each(change: Change, function: Callable[[Tensor], Tensor]) -> Change:
    """Applies `function` to the tensors of a change, for example to move it to another device."""
    return Factors(function(change.B), function(change.A)) if isinstance(change, Factors) else function(change)


def scaled(change: Change, by: float) -> Change:
    """`by` times the change."""
    return Factors(change.B * by, change.A) if isinstance(change, Factors) else change * by


def added(a: Change, b: Change) -> Change:
    """The sum of two changes. Factors stay factors."""
    if isinstance(a, Factors) and isinstance(b, Factors):
        if torch.equal(a.A, b.A):
            return Factors(a.B + b.B, a.A)
        return Factors(torch.cat([a.B, b.B], 1), torch.cat([a.A, b.A]))
    return dense(a) + dense(b)


def truncate(change: Change, rank: int | None = None) -> tuple[Factors, float]:
    """The nearest change of limited rank, and its relative error (Frobenius norm).

    The rank is that of the [out, in] matrix. Factors are truncated without making that matrix.

    Args:
        change: a matrix, a convolution, or factors.
        rank: the largest rank. None: the rank of the change. Factors within the limit stay unchanged.

    Raises:
        ValueError: `rank` is below 1, or the change has no rank, such as that of a bias.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"Expected a rank >= 1, got {rank}. Give a larger one.")
    if len(change.shape) not in (2, 4):
        raise ValueError(
            f"Expected a matrix or a convolution, got a tensor {list(change.shape)}, which has no rank. Leave it dense."
        )
    if isinstance(change, Factors):
        if rank is None or change.rank <= rank:
            return change, 0.0
        (left, b), (right, a) = (torch.linalg.qr(x.double()) for x in (change.B, change.A.flatten(1).T))
        u, s, v = torch.linalg.svd(b @ a.T, full_matrices=False)
        u, v, dtype = left @ u, v @ right.T, change.B.dtype
    else:
        u, s, v = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
        dtype = change.dtype
    rest = (s * s).flip(0).cumsum(0).flip(0).sqrt()  # rest[k]: the loss at rank k
    if rank is None:
        rank = max(1, int((rest > 0).sum()))
    error = float(rest[rank] / rest[0]) if rank < len(s) and rest[0] > 0 else 0.0
    root = s[:rank].sqrt()
    a = (root[:, None] * v[:rank]).reshape(-1, *change.shape[1:])
    return Factors((u[:, :rank] * root).to(dtype), a.to(dtype)), error
