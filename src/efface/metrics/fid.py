"""The Frechet Inception distance: a distance between two sets of pictures that treats their features as Gaussian."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from math import nan, sqrt
from typing import ClassVar

import numpy as np

from efface.records import Sample, Score

from ._features import Extract, extractor, folder_of, named, of
from ._samples import chosen, paired
from ._stats import LEAST, Z, clusters

__all__ = ["FID"]

GROUPS = 100  # each solves an eigenvalue problem
WIDE = 512  # no interval above this number of features


@dataclasses.dataclass(frozen=True)
class FID:
    """The Frechet distance between the features of the pictures and those of a reference. Lower is nearer.

        || mu_1 - mu_2 ||^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

    The score is called `fid_eye` with the `emoji` detectors, `fid_base` with Inception against the base model's
    pictures, `fid_coco` with Inception against a folder. These are different numbers. NaN if a set does not have more
    pictures than features, because its covariance is singular; use `kid` instead. Values for different N are not
    comparable.

    Paper: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter 2017, "GANs Trained by a Two Time-Scale Update Rule",
    arXiv 1706.08500, equation 6.

    Differs: the interval is of the mean of the value over other sets of N pictures: 1.96 standard errors of a
    jackknife, which leaves out each of up to 100 groups of clusters in turn. A bootstrap's copies of pictures narrow
    the covariances, so its interval would exclude the value. There is no interval above 512 features, or with fewer
    than 10 prompts. Inception runs through torchmetrics and resizes like torch-fidelity, not clean-fid. It was not run
    for lack of its weights.

    Args:
        features: "eye", "inception", "clip:FOLDER", or a callable that returns features [J, N, D].
        reference: a folder of real pictures, such as COCO's; "" = the base model's pictures of the same rows.
        kinds: kinds of rows to take; () = all.

    Raises:
        ValueError: a required `base` is missing.
        ImportError: a package is missing.

    Example:
        >>> from efface.metrics.fid import FID
        >>> FID().kinds
        ('benign',)
    """

    name: ClassVar[str] = "fid"
    unit: ClassVar[str] = "distance"
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
        ours, theirs = of(group, extract), of(other, extract)
        name, n, used = (
            named("fid", self.features, self.reference),
            len(group),
            [_used(x, y) for x, y in zip(ours, theirs, strict=True)],
        )
        widest = max(x.shape[1] for x, _ in used)
        if min(n, len(other)) <= widest:
            words += f"; not defined: {min(n, len(other))} pictures for {widest} features, take kid"
            return [Score(name, nan, n, nan, nan, "distance", False, words)]
        values = [frechet(x, y) for x, y in used]
        worst = int(np.argmax(values))
        low = high = nan
        if used[worst][0].shape[1] <= WIDE:
            low, high = self._interval(*used[worst], values[worst], group)
        else:
            words += "; no interval"
        return [Score(name, values[worst], n, low, high, "distance", False, words)]

    def _interval(self, x: np.ndarray, y: np.ndarray, value: float, group: Sequence[Sample]) -> tuple[float, float]:
        which = clusters([s.row for s in group])
        if which.max() + 1 < LEAST:
            return nan, nan
        if not self.reference:
            variance = _jackknife(which, lambda kept: frechet(x, y, kept, kept))
        else:
            variance = _jackknife(which, lambda kept: frechet(x, y, kept))
            variance += _jackknife(np.arange(len(y)), lambda kept: frechet(x, y, None, kept))
        half = Z * sqrt(variance)
        return max(value - half, 0.0), value + half


def _jackknife(which: np.ndarray, value: Callable[[np.ndarray], float]) -> float:
    """The variance of a value, from leaving out groups of clusters [N]; `value` takes the weights 0 or 1 [N]."""
    groups = min(int(which.max()) + 1, GROUPS)
    found = np.array([value((which % groups != k).astype(np.float64)) for k in range(groups)])
    return float((groups - 1) / groups * ((found - found.mean()) ** 2).sum())


def _used(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drops the columns that are zero in both, which are padding."""
    there = x.any(0) | y.any(0)
    return x[:, there], y[:, there]


def frechet(x: np.ndarray, y: np.ndarray, wx: np.ndarray | None = None, wy: np.ndarray | None = None) -> float:
    """The distance between two weighted sets of features [N, D]."""
    (m1, s1), (m2, s2) = _moments(x, wx), _moments(y, wy)
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # The trace of (S1 S2)^(1/2) is that of (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric.
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return max(float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross), 0.0)


def _moments(x: np.ndarray, w: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    w = np.ones(len(x)) if w is None else w
    mean = w @ x / w.sum()
    centred = (x - mean) * np.sqrt(w)[:, None]
    return mean, centred.T @ centred / (w.sum() - 1)
