"""What judgements say about pictures, as a reward model learns it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from .. import checks
from .agreement import ranks
from .judgement import Judgement

NOBODY = "Judge pictures with `efface feedback collect`."


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The feedback of all annotators on one concept. Pictures are named by their SHA-256.

    Args:
        concept: what was looked for.
        shares: picture to the share of its binary judgements that say yes.
        pairs: (better, worse, set): the first picture shows more of the concept. One entry per annotator and pass.
        sets: picture to the first set in which it was ranked.
        applies: picture to the share of its rankings that are not x.
        ties: pairs of equal rank, which teach nothing; two pictures with x are such a pair.
        contradictions: pictures with both binary answers, and pairs that were ordered both ways.
        annotators: who judged.

    Example:
        >>> from efface.feedback import Evidence, Judgement
        >>> def judged(picture, who, said):
        ...     return Judgement("0" * 64, "", "a", picture * 64, "scary", who, 1, said, "2026-01-01", "binary")
        >>> given = [judged("1", "ana", "yes"), judged("1", "ben", "no"), judged("2", "ana", "yes")]
        >>> found = Evidence.of(given, "scary")
        >>> list(found.shares.values()), found.contradictions
        ([0.5, 1.0], 1)
    """

    concept: str
    shares: Mapping[str, float]
    pairs: tuple[tuple[str, str, str], ...]
    sets: Mapping[str, str]
    applies: Mapping[str, float]
    ties: int
    contradictions: int
    annotators: tuple[str, ...]

    @classmethod
    def of(cls, judgements: Iterable[Judgement], concept: str) -> Evidence:
        """The evidence of binary judgements and rankings; labels are left out.

        Raises:
            ValueError: nobody judged this concept; nobody saw it in any picture, or everybody in all of them; or all
                ranks are equal.
        """
        every = [each for each in judgements if each.kind != "label"]
        given = [each for each in every if each.concept == concept]
        if not given:
            if known := sorted({each.concept for each in every}):
                checks.choice("concept", concept, known)
            raise ValueError(f"Expected feedback on {checks.shown(concept)}, got none. {NOBODY}")
        votes: dict[str, list[bool]] = {}
        for each in given:
            if each.kind == "binary":
                votes.setdefault(each.picture, []).append(each.outcome == "yes")
        pairs, sets, ties = _pairs([each for each in given if each.kind == "ranking"])
        ordered = {(better, worse) for better, worse, _ in pairs}
        both = sum((b, a) in ordered for a, b in ordered) // 2 + sum(len(set(each)) > 1 for each in votes.values())
        shares = {picture: sum(each) / len(each) for picture, each in votes.items()}
        marks: dict[str, list[bool]] = {}
        for each in given:
            if each.kind == "ranking":
                marks.setdefault(each.picture, []).append(each.outcome != "x")
        applies = {picture: sum(each) / len(each) for picture, each in marks.items()}
        who = tuple(sorted({each.annotator for each in given}))
        found = cls(concept, shares, pairs, sets, applies, ties, both, who)
        found._check(given)
        return found

    def _check(self, given: Sequence[Judgement]) -> None:
        n = len({each.picture for each in given})
        if not any(each.outcome not in ("no", "x") for each in given):
            raise ValueError(
                f"Expected feedback with pictures that show {checks.shown(self.concept)}, got {n} pictures and none "
                "that shows it. Judge pictures that the model draws for prompts close to the concept."
            )
        if not self.pairs and len(set(self.shares.values())) < 2:
            raise ValueError(
                f"Expected feedback that tells pictures apart, got equal answers for all {n} pictures. Judge pictures "
                f"that show more and less of {checks.shown(self.concept)}."
            )

    @property
    def pictures(self) -> tuple[str, ...]:
        """The judged pictures, sorted."""
        return tuple(sorted({*self.shares, *self.sets}))

    def notes(self) -> list[str]:
        """What the user has to know about these judgements."""
        found = []
        if len(self.annotators) == 1:
            found.append(
                "One annotator judged, so the reward repeats the taste and the mistakes of one person, and the "
                "agreement between people is unknown."
            )
        if self.contradictions:
            found.append(
                f"Contradictions: {self.contradictions} pictures or pairs have both answers. Answers count equally, so "
                "these teach little."
            )
        return found


def _pairs(given: Sequence[Judgement]) -> tuple[tuple[tuple[str, str, str], ...], dict[str, str], int]:
    """The ordered pairs, the first set of each picture, and the number of ties."""
    pairs: list[tuple[str, str, str]] = []
    sets: dict[str, str] = {}
    ties = 0
    for (_, name), group in ranks(given).items():
        for a, b in itertools.combinations(sorted(group), 2):
            if group[a] == group[b]:
                ties += 1
            else:
                pairs.append((a, b, name) if group[a] < group[b] else (b, a, name))
        for picture in group:
            sets.setdefault(picture, name)
    return tuple(pairs), sets, ties
