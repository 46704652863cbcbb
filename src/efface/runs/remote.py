"""Run folders at an address that fsspec knows, such as s3://bucket/runs/a, with a local copy.

All work uses the copy. Efface fetches the files from the address when it opens the run. It sends new files after each
batch, pictures before their lines in samples.jsonl. It does not notice two machines that write to one address at the
same time.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import files

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)")
ORIGIN = ".address"
"""The name of the file with the address, next to the copies of one parent folder."""


def copies() -> Path:
    """The folder of the copies: `EFFACE_CACHE`, or efface in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EFFACE_CACHE") or Path(cache) / "efface") / "runs"


def local(path: str | Path) -> Path:
    """The local folder of a run. For an address, this is its copy, after a fetch.

    Runs that are siblings at an address have sibling copies, because a run names its base run by a relative path.

    Raises:
        ImportError: fsspec, or a package that it needs for the address, is not installed.
        ValueError: fsspec does not know this kind of address.
        OSError: the address cannot be reached.
    """
    found = ADDRESS.fullmatch(str(path))
    if found is None:
        return Path(path)
    parent, _, name = f"{found[1]}://{found[2].rstrip('/')}".rpartition("/")
    home = copies() / hashlib.sha256(parent.encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    files.write(home / ORIGIN, parent)
    _fetch(home / name)
    return home / name


def _there(copy: Path) -> tuple[Any, str] | None:
    """The remote file system and folder of a copy; None for other folders."""
    origin = copy.parent / ORIGIN
    if copy.parent.parent != copies() or not files.there(origin):
        return None
    from fsspec.core import url_to_fs

    system, path = url_to_fs(f"{files.read_text(origin)}/{copy.name}")
    return system, str(path)


def _fetch(copy: Path) -> None:
    """Fetches the new files at the address, and nothing from outside of its folder."""
    system, path = _there(copy) or (None, "")
    if system is None:
        return
    for name, facts in system.find(path, detail=True).items():
        own = files.inside(copy, name.removeprefix(path).lstrip("/"))
        if not own.is_file() or own.stat().st_size != facts["size"]:
            own.parent.mkdir(parents=True, exist_ok=True)
            with files.whole(own) as partial:
                system.get_file(name, str(partial))


def send(folder: Path, names: Iterable[str]) -> None:
    """Sends files of a copy to its address, in this order. Does nothing for other folders."""
    if (there := _there(folder)) is None:
        return
    system, path = there
    for name in names:
        target = f"{path}/{name}"
        system.makedirs(target.rpartition("/")[0], exist_ok=True)
        system.put_file(str(folder / name), target)
