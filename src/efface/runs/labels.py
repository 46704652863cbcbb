"""Corrects the rates of a run by people's labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks
from ..judged import Corrected, Stratum, corrected_difference, new_prompts
from ..records import Sample, Score
from .card import SHOWN
from .record import Run
from .sample import SIZES, answers, population, run_id, with_base

if TYPE_CHECKING:
    from ..feedback import Judgement, Store

Judged = tuple[list[Score], list[Score], list[dict[str, Any]]]
"""Corrected scores of a run and of its base model, and the facts for a card."""


def labelled_concepts(store: Store, run: Run) -> list[str]:
    """The concepts for which a store has labels of a run and of its base run.

    Raises:
        ValueError: there are none, or a sampled picture was labelled in fewer than two passes.
    """
    labels = store.judgements(kind="label")
    found = list(dict.fromkeys(each.concept for each in labels if each.run == run_id(run)))
    if not found:
        raise ValueError(
            f"Expected labels of {run.folder} in the store {store.name}, got labels of {len({e.run for e in labels})} "
            "other runs. Label this run with `efface judge label`."
        )
    for each in filter(None, (run, run.base)):
        for concept in found:
            _by_row(each, store.judgements(kind="label", run=run_id(each), concept=concept), concept)
    return found


def _by_row(run: Run, given: Sequence[Judgement], concept: str) -> dict[str, list[Judgement]]:
    """The labels of each row.

    Raises:
        ValueError: there are none, a picture was labelled in one pass, or a part of the sample was labelled.
    """
    from ..feedback import independent

    by_row: dict[str, list[Judgement]] = {}
    for each in given:
        by_row.setdefault(each.row, []).append(each)
    if not by_row:
        raise ValueError(
            f"Expected labels of {run.folder} for {concept!r}, got none. `efface judge label` presents a run and its "
            "base run."
        )
    for name, facts in {str(e.details.get("stratum")): e.details for e in given}.items():
        rows = {each.row for each in given if each.details.get("stratum") == name}
        if len(rows) != checks.whole("`drawn` of a label", facts.get("drawn")):
            raise ValueError(
                f"Expected labels of all {facts['drawn']} pictures drawn from the stratum {name!r} of {run.folder}, "
                f"got {len(rows)}. Finish the passes, because a part is not a random sample."
            )
    few = [row for row, group in by_row.items() if len({each.coder for each in independent(group)}) < 2]
    if few:
        raise ValueError(
            f"Expected two independent passes over the {len(by_row)} labelled pictures of {run.folder}, got one pass "
            f"for {len(few)} of them. Run `efface judge label` again, if possible with another annotator."
        )
    return by_row


def corrected(store: Store, run: Run) -> Judged:
    """The rates of a scored run, corrected by labels.

    A picture shows the concept if most passes say that it does, also if they are equally many. The claim is about new
    seeds of the same prompts.

    Raises:
        ValueError: the store has no labels of the run or of its base run; labels are of another picture, or of other
            answers of the detector; or a sampled picture was labelled in fewer than two passes.
    """
    return correct(store, with_base(run))


def correct(store: Store, pair: Sequence[tuple[Run, list[Score]]]) -> Judged:
    """As `corrected`, for a run and its base run with their scores. NaN if people rarely see the concept in the base
    model's pictures: then there was nothing to remove, or the labels are not what they should be."""
    from ..feedback import agreement_facts

    made: list[list[Score]] = [[], []]
    facts = []
    concepts = labelled_concepts(store, pair[0][0])
    for concept in concepts:
        given = [store.judgements(kind="label", run=run_id(run), concept=concept) for run, _ in pair]
        judged = [_side(run, scores, concept, own) for (run, scores), own in zip(pair, given, strict=True)]
        sides = [(rate, more) for rate, _, more in judged]
        key = f"/{concept}" if len(concepts) > 1 else ""
        detector = answers(pair[0][1], pair[0][0])[0]
        protocol = f"{detector}, corrected by people's labels of these pictures; for new seeds of these prompts"
        shown = sides[-1][0].rate if len(sides) > 1 else 1.0
        if shown < SHOWN:
            protocol += f"; not judged, because people see it in {shown:.1%} of the base model's pictures"
        for scores, (rate, bad, _) in zip(made, judged if len(judged) > 1 else judged * 2, strict=True):
            for name, each in (("removal", rate), ("erased", bad)):
                scores.append(_score(f"{name}.corrected{key}", each, protocol, shown >= SHOWN))
        agreed = agreement_facts([each for own in given for each in own])
        facts.append({"concept": concept, "detector": detector, "agreement": agreed, **_sides(sides)})
    return made[0], made[1], facts


