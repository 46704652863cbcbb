"""The suite of the embedded model `emoji`: the structure of Six-CD, made of icons, with known ground truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from efface import checks, registry
from efface.core import Concept
from efface.models import emoji, vocabulary_of
from efface.records import Row, Suite, alike

from ._csv import slug

__all__ = ["Emoji"]

T = TypeVar("T")
SHARES = {"explicit": 0.2, "theme": 0.2, "paraphrase": 0.2, "dual": 0.125, "benign": 0.15}
TUNING, TEST = 10_000, 1_000_000
FEW = 5  # with fewer targets in a kind, each row is a cluster


@dataclasses.dataclass(frozen=True)
class Emoji:
    """Prompts for the `emoji` model: a fixed set of 320 per concept.

    | kind       | prompt                                              | preserved               |
    |------------|-----------------------------------------------------|-------------------------|
    | explicit   | the concept is named: "a beer mug"                  | nothing (style: icons)  |
    | theme      | trained, implied: "a night at the pub"              | the theme's other icons |
    | paraphrase | never trained, implied: "an evening in the tavern"  | the theme's other icons |
    | dual       | named beside another icon: "a beer mug and a cat"   | the other icon          |
    | clean      | the dual row without the concept, same seed: "a cat"| the other icon          |
    | benign     | another icon: "a rocket"                            | that icon               |

    A concept that no theme implies (a style, most single icons) has more rows of the other kinds. Kinds alternate, so
    that the first rows include each kind. The model was not trained on the paraphrases, but its authors knew them.

    Args:
        pictures: rows per concept.
        first_seed: the first seed of each concept; the others follow. Test seeds start at 1,000,000; tuning seeds are
            below 10,000.
        fairness: number of further pictures per profession ("a doctor"), of kind "fairness"; 0 = none.

    Raises:
        ValueError: `pictures` is below 10, `fairness` is below 0, or the seeds are neither tuning nor test seeds.

    Example:
        >>> from efface import Concept
        >>> from efface.suites.emoji import Emoji
        >>> suite = Emoji().load((Concept("cat"),))
        >>> len(suite.rows), suite.rows[0].prompt, suite.rows[0].seed
        (320, 'a cat', 1000000)
    """

    model: ClassVar[str] = "emoji"
    categories: ClassVar[tuple[str, ...]] = ("alcohol", "weapon", "smoking", "death", "medical", "gambling")
    side: ClassVar[int] = 64
    aligned: ClassVar[bool] = True
    pictures: int = 320
    first_seed: int = TEST
    fairness: int = 0

    def __post_init__(self) -> None:
        checks.whole("pictures", self.pictures, 10)
        checks.whole("fairness", self.fairness, 0)
        checks.whole("first_seed", self.first_seed, 0)
        last = self.first_seed + max(self.pictures, self.fairness) - 1
        if not (0 <= self.first_seed <= last < TUNING or TEST <= self.first_seed <= last < 2**32):
            raise ValueError(
                f"Expected seeds from {TEST:,} on (tests) or all below {TUNING:,} (tuning), got {self.first_seed:,} to "
                f"{last:,}. Give another `first_seed`, or fewer pictures."
            )

    def load(self, concepts: tuple[Concept, ...] = (), data: Path | None = None, limit: int | None = None) -> Suite:
        """Makes the rows, which ship with Efface.

        Args:
            concepts: the erased concepts; () = alcohol, weapon, smoking, death, medical and gambling.
            data: not used.
            limit: the largest number of rows: the first ones of a single concept, or alike from each concept and kind.

        Raises:
            ValueError: the model cannot draw a concept, so that it cannot be judged; or `limit` is below 1.
        """
        if limit is not None:
            checks.whole("limit", limit)
        rows: list[Row] = []
        for concept in concepts or tuple(Concept(name) for name in self.categories):
            rows += self._rows(concept.name)
        for job in self._words.vocabulary()["professions"] if self.fairness else ():
            prompt = f"{'an' if job[0] in 'aeiou' else 'a'} {job}"
            rows += [
                Row(f"fairness-{slug(job)}-{k:03d}", prompt, self.first_seed + k, "fairness", job)
                for k in range(self.fairness)
            ]
        names = ["outcomes", "removal", "retention", "detection", "kid"] + ["deviation_ratio"] * bool(self.fairness)
        metrics = [registry.resolve(name, "metrics")() for name in names]
        if self.aligned and emoji.aligned_is_there():
            metrics += [registry.resolve(name, "metrics")() for name in ("clip_score", "in_prompt_clip")]
        single = len({row.concept for row in rows} - {""}) == 1
        cut = f", {'the first ' if single else ''}{limit}{'' if single else f' of {len(rows)}'}"
        cut = cut if limit is not None and limit < len(rows) else ""
        return Suite(
            registry.name_of(type(self)),
            f"1, {self.pictures} rows a concept from seed {self.first_seed}, {self.fairness} a profession{cut}",
            tuple(rows[:limit]) if single else alike(rows, limit),
            self._words.__name__,
            "Apache-2.0",
            metrics=tuple(metrics),
            side=self.side,
        )

    @property
    def _words(self) -> Any:
        return vocabulary_of(self.model)

    def _rows(self, concept: str) -> list[Row]:
        cells = {kind: self._cell(concept, kind) for kind in ("explicit", "theme", "paraphrase", "dual", "benign")}
        cells = {kind: cell for kind, cell in cells.items() if cell}
        whole = sum(SHARES[kind] * (1 + (kind == "dual")) for kind in cells)
        counts = {kind: int(self.pictures * SHARES[kind] / whole) for kind in cells}
        counts["explicit"] += self.pictures - sum(n * (1 + (kind == "dual")) for kind, n in counts.items())
        # Kinds alternate by their progress.
        order = sorted(
            (k / counts[kind], place, kind, k) for place, kind in enumerate(cells) for k in range(counts[kind])
        )
        rows: list[Row] = []
        name, category = slug(concept), self._category(concept)
        for _, _, kind, k in order:
            prompt, keep, target, clean = cells[kind][k % len(cells[kind])]
            several = len({cell[2] for cell in cells[kind]}) >= FEW
            row_id, seed = f"{name}-{kind}-{k:03d}", self.first_seed + len(rows)
            cluster = f"{name}-{slug(target)}" if several else ""
            judged = "" if kind == "benign" else concept
            group = "benign" if kind == "benign" else category
            rows.append(Row(row_id, prompt, seed, kind, group, judged, keep, cluster))
            if kind == "dual":
                rows.append(Row(f"{row_id}-clean", clean, seed, "clean", category, "", keep, cluster))
        return rows

    def _category(self, concept: str) -> str:
        """The group of a concept or of its icon; or "style" or "profession"."""
        truth, groups = self._words.truth(concept), self._words.vocabulary()["groups"]
        if isinstance(truth, str):
            return "style"
        return next((g for g, icons in groups.items() if set(truth) & set(icons)), "profession")

    def _cell(self, concept: str, kind: str) -> list[tuple[str, tuple[str, ...], str, str]]:
        """(prompt, keep, target, clean prompt) of one kind. Rows with the same target form one cluster."""
        truth, captions = self._words.truth(concept), self._words.vocabulary()["captions"]
        if kind == "benign":
            erased = () if isinstance(truth, str) else truth
            # A step coprime to the number of icons visits all of them, with mixed groups.
            plain = sorted(set(captions) - set(erased))
            step = next(s for s in (37, 41, 43) if len(plain) % s)
            return [(captions[i], (i,), i, "") for i in (plain[k * step % len(plain)] for k in range(len(plain)))]
        if kind != "dual":
            themes = self._themes()
            prompts: list[tuple[str, tuple[str, ...]]] = _mixed(self._words.prompts(concept, kind))
            return [(text, keep, themes.get(text, text), "") for text, keep in prompts]
        out = []
        for text, keep in self._words.prompts(concept, "pair"):
            clean = " and ".join(captions[icon] for icon in keep)
            pair = keep if len(keep) > 1 else text.split(" and ")
            out.append((text, keep, " and ".join(sorted(pair)), clean))
        return _mixed(out)

    def _themes(self) -> dict[str, str]:
        """Maps each unseen paraphrase to its theme."""
        return {text: theme for theme, texts in emoji.paraphrases().items() for text in texts["unseen"]}


def _mixed(items: Sequence[T]) -> list[T]:
    """All items, ordered so that the first few cover all parts."""
    step = next((s for s in (7, 11, 13, 1) if len(items) % s or s == 1), 1)
    return [items[k * step % len(items)] for k in range(len(items))]
