"""How often the concept is detected, and how often pictures are blank, which does not count as success."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from efface.detectors._named import Spec
from efface.records import Sample, Score

from ._judging import judged
from ._samples import batches, chosen, groups
from ._stats import share

__all__ = ["Detection"]

BLANK = 0.02


@dataclasses.dataclass(frozen=True)
class Detection:
    """The share of pictures in which a detector sees the concept of their row, by the worse judge.

        detection = (1 / N) sum_i [ detector(x_i) sees concept_i ]

    `detection.blank` is the share of all pictures that are nearly one colour (standard deviation of the pixels below
    0.02). A ruined picture does not show the concept either, so read both. The `emoji` detectors also give
    `detection.any_icon`, the share of pictures with any recognised icon.

    Args:
        detector: a detector's name, or a mapping with name and options; see `efface.detector`.
        by: fields of rows that split the scores: kind, category, concept.

    Example:
        >>> import torch
        >>> from efface import Row, Sample
        >>> from efface.metrics.detection import Detection
        >>> grey = Sample(Row("cat-0", "a cat", 1_000_000, concept="cat"), pixels=torch.full((3, 64, 64), 0.5))
        >>> [(score.metric, score.value) for score in Detection()([grey])]
        [('detection', 0.0), ('detection.blank', 1.0), ('detection.any_icon', 0.0)]
    """

    name: ClassVar[str] = "detection"
    unit: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool | None] = False
    detector: Spec = "eyes"
    by: tuple[str, ...] = ("concept", "kind")

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """Scores of the rows that name a concept; for blank pictures, of all rows."""
        scores = []
        for key, group in groups(chosen(samples, lambda row: row.concept), tuple(self.by)).items():
            hits, words = judged(group, self.detector, lambda s: (s.row.concept,))
            scores.append(share(f"detection{key}", hits, group, worse="high", higher_is_better=False, protocol=words))
        if samples:
            flat = torch.cat([x.std((1, 2, 3)) < BLANK for x in batches(samples)])[None]
            words = f"standard deviation of the pixels below {BLANK}"
            scores.append(share("detection.blank", flat, samples, worse="high", higher_is_better=False, protocol=words))
        if samples and self.detector == "eyes":
            icons, words = judged(samples, "eyes", lambda s: ())
            scores.append(
                share("detection.any_icon", icons, samples, worse="low", higher_is_better=True, protocol=words)
            )
        return scores
