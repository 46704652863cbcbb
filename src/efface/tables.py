"""Formats scores as tables: CSV for programs, Markdown and LaTeX for papers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from . import checks

if TYPE_CHECKING:
    from .records import Score
    from .runs import Run

Format = Literal["csv", "md", "latex"]
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
_TEX |= {each: f"\\{each}" for each in "&%$#_{}"} | {"–": "--"}


def table(runs: Run | str | Path | Sequence[Run | str | Path], format: Format = "md") -> str:
    """The scores of scored runs, next to those of the base model, as a table.

    Args:
        runs: a run or its folder, or several.
        format: "csv" has one column per number. "md" and "latex" show rates with their 95 % intervals. LaTeX needs the
            package booktabs.

    Raises:
        FileNotFoundError: a folder holds no run, or the run is not scored.
        ValueError: the format is unknown, or there are no runs.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.table(tempfile.mkdtemp())
        Traceback (most recent call last):
        FileNotFoundError: ... has no run.json, so it is not a run folder. Make one with `efface bench`.
    """
    from .runs import Run

    checks.choice("format", format, get_args(Format))
    several = [runs] if isinstance(runs, (Run, str, Path)) else list(runs)
    if not several:
        raise ValueError("Expected runs for a table, got none. Name at least one run folder.")
    opened = [run if isinstance(run, Run) else Run.open(run) for run in several]
    headings: list[str] = []
    rows: list[list[str]] = []
    for run in opened:
        headings, cells = (score_numbers if format == "csv" else score_cells)(*run.scores())
        rows += [[run.folder.resolve().name, *line] for line in cells]
    return render(["run", *headings], rows, format)


def score_cells(scores: Sequence[Score], base: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """Headings, and one line per score with its interval, for readers."""
    from .report import number, span

    plain = {s.metric: s for s in base}
    rows = [
        [s.metric, *(f"{number(each)} {span(each)}" for each in (plain.get(s.metric), s)), str(s.n)] for s in scores
    ]
    return ["", "base model", "erased", "n"], rows


def score_numbers(scores: Sequence[Score], base: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """Headings, and one line per score with one column per number. Missing numbers are empty."""
    plain = {s.metric: s for s in base}
    numbers = ("value", "low", "high")
    headings = ["metric", "unit", *numbers, "n", *(f"base_{name}" for name in numbers), "base_n"]
    rows = []
    for score in scores:
        found = [_bare(getattr(score, name)) for name in numbers] + [str(score.n)]
        other = plain.get(score.metric)
        beside = [_bare(getattr(other, name)) for name in numbers] + [str(other.n)] if other else [""] * 4
        rows.append([score.metric, score.unit, *found, *beside])
    return headings, rows


def render(headings: Sequence[str], rows: Sequence[Sequence[str]], format: Format) -> str:
    """The table as text, with a final line break.

    Example:
        >>> from efface.tables import render
        >>> print(render(["name", "n"], [["a_b", "1"]], "latex"))
        \\begin{tabular}{lr}
        \\toprule
        name & n \\\\
        \\midrule
        a\\_b & 1 \\\\
        \\bottomrule
        \\end{tabular}
        <BLANKLINE>
    """
    if format == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([headings, *rows])
        return out.getvalue()
    numbers = [all(not cell or cell[0] in "0123456789-–" for cell in column) for column in zip(*rows, strict=True)]
    numbers = numbers or [False] * len(headings)
    if format == "md":
        lines = [headings, ["---:" if right else "---" for right in numbers], *rows]
        return "".join(f"| {' | '.join(_escaped(cell, {'|': '&#124;'}) for cell in line)} |\n" for line in lines)
    head, *body = [" & ".join(_escaped(cell, _TEX) for cell in line) + r" \\" for line in (headings, *rows)]
    columns = "".join("r" if right else "l" for right in numbers)
    lines = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "".join(f"{line}\n" for line in lines)


def _escaped(cell: str, marks: Mapping[str, str]) -> str:
    return "".join(marks.get(letter, letter) for letter in " ".join(cell.split()))


def _bare(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.10g}"
