"""The kernel Inception distance: a distance between two sets of pictures that assumes no distribution of features."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import nan
from typing import ClassVar

import numpy as np

from efface.records import Sample, Score

from ._features import Extract, extractor, folder_of, named, of
from ._samples import chosen, paired
from ._stats import clusters, too_few, weights

__all__ = ["KID"]

DRAWS = 400


@dataclasses.dataclass(frozen=True)
class KID:
    """Squared maximum mean discrepancy with a cubic kernel, unbiased, times 1000. Lower is nearer. May be negative.

        k(x, y) = (x . y / D + 1)^3
        KID = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    The score is called `kid_eye` with the `emoji` detectors, `kid_base` with Inception against the base model's
    pictures, `kid_coco` with Inception against a folder. The base model's pictures of the same rows are not an
    independent set. The third mean then omits pairs of the same row, so that equal sets give 0 up to rounding.

    Paper: Binkowski, Sutherland, Arbel, Gretton 2018, "Demystifying MMD GANs", arXiv 1801.01401.

    Differs: uses all pictures together, not 100 subsets. The interval is a basic bootstrap over clusters. NaN with
    fewer than 10 prompts. Inception runs through torchmetrics; it was not run for lack of its weights.

    Args:
        features: "eye", "inception", "clip:FOLDER", or a callable that returns features [J, N, D].
        reference: a folder of real pictures, such as COCO's; "" = the base model's pictures of the same rows.
        kinds: kinds of rows to take; () = all.

    Raises:
        ValueError: a required `base` is missing.
        ImportError: a package is missing.

    Example:
        >>> from efface.metrics.kid import KID
        >>> KID(features="eye").reference
        ''
    """

    name: ClassVar[str] = "kid"
    unit: ClassVar[str] = "x 1000"
    higher_is_better: ClassVar[bool | None] = False
    features: str | Extract = "eye"
    reference: str = ""
    kinds: tuple[str, ...] = ("benign",)

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """One score, by the worse judge."""
        group = chosen(samples, lambda row: not self.kinds or row.kind in self.kinds)
        if not group:
            return []
        other = folder_of(self.reference) if self.reference else paired(group, base, self.name)
        extract, words = extractor(self.features)
        name, n = named("kid", self.features, self.reference), len(group)
        if few := too_few(group, name, self.unit, False, words):
            return few
        if len(other) < 2:
            return [Score(name, nan, n, nan, nan, self.unit, False, f"{words}; not defined for one picture")]
        twins, found = not self.reference, []
        for x, y in zip(of(group, extract), of(other, extract), strict=True):
            there = x.any(0) | y.any(0)
            kernels = _kernels(x[:, there], y[:, there])
            value = _mmd(*kernels, np.ones(n), np.ones(len(y)), twins)
            found.append((value, *_interval(kernels, value, group, len(y), twins)))
        value, low, high = max(found)
        return [Score(name, value, n, low, high, self.unit, False, words)]


def _kernels(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    d = max(x.shape[1], 1)
    return (x @ x.T / d + 1) ** 3, (y @ y.T / d + 1) ** 3, (x @ y.T / d + 1) ** 3


def _mmd(kxx: np.ndarray, kyy: np.ndarray, kxy: np.ndarray, wx: np.ndarray, wy: np.ndarray, twins: bool) -> float:
    """1000 times the weighted discrepancy. Copies of one picture do not form a pair."""

    def mean(k: np.ndarray, a: np.ndarray, b: np.ndarray, skip: bool) -> float:
        own = (a * b * np.diag(k)).sum() if skip else 0.0
        return float((a @ k @ b - own) / (a.sum() * b.sum() - ((a * b).sum() if skip else 0.0)))

    return 1000 * (mean(kxx, wx, wx, True) + mean(kyy, wy, wy, True) - 2 * mean(kxy, wx, wy, twins))


def _interval(
    kernels: tuple[np.ndarray, np.ndarray, np.ndarray], value: float, group: Sequence[Sample], others: int, twins: bool
) -> tuple[float, float]:
    which = clusters([s.row for s in group])
    if which.max() < 2:
        return nan, nan
    found = []
    for k, w in enumerate(weights(int(which.max()) + 1, DRAWS)):
        mine = w[which]
        yours = mine if twins else weights(others, 1, seed=k + 1)[0]
        if (mine > 0).sum() > 1 and (yours > 0).sum() > 1:
            found.append(_mmd(*kernels, mine, yours, twins))
    low, high = (float(np.percentile(found, q)) for q in (2.5, 97.5))
    return 2 * value - high, 2 * value - low
