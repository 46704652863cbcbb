"""How a family's denoiser is called in training, outside of the pipeline's call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


class InTraining:
    """The facts for training. The defaults are those of a plain transformer; other families override what differs.

    Latents are [N, C, h, w] everywhere outside of a denoiser's call.
    """

    denoiser: str
    text_argument: str
    time_argument: str
    mask_argument: str
    variances: bool

    def training_added(self, pipe: DiffusionPipeline, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further training inputs of the denoiser, one row per text, from the output of `encode_prompt`."""
        return {self.mask_argument: parts["mask"]} if "mask" in parts else {}

    def training_arguments(self, text: Tensor, added: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of a denoiser call in training, from a text and from rows of `training_added`."""
        return {self.text_argument: text, **added}

    def training_call(
        self, x: Tensor, t: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a denoiser call with latents at times of the scheduler, [N] or []."""
        return (), {"hidden_states": x, self.time_argument: t.expand(len(x)), **arguments}

    def training_output(self, out: Tensor, x: Tensor) -> Tensor:
        """The prediction [N, C, h, w] from the denoiser's output for latents x, without predicted variances."""
        return out[:, : x.shape[1]] if self.variances else out

    def latent_shape(self, pipe: DiffusionPipeline) -> tuple[int, int, int]:
        """The latents [C, h, w] of a picture of the pipeline's default size."""
        config = getattr(pipe, self.denoiser).config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def set_steps(self, pipe: DiffusionPipeline, scheduler: Any, steps: int, device: Any) -> None:
        """Sets the scheduler's times as a pipeline call with so many steps and the default size does."""
        scheduler.set_timesteps(steps, device=device)

    def few_steps(self, pipe: DiffusionPipeline) -> bool:
        """Whether the model was distilled to few steps, so that it has no trajectory with guidance."""
        return False
