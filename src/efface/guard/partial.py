"""Pictures of rows that are still being drawn, for those policies that allow them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import checks
from .._latents import decodes, pictures_of
from ..pictures import to_pil
from .policy import Policy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Partial:
    """What shows pictures of rows that are not finished.

    Args:
        steps: row to the numbers of the finished steps after which its picture is shown.
        show: called with the row, the number of finished steps, and the picture.

    Example:
        >>> import efface
        >>> from efface.guard import Partial
        >>> pipe = efface.load("emoji")
        >>> guard = efface.Guard({"kids": efface.Policy(erase=["alcohol"], partial_pictures=True)})
        >>> shown = []
        >>> partial = Partial({0: [1]}, lambda row, step, picture: shown.append((row, step, picture.size)))
        >>> result = guard.draw(pipe, ["a pub"], ["kids"], [1], partial=partial, num_inference_steps=2)
        >>> shown
        [(0, 1, (64, 64))]
    """

    steps: Mapping[int, Collection[int]]
    show: Callable[[int, int, Image], object]

    def of(self, rows: Sequence[int]) -> Partial:
        """The same for a batch that has these rows only, in their order."""
        steps = {j: self.steps[k] for j, k in enumerate(rows) if k in self.steps}
        return Partial(steps, lambda j, step, picture: self.show(rows[j], step, picture))

    @staticmethod
    def possible(pipe: DiffusionPipeline) -> bool:
        """Whether the latents of a pipeline can be shown between two steps: they are not packed, and the pipeline does
        not check or mark its pictures."""
        return decodes(pipe)

    def check(self, pipe: DiffusionPipeline, policies: Sequence[Policy]) -> None:
        """Raises ValueError unless the policies of the rows allow it and the pipeline can do it."""
        for row in self.steps:
            if not policies[checks.whole("row", row, 0, len(policies) - 1)].partial_pictures:
                raise ValueError(
                    f"Expected rows whose policies allow partial pictures, got row {row}. Leave it out, or write "
                    "`partial_pictures: true` into its policy."
                )
        if not decodes(pipe):
            cure = "Leave out `partial`."
            raise ValueError(checks.refusal("a pipeline whose latents can be shown", type(pipe).__name__, cure))


def callback(
    on_step: Callable[[int], None] | None, partial: Partial | None, unproven: Callable[[int, int], str]
) -> Callable[..., dict[str, Any]]:
    """The callback of a pipeline call, which tells its steps and shows partial pictures.

    Args:
        on_step: called with the number of finished steps. An exception of it ends the call.
        partial: what shows partial pictures.
        unproven: why a row, after a number of steps, is not proven; "" if it is. Only proven rows are shown.
    """

    def report(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        done = step + 1
        if on_step is not None:
            on_step(done)
        for row, steps in partial.steps.items() if partial is not None else ():
            if done in steps and not unproven(row, done):
                (picture,) = to_pil(_decoded(pipe, tensors["latents"][row : row + 1]))
                partial.show(row, done, picture)  # type: ignore[union-attr]
        return {}

    return report


@torch.no_grad()
def _decoded(pipe: Any, latents: Tensor) -> Tensor:
    """The pictures of latents. Some VAEs overflow in float16, so these decode in float32, as in their pipelines."""
    vae = pipe.vae
    if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        return pictures_of(pipe, latents).float()
    vae.to(dtype=torch.float32)
    try:
        return pictures_of(pipe, latents)
    finally:
        vae.to(dtype=torch.float16)
