"""A run is a folder: the pictures that a model draws for a suite, what judges say of them, and how to make it again.

    run.json       suite, model, erasers, sampling, versions, command: all that decides the pictures
    images/        one PNG per row, named by the row's id
    samples.jsonl  one line per picture, with its SHA-256, appended and flushed to disk batch by batch
    scores.json    every score with its value per picture, of this run and of the plain model
    card.json      the summary, for reports and leaderboards

A run may stop at any moment, by Ctrl-C, a kill or a full disk: the same call continues it. Batches are cut by row index
alone; inside a batch, rows with equal pipeline arguments are drawn in one call. So what a batch looks like does not
depend on where an earlier process ended. What was half written of a batch is drawn again. Works where `fcntl` does
(Linux, macOS).

Run folders are made to be shared, so one that is read is not trusted: see `efface.schema` and `efface.files`.
"""

from .bench import make_suite, run
from .draw import Paint, locally, work
from .folder import CARD, IMAGES, LOCK, RUN, SAMPLES, SCORES
from .judges import make_metric, make_metrics, metric_config, recorded
from .record import Progress, Run, this_command
from .score import rehearse, score
from .verify import Redrawn, Verification, verify
from .workers import Cluster

__all__ = [
    "CARD",
    "IMAGES",
    "LOCK",
    "RUN",
    "SAMPLES",
    "SCORES",
    "Cluster",
    "Paint",
    "Progress",
    "Redrawn",
    "Run",
    "Verification",
    "locally",
    "make_metric",
    "make_metrics",
    "make_suite",
    "metric_config",
    "recorded",
    "rehearse",
    "run",
    "score",
    "this_command",
    "verify",
    "work",
]