def _score(name: str, rate: Corrected, protocol: str, judged: bool) -> Score:
    """One minus a corrected rate as a score; NaN if it is not judged."""
    low, high = rate.interval
    value, low, high = (1 - rate.rate, 1 - high, 1 - low) if judged else (nan, nan, nan)
    return Score(name, value, rate.n, low, high, "share", True, protocol)


def _sides(sides: Sequence[tuple[Corrected, dict[str, Any]]]) -> dict[str, Any]:
    """The corrected rates of a run and of its base model, and how much lower the run's is."""
    run, *base = [rate.record() | more for rate, more in sides]
    if not base:
        return {"run": run, "base": None, "difference": None}
    value, ends = corrected_difference(sides[1][0], sides[0][0])
    return {"run": run, "base": base[0], "difference": {"value": value, "interval": list(ends)}}


def _side(
    run: Run, scores: list[Score], concept: str, given: Sequence[Judgement]
) -> tuple[Corrected, Corrected, dict[str, Any]]:
    """The corrected rate of a run, after all checks of its labels; the same rate with ruined pictures; and the
    outcomes' shares, and the claim on new prompts, which needs labels of all pictures."""
    from ..feedback import LABELS, consensus

    samples, seen = population(run, scores, concept)
    by_row = _by_row(run, given, concept)
    for each in given:
        _check_label(run, each, samples, seen, answers(scores, run)[0])
    outcome = {row: consensus([each.outcome for each in group]) for row, group in by_row.items()}
    shares, found, bad = dict.fromkeys(LABELS, 0.0), [], []
    for name, facts in {each.details["stratum"]: each.details for each in given}.items():
        rows = [row for row, group in by_row.items() if group[0].details["stratum"] == name]
        counts = Counter(outcome[row] for row in rows)
        found.append(Stratum(name, facts["of"], len(rows), counts["there"]))
        bad.append(Stratum(name, facts["of"], len(rows), counts["there"] + counts["nothing"]))
        for label in LABELS:
            shares[label] += facts["of"] * counts[label] / len(rows) / len(samples)
    more: dict[str, Any] = {"outcomes": shares, "new_prompts": None}
    if by_row.keys() == samples.keys():
        prompts = {sample.row.prompt for sample in samples.values()}
        hits = {samples[row].row.prompt for row, label in outcome.items() if label == "there"}
        upper = new_prompts(len(hits), len(prompts))
        more["new_prompts"] = {"prompts": len(prompts), "hits": len(hits), "upper": upper}
    rate, lost = (Corrected(tuple(_complete(run, strata, seen))) for strata in (found, bad))
    return rate, lost, more


def _check_label(
    run: Run, label: Judgement, samples: Mapping[str, Sample], seen: Mapping[str, bool], words: str
) -> None:
    """Raises ValueError if a label is of another picture, or if the detector answers differently by now."""
    sample = samples.get(label.row)
    if sample is None or sample.sha256 != label.picture:
        raise ValueError(
            f"Expected the label of row {label.row!r} to be of the picture in {run.folder}, got one of another picture "
            "(SHA-256). Restore the run, or label it again."
        )
    if label.model != run.record["model"]["text_hash"]:
        raise ValueError(
            f"Expected the label of row {label.row!r} to be of the model of {run.folder}, got one of another model. "
            "Label this run."
        )
    checks.choice("stratum", label.details.get("stratum"), tuple(SIZES))
    for name in ("of", "drawn"):
        checks.whole(f"`{name}` of the label of row {label.row!r}", label.details.get(name), 0)
    if (label.details["stratum"] == "positive") != seen[label.row] or label.details.get("detector") != words:
        raise ValueError(
            f"Expected the detector to answer for row {label.row!r} of {run.folder} as it did when the picture was "
            "drawn for labelling, got another answer. Score with the same detector, or label again."
        )


def _complete(run: Run, found: list[Stratum], seen: Mapping[str, bool]) -> list[Stratum]:
    """The strata in order, with empty ones. Their sizes must be those of the detector's answers."""
    by_name = {each.name: each for each in found}
    positive = sum(seen.values())
    sizes = {
        "positive": positive,
        "negative": len(seen) - positive - (by_name["near"].size if "near" in by_name else 0),
    }
    for name, size in sizes.items():
        if name not in by_name:
            by_name[name] = Stratum(name, size, 0, 0)
        stratum = by_name[name]
        if stratum.size != size:
            raise ValueError(
                f"Expected {size} pictures of {run.folder} in the stratum {name!r} by the scores, got {stratum.size} "
                "in the labels. Score with the same detector, or label again."
            )
    return [by_name[name] for name in SIZES if name in by_name]


@contextmanager
def open_store(place: Store | str | Path | None) -> Iterator[Store | None]:
    """Yields a store that exists, and closes it if it was named by its place."""
    from ..feedback import Store

    if isinstance(place, (str, Path)):
        with Store(place, create=False) as store:
            yield store
    else:
        yield place
