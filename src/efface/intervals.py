"""Rates with their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from efface import checks

Z = 1.959964  # 95 %


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate; (0, 1) where nothing was counted.

    Args:
        hits: how often it happened, 0 to n.
        n: how often it could have happened.

    Raises:
        ValueError: hits outside 0 to n.

    Example:
        >>> from efface.intervals import wilson
        >>> low, high = wilson(0, 64)
        >>> low, round(high, 3)
        (0.0, 0.057)
    """
    checks.whole("hits", hits, 0, checks.whole("n", n, 0))
    if n == 0:
        return 0.0, 1.0
    p, d = hits / n, 1 + Z * Z / n
    middle, half = (p + Z * Z / (2 * n)) / d, Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / d
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


@dataclass(frozen=True)
class Rate:
    """`hits` of `n`.

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
        """As cards hold it."""
        return {"rate": self.rate, "hits": self.hits, "n": self.n, "interval": list(self.interval)}
