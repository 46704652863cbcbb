"""SDXL: two text encoders side by side, in cross-attention, and a pooled text that bypasses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .unet import OFFERED, UNet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclass(frozen=True)
class _SDXL(UNet):
    def cure_for_lost(self, lost: Sequence[str]) -> str:
        if "text_encoder" in lost:  # an SDXL refiner is made without the first one
            return "Erase on the SDXL base pipeline, and leave an SDXL refiner out"
        return super().cure_for_lost(lost)

    def training_added(self, pipe: DiffusionPipeline, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pooled text, and the size of an uncropped picture at the base model's resolution."""
        pooled = parts["pooled"]
        side = pipe.default_sample_size * pipe.vae_scale_factor
        size = {"original_size": (side, side), "crops_coords_top_left": (0, 0), "target_size": (side, side)}
        width = pipe.text_encoder_2.config.projection_dim
        ids = pipe._get_add_time_ids(*size.values(), dtype=parts["text"].dtype, text_encoder_projection_dim=width)
        return {"text_embeds": pooled, "time_ids": ids.to(pooled.device).repeat(len(pooled), 1)}


SDXL = _SDXL(
    "SDXL",
    encoders=("CLIPText", "CLIPText"),
    offers=OFFERED | {"causal_text"},
    returns=("text", "negative", "pooled", "negative_pooled"),
    texts=(("tokenizer", "tokenizer_2"),),
    pools=("tokenizer_2",),
)
