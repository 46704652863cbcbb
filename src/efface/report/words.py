"""Formats scores for tables and pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..records import Score


def number(score: Score | None) -> str:
    if score is None or math.isnan(score.value):
        return "–"
    return _value(score.value, score.unit)


def _value(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.3g}"


def span(score: Score | None) -> str:
    """The interval as text, which says if there is none."""
    if score is None or math.isnan(score.value):
        return "not defined" if score else "not measured"
    if math.isnan(score.low) or math.isnan(score.high):
        return "no interval"
    low, high = (_value(x, score.unit).removesuffix(" %") for x in (score.low, score.high))
    return f"[{low}, {high}]"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def ends(interval: Sequence[float]) -> str:
    """The ends of an interval of shares, in percent."""
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
