"""Draws removal against retention as an SVG."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from typing import Any

from ..records import Score

COLORS = ("#d95f02", "#1f78b4", "#1b9e77", "#c2478f", "#b8860b", "#7570b3", "#66a61e")
MARKERS = "oDs^vPX*"


def pareto(points: Sequence[tuple[str, Score, Score]], removal: str, retention: str, salt: str = "pareto") -> str:
    """Draws points (label, removal, retention) as an SVG whose lines and letters take the page's colour.

    Args:
        points: the points, the base model first.
        removal, retention: names of the axes.
        salt: distinguishes the ids of several figures on a page.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink = "#010203"  # stands for the page's own colour
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 10,
        "font.family": "sans-serif",
        "text.parse_math": False,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    with mpl.rc_context(settings):
        columns = 3 if max(len(p[0]) for p in points) < 20 else 2
        lines = -(-len(points) // columns)
        figure = Figure(figsize=(5.2, 4.0 + 0.22 * lines), layout="constrained")
        axes = figure.subplots()
        axes.grid(color=ink, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        best = sorted((p for p in points if not any(_beats(q, p) for q in points)), key=lambda p: p[1].value)
        axes.plot([100 * p[1].value for p in best], [100 * p[2].value for p in best], ":", color=ink, linewidth=1)
        keys: list[Any] = []
        for n, (_, x, y) in enumerate(points):
            color, marker = ("#8a94a3", "o") if n == 0 else (COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)])
            drawn = axes.errorbar(
                100 * x.value,
                100 * y.value,
                xerr=_arms(x),
                yerr=_arms(y),
                color=color,
                fmt=marker,
                markersize=7,
                linewidth=1,
                capsize=2,
                markerfacecolor="none" if n == 0 else color,
            )
            keys.append(drawn.lines[0])
            for line in (*drawn.lines[1], *drawn.lines[2]):
                line.set_alpha(0.55)
        place: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9}
        figure.legend(keys, [p[0] if len(p[0]) <= 28 else f"{p[0][:27]}…" for p in points], **place)
        axes.set(xlim=(-4, 104), ylim=(-4, 108), xlabel=f"removal, % ({removal})", ylabel=f"retention, % ({retention})")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(ink, "currentColor")
    words = "; ".join(f"{n}: removal {100 * x.value:.1f} %, retention {100 * y.value:.1f} %" for n, x, y in points)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(words)}"', 1)


def _beats(a: tuple[str, Score, Score], b: tuple[str, Score, Score]) -> bool:
    pair = [(mine.value, other.value) for mine, other in zip(a[1:], b[1:], strict=True)]
    return all(x >= y for x, y in pair) and any(x > y for x, y in pair)


def _arms(score: Score) -> list[list[float]] | None:
    if math.isnan(score.low) or math.isnan(score.high):
        return None
    return [[100 * max(score.value - score.low, 0)], [100 * max(score.high - score.value, 0)]]
