"""The autoencoder of the 128-pixel models: 128 x 128 pictures to 16 x 16 x 8 latents and back.

Convolutions at full resolution are slow on CPUs, so the encoder folds pixels into channels (`PixelUnshuffle(8)`) and
the decoder unfolds them in two steps, 16 x 16 to 32 x 32 to 128 x 128. To diffusers it is an `AutoencoderKL`:
pipelines accept it in `from_pipe`, and slicing and tiling work.
"""

from __future__ import annotations

import torch

# diffusers imports this module by path when it loads a saved pipeline, and looks for `ModelMixin` in it.
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from efface.models.emoji.vae import FOLD, Block

__all__ = ["EmojiAutoencoder", "ModelMixin"]

LOG_VARIANCE = -30.0  # diffusers' lowest: a sample differs from the mean by less than 1e-6


class Encoder(nn.Module):
    """Maps pictures to means and log variances of the latents, side by side in channels. The variances are constant."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(FOLD),
            nn.Conv2d(3 * FOLD**2, width, 1),
            Block(width),
            Block(width),
            nn.Conv2d(width, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = self.body(x)
        return torch.cat([mean, torch.full_like(mean, LOG_VARIANCE)], 1)


class _AutoencoderKLToDiffusers(type):
    """Classes that compare equal to `AutoencoderKL`.

    `from_pipe` passes a model on only if the new pipeline names its exact type, and refuses subclasses.
    """

    def __eq__(cls, other: object) -> bool:
        return other is AutoencoderKL or cls is other

    def __hash__(cls) -> int:
        return type.__hash__(cls)


class EmojiAutoencoder(AutoencoderKL, metaclass=_AutoencoderKLToDiffusers):
    """Pixel-shuffle autoencoder with a deterministic encoder.

    Args:
        latent_channels: channels of the latents.
        encoder_width: channels inside the encoder, a multiple of 16.
        decoder_width: channels of the decoder at 16 x 16, a multiple of 16.
        last_width: channels of the decoder at 32 x 32, a multiple of 16.
        sample_size: side of the training pictures.
        scaling_factor: 1 / standard deviation of the latents, set after training.
        shift_factor: pipelines subtract it from latents before scaling.
        block_out_channels: pipelines read its length only: four entries mean a factor of 8.
        in_channels, out_channels: channels of pictures.
        latents_mean, latents_std: unused; some pipelines read them.
        force_upcast: whether pipelines must decode in float32.

    Example:
        >>> import torch
        >>> from efface.models.emoji128.vae import EmojiAutoencoder
        >>> vae = EmojiAutoencoder(encoder_width=16, decoder_width=16, last_width=16)
        >>> z = vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mode()
        >>> z.shape, vae.decode(z).sample.shape
        (torch.Size([1, 8, 16, 16]), torch.Size([1, 3, 128, 128]))
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        encoder_width: int = 160,
        decoder_width: int = 192,
        last_width: int = 96,
        sample_size: int = 128,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] = (1, 1, 1, 1),
        in_channels: int = 3,
        out_channels: int = 3,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
    ) -> None:
        super(AutoencoderKL, self).__init__()  # not AutoencoderKL's own, which would build its encoder and decoder
        self.encoder = Encoder(latent_channels, encoder_width)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, decoder_width, 3, padding=1),
            Block(decoder_width),
            Block(decoder_width),
            Block(decoder_width),
            nn.Conv2d(decoder_width, 4 * last_width, 1),
            nn.PixelShuffle(2),
            Block(last_width),
            Block(last_width),
            nn.Conv2d(last_width, 3 * 4**2, 3, padding=1),
            nn.PixelShuffle(4),
        )
        self.quant_conv = self.post_quant_conv = None
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_latent_min_size = sample_size // FOLD
        self.tile_overlap_factor = 0.25
