"""The files of the `emoji` model, and the check of their SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efface import checks
from efface.files import write

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).parent / "weights"
CURE = "Reinstall efface, or train it again with recipes/emoji."
MODEL = ("unet.safetensors", "unet.json", "vae.safetensors", "vae.json")
RECORDED = (*MODEL, "gie.safetensors")  # in model.json; eyes.json and aligned.json have the rest


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 lower-case hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, expected: str, cure: str = CURE) -> Path:
    """Returns `path` if the file has the SHA-256 `expected`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file differs from the published one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {cure}")
    if (found := sha256(path)) != expected:
        raise ValueError(f"{path} is damaged, expected SHA-256 {expected}, got {found}. {cure}")
    return path


def read_object(path: Path, *keys: str, cure: str = CURE) -> dict[str, Any]:
    """Reads the JSON object in a file of the package.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds something else, or lacks one of `keys`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {cure}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object ({error}). {cure}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object (it starts with {str(found)[:20]!r}). {cure}")
    if missing := [key for key in keys if not found.get(key)]:
        raise ValueError(f"{path} is damaged and has no {', '.join(missing)}. {cure}")
    return found


def built(cls: Any, folder: Path, name: str, dtype: torch.dtype, cure: str = CURE) -> Any:
    """The model of `name`.json with the weights of `name`.safetensors.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the two do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"{name}.safetensors"
    model = cls.from_config(read_object(folder / f"{name}.json", cure=cure))
    try:
        # Cast here and assign: diffusers prints a warning at `model.to(dtype)`.
        weights = {key: tensor.to(dtype, copy=True) for key, tensor in load_file(path).items()}
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit {name}.json ({str(error)[:80]}). {cure}") from error
    return model.eval()


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
