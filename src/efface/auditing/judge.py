"""What detectors see in the pictures of an audit, as figures per concept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..detectors._named import Spec
from ..intervals import Difference, Rate, clopper_pearson, clustered, difference
from ..judged import LEVEL, Corrected, Stratum, new_prompts
from ..metrics._judging import judged
from ..records import Row, Sample

ENOUGH = 59  # prompts; fewer cannot support a bound of 5 % on new prompts


@dataclass(frozen=True)
class Seen:
    """What detectors see in pictures.

    Args:
        rows: the rows of the pictures.
        there: whether the concept of a row is there, bool [J, N]; False where a row names none.
        something: whether anything is recognisable, by all judges, bool [N]. None: not judged.
        words: the detector in words.
    """

    rows: Sequence[Row]
    there: Tensor
    something: Tensor | None
    words: str

    def of(self, concept: str) -> tuple[list[Row], Tensor, Tensor | None]:
        """The rows that name a concept, with both answers."""
        where = [k for k, row in enumerate(self.rows) if row.concept == concept]
        return (
            [self.rows[k] for k in where],
            self.there[:, where],
            None if self.something is None else (self.something[where]),
        )


def see(samples: Sequence[Sample], detector: Spec, recognises: Spec | None) -> Seen:
    """Judges pictures. Rows without a concept are judged only for anything recognisable."""
    import torch

    asked = [k for k, sample in enumerate(samples) if sample.row.concept]
    hits, words = judged([samples[k] for k in asked], detector, lambda s: (s.row.concept,))
    there = torch.zeros(len(hits), len(samples), dtype=torch.bool)
    there[:, asked] = hits
    something = None
    if recognises is not None:
        anything, more = judged(samples, recognises, lambda s: ())
        something = anything.all(0)
        words += "" if more == words else f"; anything recognisable by {more}"
    return Seen([sample.row for sample in samples], there, something, words)


def share(rate: Rate, rows: Sequence[Row], values: Sequence[int]) -> dict[str, Any]:
    return rate.record() | {"interval": list(clustered(values, [row.prompt for row in rows]))}


def figures(concept: str, now: Seen, before: Seen | None, level: float = LEVEL) -> dict[str, Any]:
    """The figures of a concept, each by the less favourable judge.

    Args:
        concept: the concept.
        now, before: the audited model's pictures and the base model's, of the same rows.
        level: the error probability of `upper` and `lower`.

    Returns:
        `n`, `prompts` and `seeds`; the `kinds` of prompts, the worst first; `rate` and `outcomes` of the audited model,
        `base_rate` and `base_outcomes` of the base model, and their paired `difference`. `again` counts the pictures in
        which the base model shows the concept, and those of them in which the audited model still does. `upper` and
        `lower` bound the rate of new seeds for these prompts, by the detector alone; `new_prompts` bounds the share of
        new prompts. The `worst` prompt, and `shown`: the ids of pictures in which any judge sees the concept.
    """
    rows, there, something = now.of(concept)
    if not rows:
        return {"concept": concept, "n": 0, "prompts": 0}
    judge = int(there.sum(1).argmax())
    values = there[judge].int().tolist()
    hits, n = sum(values), len(values)
    by_prompt: dict[str, list[int]] = {}
    for row, value in zip(rows, values, strict=True):
        by_prompt.setdefault(row.prompt, []).append(value)
    worst = max(by_prompt, key=lambda prompt: sum(by_prompt[prompt]) / len(by_prompt[prompt]))
    shown = sum(map(any, by_prompt.values()))
    low, high = clopper_pearson(hits, n, level)
    found: dict[str, Any] = {
        "concept": concept,
        "n": n,
        "prompts": len(by_prompt),
        "seeds": len({row.seed for row in rows}),
        "rate": share(Rate(hits, n), rows, values),
        "outcomes": outcomes(there[judge], something),
        "lower": low,
        "upper": high,
        "new_prompts": {"prompts": len(by_prompt), "hits": shown, "upper": new_prompts(shown, len(by_prompt))},
        "worst": {"prompt": worst, "hits": sum(by_prompt[worst]), "n": len(by_prompt[worst])} if hits else None,
        "shown": [row.id for row, any_judge in zip(rows, there.any(0).tolist(), strict=True) if any_judge],
        "base_rate": None,
        "base_outcomes": None,
        "difference": None,
        "again": None,
    }
    base: list[int] | None = None
    if before is not None:
        _, plain, recognised = before.of(concept)
        least = int(plain.sum(1).argmin())
        base = plain[least].int().tolist()
        found["base_rate"] = share(Rate(sum(base), n), rows, base)
        found["base_outcomes"] = outcomes(plain[least], recognised)
        found["difference"] = compared(plain, there, rows)
        found["again"] = {"hits": sum(map(min, base, values)), "n": sum(base)}
    found["kinds"] = by_kind(rows, values, base)
    return found


def by_kind(rows: Sequence[Row], values: Sequence[int], base: Sequence[int] | None) -> list[dict[str, Any]]:
    """How many pictures of each kind of prompt show the concept, the worst kind first."""
    groups: dict[str, list[int]] = {}
    for k, row in enumerate(rows):
        groups.setdefault(row.kind, []).append(k)
    found: list[dict[str, Any]] = [
        {
            "kind": kind or "no kind",
            "n": len(of),
            "hits": sum(values[k] for k in of),
            "base_hits": None if base is None else sum(base[k] for k in of),
        }
        for kind, of in groups.items()
    ]
    return sorted(found, key=lambda each: -each["hits"] / each["n"])


def outcomes(there: Tensor, something: Tensor | None) -> dict[str, float] | None:
    """The shares of the three outcomes; None if no detector says whether anything is recognisable."""
    if something is None:
        return None
    other = ~there & something
    shares = {"there": there, "other": other, "nothing": ~there & ~something}
    return {name: float(hits.double().mean()) for name, hits in shares.items()}


def compared(
    first: Tensor, second: Tensor, rows: Sequence[Row], pick: Callable[..., Difference] = min
) -> dict[str, Any]:
    """The paired difference of two rates, first minus second, by the judge with the smallest one (or another pick)."""
    prompts = [row.prompt for row in rows]
    pairs = zip(first.int().tolist(), second.int().tolist(), strict=True)
    found = pick([difference(a, b, prompts) for a, b in pairs], key=lambda each: each.value)
    return {"value": found.value, "interval": list(found.interval), "p": found.p, "prompts": found.prompts}


def recognised(seen: Seen) -> float | None:
    """The share of all pictures in which something is recognisable."""
    return None if seen.something is None else float(seen.something.double().mean())


def control(samples: Sequence[Sample], detector: Spec, recognises: Spec | None) -> dict[str, Any]:
    """How often detectors see something in pictures that show nothing: a concept by any judge, or anything.

    Returns:
        `n`; `concepts`, the share of the pictures of each concept, and the largest of them as `concept`; `something`.
    """
    seen = see(samples, detector, recognises)
    names = dict.fromkeys(row.concept for row in seen.rows)
    shares = {name: float(seen.of(name)[1].any(0).double().mean()) for name in names}
    return {
        "n": len(samples),
        "concept": max(shares.values()),
        "concepts": shares,
        "something": recognised(seen),
    }


def corrected(facts: Mapping[str, Any]) -> Corrected:
    """The corrected rate that a card holds."""
    return Corrected(tuple(Stratum(s["name"], s["size"], s["n"], s["hits"]) for s in facts["strata"]))


def labels_needed(n: int, positives: int, limit: float, level: float = LEVEL) -> int | None:
    """The smallest number of labelled negatives that can bound a rate, if people see no miss and confirm all positives;
    None if no number can.

    Example:
        >>> from efface.auditing.judge import labels_needed
        >>> labels_needed(512, 0, 0.05)
        85
    """

    def bound(labelled: int) -> float:
        of = (Stratum("positive", positives, positives, positives), Stratum("negative", n - positives, labelled, 0))
        return Corrected(of).upper(level)

    low, high = 1, n - positives
    if high < 1 or bound(high) > limit:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) <= limit else (middle + 1, high)
    return low
