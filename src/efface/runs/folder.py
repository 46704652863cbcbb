"""The files of a run folder, and how they are repaired after an interruption."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import files

RUN, IMAGES, SAMPLES, SCORES, CARD, LOCK = "run.json", "images", "samples.jsonl", "scores.json", "card.json", ".lock"
LINE = 32 * 1024  # bytes per row in samples.jsonl, on average
DAMAGED = "Delete the line, and run the command that made the run again."


def claim(path: Path) -> Path:
    """Returns a folder that is a run or empty; creates it if needed.

    Raises:
        ValueError: the path is a file, the folder holds other files, or it cannot be created.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected a folder for the run, got the file {path}. Name a folder.")
    if path.is_dir() and not (path / RUN).exists():
        names = sorted(p.name for p in path.iterdir())
        others = [n for n in names if n not in (LOCK, IMAGES) and not n.endswith(".partial")]
        if others:
            raise ValueError(f"{path} holds other files ({', '.join(others[:3])}, ...). Name an empty folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Cannot create the folder {path} ({error.strerror}). Name another one.") from error
    return path


def lines(folder: Path, total: int) -> list[bytes]:
    """The lines of samples.jsonl of a run with `total` rows. The last line may be incomplete."""
    path = files.inside(folder, SAMPLES)
    most = min(files.MIB + total * LINE, 2 * 1024 * files.MIB)
    return files.read(path, most).splitlines(keepends=True) if files.there(path) else []


def kept(folder: Path, total: int, size: int) -> dict[int, tuple[bytes, dict[str, Any]]]:
    """Row number to line and entry, for batches whose lines and pictures are complete.

    Raises:
        ValueError: a complete line does not match the schema, or a picture is a link that leads out of the folder.
    """
    found: dict[int, tuple[bytes, dict[str, Any]]] = {}
    for number, line in enumerate(lines(folder, total), 1):
        if not line.endswith(b"\n") or (entry := _entry(line, folder, number)) is None:
            continue
        picture = files.inside(folder, entry["file"])
        if picture.is_file() and picture.stat().st_size == entry["bytes"]:
            found[entry["k"]] = line, entry
    batches = [range(s, min(s + size, total)) for s in range(0, total, size)]
    return {k: found[k] for batch in batches if all(k in found for k in batch) for k in batch}


def _entry(line: bytes, folder: Path, number: int) -> dict[str, Any] | None:
    """The entry of a line; None if the line is incomplete or overwritten."""
    from .. import schema

    try:
        entry = files.parse(line)
    except ValueError:
        return None
    where = f"{folder / SAMPLES}, line {number}"
    made: dict[str, Any] = schema.check(entry, schema.SampleLine, where, DAMAGED)
    if Path(made["file"]).stem != made["row"]["id"]:
        raise ValueError(f"Expected `file` in {where} to be named by the row, got {made['file']!r}. {DAMAGED}")
    return made


def mend(folder: Path, total: int, size: int) -> set[int]:
    """Removes broken lines and incomplete batches from samples.jsonl, and returns the remaining rows."""
    path, whole = folder / SAMPLES, kept(folder, total, size)
    good = {line for line, _ in whole.values()}
    old = lines(folder, total)
    new = b"".join(line for line in old if line in good)
    if b"".join(old).startswith(new):  # the usual case, which also works on a full disk
        if len(b"".join(old)) > len(new):
            files.cut(path, len(new))
    else:
        files.write(path, new)
    return set(whole)


@contextlib.contextmanager
def disk(folder: Path, done: int | None, total: int) -> Iterator[None]:
    """Adds to a disk error what stays and how to continue."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "The disk is full" if full else f"The disk cannot be written to ({error.strerror or error})"
        left = "Finished work" if done is None else f"{done} of {total} pictures"
        cure = "free some space" if full else "mend that"
        stop = OSError(f"{what}. {left} stayed in {folder}: {cure} and run the same command, which continues.")
        stop.errno = error.errno
        raise stop from error
