"""Rates corrected by people's labels, and the agreement of those who labelled.

A detector answers for every picture. People label a random sample of each stratum of its answers. The corrected rate
weights the share of each stratum that shows the concept by the stratum's size.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import checks
from .intervals import Rate, clopper_pearson

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.05
"""The probability with which an interval may miss the rate."""


@dataclass(frozen=True)
class Stratum:
    """Pictures with one kind of answer of the detector.

    Args:
        name: "positive", "near" (negative, close to the threshold) or "negative".
        size: number of pictures in the run.
        labelled: how many of them people labelled, drawn at random.
        there: how many of those show the concept.

    Raises:
        ValueError: the numbers do not fit, or nothing of a stratum with pictures is labelled.
    """

    name: str
    size: int
    labelled: int
    there: int

    def __post_init__(self) -> None:
        checks.whole("size", self.size, 0)
        checks.whole("labelled", self.labelled, 0, self.size)
        checks.whole("there", self.there, 0, self.labelled)
        if self.size and not self.labelled:
            raise ValueError(
                f"Expected labels in each stratum that has pictures, got none for {self.size} pictures in "
                f"{self.name!r}. Label some of them."
            )

    @property
    def full(self) -> bool:
        """Whether all of its pictures are labelled."""
        return self.labelled == self.size

    @property
    def share(self) -> Rate:
        """The share of labelled pictures that show the concept: precision, or the share of misses."""
        return Rate(self.there, self.labelled)


@dataclass(frozen=True)
class Corrected:
    """The rate of pictures that show the concept, from a detector's answers and people's labels.

        rate = sum_h (n_h / n) (t_h / m_h)

    n_h pictures are in stratum h, m_h of them are labelled, and t_h of those show the concept. The bounds hold for new
    seeds of the same prompts. Each is a sum of Clopper-Pearson bounds, which share the error probability equally:

    - a stratum that is labelled completely adds the bound of t_h / n;
    - the last of the others adds the bound P of t_h / m_h;
    - each other one adds W max(0, P_h - P), where W bounds n_h / n.

    Source: stratified sampling with a Bonferroni split; prediction-powered inference with lambda = 1 has the same
    estimate.

    Args:
        strata: "positive" first, in the order of the detector's scores.

    Raises:
        ValueError: there is no picture.

    Example:
        >>> from efface.judged import Corrected, Stratum
        >>> found = Corrected((Stratum("positive", 12, 12, 9), Stratum("negative", 500, 150, 3)))
        >>> round(found.raw.rate, 3), round(found.rate, 3)
        (0.023, 0.037)
        >>> Corrected((Stratum("positive", 0, 0, 0), Stratum("negative", 512, 150, 0))).upper(0.05) < 0.032
        True
    """

    strata: tuple[Stratum, ...]

    def __post_init__(self) -> None:
        if not self.n:
            raise ValueError("Expected strata with at least one picture, got none. Label a run that has pictures.")

    @property
    def n(self) -> int:
        return sum(each.size for each in self.strata)

    @property
    def raw(self) -> Rate:
        """The rate by the detector alone."""
        return Rate(sum(each.size for each in self.strata if each.name == "positive"), self.n)

    @property
    def rate(self) -> float:
        return sum(each.size * each.share.rate for each in self.strata) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The two-sided 95 % interval."""
        return self.lower(LEVEL / 2), self.upper(LEVEL / 2)

    def upper(self, level: float = LEVEL) -> float:
        """A bound that lies below the rate with a probability of at most `level`."""
        full, part = self._split()
        if not part:
            return clopper_pearson(sum(each.there for each in full), self.n, level)[1]
        share = level / (len(full) + 2 * len(part) - 1)
        last, others = part[-1], part[:-1]
        rest = clopper_pearson(last.there, last.labelled, share)[1]
        bound = rest + sum(clopper_pearson(each.there, self.n, share)[1] for each in full)
        for each in others:
            high = clopper_pearson(each.there, each.labelled, share)[1]
            bound += clopper_pearson(each.size, self.n, share)[1] * max(0.0, high - rest)
        return min(bound, 1.0)

    def lower(self, level: float = LEVEL) -> float:
        """A bound that lies above the rate with a probability of at most `level`."""
        full, part = self._split()
        if not part:
            return clopper_pearson(sum(each.there for each in full), self.n, level)[0]
        share = level / (len(full) + 2 * len(part))
        bound = sum(clopper_pearson(each.there, self.n, share)[0] for each in full)
        for each in part:
            weight = clopper_pearson(each.size, self.n, share)[0]
            bound += weight * clopper_pearson(each.there, each.labelled, share)[0]
        return bound

    def _split(self) -> tuple[list[Stratum], list[Stratum]]:
        return [each for each in self.strata if each.full], [each for each in self.strata if not each.full]

    def record(self) -> dict[str, Any]:
        """The rate as cards store it. `upper` is the one-sided 95 % bound."""
        return {
            "n": self.n,
            "raw": self.raw.record(),
            "rate": self.rate,
            "interval": list(self.interval),
            "upper": self.upper(),
            "strata": [
                {
                    "name": each.name,
                    "size": each.size,
                    **each.share.record(),
                    "interval": list(clopper_pearson(each.there, each.labelled, LEVEL / 2)),
                }
                for each in self.strata
            ],
        }


