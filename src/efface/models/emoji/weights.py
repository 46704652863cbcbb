"""Where the weights of the `emoji` model lie, and the check that they are whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
CURE = "Reinstall efface, or train it again with recipes/emoji."


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 lower-case hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, expected: str) -> Path:
    """Returns `path` if the file has the SHA-256 `expected`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file differs from the one that was published.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {CURE}")
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{path} is damaged: its sha256 is {found}, expected {expected}. {CURE}")
    return path
