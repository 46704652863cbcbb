"""Reading prompt files: every value checked, every complaint with file, line and column; and the screen for minors."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from efface import checks
from efface.core import Concept
from efface.files import check_ordinary, read_text, there
from efface.records import Row

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of one data file: its rows and sha256 in the screened copy, which differs from what authors
    publish."""

    rows: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a prompt set comes from.

    Args:
        folder: its folder under the data folder.
        url: where the authors publish it.
        commit: of the upstream repository.
        licence: of the data.
        files: file name to facts.
    """

    folder: str
    url: str
    commit: str
    licence: str
    files: Mapping[str, Facts]

    def path(self, data: Path | None, name: str) -> Path:
        """The file `name` of this set.

        Raises:
            ValueError: no data folder was given.
            FileNotFoundError: it has no such file.
        """
        where = f"The authors publish it at {self.url} (commit {self.commit[:12]}, licence: {self.licence})."
        if data is None:
            raise ValueError(
                f"The suite needs {self.folder}/{name}, which does not come with Efface: give the folder that holds "
                f"{self.folder}/ as `data` (--data FOLDER). {where}"
            )
        path = Path(data) / self.folder / name
        if not there(path):
            raise FileNotFoundError(f"{path} is missing. {where}")
        check_ordinary(path)
        return path

    def screened(self, path: Path) -> bool:
        """Whether this is byte for byte the copy that was screened already."""
        known = self.files.get(path.name)
        return known is not None and known.sha256 == sha256(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(paths: Sequence[Path]) -> str:
    """One sha256 for several files: of the file itself if it is one, else over sorted names and hashes."""
    if len(paths) == 1:
        return sha256(paths[0])
    lines = sorted(f"{path.name} {sha256(path)}\n" for path in set(paths))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class Line(dict[str, str]):
    """One record of a CSV file, by column name, which knows where it stands.

    The error messages never quote the text of a prompt.
    """

    def __init__(self, values: Mapping[str, str], path: Path, number: int) -> None:
        super().__init__(values)
        self.path, self.number = path, number

    def wrong(self, column: str, what: str) -> ValueError:
        return ValueError(f"{self.path}, line {self.number}, column {column!r}: {what}.")

    def text(self, column: str) -> str:
        value = self[column].strip()
        if not value:
            raise self.wrong(column, "expected a text, but it is empty")
        return value

    def whole(self, column: str, top: int = checks.SEEDS) -> int:
        """An integer >= 0 and below `top`; "7.0" counts, as pandas writes it."""
        value = self[column].strip()
        match = re.fullmatch(r"(\d{1,20})(\.0*)?", value)
        if not match or int(match[1]) >= top:
            bound = "2**32" if top == checks.SEEDS else str(top)
            raise self.wrong(column, f"expected a whole number from 0 to below {bound}, got {checks.shown(value)}")
        return int(match[1])

    def number_in(self, column: str, low: float, high: float) -> float:
        try:
            value = float(self[column])
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise self.wrong(column, f"expected a number in [{low:g}, {high:g}], got {checks.shown(self[column])}")
        return value


def read(path: Path, columns: Sequence[str]) -> list[Line]:
    """All records of a UTF-8 CSV file with a header.

    Args:
        path: the file.
        columns: those that must be there; others are read too.

    Raises:
        ValueError: not UTF-8, no header, a missing column, an open quote, or a record with too many or too few fields.
    """
    text = io.StringIO(read_text(path), newline="")
    return list(_lines(path, csv.reader(text, strict=True), columns))


def _lines(path: Path, reader: Any, columns: Sequence[str]) -> Iterator[Line]:
    start = 1
    try:
        header: list[str] = next(reader, [])
        missing = [c for c in columns if c not in header]
        if missing:
            raise ValueError(
                f"{path} lacks the column{'s' * (len(missing) > 1)} {checks.short(', '.join(missing))}. "
                f"Its header has {checks.short(', '.join(header)) or 'nothing'}."
            )
        start = reader.line_num + 1
        for record in reader:
            if record and len(record) != len(header):
                at = min(len(record), len(header)) + 1
                raise ValueError(
                    f"{path}, line {start}, column {at}: expected {len(header)} fields, but got {len(record)}: "
                    f"put texts with commas into quotes."
                )
            if record:
                yield Line(dict(zip(header, record, strict=True)), path, start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not a CSV record ({error}).") from error


_MINOR = re.compile(
    r"\b(child(ren)?(hood)?|kids?|kinder\w*|toddlers?|bab(y|ies)|infants?|newborns?|teen(s|age|aged|ager|agers)?"
    r"|pre-?teens?|tweens?|under-?age[d]?|minors?|juveniles?|adolescen\w*|pupils?|school\w*|\d?girls?|\d?boys?"
    r"|young(er|ster|sters)?|youth(ful)?|little (sister|brother|one)s?|daughters?|sons?|lolis?|lolitas?|shotas?"
    r"|([1-9]|1[0-7])[- ]?(years?|yrs?|y/?o)\b)",
    re.IGNORECASE,
)


def screen(lines: Sequence[Line], texts: Sequence[str], sexual: Callable[[Line], bool]) -> tuple[list[Line], int]:
    """Leaves out lines that may put a minor into a sexual context: a broad rule of keywords, which drops too much.

    Args:
        lines: of a file that was not screened before.
        texts: columns to look into.
        sexual: whether a line's context is sexual.

    Returns:
        The lines that stay, and how many were dropped.
    """
    kept = [line for line in lines if not (sexual(line) and any(_MINOR.search(line[c]) for c in texts))]
    return kept, len(lines) - len(kept)


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the items, evenly spread over all, in order."""
    if limit is None or checks.whole("limit", limit) >= len(items):
        return list(items)
    return [items[k * len(items) // limit] for k in range(limit)]


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def wanted(concepts: Sequence[Concept], known: Mapping[str, Sequence[str]], suite: str) -> tuple[str, ...]:
    """The sets of a suite that the names of `concepts` ask for; all if there are no concepts.

    Args:
        concepts: what is erased.
        known: name of a set to the concept names that it measures, in lower case.
        suite: for the message.

    Raises:
        ValueError: the suite measures none of the concepts.
    """
    names = {c.name.lower() for c in concepts}
    found = tuple(each for each, measured in known.items() if not names or names & set(measured))
    if not found:
        things = ", ".join(sorted({m for measured in known.values() for m in measured})[:40])
        raise ValueError(
            f"The suite {suite!r} does not measure {', '.join(sorted(names))}. It measures: {things}. "
            "Without concepts it loads all its sets."
        )
    return found


def unique(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows; where an id comes twice in the data, later ones get a number."""
    counts: dict[str, int] = {}
    out = []
    for row in rows:
        counts[row.id] = count = counts.get(row.id, 0) + 1
        out.append(row if count == 1 else dataclasses.replace(row, id=f"{row.id}.{count}"))
    return tuple(out)
