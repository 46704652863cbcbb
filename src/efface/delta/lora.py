"""Exports a delta's weights as a LoRA for other tools, and measures the error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import __version__, checks, files
from ..families import original_place
from .factors import Change, Factors, dense, truncate

Layout = Literal["diffusers", "kohya"]
PARTS = ("unet.", "transformer.")
Tensors = tuple[Tensor, Tensor]  # B [out, r] and A [r, in] or [r, in, h, w]


def export(
    path: str | Path,
    weights: Mapping[str, Change],
    strength: float,
    layout: Layout = "diffusers",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    method: str = "",
    denoiser: str = "",
) -> float:
    """Writes the file, and returns its relative error. See `Delta.export` for the arguments.

    `denoiser` is the class of a transformer, which the names of layout "kohya" depend on.

    Raises:
        ValueError: `layout` is unknown, `rank` is below 1, or a LoRA cannot hold the changes.
        OSError: the file cannot be written. An older file stays.
    """
    checks.choice("layout", layout, get_args(Layout))
    part = next(iter(weights)).partition(".")[0]
    wrong = [n for n, c in weights.items() if not (n.startswith(PARTS) and len(c.shape) in (2, 4))]
    if wrong:
        raise ValueError(
            f"Expected changes of matrices and convolutions of the denoiser, got {len(wrong)} others of "
            f"{len(weights)}, such as {wrong[0]!r}. Fit without `biases`, or merge the delta and save the complete "
            "model."
        )
    dtype = dtype or (torch.float32 if layout == "diffusers" else torch.float16)
    modules = {name.removesuffix(".weight"): change for name, change in weights.items()}
    places = {m: _kohya(m, c, denoiser) if layout == "kohya" else _Place(m) for m, c in modules.items()}
    factors = {module: truncate(change, rank)[0] for module, change in modules.items()}
    ranks = Counter[str]()
    for module, place in places.items():
        ranks[place.name] += factors[module].rank
    alpha = float(torch.tensor(max(ranks.values()), dtype=dtype))  # as stored in the file
    held: dict[str, list[tuple[_Place, Tensors]]] = {}
    lost = whole = 0.0
    for module, place in places.items():
        scale = 1.0 if layout == "diffusers" else alpha / ranks[place.name]
        b, a = (t.to(dtype) for t in _balanced(factors[module], strength / scale))
        exact = strength * dense(modules[module]).double()
        lost += float((Factors(b.double() * scale, a.double()).dense() - exact).norm()) ** 2
        whole += float(exact.norm()) ** 2
        held.setdefault(place.name, []).append((place, (b, a)))
    tensors: dict[str, Tensor] = {}
    for name, parts in held.items():
        tensors |= _named(name, *_joined(parts), layout, alpha)
    header = {"format": "pt", "software": f"efface {__version__}", "method": method}
    if layout == "diffusers":
        found = {module.removeprefix(f"{part}."): ranks[module] for module in modules}
        header["lora_adapter_metadata"] = json.dumps(_peft(part, found), sort_keys=True)
    files.write_tensors(Path(path), tensors, header)
    return (lost / whole) ** 0.5 if whole else 0.0


# ---------------------------------------------------------------- names


class _Place(NamedTuple):
    """Where a file holds the change of a module.

    Args:
        name: the module in the file.
        part: the number of this change among those that the module holds.
        rows: the rows of each of these; () for one change.
        turned: whether the halves of the rows are exchanged there.
    """

    name: str
    part: int = 0
    rows: tuple[int, ...] = ()
    turned: bool = False


def _kohya(module: str, change: Change, denoiser: str) -> _Place:
    """kohya's names: of a UNet those of diffusers, of a transformer those of the published checkpoint.

    Raises:
        ValueError: the transformer is unknown, or tools lose the change of this module.
    """
    if module.startswith("unet."):
        if ".add_embedding." in module:
            raise ValueError(
                f"Diffusers reads no change of {f'{module}.weight'!r} from a file with kohya's names. Export with "
                "`layout` 'diffusers'."
            )
        return _Place(f"lora_{module.replace('.', '_')}")
    found = original_place(denoiser, module.removeprefix("transformer."))
    if found is None:
        raise ValueError(
            f"Expected a module with a name in kohya's files, got {f'{module}.weight'!r} of "
            f"{denoiser or 'a transformer that the delta does not name'}. Export with `layout` 'diffusers'."
        )
    width = change.shape[1]
    turned = found.module.endswith("adaLN_modulation.1") and change.shape[0] == 2 * width  # scale and shift
    rows = tuple(n * width for n in found.parts)
    return _Place(f"lora_unet_{found.module.replace('.', '_')}", found.part, rows, turned)


def _joined(parts: Sequence[tuple[_Place, Tensors]]) -> Tensors:
    """One change from the changes of a module's parts: B has a block for each part, at its rows."""
    (place, (b, a)), *more = parts = sorted(parts, key=lambda each: each[0].part)
    if place.turned:
        b = torch.cat(b.chunk(2)[::-1])
    if not place.rows:
        return b, a
    whole = b.new_zeros(sum(place.rows), b.shape[1] + sum(other.shape[1] for _, (other, _) in more))
    column = 0
    for each, (some, _) in parts:
        start = sum(each.rows[: each.part])
        whole[start : start + len(some), column : column + some.shape[1]] = some
        column += some.shape[1]
    return whole, torch.cat([some for _, (_, some) in parts])


def _named(module: str, b: Tensor, a: Tensor, layout: Layout, alpha: float) -> dict[str, Tensor]:
    """The factors of one module under the layout's names.

    kohya: every module has the same `alpha`, because diffusers reads one for all. Tools scale by alpha / rank.
    """
    up = b if a.ndim == 2 else b[:, :, None, None]
    if layout == "diffusers":
        return {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": a}
    factors = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": a}
    return {f"{module}.alpha": torch.tensor(alpha, dtype=b.dtype), **factors}


def _peft(part: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of PEFT's `LoraConfig`, as diffusers stores them. Every module has its rank as alpha.

    PEFT takes a module's name also for the end of a longer one, unless it begins with "^".
    """
    r = max(ranks.values())
    longer = {module for module in ranks if any(other.endswith(f".{module}") for other in ranks)}
    others = {f"^{m}" if m in longer else m: rank for m, rank in ranks.items() if rank != r}
    config = {"r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": others, "target_modules": sorted(ranks)}
    return {f"{part}.{name}": value for name, value in config.items()}


def _balanced(change: Factors, strength: float) -> Tensors:
    """B and A with columns and rows of similar size, so that they fit into half precision."""
    b, a = change.B.double() * strength, change.A.double()
    left, right = b.norm(dim=0), a.flatten(1).norm(dim=1)
    by = torch.where((left > 0) & (right > 0), (right / left.clamp_min(1e-300)).sqrt(), torch.ones_like(left))
    return b * by, (a.flatten(1) / by[:, None]).reshape(a.shape)
