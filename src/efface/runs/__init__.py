"""A run is a folder with the pictures that a model drew for a suite, their scores, and the facts to draw them again.

    run.json       suite, model, erasers, sampling, versions, command: all that determines the pictures
    images/        one PNG per row, named by the row's id
    samples.jsonl  one line per picture, with its SHA-256, appended and flushed to disk batch by batch
    scores.json    every score with its value per picture, of this run and of the base model
    card.json      the summary, for reports and leaderboards

The same call continues a run that Ctrl-C, a kill or a full disk stopped. Batches depend only on the row index. Inside a
batch, one pipeline call draws the rows with equal arguments. So the pictures do not depend on where an earlier process
ended. A partly written batch is drawn again. Needs `fcntl` (Linux, macOS).

People share run folders, so Efface does not trust them: see `efface.schema` and `efface.files`.
"""

from .bench import make_suite, run
from .draw import Paint, locally, work
from .folder import CARD, IMAGES, LOCK, RUN, SAMPLES, SCORES
from .judges import make_metric, make_metrics, metric_config, recorded
from .labels import corrected, open_store
from .record import Progress, Run, this_command
from .sample import draw_items
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
    "corrected",
    "draw_items",
    "locally",
    "make_metric",
    "make_metrics",
    "make_suite",
    "metric_config",
    "open_store",
    "recorded",
    "rehearse",
    "run",
    "score",
    "this_command",
    "verify",
    "work",
]
