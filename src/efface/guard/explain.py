"""Maps of where in a picture the erasers changed what attention read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .. import api
from ..core import ConceptsField, RowsField
from ..hooks import Converted, CrossAttention, ErasurePrompts, Method
from ..pictures import grid, to_pil
from .deltas import Shelf, edited
from .proof import lines
from .record import Guarded, lock_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from .policy import Policy

SAME = 1e-3
"""The largest difference of pixels in [0, 1] between a picture and its redraw."""


@dataclass(frozen=True)
class _Probe(Method):
    """Changes nothing. Adds up how far the methods before it moved each query's output, relative to its length."""

    edits_attention: ClassVar[bool] = True

    concepts: ConceptsField = Converted(())
    rows: RowsField = Converted(None)
    found: list[Tensor] = field(default_factory=list, compare=False)

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        if cross.output is not None:
            moved = (out - cross.output).float().norm(dim=-1) / cross.output.float().norm(dim=-1).clamp_min(1e-12)
            self.found.append(moved.detach().mean(0).cpu())
        return out


def explained(policy: Policy, result: Guarded, row: int, shelf: Shelf) -> Image:
    """See `Guard.explain`."""
    record, pipe = result.rows[row], result.again.pipe()
    if pipe is None or policy.hash != record.policy:
        raise ValueError("The pipeline of this result was deleted, or the result is of another guard. Draw it again.")
    if record.outcome not in ("drawn", "logged") or not policy.erase:
        why = f"is {record.outcome}" if policy.erase else "has deltas only" if policy.deltas else "has no erasure"
        raise ValueError(f"Expected a row that was drawn with erasures, but row {row} {why}. Choose another row.")
    batch = result.again.some([row])
    needed = lines([policy], pipe)
    if not any(line.eraser.edits_attention for line in needed):
        names = ", ".join(each.eraser["method"] for each in record.acted)
        raise ValueError(
            f"{names} changes the prompt or the prediction, not attention, so no place in the picture reads the "
            "concept. Choose a method that edits attention, such as 'eiup'."
        )
    probe = _Probe(policy.concepts[:1])
    with lock_of(pipe), edited(pipe, policy.deltas, shelf), api.stack(pipe, *(line.eraser for line in needed), probe):
        drawn = api.draw(pipe, batch.prompts, batch.seeds, 1, batch.guidance, **batch.call)
    given = result.again.pictures
    if given is None or float((drawn[0] - given[row]).abs().max()) > SAME:
        raise ValueError(
            "The picture cannot be drawn again, because the pipeline changed since. Draw it with the guard again."
        )
    return grid(
        [*to_pil(drawn), *to_pil(_overlay(drawn[0], probe.found)[None])], columns=[record.outcome, "changed here"]
    )


def heat(found: list[Tensor], height: int, width: int) -> Tensor:
    """The sum of maps [Q] of any size, as [H, W] with the smallest value at 0 and the largest at 1."""
    total = torch.zeros(height, width)
    for moved in found:
        rows = max(round((len(moved) * height / width) ** 0.5), 1)
        while len(moved) % rows:
            rows -= 1
        total += interpolate(moved.reshape(1, 1, rows, -1), (height, width), mode="bilinear")[0, 0]
    return (total - total.min()) / (total.max() - total.min()).clamp_min(1e-12)


def _overlay(picture: Tensor, found: list[Tensor]) -> Tensor:
    """The picture in grey, with red where the erasers changed most."""
    there = heat(found, *picture.shape[1:])
    grey = picture.mean(0).clamp(0, 1) * 0.6 + 0.2
    red = torch.stack([grey + there * (1 - grey), *[grey * (1 - there)] * 2])
    return red.clamp(0, 1)
