"""Modules by the names of the checkpoint that a model was published with, which other tools than diffusers use."""

from __future__ import annotations

import re
from typing import NamedTuple

from ._find import FAMILIES

FUSED = {"qkv": (1, 1, 1), "linear1": (1, 1, 1, 4)}
"""The rows of each part of a module that diffusers splits, in widths of the module's input."""


class Place(NamedTuple):
    """Where a module of diffusers is in the published checkpoint.

    `module` is the name there. `part` counts the `parts` of a module that diffusers splits; these are their rows, in
    widths of its input. A module that is not split has part 0 and no `parts`.
    """

    module: str
    part: int = 0
    parts: tuple[int, ...] = ()


def original_place(denoiser: str, module: str) -> Place | None:
    """The place of a denoiser's module, both by name; None if Efface does not know it.

    Args:
        denoiser: the class of the denoiser.
        module: such as "transformer_blocks.0.attn.to_q".
    """
    names = next((each.original for each in FAMILIES if each.denoiser_class == denoiser), {})
    number = re.search(r"\.(\d+)\.", module)
    pattern = module if number is None else f"{module[: number.start()]}.*.{module[number.end() :]}"
    found = names.get(pattern)
    if found is None:
        return None
    name, _, part = (found if number is None else found.replace("*", number[1])).partition(":")
    return Place(name, int(part or 0), FUSED[name.rpartition(".")[2]] if part else ())
