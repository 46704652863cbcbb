"""Decides which runs are comparable, and explains why others are not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..records import Score
from ..runs import Run, corrected

if TYPE_CHECKING:
    from ..feedback import Store


class Entry(NamedTuple):
    """A run with its label, card and scores."""

    label: str
    run: Run
    card: dict[str, Any]
    scores: dict[str, Score]
    base: dict[str, Score]


def entries(runs: Sequence[Run], store: Store | None = None) -> list[Entry]:
    """The runs with their scores; with those that a store of labels corrects, instead of the card's corrected ones."""
    names = [_name(run) for run in runs]
    folders = [run.folder.resolve().name for run in runs]
    labels = [n if names.count(n) == 1 else f"{n} ({f})" for n, f in zip(names, folders, strict=True)]
    found = []
    for k, (label, run) in enumerate(zip(labels, runs, strict=True)):
        scores, base = ({s.metric: s for s in group} for group in run.scores())
        card = run.card()
        if store is not None:
            more, base_more, facts = corrected(store, run)
            card = {**card, "labels": facts}
            scores |= {s.metric: s for s in more}
            base |= {s.metric: s for s in base_more}
        label = label if labels.count(label) == 1 else f"{label} #{k + 1}"
        found.append(Entry(label, run, card, scores, base))
    return found


def _name(run: Run) -> str:
    """The methods of a run; the model's name if it is compared with another model."""
    methods = " + ".join(each["method"] for each in run.record["erasers"])
    return methods or (str(run.record["model"]["name"]) if run.base else "base model")


def _identity(entry: Entry) -> dict[str, Any]:
    """The facts that must agree before two runs are comparable."""
    card = entry.card
    return {
        "suite": f"{card['suite']['name']} {card['suite']['version']}",
        "data hash": card["suite"]["data_hash"],
        "rows": card["rows"]["sha256"],
        "sampling": card["call"],
        "model": {k: v for k, v in card["model"].items() if k != "name"},
    }


def grouped(entries: Sequence[Entry]) -> tuple[list[list[Entry]], list[str]]:
    """Groups of comparable runs, and the reasons for each further group."""
    groups: list[list[Entry]] = []
    reasons: list[str] = []
    for entry in entries:
        against = [_apart(group[0], entry) or _judged_apart(group, entry) for group in groups]
        if "" in against:
            groups[against.index("")].append(entry)
        else:
            reasons += [f"{groups[0][0].label} and {entry.label}: {against[0]}"] if groups else []
            groups.append([entry])
    return groups, reasons


def _apart(a: Entry, b: Entry) -> str:
    one, other = _identity(a), _identity(b)
    found = []
    for k, x in one.items():
        y = other[k]
        if isinstance(x, dict):  # only the differences
            x, y = ({n: v for n, v in a.items() if v != b.get(n)} for a, b in ((x, y), (y, x)))
        found += [f"{k} {_brief(x)} against {_brief(y)}"] if x != y else []
    return "; ".join(found)


def _judged_apart(group: Sequence[Entry], entry: Entry) -> str:
    for other in group:
        for name in other.scores.keys() & entry.scores.keys():
            one, two = other.scores[name].protocol, entry.scores[name].protocol
            if one != two:
                return f"{name} judged by {_brief(one)} against {_brief(two)}"
    return ""


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_brief(v)}" for k, v in value.items()) or "none"
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch("[0-9a-f]{40,}", text):
        return text[:12]
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
