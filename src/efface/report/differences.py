"""Compares runs of the same rows, picture by picture. One comparison is primary; Holm adjusts the others."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks, files
from ..intervals import difference, holm
from ..judged import Corrected, Stratum, corrected_difference
from ..records import Row
from ..runs import Run, open_store
from ..runs.sample import answers
from .compare import Entry, entries

if TYPE_CHECKING:
    from ..feedback import Store

METRICS = {
    "residual": "pictures in which the detector sees the concept; less is better",
    "retention": "pictures with what should stay; more is better",
}


def compare(
    runs: Sequence[Run | str | Path],
    *,
    metric: str = "residual",
    labels: Store | str | Path | None = None,
    figure: str | Path | None = None,
) -> dict[str, Any]:
    """Compares scored runs of the same suite, pair by pair, on equal rows.

        d = mean over rows of (x_a - x_b),   x = 1 if the picture counts

    The comparison of the first two runs is the primary one, so name them first. The p values of all others are adjusted
    together by Holm. Intervals are clustered by prompt.

    Args:
        runs: at least two scored runs or their folders, the primary pair first.
        metric: "residual" or "retention".
        labels: a store of people's labels of all runs. Adds residual differences that are corrected by them.
        figure: an SVG file for the differences with their intervals.

    Returns:
        `comparisons`, each with `a`, `b`, `difference`, `interval`, `p`, `primary`, and `corrected` by labels; `p_holm`
        of those that are not primary. `notes` says which rows or versions differ.

    Raises:
        ValueError: there are fewer than two runs; they have other suites, models or sampling, or no row in common; they
            are judged by other detectors; or labels are missing.
        FileNotFoundError: a folder holds no run, or the run is not scored.

    Example:
        >>> import efface
        >>> efface.compare([])
        Traceback (most recent call last):
        ValueError: Expected at least two runs to compare, got 0. Name their folders.
    """
    if len(runs) < 2:
        raise ValueError(f"Expected at least two runs to compare, got {len(runs)}. Name their folders.")
    checks.choice("metric", metric, tuple(METRICS))
    if labels is not None and metric != "residual":
        raise ValueError("Expected `labels` for the metric 'residual' only, got 'retention'. Leave one out.")
    opened = [each if isinstance(each, Run) else Run.open(each) for each in runs]
    with open_store(labels) as store:
        found = entries(opened, store)
    _check_same(found)
    values = [_values(entry, metric) for entry in found]
    rows, notes = _common(found, values)
    made: list[dict[str, Any]] = []
    for k, (a, b) in enumerate(itertools.combinations(range(len(found)), 2)):
        pair = [[int(values[which][row.id]) for row in rows] for which in (a, b)]
        apart = difference(pair[0], pair[1], [row.prompt for row in rows])
        made.append(
            {
                "a": found[a].label,
                "b": found[b].label,
                "difference": apart.value,
                "interval": list(apart.interval),
                "p": apart.p,
                "primary": k == 0,
                "corrected": _corrected(found[a], found[b]) if labels is not None else None,
            }
        )
    for each, p in zip(made[1:], holm([each["p"] for each in made[1:]]), strict=True):
        each["p_holm"] = p
    card = {"format": 1, "metric": metric, "rows": len(rows), "prompts": len({row.prompt for row in rows})}
    card |= {"runs": [entry.label for entry in found], "notes": notes, "comparisons": made}
    if figure is not None:
        _plot(card, checks.path("figure", figure))
    return card


def _check_same(found: Sequence[Entry]) -> None:
    """Raises ValueError if runs have other suites, models or sampling. Their rows may differ in part."""
    first = found[0].card
    for entry in found[1:]:
        for name, there, here in (
            ("suite", first["suite"]["name"], entry.card["suite"]["name"]),
            ("sampling", first["call"], entry.card["call"]),
            *((f"model's {key}", first["model"][key], entry.card["model"][key]) for key in ("text_hash", "dtype")),
        ):
            if there != here and not (name.startswith("model") and _models(found)):
                raise ValueError(
                    f"Expected runs with the same {name}, got {checks.shown(there)} in {found[0].label} and "
                    f"{checks.shown(here)} in {entry.label}. Draw both alike."
                )


def _models(found: Sequence[Entry]) -> bool:
    """Whether the runs compare models, rather than erasers of one model."""
    return any(entry.run.record.get("compares") for entry in found)


def _values(entry: Entry, metric: str) -> dict[str, bool]:
    """Row id to whether its picture counts."""
    if metric == "residual":
        return answers(list(entry.scores.values()), entry.run)[1]
    score = entry.scores.get("retention")
    if score is None or not score.per_sample:
        raise ValueError(f"Expected {entry.label} to be scored by `retention`, got other scores. Score it with it.")
    return {row: value >= 0.5 for row, value in score.per_sample.items()}


def _common(found: Sequence[Entry], values: Sequence[Mapping[str, bool]]) -> tuple[list[Row], list[str]]:
    """The rows that all runs share and judge, and notes about what differs."""
    by_id = [{sample.row.id: sample.row for sample in entry.run.finished()} for entry in found]
    rows = [
        row
        for name, row in by_id[0].items()
        if all(each.get(name) == row for each in by_id) and all(name in each for each in values)
    ]
    if not rows:
        raise ValueError("Expected runs with equal rows and seeds, got none in common. Draw the same suite.")
    notes = []
    sizes = {entry.label: len(each) for entry, each in zip(found, values, strict=True)}
    if set(sizes.values()) != {len(rows)}:
        listed = ", ".join(f"{label}: {n}" for label, n in sizes.items())
        notes.append(f"Only the {len(rows)} rows that all runs share are compared ({listed}).")
    protocols = {_protocol(entry) for entry in found}
    if len(protocols) > 1:
        raise ValueError(
            f"Expected runs that one detector judged, got {' and '.join(sorted(protocols))}. Score them alike."
        )
    versions = {str(sorted(entry.card["sessions"][-1]["versions"].items())) for entry in found}
    if len(versions) > 1:
        notes.append("The runs were drawn with other versions of packages, so equal seeds may give other noise.")
    return rows, notes


def _protocol(entry: Entry) -> str:
    return answers(list(entry.scores.values()), entry.run)[0]


def _corrected(a: Entry, b: Entry) -> list[dict[str, Any]]:
    """The residual difference a - b of each labelled concept, corrected by people's labels."""
    one, two = ({facts["concept"]: facts["run"] for facts in entry.card.get("labels", [])} for entry in (a, b))
    found = []
    for concept in one.keys() & two.keys():
        if one[concept]["n"] == two[concept]["n"]:
            value, ends = corrected_difference(_rate(one[concept]), _rate(two[concept]))
            found.append({"concept": concept, "difference": value, "interval": list(ends)})
    return found


