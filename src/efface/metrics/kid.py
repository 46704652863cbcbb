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

    Differs: uses all pictures together, not 100 subsets. The interval is a basic bootstrap over clusters; see `Pairs`.
    NaN with fewer than 10 prompts. Inception runs through torchmetrics; it was not run for lack of its weights.

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
        which, found = clusters([s.row for s in group]), []
        for x, y in zip(of(group, extract), of(other, extract), strict=True):
            there = x.any(0) | y.any(0)
            distance = Discrepancy(x[:, there], y[:, there], which, not self.reference)
            found.append((value := distance(), *_interval(distance, value)))
        value, low, high = max(found)
        return [Score(name, value, n, low, high, self.unit, False, words)]


class Pairs:
    """Means of a kernel over pairs of different pictures of a resample of clusters.

    Copies of a cluster are equal, so their pairs say nothing of other pictures: of one cluster, only pairs within a
    copy count. Otherwise a resample of few clusters would look more alike than the pictures are.

    Args:
        kernel: [N, N].
        which: the cluster of each picture, [N], from 0 on.
    """

    def __init__(self, kernel: np.ndarray, which: np.ndarray) -> None:
        self.kernel, self.which = kernel, which
        own = np.eye(int(which.max()) + 1)[:, which]
        self.inside, self.sizes = ((own @ kernel) * own).sum(1), own.sum(1)
        self.apart = self.inside - np.bincount(which, np.diag(kernel))

    def mean(self, w: np.ndarray) -> float:
        """The mean for a resample that has each cluster `w` times, [C]."""
        each: np.ndarray = w[self.which]
        copies: np.ndarray = w**2
        total = each @ self.kernel @ each - copies @ self.inside + w @ self.apart
        count = (w @ self.sizes) ** 2 - copies @ self.sizes**2 + w @ (self.sizes * (self.sizes - 1))
        return float(total / count)


class Discrepancy:
    """1000 times the squared maximum mean discrepancy of two sets of features, [N, D] and [M, D].

    Args:
        x, y: the features.
        which: the cluster of each x, [N], from 0 on.
        twins: whether y[i] is of the same row as x[i]. Such pairs are omitted, and both have the same clusters.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, which: np.ndarray, twins: bool) -> None:
        d = max(x.shape[1], 1)
        own, other, self.cross = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        self.own, self.other = Pairs(own, which), Pairs(other, which if twins else np.arange(len(y)))
        self.twins = Pairs(self.cross, which) if twins else None

    def __call__(self, w: np.ndarray | None = None, v: np.ndarray | None = None) -> float:
        """The value for `w` copies of each cluster of x, and `v` of each y, which twins do not have. None: one each."""
        w = np.ones(len(self.own.sizes)) if w is None else w
        if self.twins is not None:
            return 1000 * (self.own.mean(w) + self.other.mean(w) - 2 * self.twins.mean(w))
        v = np.ones(len(self.other.sizes)) if v is None else v
        each = w[self.own.which]
        cross = float(each @ self.cross @ v / (each.sum() * v.sum()))
        return 1000 * (self.own.mean(w) + self.other.mean(v) - 2 * cross)


def _interval(found: Discrepancy, value: float) -> tuple[float, float]:
    n, others = len(found.own.sizes), len(found.other.sizes)
    if n < 3:
        return nan, nan
    draws = []
    for k, w in enumerate(weights(n, DRAWS)):
        v = None if found.twins else weights(others, 1, seed=k + 1)[0]
        if (w[found.own.which] > 0).sum() > 1 and (v is None or (v > 0).sum() > 1):
            draws.append(found(w, v))
    low, high = (float(np.percentile(draws, q)) for q in (2.5, 97.5))
    return 2 * value - high, 2 * value - low
