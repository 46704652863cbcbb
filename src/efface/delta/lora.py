"""A delta's weights as a LoRA for other tools, and how far the file is from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import __version__, files
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
    """Writes the file and returns its relative error; for the arguments see `Delta.export`.

    Raises:
        ValueError: an unknown layout, a rank below 1, or changes that a LoRA cannot hold.
        OSError: the file cannot be written. An older one stays.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"Expected `layout` to be 'diffusers' or 'kohya', but got {layout!r}.")
    wrong = [n for n, c in weights.items() if not (n.startswith("unet.") and len(c.shape) in (2, 4))]
    if wrong:
        raise ValueError(
            f"A LoRA cannot hold {len(wrong)} of the {len(weights)} changes, such as {wrong[0]!r}: it has matrices and "
            "convolutions of the UNet only. Merge the delta and save the whole model."
        )
    dtype = dtype or (torch.float32 if layout == "diffusers" else torch.float16)
    tensors: dict[str, Tensor] = {}
    lost = whole = 0.0
    for name, change in weights.items():
        b, a = (t.to(dtype) for t in _balanced(truncate(change, rank)[0], strength))
        tensors |= _named(name.removesuffix(".weight"), b, a, layout)
        exact = strength * dense(change).double()
        lost += float((Factors(b.double(), a.double()).dense() - exact).norm()) ** 2
        whole += float(exact.norm()) ** 2
    files.write_tensors(Path(path), tensors, {"format": "pt", "software": f"efface {__version__}", "method": method})
    return (lost / whole) ** 0.5 if whole else 0.0


def _named(module: str, b: Tensor, a: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The factors of one module under the layout's names."""
    up = b if a.ndim == 2 else b[:, :, None, None]
    if layout == "diffusers":
        return {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": a}
    key = f"lora_{module.replace('.', '_')}"
    alpha = torch.tensor(float(b.shape[1]), dtype=b.dtype)
    return {f"{key}.alpha": alpha, f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": a}


def _balanced(change: Factors, strength: float) -> tuple[Tensor, Tensor]:
    """B and A with columns and rows of like size, so that they fit into half precision."""
    b, a = change.B.double() * strength, change.A.double()
    left, right = b.norm(dim=0), a.flatten(1).norm(dim=1)
    by = torch.where((left > 0) & (right > 0), (right / left.clamp_min(1e-300)).sqrt(), torch.ones_like(left))
    return b * by, (a.flatten(1) / by[:, None]).reshape(a.shape)
