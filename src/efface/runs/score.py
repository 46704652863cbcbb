"""Scores a finished run from its pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..progress import shows
from ..records import Metric, Sample, Score, Suite
from .card import summary
from .folder import CARD, SCORES
from .judges import make_metrics, metric_config, recorded
from .labels import correct, labelled_concepts, open_store
from .record import FORMAT, Progress, Run, now, score_facts, silent, versions
from .remote import send

if TYPE_CHECKING:
    from ..feedback import Store


@shows
def score(
    run: Run | str | Path,
    metrics: Sequence[Metric] | None = None,
    progress: bool | Progress | None = None,
    labels: Store | str | Path | None = None,
) -> list[Score]:
    """Scores a finished run, and writes scores.json and card.json into its folder. Draws nothing.

    The same metrics score the base model's pictures; the files hold both.

    Args:
        run: a run, or its folder.
        metrics: the metrics to compute. None: the suite's metrics. The record of an opened folder names them; it may
            come from an untrusted source, so it must not name files or hub models.
        progress: True shows a bar. A callable receives each metric's name, the number done and the total.
        labels: a store of people's labels of this run. Adds rates that are corrected by them.

    Raises:
        FileNotFoundError: the folder holds no run, or the base run is missing.
        ValueError: the run is not complete, a file is damaged or has another SHA-256 than recorded, the recorded
            metrics name files or hub models, or there are no metrics. Or the labels are not of this run, incomplete or
            of one pass.

    Returns:
        The scores of the run.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.score(tempfile.mkdtemp())
        Traceback (most recent call last):
        FileNotFoundError: ... has no run.json, so it is not a run folder. Make one with `efface bench`.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    chosen = tuple(metrics) if metrics is not None else run.metrics or make_metrics(recorded(run))
    if not chosen:
        raise ValueError(f"The suite of {run.folder} names no metrics. Give `metrics=` (--metric).")
    with open_store(labels) as store:
        if store:
            labelled_concepts(store, run)
    plain, samples = run.base, run.finished()
    base = plain.finished() if plain else samples
    tell = progress if callable(progress) else silent
    measured: list[list[Score]] = [[], []]
    began = time.perf_counter()
    for k, metric in enumerate(chosen):
        tell(metric.name, k, len(chosen))
        measured[0] += metric(samples, base)
        measured[1] += metric(base, base) if plain else measured[0][len(measured[1]) :]
    tell("scored", len(chosen), len(chosen))
    scores, base_scores = measured
    judged: list[dict[str, Any]] = []
    with open_store(labels) as store:
        if store:
            more, base_more, judged = correct(store, [(run, scores)] + ([(plain, base_scores)] if plain else []))
            scores, base_scores = scores + more, base_scores + base_more
    configs = [metric_config(m) for m in chosen]
    files.write_json(
        run.folder / SCORES,
        {
            "format": FORMAT,
            "metrics": configs,
            "scored": now(),
            "versions": versions(),
            "scores": [score_facts(s) for s in scores],
            "base": [score_facts(s) for s in base_scores],
        },
    )
    card = summary(run, plain, scores, base_scores, time.perf_counter() - began)
    files.write_json(run.folder / CARD, card | ({"labels": judged} if judged else {}))
    send(run.folder, [SCORES, CARD])
    return scores


def rehearse(suite: Suite) -> None:
    """Scores grey pictures for a few rows of each kind, and discards the scores.

    Finds missing packages, weights and detectors before anything is drawn.
    """
    import torch

    if not suite.metrics:
        raise ValueError(f"the suite {suite.name!r} names no metric for these rows")
    few = list({(row.kind, row.category): row for row in reversed(suite.rows)}.values())
    halves = {f"{row.id}-clean" for row in few}
    few += [row for row in suite.rows if row.id in halves and row not in few]
    grey = [Sample(row, pixels=torch.full((3, suite.side, suite.side), 0.5)) for row in few]
    if not any([metric(grey, grey) for metric in suite.metrics]):  # calls every metric, because each may lack something
        known = ", ".join(metric.name for metric in suite.metrics)
        raise ValueError(f"none of the metrics of the suite {suite.name!r} ({known}) judges such rows")
