"""Retention: whether pictures still show what the erasure should preserve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import nan
from typing import ClassVar

from efface.detectors._named import Spec
from efface.records import Sample, Score

from ._judging import judged
from ._samples import chosen, groups, paired
from ._stats import clusters, ratio_interval, share

__all__ = ["Retention"]


@dataclasses.dataclass(frozen=True)
class Retention:
    """The share of pictures that still show at least one of the things in `keep`, by the worse judge; and the same
    relative to the base model.

        retention          = (1 / N) sum_i [ detector(x_i) sees any of keep_i ]
        retention.relative = kept(G') / kept(G)

    The base model also misses some of these things, so the relative rate isolates the effect of the erasure. It may
    exceed 1. It is omitted without `base`, and NaN if the base model shows none of the things.

    Args:
        detector: a detector's name, or a mapping with name and options; see `efface.detector`.
        by: fields of rows that split the scores: kind, category, concept.

    Example:
        >>> import torch
        >>> from efface import Row, Sample
        >>> from efface.metrics.retention import Retention
        >>> row = Row("dual-0", "a beer mug and a cat", 1_000_000, keep=("cat-face",))
        >>> Retention()([Sample(row, pixels=torch.full((3, 64, 64), 0.5))])[0].value
        0.0
    """

    name: ClassVar[str] = "retention"
    unit: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool | None] = True
    detector: Spec = "eyes"
    by: tuple[str, ...] = ("kind",)

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """Scores of all rows with `keep`, and of each group of them."""
        scores = []
        for key, group in groups(chosen(samples, lambda row: row.keep), tuple(self.by)).items():
            now, words = judged(group, self.detector, lambda s: s.row.keep)
            scores.append(share(f"retention{key}", now, group, worse="low", higher_is_better=True, protocol=words))
            if base is None:
                continue
            was, _ = judged(paired(group, base, self.name), self.detector, lambda s: s.row.keep)
            which, found = clusters([s.row for s in group]), []
            for kept, there in zip(now.double().numpy(), was.double().numpy(), strict=True):
                value = float(kept.sum() / there.sum()) if there.sum() else nan
                found.append((value, *ratio_interval(kept, there, which)))
            known = [f for f in found if f[0] == f[0]] or found
            value, low, high = min(known)
            scores.append(Score(f"retention.relative{key}", value, len(group), low, high, "ratio", True, words))
        return scores
