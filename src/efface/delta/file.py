"""The file of a delta: safetensors, with everything but the tensors as JSON in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core import Concept
from .base import lacks
from .factors import Change, Factors

HEADER, FORMAT = "efface", 1
T = TypeVar("T")


def save(path: str | Path, weights: Mapping[str, Change], header: Mapping[str, Any]) -> None:
    """Writes the changes, with a header of JSON types.

    Raises:
        OSError: the file cannot be written. An older one stays.
    """
    tensors: dict[str, Tensor] = {}
    for name, change in weights.items():
        if isinstance(change, Factors):
            tensors[f"{name}:B"], tensors[f"{name}:A"] = change.B, change.A
        else:
            tensors[name] = change
    write(tensors, Path(path), {HEADER: json.dumps({**header, "format": FORMAT})})


def load(path: str | Path, make: Callable[..., T]) -> T:
    """Reads what `save` has written and hands it to `make`: the changes, and the header as keywords.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short, damaged, of a newer version or not a delta, or does not say which model it belongs
            to.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no delta {path}: make one with `efface fit`.")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged, cut short, or no safetensors file ({error}): make it anew.") from error
    if not isinstance(header, dict):
        raise ValueError(
            f"{path} is a safetensors file, but not a delta of Efface: its header has no {HEADER!r} entry. Load a LoRA "
            "with pipe.load_lora_weights."
        )
    if (found := header.pop("format", None)) != FORMAT:
        raise ValueError(f"{path} has format {found}, but this version reads {FORMAT}: update Efface.")
    try:
        header["concepts"] = tuple(Concept(**c) for c in header["concepts"])
        names = dict.fromkeys(key.removesuffix(":B").removesuffix(":A") for key in tensors)
        weights = {n: tensors[n] if n in tensors else Factors(tensors[f"{n}:B"], tensors[f"{n}:A"]) for n in names}
        made = make(weights, **header)
        what = lacks(header.get("base", {}), weights)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole delta ({error}): make it anew.") from error
    if what:
        raise ValueError(
            f"{path} does not say which model it belongs to: its header has no hash of {what}, and it would change any "
            "model. Make it anew with `efface fit`."
        )
    return made


def write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file whole or not at all.

    Raises:
        OSError: the file cannot be written. An older one stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"Cannot write {path} ({error}). What was there before is still there.") from error
    finally:
        partial.unlink(missing_ok=True)
