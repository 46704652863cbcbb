"""Pictures of the concept as the input of an attack."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .._latents import latents_of
from ._noising import Noising

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


def from_pictures(pipe: Any) -> Any:
    """The image-to-image pipeline with the same models, which starts from a noised picture.

    Raises:
        ValueError: diffusers has none for this family.
    """
    from diffusers import AutoPipelineForImage2Image

    refusal = (
        f"diffusers has no image-to-image pipeline for this {type(pipe).__name__}. Use an attack without a picture."
    )
    try:
        made = AutoPipelineForImage2Image.from_pipe(pipe, torch_dtype=pipe.dtype)
    except ValueError as error:
        raise ValueError(refusal) from error
    if not takes(made, "strength"):  # FLUX.2's reads the picture as a reference, and starts from noise
        raise ValueError(refusal)
    return made


def takes(pipe: Any, argument: str) -> bool:
    """Whether the pipeline's call has an argument of this name."""
    return argument in inspect.signature(type(pipe).__call__).parameters


def half_mask(image: Tensor, side: str) -> Tensor:
    """A mask [1, 1, H, W], 1 where the picture is hidden."""
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


@dataclass(frozen=True, eq=False)
class Visible:
    """Keeps a part of a picture visible while a pipeline draws, as a context around its calls.

    After each step of the scheduler, the visible part of the latents becomes that of the picture, with the noise of the
    next step.

    Args:
        image: the picture [1, 3, H, W].
        mask: 1 where it is hidden [1, 1, H, W].
        seed: seed of the noise.
    """

    image: Tensor
    mask: Tensor
    seed: int = 0

    @contextlib.contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        noising, picture = Noising.of(pipe), latents_of(pipe, self.image)
        rng, scheduler, hidden = torch.Generator().manual_seed(self.seed), pipe.scheduler, self._hidden(pipe, picture)
        step, done = scheduler.step, 0

        def shown(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            out, done = step(*args, **kwargs), done + 1
            times = scheduler.timesteps
            latents = out[0] if isinstance(out, tuple) else out.prev_sample
            done = done if done <= len(times) else 1  # the next call
            noise = torch.randn(latents.shape, generator=rng).to(latents)
            known = picture.to(latents).expand_as(latents)
            if done < len(times):
                known = noising.noisy(known, noise, float(times[done]))
            changed = hidden.to(latents) * latents + (1 - hidden.to(latents)) * known
            return (changed, *out[1:]) if isinstance(out, tuple) else type(out)(**{**out, "prev_sample": changed})

        scheduler.step = shown
        try:
            yield
        finally:
            del scheduler.step
        if not done:
            raise RuntimeError(
                "The pipeline did not step its own scheduler, so nothing was kept visible. Use another one."
            )

    def _hidden(self, pipe: Any, picture: Tensor) -> Tensor:
        """The mask in the shape of the latents."""
        if picture.ndim == 4:
            return interpolate(self.mask, picture.shape[-2:])
        height, width = (side // pipe.vae_scale_factor for side in self.mask.shape[-2:])
        mask = interpolate(self.mask, (height, width)).expand(1, picture.shape[-1] // 4, height, width)
        packed: Tensor = pipe._pack_latents(mask, *mask.shape)
        return packed