def _rate(facts: Mapping[str, Any]) -> Corrected:
    return Corrected(tuple(Stratum(s["name"], s["size"], s["n"], s["hits"]) for s in facts["strata"]))


def _plot(card: Mapping[str, Any], path: Path) -> None:
    """Draws the differences with their intervals, the primary one on top."""
    if path.suffix != ".svg":
        raise ValueError(checks.refusal("a figure that is named .svg", str(path), "Give --figure NAME.svg."))
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('A figure needs matplotlib. Install it with pip install "efface[bench]".') from error
    made = card["comparisons"]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compare", "text.parse_math": False}):
        figure = Figure(figsize=(7, 1.2 + 0.4 * len(made)), layout="constrained")
        axes = figure.subplots()
        for k, each in enumerate(made):
            low, high = (100 * end for end in each["interval"])
            axes.plot([low, high], [k, k], color="#1f78b4" if each["primary"] else "#586271", linewidth=2)
            axes.plot([100 * each["difference"]], [k], "o", color="#1f78b4" if each["primary"] else "#586271")
        axes.axvline(0, color="#8a94a3", linewidth=1)
        names = [f"{each['a']} − {each['b']}{' (primary)' if each['primary'] else ''}" for each in made]
        axes.set(yticks=range(len(made)), yticklabels=names, xlabel=f"{card['metric']}, difference in points, 95 %")
        axes.invert_yaxis()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    files.write(path, file.getvalue())
