"""Run folders at an address that fsspec knows, such as s3://bucket/runs/a: a copy on this machine, kept the same.

Everything works on the copy. What the address has is fetched when the run is opened. What is made here is sent after
each batch, pictures before the lines that name them. Two machines that write to one address at a time are not noticed.
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
"""The file, next to the copies of one parent folder, that names its address."""


def copies() -> Path:
    """Where copies are: `EFFACE_CACHE`, or efface in the cache folder of this user."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EFFACE_CACHE") or Path(cache) / "efface") / "runs"


def local(path: str | Path) -> Path:
    """The folder of a run on this machine; for an address its copy, with all that is there.

    Runs that are siblings at an address are siblings here, since a run names its base run by a relative path.

    Raises:
        ImportError: fsspec, or what it needs for the address, is not installed.
        ValueError: fsspec does not know the kind of address.
        OSError: what the address names cannot be reached.
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
    """The file system and the folder of which this is a copy; None for any other folder."""
    origin = copy.parent / ORIGIN
    if copy.parent.parent != copies() or not files.there(origin):
        return None
    from fsspec.core import url_to_fs

    system, path = url_to_fs(f"{files.read_text(origin)}/{copy.name}")
    return system, str(path)


def _fetch(copy: Path) -> None:
    """Brings what is new at the address, and nothing from outside of its folder."""
    system, path = _there(copy) or (None, "")
    if system is None:
        return
    for name, facts in system.find(path, detail=True).items():
        own = files.inside(copy, name.removeprefix(path).lstrip("/"))
        if not own.is_file() or own.stat().st_size != facts["size"]:
            own.parent.mkdir(parents=True, exist_ok=True)
            with files.whole(own) as partial:
                system.get_file(name, str(partial))


def send(folder: Path, names: Iterable[str] | None = None) -> None:
    """Sends files of a copy to where it comes from; does nothing for any other folder.

    Args:
        folder: of the run.
        names: of the files, in the order in which they are sent; None: all that are not there with the same size.
    """
    if (there := _there(folder)) is None:
        return
    system, path = there
    if names is None:
        known = {name.removeprefix(path).lstrip("/"): facts for name, facts in system.find(path, detail=True).items()}
        ours = [file for file in sorted(folder.rglob("*"), key=str) if file.is_file() and file.name[0] != "."]
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in ours}
        names = [name for name, size in sizes.items() if name not in known or known[name]["size"] != size]
    for name in names:
        target = f"{path}/{name}"
        system.makedirs(target.rpartition("/")[0], exist_ok=True)
        system.put_file(str(folder / name), target)
