"""Reads the user's own prompt files line by line, with bounded memory. Errors name the line and quote no prompt."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efface import checks, files

LONGEST = 65_536  # bytes of a line
COLUMNS = ("prompt", "concept", "kind", "category", "seed", "keep")
FORMS = (".csv", ".jsonl", ".txt")


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file, with the number of its line."""

    line: int
    prompt: str
    concept: str = ""
    kind: str = ""
    category: str = ""
    seed: int | None = None
    keep: tuple[str, ...] = ()


def prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of a file, one after the other.

    - `.csv`: a header with `prompt`, and perhaps `concept`, `kind`, `category`, `seed` and `keep` (parts after `;`).
    - `.jsonl`: an object per line with these entries; `keep` is a list.
    - `.txt`: a prompt per line.

    Blank lines do not count.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the suffix is another one, or a line is too long, not UTF-8, holds zero bytes or carriage returns,
            or is not of that form.
    """
    if path.suffix.lower() not in FORMS:
        raise ValueError(checks.refusal(f"prompts in a file that ends in {', '.join(FORMS)}", path.name, "Convert it."))
    if not files.there(path):
        raise FileNotFoundError(f"{path} does not exist. Name the file with the prompts.")
    files.check_ordinary(path, 2**50)
    if path.suffix.lower() == ".csv":
        yield from _csv(path)
        return
    for number, text in _lines(path):
        if text.strip() and path.suffix.lower() == ".txt":
            yield checked(_at(path, number), number, {"prompt": text})
        elif text.strip():
            yield _entry(path, number, files.json_of(text, _at(path, number), "Write one object per line."))


def _at(path: Path, number: int) -> str:
    return f"{path}, line {number}"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers. A byte order mark is dropped."""
    with path.open("rb") as file:
        for number in range(1, 2**62):
            raw = file.readline(LONGEST + 1)
            if not raw:
                return
            if len(raw) > LONGEST:
                raise ValueError(f"{_at(path, number)}: the line has over {LONGEST} bytes. Shorten the prompt.")
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{_at(path, number)}: the line is not UTF-8. Save the file as UTF-8.") from error
            if "\0" in text:  # UTF-16 without a byte order mark is valid UTF-8
                raise ValueError(f"{_at(path, number)}: the line holds zero bytes. Save the file as UTF-8.")
            if "\r" in text.rstrip("\r\n"):  # one line for all prompts of a file of an old Mac
                raise ValueError(f"{_at(path, number)}: the line holds a carriage return. End lines with a line feed.")
            yield number, text


def _csv(path: Path) -> Iterator[Prompt]:
    texts = (text for _, text in _lines(path))
    reader, start = csv.reader(texts, strict=True), 1
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if "prompt" not in header or len(set(header)) < len(header):
            raise ValueError(
                f"Expected a header with the column `prompt` once in line 1 of {path}, got another line. Write a "
                f"header of {', '.join(COLUMNS)}, with commas between them."
            )
        start = reader.line_num + 1
        for record in reader:
            if record and any(record):
                if len(record) != len(header):
                    raise ValueError(
                        f"{_at(path, start)}: expected {len(header)} fields, got {len(record)}. Put texts with commas "
                        "into quotes."
                    )
                values: dict[str, Any] = dict(zip(header, record, strict=True))
                values["keep"] = [each.strip() for each in values.get("keep", "").split(";") if each.strip()]
                yield checked(_at(path, start), start, values)
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{_at(path, start)}: not a CSV record ({error}). Correct the line.") from error


def _entry(path: Path, number: int, value: Any) -> Prompt:
    if not isinstance(value, Mapping):
        raise ValueError(f"{_at(path, number)}: expected an object with `prompt`, got another value. Write an object.")
    return checked(_at(path, number), number, value)


def checked(where: str, number: int, values: Mapping[str, Any]) -> Prompt:
    """The prompt of a line. Raises ValueError, with the line's place, if an entry is of another type or empty."""
    texts = {name: values.get(name) or "" for name in ("prompt", "concept", "kind", "category")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}, `{name}`: expected a text, got a {type(value).__name__}. Correct the line.")
    if not texts["prompt"].strip():
        raise ValueError(f"{where}, `prompt`: expected a text, got an empty one. Correct the line.")
    keep = values.get("keep") or []
    if not isinstance(keep, list) or not all(isinstance(each, str) for each in keep):
        raise ValueError(f"{where}, `keep`: expected a list of texts, got another value. Correct the line.")
    clean = {name: value.strip() for name, value in texts.items()}
    return Prompt(number, **clean, seed=_seed(where, values.get("seed")), keep=tuple(keep))


def _seed(where: str, value: Any) -> int | None:
    if value is None or value == "":
        return None
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 10:
        text = int(text)
    if isinstance(text, bool) or not isinstance(text, int) or not 0 <= text < checks.SEEDS:
        raise ValueError(
            f"{where}, `seed`: expected a whole number from 0 to below 2**32, got {checks.shown(value)}. Correct the "
            "line."
        )
    return text


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(rows: Iterator[Prompt]) -> str:
    """One hash over prompts that are in no file."""
    found = hashlib.sha256()
    for each in rows:
        found.update(f"{json.dumps(dataclasses.astuple(each))}\n".encode())
    return found.hexdigest()
