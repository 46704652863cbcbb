"""The verdict of a report in words: what was erased, by which judge with which error, and what was not covered."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..records import Score
from ..runs.card import coverage
from ..runs.sample import JUDGES, answers
from .compare import Entry
from .words import ends, percent

MOST = 12  # concepts of a run with a sentence each
OURS = re.compile(r"emoji(-128|-flux)?( \+ [^/]*)?(, weights [0-9a-f]*)?")
"""The embedded models that the detectors were made for, also with deltas, as runs and audits name it."""
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
        facts = coverage(entry.run, list(entry.base.values()))
        sentences = _concepts(entry, facts, judged)
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


def _concepts(entry: Entry, found: Sequence[Mapping[str, Any]], judged: Mapping[str, bool]) -> list[str]:
    """What was measured about each concept, the worst first, and which were not judged."""
    rows: dict[str, list[str]] = {}
    for sample in entry.run.samples():
        rows.setdefault(sample.row.concept, []).append(sample.row.id)
    made = []
    for facts in (each for each in found if not each["why"]):
        of = rows[facts["concept"]]
        hits = sum(judged.get(row, False) for row in of)
        text = (
            f"{facts['concept']}: the detector sees it in {hits} of {len(of)} pictures of {facts['prompts']} prompts "
            f"({percent(hits / len(of))}), with the base model in {percent(facts['base_rate'])}."
        )
        made.append((hits / len(of), " ".join([text, _nothing(entry, of), _labelled(entry, facts["concept"])])))
    made.sort(key=lambda each: -each[0])
    sentences = [text for _, text in made[:MOST]]
    if made[MOST:]:
        sentences.append(
            f"{len(made) - MOST} other concepts: seen in at most {percent(made[MOST][0])} of their pictures."
        )
    return [*sentences, *(f"{names}: not judged, because {why}." for names, why in _unjudged(found))]


def _unjudged(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The concepts that are not judged, together where the reason is the same."""
    by_reason: dict[str, list[str]] = {}
    for facts in (each for each in found if each["why"]):
        by_reason.setdefault(facts["why"], []).append(facts["concept"])
    return [(", ".join(names), why) for why, names in by_reason.items()]


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
    base = f", with the base model in {percent(facts['base']['rate'])}" if facts["base"] else ""
    return f"By people's labels it is there in {rate}{base}, for new seeds of these prompts."


def _missing(found: Sequence[Mapping[str, Any]]) -> list[str]:
    few = [f"{facts['concept']} ({facts['prompts']})" for facts in found if facts["rows"] and facts["prompts"] < ENOUGH]
    lines = [f"{names}: removal is not judged, because {why}." for names, why in _unjudged(found)]
    if few:
        lines.append(f"Fewer than {ENOUGH} prompts cannot support 5 % for new prompts: {', '.join(few)}.")
    return lines


def _general(group: Sequence[Entry]) -> list[str]:
    """What no run of the group says anything about."""
    found = []
    protocols = {score.protocol for entry in group for score in entry.scores.values()}
    model = group[0].card["model"]["name"]
    if any(each.startswith("both eyes of emoji") for each in protocols) and not OURS.fullmatch(model):
        found.append(f"The detector was made for the emoji models, not for {model}.")
    found.append("Attacks are not part of this report; `efface attack` runs them.")
    found.append("Languages: those of the suite's prompts.")
    return found
