"""Samples a run for labelling: a random sample of each kind of answer of the detector."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import checks, registry
from ..records import Sample, Score
from .judges import foreign
from .record import DECIDES, Run, digest

if TYPE_CHECKING:
    from ..core import Detector
    from ..feedback import Item, Store

JUDGES = ("removal.absolute", "detection", "inappropriateness", "asr")
"""Scores whose value per picture is a detector's answer, the first one that a run has."""
NEAR = 0.5
"""A negative picture is near the threshold if its score is at least this share of the threshold."""
SIZES = {"positive": 100, "near": 50, "negative": 150}
"""How many pictures of each stratum are drawn by default."""


def run_id(run: Run) -> str:
    """The hash of the facts that determine a run's pictures. A copy of a run has the same one."""
    return digest({key: run.record[key] for key in DECIDES})


def answers(scores: Sequence[Score], run: Run) -> tuple[str, dict[str, bool]]:
    """The detector in words, and row id to whether it sees the row's concept.

    Raises:
        ValueError: no score has a detector's answer per picture.
    """
    by_name = {score.metric: score for score in scores if score.per_sample}
    score = next((by_name[name] for name in JUDGES if name in by_name), None)
    if score is None or score.per_sample is None:
        raise ValueError(
            f"Expected {run.folder} to be scored by a detector ({', '.join(JUDGES)}), got other scores. Give it "
            "--metric detection."
        )
    seen = {row: value for row, value in score.per_sample.items() if not math.isnan(value)}
    return score.protocol, {row: (value < 0.5) == bool(score.higher_is_better) for row, value in seen.items()}


def population(run: Run, scores: Sequence[Score], concept: str) -> tuple[dict[str, Sample], dict[str, bool]]:
    """Row id to sample, and to the detector's answer, for the rows that name a concept.

    Raises:
        ValueError: no row names it, a row has no answer, or a picture is missing.
    """
    finished, (_, seen) = run.finished(), answers(scores, run)
    samples = {sample.row.id: sample for sample in finished if sample.row.concept == concept}
    if not samples:
        checks.choice("--concept", concept, sorted({sample.row.concept for sample in finished} - {""}))
    if lacking := [row for row in samples if row not in seen]:
        raise ValueError(
            f"Expected an answer of the detector for row {lacking[0]!r} of {run.folder}, got none. Score the run again."
        )
    return samples, {row: seen[row] for row in samples}


def draw_items(
    store: Store, run: Run, concept: str, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> list[Item]:
    """The pictures of a run to label: a random sample of each stratum of the detector's answers.

    The first call stores the sample; later calls return the same one, so that all passes judge the same pictures.

    Args:
        store: the store of judgements.
        run: a scored run or its base run; its rows name the concept.
        concept: what to look for.
        sizes: how many pictures of "positive", "near" and "negative" to draw. All, if there are fewer. None: the stored
            sample's, or 100, 50 and 150.
        seed: seed of the sample.

    Raises:
        ValueError: the run is not scored by a detector, no row names the concept, pictures have no SHA-256, or the
            store has a sample of other sizes.
        FileNotFoundError: the run is not scored.
    """
    found = []
    for each, scores in with_base(run):
        if store.sample(run_id(each), concept) is None:
            judge = _judge(run.scored_by(), answers(scores, each)[0], concept)
            drawn = _drawn(each, scores, concept, {**SIZES, **(sizes or {})}, seed, judge)
            store.keep_sample(run_id(each), concept, drawn)
        found += _items(store, each, scores, concept, sizes)
    return found


def with_base(run: Run) -> list[tuple[Run, list[Score]]]:
    """A run and its base run, each with its scores."""
    (scores, plain), base = run.scores(), run.base
    return [(run, scores)] + ([(base, plain)] if base else [])


def _items(store: Store, run: Run, scores: list[Score], concept: str, sizes: Mapping[str, int] | None) -> list[Item]:
    """The pictures of the stored sample, which have to be those of the run."""
    from ..feedback import Item, details_of

    samples, _ = population(run, scores, concept)
    drawn = store.sample(run_id(run), concept) or {}
    if sizes is not None and drawn["asked"] != {**SIZES, **sizes}:
        raise ValueError(
            f"Expected the sizes of the sample that the store has of {run.folder} ({_sizes(drawn['asked'])}), got "
            f"{_sizes({**SIZES, **sizes})}. Leave them out, or name another --store."
        )
    found = []
    for row, (picture, stratum) in drawn["rows"].items():
        sample = samples.get(row)
        if sample is None or sample.sha256 != picture or sample.path is None:
            raise ValueError(
                f"Expected the picture of row {row!r} of {run.folder} to be the one that the store has drawn, got "
                "another one. Restore the run, or name another --store."
            )
        found.append(Item(run_id(run), drawn["model"], row, picture, sample.path, details_of(drawn, stratum)))
    return found


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _drawn(
    run: Run, scores: list[Score], concept: str, sizes: Mapping[str, int], seed: int, judge: Detector | None
) -> dict[str, Any]:
    """A random sample of each stratum, as the store keeps it."""
    by_row, seen = population(run, scores, concept)
    samples = list(by_row.values())
    if any(not sample.sha256 for sample in samples):
        raise ValueError(f"Expected {run.folder} to record the SHA-256 of its pictures, got none. Draw the run again.")
    close = _close(judge, samples)
    strata: dict[str, list[Sample]] = {name: [] for name in SIZES}
    for sample, near in zip(samples, close or [False] * len(samples), strict=True):
        strata["positive" if seen[sample.row.id] else "near" if near else "negative"].append(sample)
    chance = random.Random(f"{seed} {run_id(run)} {concept}")
    rows: dict[str, tuple[str, str]] = {}
    facts = {}
    for name, group in strata.items():
        chosen = chance.sample(group, min(checks.whole(name, sizes[name], 1), len(group)))
        facts[name] = {"of": len(group), "drawn": len(chosen)}
        rows |= {sample.row.id: (sample.sha256, name) for sample in chosen}
    explicit = judge is None or bool(getattr(judge, "anything_unsafe", False))
    said = {"seed": seed, "asked": dict(sizes), "detector": answers(scores, run)[0], "explicit": explicit}
    return {**said, "model": run.record["model"]["text_hash"], "strata": facts, "rows": rows}


def _judge(metrics: Sequence[Mapping[str, Any]], words: str, concept: str) -> Detector | None:
    """The detector of this name, from the metrics that scored a run; None if it is of another package or was made from
    a file or a hub model, which a run folder must not choose."""
    from ..detectors._named import detector

    for config in metrics:
        if config["method"] in registry.methods("metrics") and "detector" in config and not foreign(config)[0]:
            judge = detector(config["detector"], (concept,))
            if judge.name == words:
                return judge
    return None


def _close(judge: Detector | None, samples: list[Sample]) -> list[bool] | None:
    """Whether any score of the detector is at least `NEAR` of its threshold; None if the detector has no scores."""
    from ..detectors._base import Looking, looks
    from ..metrics._samples import batches

    if not isinstance(judge, Looking):
        return None
    ratios = judge.ratios([look for images in batches(samples) for look in looks(judge, images)])
    return None if ratios is None else (ratios.amax(0) >= NEAR).tolist()
