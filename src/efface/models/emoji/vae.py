"""The autoencoder of the `emoji` model: 64 x 64 pictures to 8 x 8 latents and back.

Full-resolution convolutions are slow on CPUs, so `PixelUnshuffle(8)` first folds pixels into channels, residual blocks
run at 8 x 8, and `PixelShuffle` unfolds them. It has the VAE interface of diffusers' pipelines: `encode(x).latents`,
`decode(z)`, `config.scaling_factor`, `config.latent_channels`, and four `block_out_channels` (a factor of 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# diffusers imports this module by path when it loads a saved pipeline, and looks for `ModelMixin` in it.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn

FOLD = 8


@dataclass
class LatentsOutput(BaseOutput):
    """The output of `encode`: `latents` [B, C, H/8, W/8], unscaled (diffusers multiplies by `scaling_factor`)."""

    latents: Tensor


class Block(nn.Module):
    """Residual block of two 3 x 3 convolutions, width kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(16, width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.silu(self.inner(F.silu(self.norm(x)))))


class EmojiVAE(ModelMixin, ConfigMixin):
    """Pixel-shuffle autoencoder with a deterministic encoder.

    Args:
        latent_channels: channels of the latents.
        width: channels inside, a multiple of 16.
        blocks: number of residual blocks, in the encoder and in the decoder.
        scaling_factor: 1 / standard deviation of the latents, set after training.
        block_out_channels: pipelines read only its length: four entries mean a factor of 8.

    Example:
        >>> import torch
        >>> from efface.models.emoji.vae import EmojiVAE
        >>> vae = EmojiVAE(width=32, blocks=1)
        >>> z = vae.encode(torch.zeros(1, 3, 64, 64)).latents
        >>> z.shape, vae.decode(z).sample.shape
        (torch.Size([1, 8, 8, 8]), torch.Size([1, 3, 64, 64]))
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        width: int = 192,
        blocks: int = 3,
        scaling_factor: float = 1.0,
        block_out_channels: tuple[int, ...] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        pixels = 3 * FOLD**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(FOLD),
            nn.Conv2d(pixels, width, 1),
            *(Block(width) for _ in range(blocks)),
            nn.Conv2d(width, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *(Block(width) for _ in range(blocks)),
            nn.Conv2d(width, pixels, 1),
            nn.PixelShuffle(FOLD),
        )

    def encode(self, x: Tensor, return_dict: bool = True) -> LatentsOutput | tuple[Tensor]:
        """Maps `x` [B, 3, H, W] in [-1, 1] to latents [B, C, H/8, W/8]."""
        latents = self.encoder(x)
        return LatentsOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Maps latents `z` [B, C, h, w] to pictures [B, 3, 8h, 8w] in about [-1, 1]. Ignores `generator`."""
        sample = self.decoder(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))
