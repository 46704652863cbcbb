"""Pictures of the concept as the input of an attack, and pipelines that take pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._contract import Target, Victim


def picture_of(victim: Victim, target: Target) -> Tensor:
    """A picture [1, 3, H, W] of the concept by the base model, with one of the attacker's seeds.

    The first one in which the detector of the search sees the concept; otherwise the first.
    """
    images = victim.draw_original(target.prompt)
    found = victim.found(images).nonzero().flatten().tolist()
    first = found[0] if found else 0
    return images[first : first + 1]


def converted(pipe: Any, kind: str) -> Any:
    """The pipeline of another kind ("AutoPipelineForImage2Image" or "AutoPipelineForInpainting") with the same models.

    Raises:
        ValueError: diffusers has none for this family.
    """
    import diffusers

    try:
        made = getattr(diffusers, kind).from_pipe(pipe, torch_dtype=pipe.dtype)
    except ValueError as error:
        raise ValueError(
            f"diffusers makes no pipeline of the kind {kind} from this {type(pipe).__name__} ({error}). Use an attack that "
            "needs no picture."
        ) from error
    return made


def half_mask(image: Tensor, side: str) -> Tensor:
    """A mask [1, 1, H, W], 1 where the picture is drawn again."""
    height, width = image.shape[-2:]
    mask = torch.zeros(1, 1, height, width)
    where = {
        "left": (slice(None), slice(None, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
        "top": (slice(None, height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "all": (slice(None), slice(None)),
    }[side]
    mask[(0, 0, *where)] = 1.0
    return mask
