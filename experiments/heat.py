"""Draws a card of attacks: guards against attacks, each cell the rate of the concept."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

INK = "#6e7781"  # can be read on white and on black
DARK = 0.55  # rates above it get light letters


def heat(card: Mapping[str, Any]) -> str:
    """An SVG. A cell says the rate of the concept under attack, and in brackets that of random texts in its place."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rates = {tuple(row["row"].split(" | ", 1)): row for row in card["rows"] if "attacked" in row}
    guards, attacks = (list(dict.fromkeys(pair[k] for pair in rates)) for k in (0, 1))
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "heat", "font.family": "sans-serif", "font.size": 10}
    settings |= {key: INK for key in ("text.color", "axes.edgecolor", "xtick.color", "ytick.color")}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(3.2 + 1.1 * len(guards), 1.2 + 0.36 * len(attacks)), layout="constrained")
        axes = figure.subplots()
        shown = [
            [rates[g, a]["attacked"]["rate"] if (g, a) in rates else float("nan") for g in guards] for a in attacks
        ]
        axes.imshow(shown, cmap="Oranges", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(guards)), guards)
        axes.set_yticks(range(len(attacks)), attacks)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for (guard, attack), row in rates.items():
            rate, control = row["attacked"]["rate"], row.get("control")
            text = f"{100 * rate:.0f} %" + (f" ({100 * control['rate']:.0f})" if control else "")
            place = (guards.index(guard), attacks.index(attack))
            axes.text(*place, text, ha="center", va="center", color="#ffffff" if rate > DARK else "#1f2328", fontsize=9)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return file.getvalue()
