"""What an annotator still has to judge, in an order that hides method, prompt and the detector's answer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from .. import checks, files
from ..pictures import read_picture
from .judgement import LABELS, OUTCOMES, Judgement, annotator_name
from .store import Store

FINAL = 3
"""The pass that judges only the pictures in which the independent passes differ."""
PASSES = 1_000  # of feedback
SET = 5
"""The largest number of pictures that are ranked together."""


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

    def read(self) -> Image.Image:
        """The picture.

        Raises:
            FileNotFoundError: its file is missing.
            ValueError: its SHA-256 is another one than recorded, or it cannot be read.
        """
        return read_picture(self.path, self.picture)


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
        every = store.judgements(kind="label", concept=concept, number=number)
        given = [each for each in every if (each.run, each.row) in wanted]
        done = {(each.run, each.row) for each in given}
        if all(each.annotator == annotator for each in given) and done != wanted:
            return number
    return FINAL


class Session:
    """One annotator in one pass. Every answer is stored before the next picture is shown.

    Labels are kept by run and row. Feedback is kept by picture, so a pool of pictures may grow between two sittings.

    Args:
        store: where answers go, and where earlier ones are.
        items: the pictures: for labels the sampled ones of a run and its base run.
        concept: what to look for.
        annotator: who answers.
        number: the pass. Pass 3 of labels presents the pictures in which earlier passes differ.
        seed: seed of the order, which also depends on annotator and pass.
        kind: "label" or "binary".

    Raises:
        ValueError: pass 3 of labels comes before two complete passes.
    """

    kinds: tuple[str, ...] = ("label", "binary")

    def __init__(
        self,
        store: Store,
        items: Sequence[Item],
        concept: str,
        annotator: str,
        number: int,
        seed: int = 0,
        kind: str = "label",
    ) -> None:
        self.store, self.concept, self.annotator = store, concept, annotator_name(annotator)
        self.kind, self.seed = checks.choice("kind", kind, self.kinds), seed
        self.number = checks.whole("pass", number, 1, FINAL if kind == "label" else PASSES)
        if kind == "label" and number == FINAL:
            items = self._contested(items)
        self.items = sorted(items, key=lambda item: (item.run, item.row))
        random.Random(f"{seed} {annotator} {number}").shuffle(self.items)
        given = store.judgements(kind=kind, concept=concept, number=self.number)
        self.mine = {self._key(each) for each in given if each.annotator == annotator}
        self._latest: list[int] = []
        self.answered = self._answered()

    def _key(self, each: Item | Judgement) -> object:
        return (each.run, each.row) if self.kind == "label" else each.picture

    def _answered(self) -> set[int]:
        """The questions that have an answer. Here a question is a picture."""
        return {k for k, item in enumerate(self.items) if self._key(item) in self.mine}

    @property
    def total(self) -> int:
        """The number of questions."""
        return len(self.items)

    def shown(self, k: int) -> list[int]:
        """The places of the pictures that question k shows."""
        return [k]

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
        """The questions that have no answer yet: the places of their pictures, or of sets of pictures."""
        return [k for k in range(self.total) if k not in self.answered]

    def answer(self, k: int, outcome: str | Sequence[str], *, replace: bool = False) -> None:
        """Stores the answer to question k: the outcome of its picture, or one for each picture of a set.

        Raises:
            ValueError: there is no such question, or no such outcome; or another outcome is stored and `replace` is
                False.
        """
        checks.whole("picture", k, 0, self.total - 1)
        outcomes, places = [outcome] if isinstance(outcome, str) else list(outcome), self.shown(k)
        if len(outcomes) != len(places):
            raise ValueError(f"Expected {len(places)} answers, got {len(outcomes)}. Give one for each picture.")
        for each in outcomes:
            checks.choice("outcome", each, self.outcomes(k))
        made = [self.judgement(self.items[place], each) for place, each in zip(places, outcomes, strict=True)]
        self.store.add(made, replace=replace or k in self._latest)
        self.answered.add(k)
        self._latest = [*(each for each in self._latest if each != k), k]

    def outcomes(self, k: int) -> tuple[str, ...]:
        """What can be answered to question k."""
        return OUTCOMES[self.kind]

    def judgement(self, item: Item, outcome: str) -> Judgement:
        facts = (item.run, item.model, item.row, item.picture, self.concept, self.annotator, self.number, outcome)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Judgement(*facts, now, self.kind, details=self._details(item))

    def _details(self, item: Item) -> Mapping[str, Any]:
        return item.details

    def back(self) -> int | None:
        """The question that was answered last, to answer it again; None if there is none."""
        return self._latest.pop() if self._latest else None


class Ranking(Session):
    """A session in which the annotator ranks sets of up to five pictures.

    In a set, 1 shows most of the concept, equal ranks are a tie, and "x" does not show it. All annotators of a pass get
    the same sets, in another order. An answer is a whole set, so a stop in the middle of a set asks for it again.

    Args:
        store, items, concept, annotator, number, seed: as in `Session`.

    Raises:
        ValueError: there are fewer than two pictures.
    """

    kinds = ("ranking",)

    def __init__(
        self, store: Store, items: Sequence[Item], concept: str, annotator: str, number: int, seed: int = 0
    ) -> None:
        if len(items) < 2:
            raise ValueError(f"Expected at least 2 pictures to rank, got {len(items)}. Name a folder with more.")
        super().__init__(store, items, concept, annotator, number, seed, "ranking")

    def _answered(self) -> set[int]:
        self.sets = self._grouped(range(len(self.items)))
        done = [sum(self._key(self.items[k]) in self.mine for k in group) for group in self.sets]
        if any(0 < n < len(group) for n, group in zip(done, self.sets, strict=True)):  # the pool has grown
            self.sets = self._grouped([k for k, item in enumerate(self.items) if self._key(item) not in self.mine])
            return set()
        return {k for k, n in enumerate(done) if n}

    def _grouped(self, places: Sequence[int]) -> list[list[int]]:
        """Random sets of nearly equal size, the same for all annotators; their order differs."""
        chance = random.Random(f"{self.seed} {self.number}")
        ordered = sorted(places, key=lambda k: self.items[k].picture)
        chance.shuffle(ordered)
        n = -(-len(ordered) // SET)
        sets = [sorted(ordered[k::n]) for k in range(n)]  # sorted by place, which is random for each annotator
        return sorted(group for group in sets if len(group) > 1)

    @property
    def total(self) -> int:
        return len(self.sets)

    def shown(self, k: int) -> list[int]:
        return self.sets[k]

    def outcomes(self, k: int) -> tuple[str, ...]:
        return (*OUTCOMES["ranking"][: len(self.sets[k])], "x")

    def _details(self, item: Item) -> Mapping[str, Any]:
        return {**item.details, "set": self.name_of_set(item.picture)}

    def name_of_set(self, picture: str) -> str:
        """The name of the set that holds a picture: a hash of its pictures."""
        group = next(group for group in self.sets if any(self.items[k].picture == picture for k in group))
        return files.sha256("".join(sorted(self.items[k].picture for k in group)).encode())[:16]
