"""Judgements as JSON lines: one line per judgement, which says all that is known about it."""

from __future__ import annotations

import json
from pathlib import Path

from .. import files
from .judgement import Judgement
from .store import Store

CURE = "Correct the line, or export the file again. Nothing was imported."


def export(store: Store, out: str | Path) -> int:
    """Writes all judgements of a store into a JSON-lines file.

    Returns:
        Their number.

    Raises:
        OSError: the file cannot be written. An earlier file stays.
    """
    lines = [json.dumps(each.record(), allow_nan=False) + "\n" for each in store.judgements()]
    files.write(Path(out), "".join(lines))
    return len(lines)


def load(store: Store, path: str | Path) -> int:
    """Imports judgements from a JSON-lines file, all or none. Lines that the store already holds change nothing.

    Returns:
        The number of judgements that are new.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is damaged, or has another outcome than the store or an earlier line. The message has its
            number.
    """
    from .. import schema
    from .forms import JudgementLine

    path, found, places = Path(path), [], []
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = schema.check(files.json_of(line, where, CURE), JudgementLine, where, CURE)
        try:
            found.append(Judgement.of(entry))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} is damaged. {error} Nothing was imported.") from error
        places.append(where)
    return store.add(found, where=places)
