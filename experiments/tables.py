"""Tables: Markdown, LaTeX and CSV from the same cells."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

FORMATS = ("markdown", "latex", "csv")
SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A head and rows of texts. Code in a cell stands between backticks."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self, form: str = "markdown") -> str:
        return {"markdown": self.markdown, "latex": self.latex, "csv": self.csv}[form]()

    def markdown(self) -> str:
        lines = [f"| {' | '.join(self.head)} |", "|---" * len(self.head) + "|"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])

    def latex(self) -> str:
        lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (self.head, *self.rows)]
        columns = "l" + "r" * (len(self.head) - 1)
        head = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
        return "\n".join([*head, *lines[1:], r"\bottomrule", r"\end{tabular}"])

    def csv(self) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(
            [[c.replace("`", "") for c in row] for row in (self.head, *self.rows)]
        )
        return out.getvalue().removesuffix("\n")


def _escaped(cell: str) -> str:
    made = "".join(SPECIAL.get(c, c) for c in cell).split("`")
    return "".join(rf"\texttt{{{part}}}" if k % 2 else part for k, part in enumerate(made))


def percent(p: Mapping[str, Any], digits: int = 1) -> str:
    """A rate with its interval."""
    low, high = p["interval"]
    return f"{100 * p['rate']:.{digits}f} % [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def ratio(spread: Mapping[str, float]) -> str:
    """A median with its range."""
    return "{median:.2f} ({min:.2f}-{max:.2f})".format(**spread)


def span(values: Sequence[float]) -> str:
    """Least to most."""
    low, high = (f"{v:.0f}" if v >= 10 else f"{v:.1f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def mean(rates: Mapping[str, Any]) -> str:
    return f"{100 * sum(r['rate'] for r in rates.values()) / len(rates):.0f} %"


def of_card(card: Mapping[str, Any]) -> Table:
    """The table of a card."""
    if "form" not in card:
        raise ValueError(
            "Expected a card of `python -m experiments`, got one of an earlier runner. Use `docs` for these."
        )
    rows, columns = card["rows"], card["columns"]
    if rows and "scenes" in rows[0]:
        scenes = list(rows[0]["scenes"])
        shown = [[ratio(c["ratio"]) if (c := row["scenes"].get(s)) else "-" for s in scenes] for row in rows]
        return Table(["", *scenes], [[row["row"], *cells] for row, cells in zip(rows, shown, strict=True)])
    if rows and "rounds" in rows[0]:
        heads = [f"{row['row']}: {what}" for row in rows[1:] for what in ("residual", "retention")]
        rounds = zip(*(row["rounds"] for row in rows[1:]), strict=True)
        lines = [["nothing", *(mean(rows[0]["rounds"][0][of]) for _ in rows[1:] for of in ("removed", "kept"))]]
        lines += [[of[0]["concept"], *(mean(r[what]) for r in of for what in ("removed", "kept"))] for of in rounds]
        return Table(["after removing", *heads], lines)
    if rows and "concepts" in rows[0]:
        lines = [
            [
                row["row"],
                n,
                f"{c['seconds']:.3g}{'*' * bool(c['layers left out'])}",
                f"{c['memory MiB']:.0f}",
                f"{c['error']:.0e}",
            ]
            for row in rows
            for n, c in row["concepts"].items()
        ]
        return Table(["method", "concepts", "seconds", "MiB", "error"], lines)
    lines = [[f"`{row['row']}`", *(percent(row[m]) if m in row else "-" for m in columns)] for row in rows]
    return Table(["method", *columns.values()], lines)


def caption(card: Mapping[str, Any], name: str) -> str:
    """What stands above a card's table in the docs."""
    hours = card["core_hours"]
    facts = [
        f"{card['question']} `{card['model']['name']}`, {card['block']} block, n = {card['n']} per cell or rounds."
    ]
    if "cells" in card:
        prompts = sum(len(cell["prompts"]) for cell in card["cells"].values())
        facts.append(f"{prompts} prompts; 95 % intervals, clustered by prompt. Judges: {card['detector']['name']}.")
    facts += card.get("verdict", [])
    facts.append(
        f"Measured {card['date'][:10]} by `{card['command']}`, code {card['code']['commit'][:7]}, on {card['machine']}."
    )
    facts.append(
        f"It took {hours['spent']:.2g} core-hours (estimate {hours['estimate']:.2g}, cap {hours['cap']:g}); card in "
        f"`results/{name}.json`."
    )
    for note in card.get("updates", []):
        facts.append(f"Redrawn {note['date'][:10]} by `{note['command']}`: {', '.join(note['rows'])}.")
    return "\n".join(facts)
