"""Pictures as latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    weight = next(vae.parameters())
    made = vae.encode((2 * images - 1).to(weight.device, weight.dtype))
    latents = made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latents
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = (latents.float() - shift) * vae.config.scaling_factor
    if not latents.isfinite().all():
        raise ValueError("The VAE's latents of the pictures are not finite. Load its weights in float32.")
    if callable(getattr(pipe, "_pack_latents", None)):
        latents = pipe._pack_latents(latents, *latents.shape)
    return latents
