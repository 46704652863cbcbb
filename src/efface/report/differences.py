"""Compares runs of the same rows, picture by picture. One comparison is primary; Holm adjusts the others."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks, files
from ..intervals import Difference, difference, holm
from ..judged import Corrected, Stratum, corrected_difference
from ..records import Row, Score
from ..runs import Run, open_store
from ..runs.sample import answers
from .compare import Entry, entries
from .words import percent

if TYPE_CHECKING:
    from ..feedback import Store

METRICS = {
    "residual": "pictures in which the detector sees the concept; less is better",
    "erased": "pictures without the concept in which something is recognisable; more is better",
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
        metric: "residual", "erased" or "retention". A ruined picture lowers the residual rate, but it is not erased.
        labels: a store of people's labels of all runs. Adds residual differences that are corrected by them.
        figure: an SVG file for the differences with their intervals.

    Returns:
        `comparisons`, each with `a`, `b`, `difference`, `interval`, `p`, `primary`, and `corrected` by labels; `p_holm`
        of those that are not primary; and `concepts`, the difference of each concept if there are several. `notes` says
        which rows or versions differ, and how many pictures are ruined.

    Raises:
        ValueError: there are fewer than two runs; they have other suites, models or sampling, or no row in common; or
            they are judged by other detectors. Or a run lacks the metric, its base model rarely shows the concept, or
            labels are missing.
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
        raise ValueError(f"Expected `labels` for the metric 'residual' only, got {metric!r}. Leave one out.")
    opened = [each if isinstance(each, Run) else Run.open(each) for each in runs]
    with open_store(labels) as store:
        found = entries(opened, store)
    _check_same(found)
    values = [_values(entry, metric) for entry in found]
    rows, notes = _common(found, values, metric)
    if metric == "residual":
        notes += _ruined(found)
    if labels is not None:
        notes += _uncorrected(found)
    made: list[dict[str, Any]] = []
    for k, (a, b) in enumerate(itertools.combinations(range(len(found)), 2)):
        pair = values[a], values[b]
        apart = _difference(rows, *pair)
        made.append(
            {
                "a": found[a].label,
                "b": found[b].label,
                "difference": apart.value,
                "interval": list(apart.interval),
                "p": apart.p,
                "primary": k == 0,
                "concepts": _by_concept(rows, *pair),
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


def _difference(rows: Sequence[Row], a: Mapping[str, bool], b: Mapping[str, bool]) -> Difference:
    one, two = ([int(values[row.id]) for row in rows] for values in (a, b))
    return difference(one, two, [row.prompt for row in rows])


def _by_concept(rows: Sequence[Row], a: Mapping[str, bool], b: Mapping[str, bool]) -> list[dict[str, Any]]:
    """The difference of each concept, if there are several: one may rise while their mean falls."""
    names = list(dict.fromkeys(row.concept for row in rows if row.concept))
    found = []
    for name in names if len(names) > 1 else ():
        of = [row for row in rows if row.concept == name]
        apart = _difference(of, a, b)
        found.append({"concept": name, "rows": len(of), "difference": apart.value, "interval": list(apart.interval)})
    return found


def _ruined(found: Sequence[Entry]) -> list[str]:
    """How many pictures of each run are ruined, or that nothing told them apart."""
    scores = {entry.label: entry.scores.get("outcomes.nothing") for entry in found}
    shares = [f"{label} {percent(score.value)}" for label, score in scores.items() if score]
    bare = [label for label, score in scores.items() if not score]
    notes = []
    if shares:
        notes.append(
            f"Nothing is recognisable in these shares of the pictures, which count as without the concept: "
            f"{', '.join(shares)}. `--metric erased` compares without them."
        )
    if bare:
        notes.append(f"Ruined pictures were not told apart in {', '.join(bare)}, so they may look erased.")
    return notes


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
    score = _score(entry, metric)
    if metric == "erased" and math.isnan(score.value):
        raise ValueError(
            f"Expected runs whose base model shows the concept, got {entry.label} ({checks.short(score.protocol)}). "
            "Compare other rows."
        )
    return {row: value >= 0.5 for row, value in (score.per_sample or {}).items()}


def _score(entry: Entry, metric: str) -> Score:
    name, by = {"erased": ("outcomes.erased", "outcomes"), "retention": ("retention", "retention")}[metric]
    score = entry.scores.get(name)
    if score is None or not score.per_sample:
        raise ValueError(f"Expected {entry.label} to be scored by `{by}`, got other scores. Score it with it.")
    return score


def _common(found: Sequence[Entry], values: Sequence[Mapping[str, bool]], metric: str) -> tuple[list[Row], list[str]]:
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
    protocols = {_protocol(entry, metric) for entry in found}
    if len(protocols) > 1:
        raise ValueError(
            f"Expected runs that one detector judged, got {' and '.join(sorted(protocols))}. Score them alike."
        )
    versions = {str(sorted(entry.card["sessions"][-1]["versions"].items())) for entry in found}
    if len(versions) > 1:
        notes.append("The runs were drawn with other versions of packages, so equal seeds may give other noise.")
    return rows, notes


def _protocol(entry: Entry, metric: str) -> str:
    """The detector of a metric in words."""
    if metric == "residual":
        return answers(list(entry.scores.values()), entry.run)[0]
    return _score(entry, metric).protocol


def _uncorrected(found: Sequence[Entry]) -> list[str]:
    """The concepts that people did not label in all runs; or that runs of other rows are not corrected."""
    if len({entry.card["rows"]["sha256"] for entry in found}) > 1:
        return ["Labels correct no difference of runs with other rows."]
    labelled = [{facts["concept"] for facts in entry.card.get("labels", [])} for entry in found]
    some = sorted(set().union(*labelled) - set.intersection(*labelled))
    return [f"Not labelled in all runs, so not corrected: {', '.join(some)}."] if some else []


def _corrected(a: Entry, b: Entry) -> list[dict[str, Any]]:
    """The residual difference a - b of each labelled concept, corrected by people's labels."""
    if a.card["rows"]["sha256"] != b.card["rows"]["sha256"]:
        return []
    one, two = ({facts["concept"]: facts["run"] for facts in entry.card.get("labels", [])} for entry in (a, b))
    found = []
    for concept in (name for name in one if name in two):
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
