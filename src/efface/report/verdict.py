"""The verdict of a report in words: what was erased, by which judge with which error, and what was not covered."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..records import Score
from ..runs.card import coverage
from ..runs.sample import JUDGES, answers
from .compare import Entry
from .words import ends, percent

ENOUGH = 59  # prompts; fewer cannot support a bound of 5 % on new prompts


def verdict(group: Sequence[Entry]) -> dict[str, Any]:
    """What to read before any table.

    Returns:
        `runs`: label and sentences of each run; `not_covered`: sentences about the group; and `failed`: the ids of rows
        in which a detector still sees the concept in the picture of a run.
    """
    told: list[dict[str, Any]] = []
    missing: list[str] = []
    failed: set[str] = set()
    for entry in (each for each in group if each.run.base):
        judged = _seen(entry.scores, entry)
        failed |= {row for row, seen in judged.items() if seen}
        sentences = []
        for facts in coverage(entry.run, list(entry.base.values())):
            sentences.append(_concept(entry, facts, judged))
            missing += _missing(facts)
        kept = entry.scores.get("retention")
        if kept is not None:
            base = entry.base.get("retention")
            beside = f", with the base model in {percent(base.value)}" if base else ""
            sentences.append(f"What should stay is there in {percent(kept.value)} of {kept.n} pictures{beside}.")
        told.append({"label": entry.label, "sentences": sentences})
    return {"runs": told, "not_covered": [*dict.fromkeys(missing), *_general(group)], "failed": failed}


def _seen(scores: Mapping[str, Score], entry: Entry) -> dict[str, bool]:
    """Row id to the detector's answer; empty if no detector judged the run."""
    if not any(name in scores and scores[name].per_sample for name in JUDGES):
        return {}
    return answers(list(scores.values()), entry.run)[1]


def _concept(entry: Entry, facts: Mapping[str, Any], judged: Mapping[str, bool]) -> str:
    """What was measured about a concept, or why it is not judged."""
    name = facts["concept"]
    if facts["why"]:
        return f"{name}: not judged, because {facts['why']}."
    rows = [sample.row.id for sample in entry.run.samples() if sample.row.concept == name]
    hits = sum(judged.get(row, False) for row in rows)
    text = (
        f"{name}: the detector sees it in {hits} of {len(rows)} pictures of {facts['prompts']} prompts "
        f"({percent(hits / len(rows))}), with the base model in {percent(facts['base_rate'])}."
    )
    return " ".join([text, _nothing(entry, rows), _labelled(entry, name)])


def _nothing(entry: Entry, rows: Collection[str]) -> str:
    """The share of ruined pictures."""
    score = entry.scores.get("outcomes.nothing")
    if score is None or score.per_sample is None:
        return "Ruined pictures were not told apart."
    ruined = [score.per_sample[row] for row in rows if row in score.per_sample]
    return f"In {percent(sum(ruined) / len(ruined))} nothing is recognisable."


def _labelled(entry: Entry, name: str) -> str:
    """What people's labels say, or that there are none."""
    facts = next((each for each in entry.card.get("labels", []) if each["concept"] == name), None)
    if facts is None:
        return "The detector's error is unknown: nobody labelled this run."
    rate = f"{percent(facts['run']['rate'])} {ends(facts['run']['interval'])}"
    return f"By people's labels it is there in {rate}, for new seeds of these prompts."


def _missing(facts: Mapping[str, Any]) -> list[str]:
    found = [f"{facts['concept']}: removal is not judged, because {facts['why']}."] if facts["why"] else []
    if facts["rows"] and facts["prompts"] < ENOUGH:
        found.append(
            f"{facts['concept']}: {facts['prompts']} prompts. Fewer than {ENOUGH} cannot support 5 % for new prompts."
        )
    return found


def _general(group: Sequence[Entry]) -> list[str]:
    """What no run of the group says anything about."""
    found = []
    used = {name for entry in group for name, score in entry.scores.items() if score.protocol.startswith("emoji eyes")}
    model = group[0].card["model"]["name"]
    if used and not model.startswith("emoji"):
        found.append(f"The detector was made for the emoji model, not for {model}.")
    found.append("Attacks are not part of this report; `efface attack` runs them.")
    found.append("Languages: those of the suite's prompts.")
    return found
