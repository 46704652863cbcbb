"""Identifies the base model of a delta by fingerprints of the model's own values of the changed tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .. import __version__
from .._weights import denoiser_of, part, weight
from ..core import config
from ..families import family
from .applied import entries, unedited
from .factors import Change

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PRECISIONS = ("float64", "float32", "float16", "bfloat16")
Base: TypeAlias = Mapping[str, Mapping[str, str]]
"""Precision to parameter name to SHA-256 of the value at that precision."""


def model_name(pipe: DiffusionPipeline) -> str:
    """The model's name: a hub id, the name of its folder without the path, or its family."""
    name = pipe.name_or_path
    return (Path(name).name if name and Path(name).exists() else name) or family(pipe).name


def origin(
    editor: Any, pipe: DiffusionPipeline, own: Mapping[str, Tensor], *, seed: int, info: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The facts of an artefact's origin, as the keywords of its class.

    Args:
        editor: a dataclass; None for what was made by hand.
        pipe: the pipeline of the fit.
        own: the model's own values that identify it.
        seed, info: the seed of the fit, and further facts.
    """
    settings = {"method": ""} if editor is None else config(editor)
    deltas: list[Any] = [entry.delta for entry in entries(pipe)]
    return {
        "method": settings.pop("method"),
        "fields": settings,
        "seed": seed,
        "model": model_name(pipe),
        "base": base_of(own),
        "after": {each.hash: each.strength for each in deltas if hasattr(each, "hash") and each.strength},
        "versions": {"efface": __version__} | {p: version(p) for p in ("torch", "diffusers", "transformers")},
        "info": dict(info or {}),
    }


def kind(pipe: DiffusionPipeline) -> dict[str, str]:
    """The class of a transformer, which the names in files of other tools depend on. Nothing for a UNet."""
    found = type(denoiser_of(pipe)).__name__
    return {} if found.startswith("UNet") else {"denoiser": found}


def own_values(pipe: DiffusionPipeline, weights: Mapping[str, Change]) -> dict[str, Tensor]:
    """The model's own values, without deltas, of the tensors in `weights`.

    Raises:
        ValueError: the pipeline lacks a tensor, or the tensor cannot be edited or has another shape.
    """
    overlaid, own = unedited(pipe), {}
    for name, change in weights.items():
        prefix, _, path = name.partition(".")
        own[name] = overlaid.get(name, weight(part(pipe, prefix), path))
        if own[name].shape != change.shape:
            raise ValueError(
                f"Expected a change of {name!r} with shape {list(own[name].shape)}, got {list(change.shape)}. Fit the "
                "delta again for this architecture."
            )
    return own


def base_of(values: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Fingerprints of these values at their precision and all narrower ones."""
    known = PRECISIONS[min(map(_place, values.values())) :]
    return {precision: _fingerprints(values, precision) for precision in known}


def combined(fingerprints: Mapping[str, str]) -> str:
    """One hash over the fingerprints."""
    return hashlib.sha256("".join(f"{n} {h}\n" for n, h in sorted(fingerprints.items())).encode()).hexdigest()


def base_hash(base: Base) -> str:
    """One hash over the values at the precision of the fit; "" if the model is unknown."""
    return combined(next(iter(base.values()))) if base else ""


def lacks(base: Base, weights: Mapping[str, Change]) -> str:
    """Names a changed weight without a hash in the base; "" if all have one."""
    missing = [name for hashes in base.values() for name in weights.keys() - hashes.keys()]
    return f"the value of {min(missing)!r} in it" if missing else "" if base else "its weights"


def check_base(pipe: DiffusionPipeline, weights: Mapping[str, Change], base: Base, model: str) -> None:
    """Raises unless `base` describes the pipeline's model.

    Raises:
        ValueError: `base` does not describe all weights, or shapes or values differ. The message names both models.
    """
    if what := lacks(base, weights):
        raise ValueError(
            f"The delta does not identify its base model, because its `base` has no hash of {what}. Make it with an "
            "editor's `fit`, or with `Delta.fitted`."
        )
    try:
        own = own_values(pipe, weights)
    except ValueError as error:
        raise ValueError(
            f"The delta was fitted on {model!r} (base hash {base_hash(base)[:16]}) and does not match this pipeline, "
            f"{model_name(pipe)!r}. {error}"
        ) from error
    check_values(pipe, own, base, model)


def check_values(pipe: DiffusionPipeline, own: Mapping[str, Tensor], base: Base, model: str) -> None:
    """Raises ValueError unless the pipeline's own values have the fingerprints of `base`."""
    narrow = PRECISIONS[max(map(_place, own.values()))]
    precision = narrow if narrow in base else next(iter(base))
    want, got = base[precision], _fingerprints(own, precision)
    differ = [name for name in got if want.get(name) != got[name]]
    if differ:
        raise ValueError(
            f"The delta was fitted on {model!r} (base hash {combined(want)[:16]}), but this pipeline is "
            f"{model_name(pipe)!r} ({combined(got)[:16]}); {len(differ)} of {len(want)} weights differ, first "
            f"{differ[0]!r}. Load the delta's base model, or fit it again."
        )


def check_after(pipe: DiffusionPipeline, after: Mapping[str, float]) -> None:
    """Raises ValueError unless the deltas that were applied during a fit, hash to strength, are applied."""
    deltas: list[Any] = [entry.delta for entry in entries(pipe)]
    on = {delta.hash: delta.strength for delta in deltas if hasattr(delta, "hash")}
    for earlier, strength in after.items():
        if on.get(earlier) != strength:
            state = f"on at {on[earlier]:g}" if earlier in on else "not on"
            raise ValueError(
                f"The delta was fitted on top of the delta {earlier[:16]} at strength {strength:g}, which is "
                f"{state}. Apply that one first, as in efface.stack(pipe, earlier, this)."
            )


def common_base(a: Base, b: Base) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The base of a sum, at the precisions of both; and the names of differing weights."""
    both = [precision for precision in a if precision in b]
    differ = [name for p in both for name, value in b[p].items() if a[p].get(name, value) != value]
    return {precision: {**a[precision], **b[precision]} for precision in both}, differ


def _fingerprints(values: Mapping[str, Tensor], precision: str) -> dict[str, str]:
    """SHA-256 of the shape and bytes of each tensor, rounded to a precision."""
    found = {}
    for name, value in values.items():
        rounded = value.detach().to("cpu", getattr(torch, precision)).contiguous()
        digest = hashlib.sha256(str(list(value.shape)).encode())
        digest.update(rounded.flatten().view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def _place(value: Tensor) -> int:
    """The index of the tensor's precision in `PRECISIONS`."""
    return PRECISIONS.index(str(value.dtype).removeprefix("torch."))


def strengths(config: Mapping[str, Any]) -> dict[str, float]:
    """The hashes of a delta and of its summands, with their strengths, from a record."""
    found = {config["hash"]: config["strength"]}
    for each in config["info"].get("sum of", ()):
        found |= {name: config["strength"] * strength for name, strength in strengths(each).items()}
    return found
