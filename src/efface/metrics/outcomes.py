"""The three outcomes of a picture: the concept, something else that is recognisable, or nothing recognisable."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import nan
from typing import ClassVar

from efface.detectors._named import Spec
from efface.records import Sample, Score

from ._judging import SHOWN, judged
from ._samples import chosen, groups, paired
from ._stats import share

__all__ = ["Outcomes"]


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The shares of the three outcomes of pictures, each by the less favourable judge.

        outcomes.there   = (1 / N) sum_i [ detector sees concept_i ]
        outcomes.nothing = (1 / N) sum_i [ detector does not see concept_i, and nothing is recognisable ]
        outcomes.erased  = (1 / N) sum_i [ detector does not see concept_i, but something is recognisable ]

    A ruined picture is not erased. `outcomes.erased` is NaN (not judged) if the base model shows the concept in fewer
    than 30 % of the rows, because there is nothing to erase.

    Args:
        detector: a detector's name, or a mapping with name and options; see `efface.detector`.
        recognises: a detector that without names says whether anything is recognisable.
        by: fields of rows that split the scores: kind, category, concept.

    Raises:
        ValueError: `base` is missing or has other rows.

    Example:
        >>> import torch
        >>> from efface import Row, Sample
        >>> from efface.metrics.outcomes import Outcomes
        >>> grey = [Sample(Row("cat-0", "a cat", 1_000_000, concept="cat"), pixels=torch.full((3, 64, 64), 0.5))]
        >>> [(score.metric, score.value) for score in Outcomes()(grey, grey)]
        [('outcomes.erased', nan), ('outcomes.there', 0.0), ('outcomes.nothing', 1.0)]
    """

    name: ClassVar[str] = "outcomes"
    unit: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool | None] = True
    detector: Spec = "eyes"
    recognises: Spec = "eyes"
    by: tuple[str, ...] = ("concept", "kind")

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """Three scores of all rows that name a concept, and of each group of them."""
        scores = []
        for key, group in groups(chosen(samples, lambda row: row.concept), tuple(self.by)).items():
            there, words = judged(group, self.detector, lambda s: (s.row.concept,))
            before, _ = judged(paired(group, base, self.name), self.detector, lambda s: (s.row.concept,))
            anything, more = judged(group, self.recognises, lambda s: ())
            words += "" if more == words else f"; anything recognisable by {more}"
            something = anything.all(0)  # all of these judges have to recognise it
            erased = share(
                f"outcomes.erased{key}", ~there & something, group, worse="low", higher_is_better=True, protocol=words
            )
            if (rate := float(before.double().mean(1).min())) < SHOWN:
                words_now = f"{words}; not judged, because the base rate is {rate:.1%}"
                erased = dataclasses.replace(erased, value=nan, low=nan, high=nan, protocol=words_now)
            scores.append(erased)
            for name, hits in (("there", there), ("nothing", ~there & ~something)):
                scores.append(
                    share(f"outcomes.{name}{key}", hits, group, worse="high", higher_is_better=False, protocol=words)
                )
        return scores
