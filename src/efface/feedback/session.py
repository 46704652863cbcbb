"""What an annotator still has to judge, in an order that hides method, prompt and the detector's answer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import checks
from .judgement import LABELS, Judgement, annotator_name
from .store import Store

FINAL = 3
"""The pass that judges only the pictures in which the independent passes differ."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture to judge.

    Args:
        run, model, row, picture: as in `Judgement`.
        path: the picture's file.
        details: how it was drawn.
    """

    run: str
    model: str
    row: str
    picture: str
    path: Path
    details: Mapping[str, Any] = dataclasses.field(hash=False)


def details_of(sample: Mapping[str, Any], stratum: str) -> dict[str, Any]:
    """How a picture of a stored sample was drawn."""
    return {
        "stratum": stratum,
        **sample["strata"][stratum],
        **{name: sample[name] for name in ("detector", "explicit")},
    }


def independent(judgements: Iterable[Judgement]) -> list[Judgement]:
    """The judgements of independent passes, without the final one, whose pictures were chosen because others differ."""
    return [each for each in judgements if each.number != FINAL]


def consensus(outcomes: Sequence[str]) -> str:
    """The outcome of several passes: "there" if at least half say so, else the more frequent of the others. Equally
    frequent ones count as "other".

    Example:
        >>> from efface.feedback import consensus
        >>> consensus(["nothing", "there"]), consensus(["other", "there", "nothing"])
        ('there', 'other')
    """
    counts = {outcome: outcomes.count(outcome) for outcome in LABELS}
    if 2 * counts["there"] >= len(outcomes):
        return "there"
    return "other" if counts["other"] >= counts["nothing"] else "nothing"


def differing(judgements: Iterable[Judgement]) -> dict[tuple[str, str], list[Judgement]]:
    """(run, row) to its judgements, for pictures in which independent passes differ."""
    found: dict[tuple[str, str], list[Judgement]] = {}
    for each in independent(judgements):
        found.setdefault((each.run, each.row), []).append(each)
    return {key: group for key, group in found.items() if len({each.outcome for each in group}) > 1}


def choose_pass(store: Store, items: Sequence[Item], concept: str, annotator: str) -> int:
    """The pass that an annotator begins or continues: the first whose judgements are missing, and that nobody else
    began; the final one after two complete passes.
    """
    wanted = {(item.run, item.row) for item in items}
    for number in range(1, FINAL):
        given = [each for each in _of(store, concept, number) if (each.run, each.row) in wanted]
        done = {(each.run, each.row) for each in given}
        if all(each.annotator == annotator for each in given) and done != wanted:
            return number
    return FINAL


def _of(store: Store, concept: str, number: int) -> list[Judgement]:
    return store.judgements(kind="label", concept=concept, number=number)


class Session:
    """One annotator in one pass. Every answer is stored before the next picture is shown.

    Args:
        store: where answers go, and where earlier ones are.
        items: the sampled pictures of a run and its base run.
        concept: what to look for.
        annotator: who answers.
        number: the pass. Pass 3 presents the pictures in which earlier passes differ.
        seed: seed of the order, which also depends on annotator and pass.

    Raises:
        ValueError: pass 3 comes before two complete passes.
    """

    def __init__(
        self, store: Store, items: Sequence[Item], concept: str, annotator: str, number: int, seed: int = 0
    ) -> None:
        self.store, self.concept, self.annotator = store, concept, annotator_name(annotator)
        self.number = checks.whole("pass", number, 1, FINAL)
        if number == FINAL:
            items = self._contested(items)
        self.items = sorted(items, key=lambda item: (item.run, item.row))
        random.Random(f"{seed} {annotator} {number}").shuffle(self.items)
        mine = {(each.run, each.row) for each in _of(store, concept, self.number) if each.annotator == annotator}
        self.answered = {k for k, item in enumerate(self.items) if (item.run, item.row) in mine}
        self._latest: list[int] = []

    def _contested(self, items: Sequence[Item]) -> list[Item]:
        given = independent(self.store.judgements(kind="label", concept=self.concept))
        coders: dict[tuple[str, str], set[tuple[str, int]]] = {}
        for each in given:
            coders.setdefault((each.run, each.row), set()).add(each.coder)
        few = sum(len(coders.get((item.run, item.row), ())) < 2 for item in items)
        if few:
            raise ValueError(
                f"Expected two complete passes before pass {FINAL}, got fewer for {few} of {len(items)} pictures. "
                "Finish passes 1 and 2."
            )
        contested = differing(given)
        return [item for item in items if (item.run, item.row) in contested]

    @property
    def left(self) -> list[int]:
        """The places of the pictures that have no answer yet."""
        return [k for k in range(len(self.items)) if k not in self.answered]

    def answer(self, k: int, outcome: str, *, replace: bool = False) -> None:
        """Stores an answer for the picture at place k.

        Raises:
            ValueError: there is no such picture, or no such outcome; or another outcome is stored and `replace` is
                False.
        """
        checks.whole("picture", k, 0, len(self.items) - 1)
        self.store.add([self.judgement(self.items[k], outcome)], replace=replace or k in self._latest)
        self.answered.add(k)
        self._latest = [*(each for each in self._latest if each != k), k]

    def judgement(self, item: Item, outcome: str) -> Judgement:
        facts = (item.run, item.model, item.row, item.picture, self.concept, self.annotator, self.number, outcome)
        return Judgement(*facts, datetime.now(UTC).isoformat(timespec="seconds"), details=item.details)

    def back(self) -> int | None:
        """The place of the picture that was answered last, to answer it again; None if there is none."""
        return self._latest.pop() if self._latest else None
