"""Pictures as latents, and back."""

from __future__ import annotations

import inspect
from math import isqrt
from typing import Any

import torch
from torch import Tensor


def scaling(pipe: Any) -> tuple[float, float]:
    """The factor and the shift between the VAE's latents and the denoiser's.

    Raises:
        ValueError: the VAE scales its latents in another way.
    """
    config = pipe.vae.config
    if getattr(config, "scaling_factor", None) is None:
        raise ValueError(
            f"Expected a VAE with one `scaling_factor`, got {type(pipe.vae).__name__}, which scales its latents in "
            "another way. Use an attack or a method that needs no latents of pictures."
        )
    return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)


@torch.no_grad()
def latents_of(pipe: Any, images: Tensor) -> Tensor:
    """The latents of pictures [N, 3, H, W] in [0, 1], as the denoiser gets them. FLUX packs them to [N, L, C].

    Raises:
        ValueError: the pipeline has no VAE with an encoder, or the latents are not finite.
    """
    vae: Any = getattr(pipe, "vae", None)
    if not callable(getattr(vae, "encode", None)):
        raise ValueError(
            f"Expected a pipeline with a VAE that encodes pictures, got {type(vae).__name__}. Use a pipeline with its "
            "complete VAE."
        )
    scale, shift = scaling(pipe)
    weight = next(vae.parameters())
    made = vae.encode((2 * images - 1).to(weight.device, weight.dtype))
    plain = "latent" if hasattr(made, "latent") else "latents"  # Sana's autoencoder, and those with a codebook
    latents = made.latent_dist.mode() if hasattr(made, "latent_dist") else getattr(made, plain)
    latents = (latents.float() - shift) * scale
    if not latents.isfinite().all():
        raise ValueError("The VAE's latents of the pictures are not finite. Load its weights in float32.")
    if callable(getattr(pipe, "_pack_latents", None)):
        latents = pipe._pack_latents(latents, *latents.shape)
    return latents


def pictures_of(pipe: Any, latents: Tensor) -> Tensor:
    """The pictures [N, 3, H, W] in [0, 1] of latents as the denoiser gets them, with gradients.

    Raises:
        ValueError: the VAE scales its latents in another way; or packed latents are not of a square picture.
    """
    scale, shift = scaling(pipe)
    if latents.ndim == 3:
        side = isqrt(latents.shape[1])
        if side**2 != latents.shape[1]:
            raise ValueError(f"Expected packed latents of a square picture, got {latents.shape[1]}. Draw a square one.")
        pixels = 2 * side * pipe.vae_scale_factor
        latents = pipe._unpack_latents(latents, pixels, pixels, pipe.vae_scale_factor)
    weight = next(pipe.vae.parameters())
    made = pipe.vae.decode((latents / scale + shift).to(weight), return_dict=False)[0]
    return (made / 2 + 0.5).clamp(0, 1)


def decodes(pipe: Any) -> bool:
    """Whether `pictures_of` decodes the latents of any step as the pipeline decodes its last ones.

    It does not for packed latents, latents with a mean of their own, and pipelines that check or mark their pictures.
    """
    config = getattr(getattr(pipe, "vae", None), "config", None)
    known = getattr(config, "scaling_factor", None) is not None and getattr(config, "latents_mean", None) is None
    marks = any(getattr(pipe, name, None) is not None for name in ("safety_checker", "watermark"))
    tells = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    return known and tells and not marks and not hasattr(pipe, "_unpack_latents")
