"""Exports a delta's weights as a LoRA for other tools, and measures the error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import __version__, checks, files
from .factors import Change, Factors, dense, truncate

Layout = Literal["diffusers", "kohya"]


def export(
    path: str | Path,
    weights: Mapping[str, Change],
    strength: float,
    layout: Layout = "diffusers",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    method: str = "",
) -> float:
    """Writes the file, and returns its relative error. See `Delta.export` for the arguments.

    Raises:
        ValueError: `layout` is unknown, `rank` is below 1, or a LoRA cannot hold the changes.
        OSError: the file cannot be written. An older file stays.
    """
    if layout not in get_args(Layout):
        raise ValueError(
            f"Expected `layout` to be 'diffusers' or 'kohya', got {checks.shown(layout)}. Give one of the two."
        )
    wrong = [n for n, c in weights.items() if not (n.startswith("unet.") and len(c.shape) in (2, 4))]
    if wrong:
        raise ValueError(
            f"Expected changes of matrices and convolutions of the UNet, got {len(wrong)} others of {len(weights)}, "
            f"such as {wrong[0]!r}. Fit without `biases`, or merge the delta and save the complete model."
        )
    if layout == "kohya" and (unread := next((n for n in weights if ".add_embedding." in n), None)):
        raise ValueError(
            f"Diffusers reads no change of {unread!r} from a file with kohya's names. Export with `layout` 'diffusers'."
        )
    dtype = dtype or (torch.float32 if layout == "diffusers" else torch.float16)
    factors = {name.removesuffix(".weight"): truncate(change, rank)[0] for name, change in weights.items()}
    ranks = {module.removeprefix("unet."): each.rank for module, each in factors.items()}
    alpha = float(torch.tensor(max(ranks.values()), dtype=dtype))  # as stored in the file
    tensors: dict[str, Tensor] = {}
    lost = whole = 0.0
    for (module, change), given in zip(factors.items(), weights.values(), strict=True):
        scale = 1.0 if layout == "diffusers" else alpha / change.rank
        b, a = (t.to(dtype) for t in _balanced(change, strength / scale))
        tensors |= _named(module, b, a, layout, alpha)
        exact = strength * dense(given).double()
        lost += float((Factors(b.double() * scale, a.double()).dense() - exact).norm()) ** 2
        whole += float(exact.norm()) ** 2
    header = {"format": "pt", "software": f"efface {__version__}", "method": method}
    if layout == "diffusers":
        header["lora_adapter_metadata"] = json.dumps(_peft(ranks), sort_keys=True)
    files.write_tensors(Path(path), tensors, header)
    return (lost / whole) ** 0.5 if whole else 0.0


def _named(module: str, b: Tensor, a: Tensor, layout: Layout, alpha: float) -> dict[str, Tensor]:
    """The factors of one module under the layout's names.

    kohya: every module has the same `alpha`, because diffusers reads one for all. Tools scale by alpha / rank.
    """
    up = b if a.ndim == 2 else b[:, :, None, None]
    if layout == "diffusers":
        return {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": a}
    key = f"lora_{module.replace('.', '_')}"
    factors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": a}
    return {f"{key}.alpha": torch.tensor(alpha, dtype=b.dtype), **factors}


def _peft(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of PEFT's `LoraConfig`, as diffusers stores them. Every module has its rank as alpha."""
    r = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != r}
    config = {"r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": others, "target_modules": sorted(ranks)}
    return {f"unet.{name}": value for name, value in config.items()}


def _balanced(change: Factors, strength: float) -> tuple[Tensor, Tensor]:
    """B and A with columns and rows of similar size, so that they fit into half precision."""
    b, a = change.B.double() * strength, change.A.double()
    left, right = b.norm(dim=0), a.flatten(1).norm(dim=1)
    by = torch.where((left > 0) & (right > 0), (right / left.clamp_min(1e-300)).sqrt(), torch.ones_like(left))
    return b * by, (a.flatten(1) / by[:, None]).reshape(a.shape)
