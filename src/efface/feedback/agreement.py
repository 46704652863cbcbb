"""How well the independent passes of people agree, as JSON types."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..judged import Agreement, krippendorff
from .judgement import Judgement
from .session import independent


def ranks(given: Iterable[Judgement]) -> dict[tuple[tuple[str, int], str], dict[str, int]]:
    """The ranks of pictures that were ranked together, by coder and set. "x" is the rank behind all others."""
    found: dict[tuple[tuple[str, int], str], dict[str, int]] = {}
    for each in given:
        group = found.setdefault((each.coder, str(each.details.get("set", ""))), {})
        group[each.picture] = 10 if each.outcome == "x" else int(each.outcome)
    return found


def agreement_facts(given: Sequence[Judgement]) -> dict[str, Any]:
    """Who judged, and how well the independent passes agree.

    Labels and binary judgements are compared picture by picture. Rankings are compared pair by pair: which of two
    pictures of a set shows more of the concept, or a tie. Pairs of one set depend on each other, so the interval
    resamples whole sets.

    Args:
        given: the judgements of one concept, all of one kind.

    Returns:
        `annotators`, `pictures` (of rankings: pairs), how many of them `differ`, `alpha` and its 95 % `interval`. The
        last two are None if they are not defined.
    """
    units: dict[object, list[str]] = {}
    clusters: list[object] | None = None
    if given and given[0].kind == "ranking":
        sets: dict[object, object] = {}
        for (_, name), group in ranks(given).items():
            for a, b in itertools.combinations(sorted(group), 2):
                order = "tie" if group[a] == group[b] else "first" if group[a] < group[b] else "second"
                units.setdefault((a, b), []).append(order)
                sets.setdefault((a, b), name)
        clusters = [sets[pair] for pair in units]
    else:
        for each in independent(given) if given and given[0].kind == "label" else given:
            key = (each.run, each.row) if each.kind == "label" else each.picture
            units.setdefault(key, []).append(each.outcome)
    found: Agreement = krippendorff(list(units.values()), clusters=clusters)
    return {
        "annotators": sorted({each.annotator for each in given}),
        "pictures": len(units),
        "differ": found.differ,
        "alpha": None if math.isnan(found.alpha) else found.alpha,
        "interval": None if any(map(math.isnan, found.interval)) else list(found.interval),
    }
