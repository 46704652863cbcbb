"""The folder of an audit: whose it is, and what an unfinished audit must not leave there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from .result import AUDIT, JUNIT, LOCK, PAGE, RESTORE, SETTING, STATEMENT


def claim(folder: Path) -> Path:
    """Returns a folder that is an audit's or empty; creates it if needed."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder for the audit, got the file {folder}. Name a folder.")
    if folder.is_dir() and not (folder / SETTING).exists():
        others = sorted(p.name for p in folder.iterdir() if p.name != LOCK and not p.name.endswith(".partial"))
        if others:
            raise ValueError(f"{folder} holds other files ({', '.join(others[:3])}). Name an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def agree(folder: Path, models: Mapping[str, Any]) -> None:
    """Writes the models of the audit, or checks that the folder's are the same. Withdraws an earlier verdict, which
    must not stay if this call ends early."""
    from .. import schema

    path = files.inside(folder, SETTING)
    setting = files.as_json({"format": 1, **models})
    if files.there(path):
        earlier = schema.read(path, schema.Versioned, RESTORE)
        files.check_same(earlier, setting, f"{folder} holds the audit of another model", "Name another folder.")
    else:
        files.write_json(path, setting)
    for name in (STATEMENT, JUNIT, PAGE, AUDIT):
        files.inside(folder, name).unlink(missing_ok=True)
