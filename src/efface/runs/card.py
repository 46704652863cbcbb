"""Makes card.json, the summary of a run for reports and leaderboards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..records import Score
from .record import DECIDES, Run, now, score_facts


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
        "cost": cost,
        "command": record["sessions"][0]["command"],
        "sessions": record["sessions"],
        "scored": now(),
    }


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 6)
