"""Agreement of two detectors that look for the same thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from efface import checks
from efface.detectors._named import Spec
from efface.judged import krippendorff
from efface.records import Sample, Score

from ._judging import judged
from ._samples import chosen
from ._stats import share

__all__ = ["Agreement"]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of two detectors about the concept of each row.

        agreement        = Krippendorff's alpha of their answers
        agreement.equal  = (1 / N) sum_i [ a(x_i) = b(x_i) ]
        agreement.first  = (1 / N) sum_i [ a(x_i) sees concept_i, and b(x_i) does not ]
        agreement.second = (1 / N) sum_i [ b(x_i) sees concept_i, and a(x_i) does not ]

    Two detectors that agree can both be wrong. Of a detector with several networks, the first one answers.

    Args:
        detectors: two detectors, as `efface.detector` takes them.

    Raises:
        ValueError: there are not two detectors.

    Example:
        >>> import torch
        >>> from efface import Row, Sample
        >>> from efface.metrics.agreement import Agreement
        >>> grey = Sample(Row("cat-0", "a cat", 1_000_000, concept="cat"), pixels=torch.full((3, 64, 64), 0.5))
        >>> both = Agreement(("eyes", {"name": "clip", "clip": "emoji"}))
        >>> [score.metric for score in both([grey])]
        ['agreement', 'agreement.equal', 'agreement.first', 'agreement.second']
    """

    name: ClassVar[str] = "agreement"
    unit: ClassVar[str] = "alpha"
    higher_is_better: ClassVar[bool | None] = True
    detectors: tuple[Spec, ...] = ("nudenet", "open_nsfw")

    def __post_init__(self) -> None:
        if isinstance(self.detectors, str) or len(self.detectors) != 2:
            raise ValueError(checks.refusal("two `detectors`", self.detectors, 'Write ["nudenet", "open_nsfw"].'))

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """Four scores of the rows that name a concept."""
        rows = chosen(samples, lambda row: row.concept)
        if not rows:
            return []
        answers, names = zip(*(judged(rows, spec, lambda s: (s.row.concept,)) for spec in self.detectors), strict=True)
        a, b = (hits[:1] for hits in answers)
        words = " against ".join(names)
        found = krippendorff(list(zip(a[0].tolist(), b[0].tolist(), strict=True)))
        scores = [Score("agreement", found.alpha, len(rows), *found.interval, "alpha", True, words)]
        parts = (("equal", a == b, True), ("first", a & ~b, False), ("second", b & ~a, False))
        for name, hits, higher in parts:
            worse = "low" if higher else "high"
            scores.append(share(f"agreement.{name}", hits, rows, worse=worse, higher_is_better=higher, protocol=words))
        return scores