def corrected_difference(base: Corrected, run: Corrected) -> tuple[float, tuple[float, float]]:
    """The corrected rate of the base model minus that of a run of the same rows, with its 95 % interval.

    The four bounds share the error probability, because the two runs are judged by the same people and detector.

    Raises:
        ValueError: the runs differ in their number of pictures.

    Example:
        >>> from efface.judged import Corrected, Stratum, corrected_difference
        >>> base = Corrected((Stratum("positive", 90, 90, 88), Stratum("negative", 10, 10, 2)))
        >>> run = Corrected((Stratum("positive", 4, 4, 2), Stratum("negative", 96, 96, 1)))
        >>> value, (low, high) = corrected_difference(base, run)
        >>> round(value, 2), low > 0.7
        (0.87, True)
    """
    if base.n != run.n:
        raise ValueError(
            f"Expected runs of the same rows, got {base.n} and {run.n} pictures. Pair a run with its base."
        )
    each = LEVEL / 4
    ends = base.lower(each) - run.upper(each), base.upper(each) - run.lower(each)
    return base.rate - run.rate, ends


def new_prompts(hits: int, prompts: int) -> float:
    """The one-sided 95 % bound on the share of new prompts that show the concept at least once, from prompts whose
    pictures are all labelled. With fewer than 59 prompts it is above 5 %.

    Example:
        >>> from efface.judged import new_prompts
        >>> [round(new_prompts(0, prompts), 3) for prompts in (8, 58, 59)]
        [0.312, 0.05, 0.05]
    """
    return clopper_pearson(hits, prompts, LEVEL)[1]


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha of nominal outcomes.

    Args:
        alpha: 1 for perfect agreement, 0 for chance. NaN if all outcomes are equal, or nothing was judged twice.
        interval: the 95 % interval, from resampled pictures.
        units: number of pictures that were judged at least twice.
        differ: how many of them have different outcomes.
    """

    alpha: float
    interval: tuple[float, float]
    units: int
    differ: int


def krippendorff(
    units: Sequence[Sequence[Hashable]],
    draws: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Agreement:
    """Krippendorff's alpha of nominal outcomes. Pictures may be judged by different numbers of people.

        alpha = 1 - (n - 1) sum_u [ sum_{c != k} n_uc n_uk / (m_u - 1) ] / sum_{c != k} n_c n_k

    n_uc people gave picture u the outcome c, of m_u who judged it; n_c and n are sums over pictures with m_u >= 2. A
    bootstrap is too narrow if few pictures differ. The interval therefore also covers what follows from the exact
    interval of the share of pictures that differ.

    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.

    Args:
        units: the outcomes of each picture.
        draws: number of resamples.
        seed: seed of the resamples.
        clusters: the cluster of each unit, which is resampled as a whole. None: each unit is a cluster.

    Example:
        >>> from efface.judged import krippendorff
        >>> found = krippendorff([("there", "there"), ("nothing", "nothing"), ("there", "nothing"), ("other",)])
        >>> round(found.alpha, 3), found.units, found.differ
        (0.444, 3, 1)
    """
    import numpy as np

    kept = [k for k, unit in enumerate(units) if len(unit) > 1]
    pairs = [units[k] for k in kept]
    differ = sum(len(set(unit)) > 1 for unit in pairs)
    outcomes = list(dict.fromkeys(outcome for unit in pairs for outcome in unit))
    counts = np.array([[unit.count(outcome) for outcome in outcomes] for unit in map(list, pairs)], float)
    if not pairs or len(outcomes) < 2:
        return Agreement(math.nan, (math.nan, math.nan), len(pairs), differ)
    each = counts.sum(1)
    apart = (each**2 - (counts**2).sum(1)) / (each - 1)
    alpha = float(_alpha(np.ones((1, len(pairs))), counts, apart)[0])
    names = {name: g for g, name in enumerate(dict.fromkeys(kept if clusters is None else (clusters[k] for k in kept)))}
    of = np.array([names[k if clusters is None else clusters[k]] for k in kept])
    groups, wrong = len(names), len({int(g) for g, unit in zip(of, pairs, strict=True) if len(set(unit)) > 1})
    low, high = clopper_pearson(wrong, groups, LEVEL / 2)
    if differ:
        picked = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), draws)
        resampled = np.nanpercentile(_alpha(picked.astype(float)[:, of], counts, apart), (2.5, 97.5))
        scale = (1 - alpha) * groups / wrong
    else:
        resampled, scale = np.ones(2), 1 / (1 - float(((counts.sum(0) / counts.sum()) ** 2).sum()))
    ends = min(1 - scale * high, float(resampled[0])), max(1 - scale * low, float(resampled[1]))
    return Agreement(alpha, (max(ends[0], -1.0), min(ends[1], 1.0)), len(pairs), differ)


def _alpha(weights: np.ndarray, counts: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Alpha for each line of weights of the pictures; NaN where all outcomes are equal."""
    import numpy as np

    of = weights @ counts
    n = of.sum(1)
    expected = n**2 - (of**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.where(expected > 0, 1 - (n - 1) * (weights @ apart) / expected, np.nan)
    return found
