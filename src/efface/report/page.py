"""The data of the page for a group of comparable runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..records import Score
from ..runs.card import concept_names
from .compare import Entry
from .pictures import pairs_of
from .plot import pareto
from .verdict import verdict

ROLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Removal", ("outcomes.erased", "removal.absolute", "inappropriateness", "asr", "detection")),
    ("Retention", ("retention", "clip_score")),
    ("In-prompt retention", ("in_prompt_clip.normalised", "retention/dual", "in_prompt_clip")),
    (
        "Image quality",
        ("kid_eye", "kid_base", "kid_coco", "fid_eye", "fid_base", "fid_coco", "lpips", "detection.blank"),
    ),
)
"""The columns of the summary, and the scores that can fill each, best first."""


def view(k: int, group: Sequence[Entry], pairs: int) -> dict[str, Any]:
    names = list(dict.fromkeys(name for entry in group for name in entry.scores))
    heads = {title: next((n for n in wanted if n in names), None) for title, wanted in ROLES}
    plain = {name: next(e.base[name] for e in group if name in e.base) for name in names}
    first, words = group[0], verdict(group)
    every = {sample.row.id for sample in (first.run.base or first.run).samples()}
    failures = pairs_of(group, max(pairs // 2, 1), words["failed"]) if words["failed"] else []
    shown = {pair["row"].id for pair in failures}
    rest = pairs_of(group, pairs - len(failures), every - shown) if len(failures) < pairs and every - shown else []
    return {
        "mark": chr(ord("A") + k) if k < 26 else str(k + 1),
        "runs": group,
        "first": first.card,
        "erased": _erased(group),
        "columns": [(title, name, plain.get(name or "")) for title, name in heads.items()],
        "protocols": _protocols([plain[name] for name in heads.values() if name]),
        "plain": plain,
        "seconds": _mean([e.card["cost"]["plain_seconds_per_picture"] for e in group]),
        "plot": _pareto(k, group, heads["Removal"], heads["Retention"], plain),
        "bars": _bars(group, [heads["Removal"], heads["Retention"]], plain),
        "names": names,
        "verdict": words,
        "failures": failures,
        "pairs": rest,
        "total": first.run.n,
        "warnings": _warnings(group),
        "judged": _judged(group),
    }


def _protocols(scores: Sequence[Score]) -> list[str]:
    """The protocol of the scores, with scores of the same protocol together."""
    found: dict[str, list[str]] = {}
    for s in scores:
        found.setdefault(s.protocol, []).append(s.metric)
    return [f"{', '.join(names)}: {protocol}" for protocol, names in found.items()]


def _erased(group: Sequence[Entry]) -> str:
    """The names of the erased concepts; per run if they differ."""
    names = [
        ", ".join(dict.fromkeys(name for config in e.card["erasers"] for name in concept_names(config))) for e in group
    ]
    if len(set(names)) == 1:
        return names[0]
    return "; ".join(f"{e.label}: {n or 'unknown'}" for e, n in zip(group, names, strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _warnings(group: Sequence[Entry]) -> list[str]:
    found = []
    for entry in group:
        if entry.card["not_finite"]:
            found.append(f"{entry.label}: {entry.card['not_finite']} pictures had non-finite values.")
        if unverified := entry.card.get("unverified", entry.run.n):
            found.append(
                f"{entry.label}: unverified. {unverified} pictures of the run and its base run have no SHA-256, "
                "because an earlier version of Efface drew them."
            )
        versions = {json.dumps(s["versions"], sort_keys=True) for s in entry.card["sessions"]}
        if len(versions) > 1:
            found.append(f"{entry.label}: drawn in parts with {len(versions)} sets of package versions.")
    return found


def _judged(group: Sequence[Entry]) -> list[dict[str, Any]]:
    """The labelled concepts, each with a line for the base model and for each run that has labels."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in group:
        for facts in entry.card.get("labels", []):
            said = {name: facts[name] for name in ("concept", "detector")}
            table = found.setdefault((facts["concept"], facts["detector"]), {**said, "lines": []})
            if facts["base"] and not table["lines"]:
                table["lines"].append(_line("base model", facts["base"], None, None))
            table["lines"].append(_line(entry.label, facts["run"], facts["difference"], facts["agreement"]))
    return list(found.values())


def _line(label: str, facts: Mapping[str, Any], apart: Any, agreement: Any) -> dict[str, Any]:
    strata = [(each["name"], each) for each in facts["strata"]]
    return {"label": label, "facts": facts, "strata": strata, "difference": apart, "agreement": agreement}


def _bars(group: Sequence[Entry], heads: Sequence[str | None], plain: Mapping[str, Score]) -> list[dict[str, Any]]:
    """The categories of each headline share, with one bar for the base model and one per run."""
    found = []
    for head in filter(None, heads):
        parts = [n for n in plain if n.startswith(f"{head}/") and plain[n].unit == "share"]
        rows = []
        for name in parts or [n for n in (head,) if plain[n].unit == "share"]:
            scores = [("base model", plain[name]), *((e.label, e.scores[name]) for e in group if name in e.scores)]
            title = " · ".join(name.split("/")[1:]) or "all"
            rows.append({"title": title, "bars": [(label, s, *_extent(s)) for label, s in scores]})
        if rows:
            found.append({"head": head, "score": plain[head], "rows": rows})
    return found


def _extent(score: Score) -> tuple[float, float, float]:
    """The width of the bar, and the start and width of its interval, in percent."""
    if math.isnan(score.value):
        return 0.0, 0.0, 0.0
    low, high = (score.value if math.isnan(x) else min(max(x, 0.0), 1.0) for x in (score.low, score.high))
    return round(100 * min(max(score.value, 0.0), 1.0), 2), round(100 * low, 2), round(100 * (high - low), 2)


def _pareto(
    k: int, group: Sequence[Entry], removal: str | None, retention: str | None, plain: Mapping[str, Score]
) -> str:
    """An SVG of removal against retention, with intervals; "" if either is missing."""
    from markupsafe import Markup

    if not removal or not retention or not plain[removal].higher_is_better:
        return ""
    points = [("base model", plain[removal], plain[retention])]
    points += [
        (e.label, e.scores[removal], e.scores[retention]) for e in group if {removal, retention} <= set(e.scores)
    ]
    points = [p for p in points if not (math.isnan(p[1].value) or math.isnan(p[2].value))]
    return Markup(pareto(points, removal, retention, f"pareto-{k}"))
