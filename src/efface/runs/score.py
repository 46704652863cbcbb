"""Scores a finished run from its pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from .. import files
from ..progress import shows
from ..records import Metric, Sample, Score, Suite
from .card import summary
from .folder import CARD, SCORES
from .judges import make_metrics, metric_config, recorded
from .record import FORMAT, Progress, Run, now, score_facts, silent, versions
from .remote import send


@shows
def score(
    run: Run | str | Path, metrics: Sequence[Metric] | None = None, progress: bool | Progress | None = None
) -> list[Score]:
    """Scores a finished run and writes scores.json and card.json into its folder; draws nothing.

    The plain model's pictures are scored by the same metrics, and their scores stand beside the run's.

    Args:
        run: a run, or its folder.
        metrics: what to measure; None: the suite's metrics. A run that is opened from its folder has them by name, and
            must not name files or models of a hub: its record may be a stranger's.
        progress: True shows a bar. A callable gets each metric's name, how many are done, and of how many.

    Raises:
        FileNotFoundError: no run in the folder, or its base is gone.
        ValueError: the run is not complete, a file of it is damaged or not what it says by SHA-256, its metrics name
            files or models of a hub, or there is nothing to measure.

    Returns:
        The scores of the run.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.score(tempfile.mkdtemp())
        Traceback (most recent call last):
        FileNotFoundError: ... is not a run folder: it has no run.json. `efface bench` makes one.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    chosen = tuple(metrics) if metrics is not None else run.metrics or make_metrics(recorded(run))
    if not chosen:
        raise ValueError(f"Nothing to measure: the suite of {run.folder} names no metrics. Give `metrics=` (--metric).")
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
    files.write_json(run.folder / CARD, summary(run, plain, scores, base_scores, time.perf_counter() - began))
    send(run.folder, [SCORES, CARD])
    return scores


def rehearse(suite: Suite) -> None:
    """Scores grey pictures of a few rows of each kind, and throws the scores away.

    What a metric lacks (a package, weights, a detector that knows the concept) is found before anything is drawn.
    """
    import torch

    if not suite.metrics:
        raise ValueError(f"the suite {suite.name!r} names no metric for these rows")
    few = list({(row.kind, row.category): row for row in reversed(suite.rows)}.values())
    halves = {f"{row.id}-clean" for row in few}
    few += [row for row in suite.rows if row.id in halves and row not in few]
    grey = [Sample(row, pixels=torch.full((3, 64, 64), 0.5)) for row in few]
    if not any([metric(grey, grey) for metric in suite.metrics]):  # all are called: each may lack something
        known = ", ".join(metric.name for metric in suite.metrics)
        raise ValueError(f"none of the metrics of the suite {suite.name!r} ({known}) judges such rows")
