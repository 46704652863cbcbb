"""Rates with their uncertainty."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lgamma, sqrt
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

from efface import checks

Z = 1.959964  # 95 %


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate; (0, 1) if `n` is 0.

    Args:
        hits: number of events, 0 to n.
        n: number of trials.

    Raises:
        ValueError: `hits` is outside 0 to n.

    Example:
        >>> from efface.intervals import wilson
        >>> low, high = wilson(0, 64)
        >>> low, round(high, 3)
        (0.0, 0.057)
    """
    checks.whole("hits", hits, 0, checks.whole("n", n, 0))
    if n == 0:
        return 0.0, 1.0
    low, high = _score(hits / n, n, Z)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def _score(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's interval of a rate p among n trials."""
    d = 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(middle - half, 0.0), min(middle + half, 1.0)


@lru_cache(maxsize=20_000)
def clopper_pearson(hits: int, n: int, level: float = 0.025) -> tuple[float, float]:
    """The exact (Clopper-Pearson) interval of a rate. Each end misses the rate with a probability of at most `level`.

        P(X <= hits | n, high) = level,   P(X >= hits | n, low) = level

    Args:
        hits: number of events, 0 to n.
        n: number of trials; (0, 1) if 0.
        level: in (0, 0.5]. The default makes a two-sided 95 % interval.

    Raises:
        ValueError: `hits` is outside 0 to n, or `level` is outside (0, 0.5].

    Example:
        >>> from efface.intervals import clopper_pearson
        >>> low, high = clopper_pearson(0, 150)
        >>> low, round(high, 4)
        (0.0, 0.0243)
    """
    checks.whole("hits", hits, 0, checks.whole("n", n, 0))
    checks.number("level", level, 0, 0.5, above=True)
    low = 0.0 if hits == 0 or n == 0 else 1 - _tail(n - hits, n, level)
    return low, 1.0 if hits == n else _tail(hits, n, level)


def _tail(hits: int, n: int, level: float) -> float:
    """The rate at which at most `hits` of n have the probability `level`, by bisection."""
    import numpy as np

    count = np.arange(hits + 1)
    ways = np.array([lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) for k in range(hits + 1)])
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        chance = float(np.exp(ways + count * np.log(middle) + (n - count) * np.log1p(-middle)).sum())
        low, high = (middle, high) if chance > level else (low, middle)
    return high


