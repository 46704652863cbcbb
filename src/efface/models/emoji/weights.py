"""The files of the `emoji` model, and the check of their SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from efface import checks
from efface.files import write

FOLDER = Path(__file__).parent / "weights"
CURE = "Reinstall efface, or train it again with recipes/emoji."
MODEL = ("unet.safetensors", "unet.json", "vae.safetensors", "vae.json")
RECORDED = (*MODEL, "gie.safetensors")  # in model.json; eyes.json and aligned.json have the rest


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 lower-case hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, expected: str) -> Path:
    """Returns `path` if the file has the SHA-256 `expected`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file differs from the published one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {CURE}")
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{path} is damaged, expected SHA-256 {expected}, got {found}. {CURE}")
    return path


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Reads the JSON object in a file of the package.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds something else, or lacks one of `keys`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {CURE}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object ({error}). {CURE}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object (it starts with {str(found)[:20]!r}). {CURE}")
    if missing := [key for key in keys if not found.get(key)]:
        raise ValueError(f"{path} is damaged and has no {', '.join(missing)}. {CURE}")
    return found


def recorded(folder: Path) -> dict[str, str]:
    """File name to SHA-256, from model.json.

    Raises:
        FileNotFoundError, ValueError: model.json is missing, damaged, of another version, or lacks a file of the model.
    """
    path = folder / "model.json"
    record = read_object(path)
    if record.get("version") != 1:
        raise ValueError(f"Expected version 1 in {path}, got {checks.shown(record.get('version'))}. {CURE}")
    files = record.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{path} lists no files with their sha256. {CURE}")
    if missing := [name for name in MODEL if name not in files]:
        raise ValueError(f"{path} has no sha256 of {', '.join(missing)}. {CURE}")
    return files


def record(folder: Path) -> None:
    """Writes the SHA-256 of the files in `folder` into its model.json."""
    path = folder / "model.json"
    files = {name: sha256(folder / name) for name in RECORDED if (folder / name).is_file()}
    write(path, json.dumps(read_object(path) | {"files": files}, indent=2) + "\n")
