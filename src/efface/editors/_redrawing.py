"""Draws pictures twice: the second time with the places of the concept in the negative prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor

from .. import checks
from ..core import check_pictures
from ..delta import Tokens
from ..delta.words import vocabularies
from ..families import family
from ._examples import boxes_of
from ._geometry import Box, Grid
from ._located import check_fits

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class Redrawn:
    """Pictures of two passes.

    Args:
        images: float [N, 3, H, W] in [0, 1], of the second pass where the detector found the concept.
        first: those of the first pass.
        boxes: where it found the concept in the first pass.
    """

    images: Tensor
    first: Tensor
    boxes: tuple[tuple[Box, ...], ...]


def redraw(
    pipe: DiffusionPipeline,
    tokens: Tokens,
    prompts: Sequence[str],
    detector: Callable[[Tensor], Any],
    seeds: Sequence[int],
    call: Mapping[str, Any],
) -> Redrawn:
    """See `GeomErasing.two_pass`."""
    grid = _grid(pipe, tokens)
    if isinstance(prompts, str) or len(prompts) != len(seeds):
        raise ValueError(
            f"Expected one seed per prompt, got {len(seeds)} seeds for {checks.shown(prompts)}. Give two lists of one "
            "length."
        )
    facts = family(pipe)
    scale = call.get(facts.scale)
    if scale is not None and not checks.number(facts.scale, scale) > 1:
        raise ValueError(
            f"Expected guidance, which negative prompts need, got `{facts.scale}` {scale:g}. Give more than 1."
        )
    given = call.get("negative_prompt") or ""
    theirs = [given] * len(prompts) if isinstance(given, str) else list(given)
    first = _drawn(pipe, prompts, seeds, {**call, "negative_prompt": theirs})
    size = (first.shape[3], first.shape[2])
    if list(size) != list(tokens.info["size"]):
        width, height = tokens.info["size"]
        raise ValueError(
            f"Expected pictures of {width} x {height} pixels, for which the words were learned, got {size[0]} x "
            f"{size[1]}. Draw in that size, or fit the words on this model."
        )
    boxes = boxes_of(detector, first, float(tokens.fields.get("threshold", 0.0)))
    again = [k for k, each in enumerate(boxes) if each]
    if not again:
        return Redrawn(first, first, tuple(boxes))
    negative = [", ".join(filter(None, (grid.text(boxes[k], size), theirs[k]))) for k in again]
    check_fits(pipe, negative, grid)
    images = first.clone()
    some = {**call, "negative_prompt": negative}
    images[again] = _drawn(pipe, [prompts[k] for k in again], [seeds[k] for k in again], some)
    return Redrawn(images, first, tuple(boxes))


def _grid(pipe: DiffusionPipeline, tokens: Tokens) -> Grid:
    if tokens.method != "geom_erasing" or "name" not in tokens.info:
        raise ValueError(f"Expected tokens of GeomErasing, got {tokens!r}. Fit them with `GeomErasing.fit`.")
    held = vocabularies(pipe).values()
    if not held or any(entry not in each.on for each in held for entry in [tokens]):
        raise ValueError(
            f"Expected {tokens!r} to be applied to the pipeline, got one without. Call `tokens.apply(pipe)` first."
        )
    return Grid(tokens.info["name"], tokens.fields["grid"], tokens.fields["encoding"])


@torch.no_grad()
def _drawn(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]) -> Tensor:
    generators = [Generator().manual_seed(seed) for seed in seeds]
    out = cast("Any", pipe)(list(prompts), generator=generators, output_type="pt", **call)
    return check_pictures(out.images)
