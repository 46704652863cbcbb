"""Reads and checks prompt files, and screens them for minors. Errors name file, line and column."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from efface import checks
from efface.core import Concept
from efface.files import check_ordinary, read_text, there
from efface.records import Row


@dataclasses.dataclass(frozen=True)
class Facts:
    """The rows and SHA-256 of the screened copy of a data file, which differs from the published one."""

    rows: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a prompt set.

    Args:
        folder: the set's folder in the data folder.
        url: the address at which the authors publish it.
        commit: the commit of the upstream repository.
        licence: the licence of the data.
        files: file name to facts.
    """

    folder: str
    url: str
    commit: str
    licence: str
    files: Mapping[str, Facts]

    def path(self, data: Path | None, name: str) -> Path:
        """The path of a file of this set.

        Raises:
            ValueError: no data folder was given.
            FileNotFoundError: the folder lacks the file.
        """
        where = f"The authors publish it at {self.url} (commit {self.commit[:12]}, licence: {self.licence})."
        if data is None:
            raise ValueError(
                f"The suite needs {self.folder}/{name}, which does not ship with Efface. Give the folder that holds "
                f"{self.folder}/ as `data` (--data FOLDER). {where}"
            )
        path = Path(data) / self.folder / name
        if not there(path):
            raise FileNotFoundError(f"{path} is missing. {where}")
        check_ordinary(path)
        return path

    def screened(self, path: Path) -> bool:
        """Whether the file equals the screened copy, byte by byte."""
        known = self.files.get(path.name)
        return known is not None and known.sha256 == sha256(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(paths: Sequence[Path]) -> str:
    """The SHA-256 of one file, or over the sorted names and hashes of several files."""
    if len(paths) == 1:
        return sha256(paths[0])
    lines = sorted(f"{path.name} {sha256(path)}\n" for path in set(paths))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class Line(dict[str, str]):
    """One record of a CSV file by column name, with its position.

    Error messages never quote a prompt.
    """

    def __init__(self, values: Mapping[str, str], path: Path, number: int) -> None:
        super().__init__(values)
        self.path, self.number = path, number

    def wrong(self, column: str, what: str) -> ValueError:
        return ValueError(
            f"{self.path}, line {self.number}, column {column!r}: {what}. Correct the line, or get the file again."
        )

    def text(self, column: str) -> str:
        value = self[column].strip()
        if not value:
            raise self.wrong(column, "expected a text, got an empty one")
        return value

    def whole(self, column: str, top: int = checks.SEEDS) -> int:
        """An integer >= 0 and below `top`. Accepts "7.0", as pandas writes it."""
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
    """Reads all records of a UTF-8 CSV file with a header.

    Args:
        path: the file.
        columns: required columns. Other columns are also read.

    Raises:
        ValueError: the file is not UTF-8, or lacks the header or a column; a quote is open, or a record has too many or
            too few fields.
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
                    f"{path}, line {start}, column {at}: expected {len(header)} fields, got {len(record)}. Put texts "
                    "with commas into quotes."
                )
            if record:
                yield Line(dict(zip(header, record, strict=True)), path, start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not a CSV record ({error}). Correct the line.") from error


_MINOR = re.compile(
    r"\b(child(ren)?(hood)?|kids?|kinder\w*|toddlers?|bab(y|ies)|infants?|newborns?|teen(s|age|aged|ager|agers)?"
    r"|pre-?teens?|tweens?|under-?age[d]?|minors?|juveniles?|adolescen\w*|pupils?|school\w*|\d?girls?|\d?boys?"
    r"|young(er|ster|sters)?|youth(ful)?|little (sister|brother|one)s?|daughters?|sons?|lolis?|lolitas?|shotas?"
    r"|([1-9]|1[0-7])[- ]?(years?|yrs?|y/?o)\b)",
    re.IGNORECASE,
)


def names_minor(text: str) -> bool:
    """Whether a text may name a minor, by the broad keyword rule of `screen`."""
    return _MINOR.search(text) is not None


def screen(lines: Sequence[Line], texts: Sequence[str], sexual: Callable[[Line], bool]) -> tuple[list[Line], int]:
    """Drops lines that may put a minor into a sexual context. The broad keyword rule drops too much rather than too
    little.

    Args:
        lines: the lines of an unscreened file.
        texts: the columns to search.
        sexual: decides whether a line's context is sexual.

    Returns:
        The remaining lines, and the number of dropped lines.
    """
    kept = [line for line in lines if not (sexual(line) and any(_MINOR.search(line[c]) for c in texts))]
    return kept, len(lines) - len(kept)


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def wanted(concepts: Sequence[Concept], known: Mapping[str, Sequence[str]], suite: str) -> tuple[str, ...]:
    """The sets of a suite that measure `concepts`; all sets if there are no concepts.

    Args:
        concepts: the erased concepts.
        known: set name to the names of the concepts that it measures, in lower case.
        suite: the suite's name, for the message.

    Raises:
        ValueError: the suite measures none of the concepts.
    """
    names = {c.name.lower() for c in concepts}
    found = tuple(each for each, measured in known.items() if not names or names & set(measured))
    if not found:
        things = ", ".join(sorted({m for measured in known.values() for m in measured})[:40])
        raise ValueError(
            f"The suite {suite!r} does not measure {', '.join(sorted(names))}. Choose from {things}, or give no "
            "concepts to load all sets."
        )
    return found


def unique(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows, with a number added to repeated ids."""
    counts: dict[str, int] = {}
    out = []
    for row in rows:
        counts[row.id] = count = counts.get(row.id, 0) + 1
        out.append(row if count == 1 else dataclasses.replace(row, id=f"{row.id}.{count}"))
    return tuple(out)
