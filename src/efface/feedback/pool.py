"""The pictures of a folder, as a pool to judge."""

from __future__ import annotations

import re
from pathlib import Path

from .. import files
from ..pictures import BYTES
from .session import Item

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_ROW = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def pool(folder: str | Path, *, explicit: bool = False) -> list[Item]:
    """The pictures of a folder, or of a run folder, once each.

    A picture is known by the SHA-256 of its file, so files may be renamed, and pictures may be added.

    Args:
        folder: a folder with PNG, JPEG or WebP files, or a run folder that `efface bench` made.
        explicit: whether the page blurs the pictures until the annotator presses a key.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no picture.
        ValueError: a picture is not an ordinary file, or is too large.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from efface.feedback import pool
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 8)).save(folder / "a.png")
        >>> [item.row for item in pool(folder)]
        ['a']
    """
    folder = Path(folder)
    place = files.inside(folder, "images") if files.there(folder / "run.json") else folder
    paths = sorted(path for path in place.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"{folder} is not a folder with pictures ({', '.join(SUFFIXES)}). Name another folder, or draw pictures "
            "with `efface bench`."
        )
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(files.sha256(files.read(path, BYTES)), path)
    whole = files.sha256("".join(sorted(found)).encode())
    details = {"explicit": True} if explicit else {}
    return [
        Item(whole, "", path.stem if _ROW.fullmatch(path.stem) else f"picture-{sha[:16]}", sha, path, details)
        for sha, path in found.items()
    ]
