"""Intervals by a vectorised, seeded bootstrap over clusters."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np
from torch import Tensor

from efface.records import Row, Sample, Score

DRAWS, SEED, Z = 2000, 0, 1.959964
LEAST = 10
"""Prompts that a mean or a distance needs. With fewer, its 95 % bootstrap interval covers the truth in under 90 % of
cases, even for normal values: P(|t| < 1.96 sqrt((n - 1) / n)) with n - 1 degrees of freedom."""


def clusters(rows: Sequence[Row]) -> np.ndarray:
    """The cluster number of each row, 0 ... C - 1. A row without a cluster is a cluster by itself."""
    names = [(row.cluster, "") if row.cluster else ("", row.id) for row in rows]
    index = {name: k for k, name in enumerate(dict.fromkeys(names))}
    found: np.ndarray = np.array([index[name] for name in names], np.int64)
    return found


def too_few(
    samples: Sequence[Sample], name: str, unit: str, higher_is_better: bool | None, protocol: str
) -> list[Score]:
    """A score without a value that says why, if the rows have fewer than `LEAST` prompts; otherwise nothing."""
    prompts = int(clusters([s.row for s in samples]).max()) + 1
    if prompts >= LEAST:
        return []
    words = f"{protocol}; not given: {prompts} prompts, fewer than {LEAST}"
    return [Score(name, nan, len(samples), nan, nan, unit, higher_is_better, words)]


def weights(n: int, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """How often each of `n` clusters occurs in each of `draws` resamples: [draws, n]."""
    picked = np.random.default_rng(seed).integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    found: np.ndarray = np.bincount(picked.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)
    return found


def ratio_interval(
    top: Sequence[float] | np.ndarray, bottom: Sequence[float] | np.ndarray, cluster: np.ndarray
) -> tuple[float, float]:
    """The 95 % percentile interval of sum(top) / sum(bottom), from 2,000 resamples of clusters.

    If all resamples give 0, or all give 1, a bootstrap shows no spread. The other bound is then Wilson's, with one
    trial per cluster. Returns NaN, NaN with fewer than two clusters, or if `bottom` is 0.
    """
    above, below = np.bincount(cluster, top), np.bincount(cluster, bottom)
    counts = int((below != 0).sum())
    if len(above) < 2 or counts < 2:
        return nan, nan
    w = weights(len(above))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (w @ above) / (w @ below)
    low, high = (float(v) for v in np.percentile(found[np.isfinite(found)], (2.5, 97.5)))
    if not above.any():
        high = Z**2 / (counts + Z**2)
    elif np.array_equal(above, below):
        low = counts / (counts + Z**2)
    return low, high


def mean_interval(values: Sequence[float] | np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean; see `ratio_interval`."""
    return ratio_interval(values, np.ones(len(values)), cluster)


def share(
    name: str, hits: Tensor, samples: Sequence[Sample], *, worse: str, higher_is_better: bool | None, protocol: str
) -> Score:
    """The share of hits, bool [J, N], by the less favourable judge.

    Args:
        worse: "high" if a high share is less favourable, "low" if a low share is.
    """
    rates = hits.double().mean(1)
    judge = int(rates.argmax() if worse == "high" else rates.argmin())
    values = hits[judge].double().numpy()
    low, high = mean_interval(values, clusters([s.row for s in samples]))
    each = {s.row.id: float(v) for s, v in zip(samples, values, strict=True)}
    return Score(name, float(values.mean()), len(values), low, high, "share", higher_is_better, protocol, each)


def mean(
    name: str, values: Tensor, samples: Sequence[Sample], *, unit: str, higher_is_better: bool | None, protocol: str
) -> Score:
    """The mean of one value per sample, [J, N], by the judge with the lowest mean (highest if lower is better)."""
    means = values.double().mean(1)
    judge = int(means.argmax() if higher_is_better is False else means.argmin())
    numbers = values[judge].double().numpy()
    low, high = mean_interval(numbers, clusters([s.row for s in samples]))
    each = {s.row.id: float(v) for s, v in zip(samples, numbers, strict=True)}
    return Score(name, float(numbers.mean()), len(numbers), low, high, unit, higher_is_better, protocol, each)
