"""Draws the calibration of a reward model as an SVG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

SIDE, LEFT, TOP = 220, 48, 28
TITLES = {"binary": "Pictures: predicted and observed share", "ranking": "Pairs: predicted and observed order"}


def calibration_svg(facts: Mapping[str, Any]) -> str:
    """The held-out calibration of a reward model: observed against predicted shares, with 95 % Wilson intervals.

    Args:
        facts: `RewardModel.facts`.

    Example:
        >>> from efface.feedback.figure import calibration_svg
        >>> bins = [{"n": 9, "predicted": 0.8, "observed": 0.7, "interval": [0.4, 0.9]}]
        >>> calibration_svg({"binary": {"calibration": bins}, "ranking": None}).count("<circle")
        1
    """
    panels = [(TITLES[kind], facts[kind]["calibration"]) for kind in TITLES if facts.get(kind)]
    wide, high = SIDE + LEFT + 24, SIDE + TOP + 44
    drawn = "".join(_panel(title, bins, k * wide) for k, (title, bins) in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide * max(len(panels), 1)} {high}" role="img" '
        f'font-family="sans-serif" font-size="11" fill="#1a1e23">{drawn}</svg>\n'
    )


def _panel(title: str, bins: Sequence[Mapping[str, Any]], x: int) -> str:
    def at(a: float, b: float) -> tuple[float, float]:
        return x + LEFT + SIDE * a, TOP + SIDE * (1 - b)

    parts = [f'<text x="{x + LEFT}" y="16" font-weight="600">{html.escape(title)}</text>']
    parts.append(f'<rect x="{x + LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#9da8b4"/>')
    parts.append(_line(at(0, 0), at(1, 1), "#9da8b4", ' stroke-dasharray="4 4"'))
    for share in (0, 0.5, 1):
        (a, _), (_, b) = at(share, 0), at(0, share)
        parts.append(f'<text x="{a}" y="{TOP + SIDE + 14}" text-anchor="middle">{share:g}</text>')
        parts.append(f'<text x="{x + LEFT - 6}" y="{b + 4}" text-anchor="end">{share:g}</text>')
    parts.append(f'<text x="{x + LEFT + SIDE / 2}" y="{TOP + SIDE + 32}" text-anchor="middle">predicted</text>')
    for each in bins:
        low, high = each["interval"]
        a, b = at(each["predicted"], each["observed"])
        parts.append(_line(at(each["predicted"], low), at(each["predicted"], high), "#1f78b4", ""))
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="#1f78b4"><title>n = {each["n"]}</title></circle>')
    return "".join(parts)


def _line(a: tuple[float, float], b: tuple[float, float], color: str, more: str) -> str:
    return f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" stroke="{color}"{more}/>'
