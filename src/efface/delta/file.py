"""The file of a delta: safetensors, with everything except the tensors as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from .. import checks, files
from ..core import Concept
from .base import lacks
from .factors import Change, Factors
from .gates import modules_of
from .table import unidentified

HEADER, FORMAT = "efface", 1
# the kinds of deltas
WEIGHTS: str = "weights"
DIRECTIONS: str = "directions"
TOKENS: str = "tokens"
STEERING: str = "steering"
DTYPES = ("float64", "float32", "float16", "bfloat16")
LACKS: dict[str, Callable[..., str]] = {
    WEIGHTS: lacks,
    DIRECTIONS: unidentified,
    TOKENS: lambda base, tensors: lacks(base, {name: each for name, each in tensors.items() if "." not in name}),
    STEERING: lambda base, tensors: unidentified(base, modules_of(tensors)),
}
"""By kind: names what the base has no hash of, or returns ""."""
ANEW = "Make it again with `efface fit`."
T = TypeVar("T")


def save(path: str | Path, weights: Mapping[str, Change], header: Mapping[str, Any]) -> None:
    """Writes the changes, with a header of JSON types.

    Raises:
        OSError: the file cannot be written. An older file stays.
    """
    tensors: dict[str, Tensor] = {}
    for name, change in weights.items():
        if isinstance(change, Factors):
            tensors[f"{name}:B"], tensors[f"{name}:A"] = change.B, change.A
        else:
            tensors[name] = change
    files.write_tensors(Path(path), tensors, {HEADER: json.dumps({**header, "format": FORMAT})})


def load(path: str | Path, makers: Mapping[str, Callable[..., T]]) -> T:
    """Reads a file that `save` wrote, and calls the maker of its kind with the changes, and the header as keywords.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is incomplete, damaged, of a newer version or not a delta, or does not identify its base
            model.
    """
    from .. import schema
    from .forms import SteeringHeader, TokensHeader

    path = Path(path)
    if not files.there(path):
        raise FileNotFoundError(f"There is no delta {path}. Make one with `efface fit`.")
    metadata, tensors = files.read_tensors(path, ANEW)
    text = metadata.get(HEADER, "")
    if not text.startswith("{"):  # such as a GIE adapter or a LoRA
        raise ValueError(
            f"{path} is a safetensors file, but not a delta of Efface. Give a file from `efface fit`; load a LoRA "
            "with pipe.load_lora_weights, and an adapter with GIE(adapter=...)."
        )
    header = files.json_of(text, f"the header of {path}", ANEW, nan=True)
    if header.get("format") != FORMAT:
        found = checks.shown(header.get("format"))
        raise ValueError(f"Expected format {FORMAT} in {path}, got {found}. Update Efface.")
    kind = header.get("kind", WEIGHTS)
    known: dict[Any, tuple[str, type[schema.DeltaHeader]]] = {
        DIRECTIONS: ("Directions", schema.DirectionsHeader),
        TOKENS: ("Tokens", TokensHeader),
        STEERING: ("Steering", SteeringHeader),
    }
    cls, form = known.get(str(kind), ("Delta", schema.DeltaHeader))
    schema.check(header, form, path, ANEW)
    if kind not in makers:
        raise ValueError(f"{path} holds {kind}, not {' or '.join(makers)}. Load it with `efface.{cls}.load`.")
    header = {name: value for name, value in header.items() if name not in ("format", "kind")}
    if strange := [name for name, t in tensors.items() if str(t.dtype).removeprefix("torch.") not in DTYPES]:
        raise ValueError(
            f"Expected {', '.join(DTYPES)} in {path}, got {tensors[strange[0]].dtype} in {strange[0]!r}. {ANEW}"
        )
    try:
        header["concepts"] = tuple(Concept(**c) for c in header["concepts"])
        names = dict.fromkeys(key.removesuffix(":B").removesuffix(":A") for key in tensors)
        weights = {n: tensors[n] if n in tensors else Factors(tensors[f"{n}:B"], tensors[f"{n}:A"]) for n in names}
        made: Any = makers[kind](weights, **header)
        what = LACKS[kind](made.base, weights)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete delta ({error}). {ANEW}") from error
    if what:
        raise ValueError(
            f"{path} does not identify its base model, because its header has no hash of {what}. Make it again with "
            "`efface fit`."
        )
    return cast("T", made)
