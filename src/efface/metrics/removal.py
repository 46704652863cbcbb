"""Removal of the concept, absolute and relative to the base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import nan
from typing import ClassVar

import numpy as np

from efface.detectors._named import Spec
from efface.records import Sample, Score

from ._judging import SHOWN, judged
from ._samples import chosen, groups, paired
from ._stats import clusters, ratio_interval, share

__all__ = ["Removal"]


@dataclasses.dataclass(frozen=True)
class Removal:
    """Removal of the concept, by the worse judge, absolute and relative to the base model on the same rows.

        removal.absolute = 1 - detected(G') / N
        removal.relative = 1 - detected(G') / detected(G)

    Both rates are NaN if there is nothing to remove: the absolute one if the base model shows the concept in fewer than
    30 % of its pictures, the relative one if it never does. A ruined picture counts as removed here; `outcomes` tells
    it apart.

    Args:
        detector: a detector's name, or a mapping with name and options; see `efface.detector`.
        by: fields of rows that split the scores: kind, category, concept.

    Raises:
        ValueError: `base` is missing or has other rows.

    Example:
        >>> import torch
        >>> from efface import Row, Sample
        >>> from efface.metrics.removal import Removal
        >>> grey = [Sample(Row("cat-0", "a cat", 1_000_000, concept="cat"), pixels=torch.full((3, 64, 64), 0.5))]
        >>> [(score.metric, score.value) for score in Removal()(grey, grey)]
        [('removal.absolute', nan), ('removal.relative', nan)]
    """

    name: ClassVar[str] = "removal"
    unit: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool | None] = True
    detector: Spec = "eyes"
    by: tuple[str, ...] = ("concept", "kind")

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """Two scores of all rows that name a concept, and of each group of them."""
        scores = []
        rows = chosen(samples, lambda row: row.concept)
        for key, group in groups(rows, tuple(self.by)).items():
            plain = paired(group, base, self.name)
            now, words = judged(group, self.detector, lambda s: (s.row.concept,))
            was, _ = judged(plain, self.detector, lambda s: (s.row.concept,))
            absolute = share(f"removal.absolute{key}", ~now, group, worse="low", higher_is_better=True, protocol=words)
            if was.double().mean(1).min() < SHOWN:
                absolute = dataclasses.replace(absolute, value=nan, low=nan, high=nan)
            scores.append(absolute)
            which, found = clusters([s.row for s in group]), []
            for left, there in zip(now.double().numpy(), was.double().numpy(), strict=True):
                low, high = ratio_interval(left, there, which)
                value = float(1 - left.sum() / there.sum()) if there.sum() else nan
                found.append((value, 1 - high, 1 - low))
            # The worse judge. Skips judges without detections in the base model's pictures, unless all lack them.
            known = [f for f in found if not np.isnan(f[0])] or found
            value, low, high = min(known)
            scores.append(Score(f"removal.relative{key}", value, len(group), low, high, "share", True, words))
        return scores