def area(positive: Sequence[float], negative: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The area under the ROC curve of scores, and its 95 % interval, which also holds near 1 and for few scores.

        AUC = P(positive > negative) + P(equal) / 2
        |AUC - a| = z sqrt(V(a)) at both ends a,   V(a) = a (1 - a) (1 + s (1 - a) / (2 - a) + s a / (1 + a)) / (m n)
        s = (m + n) / 2 - 1 for m positive and n negative scores

    Source: R. G. Newcombe, 2006, Confidence intervals for an effect size measure based on the Mann-Whitney statistic,
    part 2, method 5.

    Raises:
        ValueError: there are no scores of one kind.

    Example:
        >>> from efface.intervals import area
        >>> value, (low, high) = area(range(10, 20), range(10))
        >>> value, round(low, 2), high
        (1.0, 0.8, 1.0)
    """
    import numpy as np

    a, b = np.asarray(positive, float), np.asarray(negative, float)
    if not len(a) or not len(b):
        raise ValueError(f"Expected scores of both kinds, got {len(a)} and {len(b)}. Give at least one of each.")
    value = float((a[:, None] > b).mean() + (a[:, None] == b).mean() / 2)
    s, pairs = (len(a) + len(b)) / 2 - 1, len(a) * len(b)

    def end(outer: float) -> float:
        inside, outside = value, outer
        for _ in range(60):
            middle = (inside + outside) / 2
            spread = middle * (1 - middle) * (1 + s * (1 - middle) / (2 - middle) + s * middle / (1 + middle)) / pairs
            inside, outside = (middle, outside) if abs(value - middle) <= Z * sqrt(spread) else (inside, middle)
        return inside

    return value, (end(0.0) if value > 0 else 0.0, end(1.0) if value < 1 else 1.0)


@dataclass(frozen=True)
class Rate:
    """A rate: `hits` of `n`.

    Example:
        >>> from efface.intervals import Rate
        >>> print(Rate(2, 64))
        3.1 % [0.9, 10.7]
    """

    hits: int
    n: int

    @property
    def rate(self) -> float:
        return self.hits / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.hits, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def record(self) -> dict[str, float | int | list[float]]:
        """The rate as cards store it."""
        return {"rate": self.rate, "hits": self.hits, "n": self.n, "interval": list(self.interval)}


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Args:
        value: the mean over pictures.
        interval: its 95 % interval over prompts and seeds.
        p: the probability of a difference of at least this size if the sign of each prompt's difference were random.
        prompts: the number of prompts. With G prompts, `p` is at least 2 / 2^G.
    """

    value: float
    interval: tuple[float, float]
    p: float
    prompts: int


def clustered(
    values: Sequence[int] | np.ndarray, clusters: Sequence[Hashable], draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a rate over pictures that share prompts: a bootstrap over prompts, then over their seeds.

    With few prompts a bootstrap is too narrow, so the interval is widened by t / z, with Student's t for the number of
    prompts. A bootstrap is also too narrow near 0 and 1. The interval therefore covers Wilson's for the effective
    number of pictures, which the bootstrap's variance gives. If all values are 0, or all are 1, each prompt counts as
    one trial.

    Args:
        values: the outcome of each picture, 0 or 1.
        clusters: the prompt of each picture.
        draws: number of resamples.
        seed: seed of the resamples.

    Returns:
        (low, high); (0, 1) with fewer than two prompts.

    Raises:
        ValueError: the numbers of prompts and values differ, or a value is not 0 or 1.

    Example:
        >>> from efface.intervals import clustered
        >>> low, high = clustered([1, 1, 0, 0] * 8, ["a", "a", "b", "b"] * 8)
        >>> low < 0.5 < high
        True
    """
    outcome, index, size = _grouped(values, clusters, (0, 1))
    hits, groups = int(outcome.sum()), len(size)
    if groups < 2:
        return 0.0, 1.0
    if hits in (0, len(outcome)):
        return wilson(groups * (hits > 0), groups)
    rate = hits / len(outcome)
    low, high, variance = _resampled(outcome, index, size, draws, seed)
    effective = min(float(len(outcome)), rate * (1 - rate) / max(variance, 1e-12))
    apart = _score(rate, effective, _student(groups - 1))
    return max(min(low, apart[0]), 0.0), min(max(high, apart[1]), 1.0)


def difference(
    a: Sequence[int] | np.ndarray,
    b: Sequence[int] | np.ndarray,
    clusters: Sequence[Hashable],
    draws: int = 4000,
    seed: int = 0,
) -> Difference:
    """The mean of a - b over pictures with equal prompts and seeds.

    `p` compares the sum of the prompts' differences with sums in which each prompt's sign is random.

    Args:
        a, b: outcomes 0 or 1, picture by picture.
        clusters: the prompt of each picture.
        draws: number of resamples, and of random signs.
        seed: seed of both.

    Raises:
        ValueError: `a`, `b` and `clusters` differ in length, or a value is not 0 or 1.

    Example:
        >>> from efface.intervals import difference
        >>> found = difference([1, 1, 1, 1], [0, 0, 1, 0], ["a", "a", "b", "b"])
        >>> found.value, found.p, found.prompts
        (0.75, 0.5, 2)
    """
    import numpy as np

    if len(a) != len(b):
        raise ValueError(f"Expected as many values in `a` as in `b`, got {len(a)} and {len(b)}. Pair them by picture.")
    outcome, index, size = _grouped(np.asarray(a, int) - np.asarray(b, int), clusters, (-1, 0, 1))
    sums, groups = np.bincount(index, outcome, len(size)), len(size)
    if 2**groups <= draws:
        signs = 1 - 2 * (np.arange(2**groups)[:, None] >> np.arange(groups) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(seed).integers(2, size=(draws, groups))
        signs[0] = 1  # the order that was seen is one of them
    p = float((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).mean())
    low, high, _ = _resampled(outcome, index, size, draws, seed)
    if not outcome.any():  # no picture differs: a bootstrap sees no spread
        high = wilson(0, groups)[1]
        low = -high
    elif groups < 2:
        low, high = -1.0, 1.0
    elif abs(int(outcome.sum())) == len(outcome):  # all differ alike: each prompt counts as one trial
        low, high = sorted((float(outcome[0]), outcome[0] * wilson(groups, groups)[0]))
    return Difference(float(outcome.mean()), (max(low, -1.0), min(high, 1.0)), p, groups)


def holm(p: Sequence[float]) -> list[float]:
    """The p values of one family of comparisons, adjusted by Holm. Those below 0.05 hold jointly at 95 %.

    Raises:
        ValueError: a value is outside 0 to 1.

    Example:
        >>> from efface.intervals import holm
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    for each in p:
        checks.share("p", each)
    adjusted, least = [0.0] * len(p), 0.0
    for k, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - k) * p[place]))
        adjusted[place] = least
    return adjusted


def _grouped(
    values: Any, clusters: Sequence[Hashable], allowed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values, the cluster number of each value, and the size of each cluster."""
    import numpy as np

    outcome = np.asarray(values, int)
    if len(outcome) != len(clusters):
        raise ValueError(f"Expected a cluster per value, got {len(clusters)} for {len(outcome)}. Name each prompt.")
    if len(outcome) == 0 or not np.isin(outcome, allowed).all():
        raise ValueError("Expected outcomes 0 or 1 of at least one picture, got others. Give one per picture.")
    number = {name: k for k, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([number[name] for name in clusters], int)
    return outcome, index, np.bincount(index, minlength=len(number))


def _resampled(
    outcome: np.ndarray, index: np.ndarray, size: np.ndarray, draws: int, seed: int
) -> tuple[float, float, float]:
    """The interval of a mean of -1, 0 and 1, by resampling clusters and then their members; and the means' variance."""
    import numpy as np

    groups = len(size)
    up, down = (np.bincount(index, sign, groups) / size for sign in (outcome > 0, outcome < 0))
    random = np.random.default_rng(seed)
    n = random.multinomial(groups, np.full(groups, 1 / groups), draws) * size
    plus = random.binomial(n, up)
    minus = random.binomial(n - plus, np.divide(down, 1 - up, out=np.zeros_like(down), where=up < 1).clip(0, 1))
    means, middle = (plus - minus).sum(1) / n.sum(1), float(outcome.mean())
    wider = _student(groups - 1) / Z if groups > 1 else 1.0
    low, high = (middle + (float(end) - middle) * wider for end in np.percentile(means, (2.5, 97.5)))
    return low, high, float(means.var())


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, expanded around the normal one. The error is 0.1 % from 4 degrees of freedom
    on."""
    z, v = Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3
