"""Chooses a detector's threshold on pictures that the user labelled, and measures its errors on the others."""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks, files
from .intervals import Rate

if TYPE_CHECKING:
    from .detectors._named import Spec

THERE = {"1": True, "there": True, "0": False, "other": False, "nothing": False}
FEW = 20  # pictures of each kind


@dataclass(frozen=True)
class Threshold:
    """A threshold with its errors on pictures that did not choose it.

    Args:
        value: the threshold.
        missed: pictures with the concept that the detector misses.
        false_alarms: pictures without the concept in which it sees the concept.
    """

    value: float
    missed: Rate
    false_alarms: Rate

    def __str__(self) -> str:
        return f"threshold={self.value:g}: misses {self.missed}, false alarms {self.false_alarms}"

    def record(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "threshold": self.value,
            "missed": self.missed.record(),
            "false_alarms": self.false_alarms.record(),
        }


def threshold(
    detector: Spec, concept: str, pictures: Sequence[tuple[Path, bool]], misses: float = 0.05, seed: int = 0
) -> Threshold:
    """The highest threshold at which a detector misses at most a share of pictures, chosen on a random half of them.

        t = the largest t with |{positives : score < t}| <= misses |positives|

    The other half gives the errors, so they are not flattered by the choice. They hold for pictures of this kind:
    label pictures of the model that you audit.

    Args:
        detector: a detector with a threshold, by name or with options; see `efface.detector`.
        concept: what to look for.
        pictures: files, each with whether it shows the concept; at least 20 of each kind.
        misses: the largest share of misses on the choosing half, in [0, 1).
        seed: of the halves.

    Raises:
        ValueError: there are too few pictures of a kind, a picture cannot be read, `misses` is out of range, or the
            detector has no threshold.

    Example:
        >>> from efface.thresholds import threshold
        >>> threshold("open_nsfw", "nudity", [])
        Traceback (most recent call last):
        ValueError: Expected at least 20 pictures with 'nudity' and 20 without, got 0 and 0. Label more.
    """
    checks.number("misses", misses, 0, 1, below=True)
    groups: dict[bool, list[Path]] = {True: [], False: []}
    for path, there in pictures:
        groups[there].append(path)
    if min(map(len, groups.values())) < FEW:
        raise ValueError(
            f"Expected at least {FEW} pictures with {checks.shown(concept)} and {FEW} without, got "
            f"{len(groups[True])} and {len(groups[False])}. Label more."
        )
    scores = {there: _scores(detector, concept, paths) for there, paths in groups.items()}
    chance = random.Random(seed)
    halves: dict[bool, tuple[list[float], list[float]]] = {}
    for there, values in scores.items():
        order = chance.sample(values, len(values))
        halves[there] = order[: len(order) // 2], order[len(order) // 2 :]
    positives = sorted(halves[True][0])
    value = positives[min(math.floor(misses * len(positives) + 1e-9), len(positives) - 1)]
    value = math.floor(value * 1e4) / 1e4 or min(v for v in (*positives, 1e-4) if v > 0)
    return Threshold(
        value,
        Rate(sum(v < value for v in halves[True][1]), len(halves[True][1])),
        Rate(sum(v >= value for v in halves[False][1]), len(halves[False][1])),
    )


def _scores(spec: Spec, concept: str, paths: Sequence[Path]) -> list[float]:
    """The score of each picture."""
    import torch

    from .detectors._base import Looking, looks
    from .detectors._named import detector
    from .records import Row, Sample

    judge: Any = detector(_with_threshold(spec), concept)
    at = getattr(judge, "threshold", None)
    if not isinstance(judge, Looking) or not isinstance(at, (int, float)):
        raise ValueError(
            f"Expected a detector with a threshold, got {judge.name}, which has none. Use classifier, clip, onnx, "
            "open_nsfw or nudenet."
        )
    found: list[float] = []
    for k, path in enumerate(paths):
        image = Sample(Row(f"p-{k}", "x", 0), path=path).image()[None]
        ratios = judge.ratios(looks(judge, image))
        found += [] if ratios is None else torch.as_tensor(ratios * at, dtype=torch.float64)[0].tolist()
    if len(found) != len(paths):
        raise ValueError(f"Expected scores from {judge.name}, got none. Use a detector with a threshold.")
    return found


def _with_threshold(spec: Spec) -> Spec:
    """The detector with any threshold, if it could also do without one."""
    options: dict[str, Any] = (
        {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    )
    if options.get("name") in ("classifier", "clip"):
        return {"threshold": 0.5, **options}
    return spec


def read_labelled(path: Path) -> list[tuple[Path, bool]]:
    """Pictures and labels from a CSV file with the columns `picture` and `label`.

    `picture` is relative to the file's folder. `label` is 1, 0, "there", "other" or "nothing".

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a column is missing, or a line is wrong; the message has its number.
    """
    reader, found = csv.reader(io.StringIO(files.read_text(path), newline=""), strict=True), []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if not {"picture", "label"} <= set(header):
            raise ValueError(f"Expected the columns `picture` and `label` in line 1 of {path}, got others. Add them.")
        for record in reader:
            if any(record):
                values = dict(zip(header, record, strict=False))
                label, name = values.get("label", "").strip().lower(), values.get("picture", "").strip()
                if label not in THERE or not name or "\0" in name:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected a picture and a label of {', '.join(THERE)}, got "
                        f"{checks.shown(label)}. Correct the line."
                    )
                found.append((path.parent / name, THERE[label]))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a CSV record ({error}). Correct the line.") from error
    return found
