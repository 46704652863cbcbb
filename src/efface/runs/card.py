"""Makes card.json, the summary of a run for reports and leaderboards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..records import Score
from .record import DECIDES, Run, now, score_facts
from .sample import JUDGES, answers

SHOWN = 0.30
"""The smallest share of the base model's pictures that has to show a concept before its removal is judged."""


def summary(run: Run, plain: Run | None, scores: list[Score], base: list[Score], seconds: float) -> dict[str, Any]:
    def short(s: Score) -> dict[str, Any]:
        return {k: v for k, v in score_facts(s).items() if k != "per_sample"}

    beside = {s.metric: {k: short(s)[k] for k in ("value", "n", "low", "high")} for s in base}
    record, entries, others = run.record, run.entries(), plain.entries() if plain else []
    cost = {"seconds_per_picture": mean(e["seconds"] for e in entries), "scoring_seconds": round(seconds, 3)}
    cost["plain_seconds_per_picture"] = mean(e["seconds"] for e in others or entries)
    return {
        **{key: record[key] for key in DECIDES},
        "folder": run.folder.resolve().name,
        "not_finite": sum(e.get("finite") is False for e in entries),
        "unverified": sum("sha256" not in e for e in (*entries, *others)),
        "scores": [short(s) | {"base": beside.get(s.metric)} for s in scores],
        "coverage": coverage(run, base),
        "cost": cost,
        "command": record["sessions"][0]["command"],
        "sessions": record["sessions"],
        "scored": now(),
    }


def coverage(run: Run, base: Sequence[Score]) -> list[dict[str, Any]]:
    """What a run says about each concept that is erased or asked for: its rows, their prompts, and how often the base
    model shows it.

    Args:
        run: the run.
        base: the scores of the base model.

    Returns:
        Per concept: `concept`, `rows`, `prompts`, `base_rate` (None if no detector judged it), and `why`, the reason
        why its removal is not judged, or "".
    """
    rows = [sample.row for sample in run.finished()]
    seen = answers(base, run)[1] if any(map(_judges, base)) else {}
    erased = (name for each in run.record["erasers"] for name in concept_names(each))
    found = []
    for name in dict.fromkeys([*erased, *(row.concept for row in rows if row.concept)]):
        of = [row for row in rows if row.concept == name]
        shown = [seen[row.id] for row in of if row.id in seen]
        rate = sum(shown) / len(shown) if shown else None
        why = "" if rate is not None and rate >= SHOWN else "no detector judged it" if of else "no row asks for it"
        if rate is not None and rate < SHOWN:
            why = f"the base model shows it in {rate:.1%} of the pictures, fewer than {SHOWN:.0%}"
        prompts = len({row.prompt for row in of})
        found.append({"concept": name, "rows": len(of), "prompts": prompts, "base_rate": rate, "why": why})
    return found


def _judges(score: Score) -> bool:
    return score.metric in JUDGES and bool(score.per_sample)


def concept_names(config: Mapping[str, Any]) -> list[str]:
    """The names of an eraser's concepts. A plug-in's record may hold names instead of concepts."""
    concepts = config.get("concepts") or []
    listed = [concepts] if isinstance(concepts, str) else concepts
    return [each if isinstance(each, str) else each["name"] for each in listed]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 6)
