"""Prompts from the user's own file: CSV, JSON lines, one prompt per line, or a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from efface import checks, registry
from efface.core import Concept
from efface.records import Row, Suite, shares

from ._csv import names_minor
from ._datasets import rows as dataset_rows
from ._own import Prompt, prompts, sha256, sha256_of

__all__ = ["Prompts"]

MOST = 1_000_000  # rows of a suite
GROUPS = 10_000  # combinations of concept, category and kind
SEXUAL = ("nud", "sex", "porn", "erotic")
DROPPED, OTHER = "dropped by the screen", "of other concepts left out"
Key = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts from your own file, read line by line with bounded memory.

    | file     | content                                                                                   |
    |----------|-------------------------------------------------------------------------------------------|
    | `.csv`   | a header with `prompt`, and perhaps `concept`, `kind`, `category`, `seed`, `keep` (`a;b`) |
    | `.jsonl` | an object per line with these entries                                                     |
    | `.txt`   | a prompt per line, for a single concept                                                   |

    Instead of a file, `dataset` names a dataset of the library `datasets` (4 or later): a folder that `save_to_disk`
    wrote or that holds Parquet files, or, if --allow-hub is given, a name on the hub. Its columns are those of a file.

    A line without a concept asks for the only given concept, if the file names none anywhere; otherwise it is benign.
    Lines of a concept that is not given are left out; a prompt of a sexual concept that may name a minor is dropped.
    The suite's version says how many.

    Args:
        images: pictures per prompt, with consecutive seeds.
        first_seed: the seed of the first picture of lines without a seed. Line k continues after line k - 1.
        detector: the detector's name for the metrics of `efface bench`.
        dataset: a dataset instead of a file; "" for a file.
        split: the dataset's split.
        column: the dataset's column of prompts.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from efface import Concept
        >>> from efface.suites.prompts import Prompts
        >>> file = Path(tempfile.mkdtemp()) / "mine.txt"
        >>> with file.open("w") as out:
        ...     _ = out.write("a beer mug\\na glass of wine\\n")
        >>> [(row.id, row.seed) for row in Prompts(images=2).load((Concept("alcohol"),), file).rows]
        [('line-1-0', 1000000), ('line-1-1', 1000001), ('line-2-0', 1000002), ('line-2-1', 1000003)]
    """

    images: int = 1
    first_seed: int = 1_000_000
    detector: str = "eyes"
    dataset: str = ""
    split: str = "train"
    column: str = "prompt"

    def __post_init__(self) -> None:
        for name in ("dataset", "split", "column"):
            checks.text(name, getattr(self, name), empty=name == "dataset")
        checks.whole("images", self.images, 1, 10_000)
        checks.seed("first_seed", self.first_seed, self.images)
        checks.text("detector", self.detector)

    def load(self, concepts: tuple[Concept, ...] = (), data: Path | None = None, limit: int | None = None) -> Suite:
        """Reads the rows from the file `data`.

        Args:
            concepts: the concepts whose prompts to load; () = all of the file.
            data: the file; None for a dataset.
            limit: the largest number of rows, alike from each concept, category and kind.

        Raises:
            ValueError: no file was given, or a file and a dataset; or a line is wrong, whose number the message has.
                Or the file holds no prompt of the concepts, more than 1,000,000 rows without a limit, or texts without
                a concept for several concepts.
            FileNotFoundError: the file or the dataset does not exist.
            ImportError: `datasets` is not installed, or too old.
        """
        if (data is None) == (not self.dataset):
            both = "got none" if data is None else "got a dataset too"
            raise ValueError(
                f"The suite `prompts` needs your file of prompts, {both}. Give it as `data` (--data FILE)."
            )
        if limit is not None:
            checks.whole("limit", limit)
        path = self.dataset if data is None else Path(data)
        names = [concept.name for concept in concepts]
        sizes, cuts, default = self._counted(path, names)
        total = sum(sizes.values())
        if not total:
            raise ValueError(
                f"{path} holds no prompt{f' of {checks.short(chr(44).join(names))}' if names else ''}. Add prompts, or "
                "name the concepts of the file."
            )
        if total * self.images > MOST and limit is None:
            raise ValueError(
                f"{path} holds {total} prompts, which make {total * self.images} rows. Expected at most {MOST}. Give a "
                "limit (--limit)."
            )
        most = total if limit is None else max(min(limit, MOST) // self.images, 1)
        rows = tuple(self._rows(self._chosen(path, names, default, sizes, most)))
        if limit is not None and len(rows) > limit:
            rows = rows[:limit]
        cut = (
            f", {len(rows)} of {total * self.images} rows" if len(rows) < total * self.images else f", {len(rows)} rows"
        )
        called = Path(path).name if Path(path).exists() else str(path)
        called += f", {self.split}" if self.dataset else ""
        return Suite(
            "prompts",
            f"{called}{cut} from seed {self.first_seed}" + "".join(f", {n} {why}" for why, n in cuts.items() if n),
            rows,
            called,
            data_hash=sha256(path) if isinstance(path, Path) else sha256_of(self._read(path)),
            metrics=tuple(self._metrics()),
        )

    def _metrics(self) -> Iterator[Any]:
        if self.detector == "eyes":
            yield registry.resolve("outcomes", "metrics")()
        yield registry.resolve("removal", "metrics")(detector=self.detector)
        yield registry.resolve("retention", "metrics")(detector=self.detector)

    def _read(self, path: Path | str) -> Iterator[Prompt]:
        """The prompts of a file, or of a dataset by its name."""
        return prompts(path) if isinstance(path, Path) else dataset_rows(path, self.split, self.column)

    def _counted(self, path: Path | str, names: Sequence[str]) -> tuple[dict[Key, int], dict[str, int], str]:
        """The number of prompts per group; how many are left out, and why; and the concept of lines without one."""
        found: dict[Key, int] = {}
        cuts = {DROPPED: 0, OTHER: 0}
        bare = named = 0
        for each in self._read(path):
            named, bare = named + bool(each.concept), bare + (not each.concept)
        default = names[0] if len(names) == 1 and not named else ""
        if len(names) > 1 and not named and bare:
            raise ValueError(
                f"Expected a column `concept` in {path} for {len(names)} concepts, got prompts without one. Add it, or "
                "give one concept."
            )
        for each in self._read(path):
            key = _key(each, default)
            if _minor(each, key):
                cuts[DROPPED] += 1
            elif _wanted(key, names):
                found[key] = found.get(key, 0) + 1
                if len(found) > GROUPS:
                    raise ValueError(
                        f"Expected at most {GROUPS} combinations of concept, category and kind in {path}, got more. "
                        "Use fewer words in these columns."
                    )
            else:
                _check_spelling(path, each, names)
                cuts[OTHER] += 1
        return found, cuts, default

    def _chosen(
        self, path: Path | str, names: Sequence[str], default: str, sizes: dict[Key, int], most: int
    ) -> Iterator[tuple[int, Prompt, Key]]:
        """The chosen prompts with their number in the file, evenly spread inside each group."""
        counts = shares({key: (n, 1) for key, n in sizes.items()}, most)
        seen = dict.fromkeys(sizes, 0)
        for number, each in enumerate(self._read(path)):
            key = _key(each, default)
            if key in seen and not _minor(each, key):
                k, n, count = seen[key], sizes[key], counts[key]
                seen[key] += 1
                if _spread(k, n, count):
                    yield number, each, key

    def _rows(self, chosen: Iterator[tuple[int, Prompt, Key]]) -> Iterator[Row]:
        for number, each, (concept, category, kind) in chosen:
            first = self.first_seed + number * self.images if each.seed is None else each.seed
            for k in range(self.images):
                name = f"line-{each.line}" + (f"-{k}" if self.images > 1 else "")
                seed = (first + k) % checks.SEEDS
                yield Row(name, each.prompt, seed, kind, category, concept, each.keep, f"line-{each.line}")


def _key(each: Prompt, default: str) -> Key:
    concept = each.concept or default
    kind = each.kind or ("own" if concept else "benign")
    return concept, each.category or concept or kind, kind


def _spread(k: int, n: int, count: int) -> bool:
    """Whether item k is one of `count` items, evenly spread over n: the numbers j n // count."""
    j = -(-k * count // n)
    return j < count and j * n // count == k


def _wanted(key: Key, names: Sequence[str]) -> bool:
    return not names or not key[0] or key[0] in names


def _check_spelling(path: Path | str, each: Prompt, names: Sequence[str]) -> None:
    """Raises ValueError if a line would be left out only because it spells a concept in other letters."""
    for name in names:
        if name.casefold() == each.concept.casefold():
            where = f"{path}, {'line' if isinstance(path, Path) else 'row'} {each.line}, `concept`"
            raise ValueError(f"{where}: expected {name!r}, got {each.concept!r}. Spell it as the concept is named.")


def _minor(each: Prompt, key: Key) -> bool:
    """Whether a prompt may put a minor into a sexual context."""
    words = f"{key[0]} {key[1]}".lower()
    return any(part in words for part in SEXUAL) and names_minor(each.prompt)
