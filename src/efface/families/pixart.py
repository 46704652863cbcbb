"""PixArt-alpha and -sigma: T5 with projected text and masked padding, in cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class _PixArt(Family):
    def cleaned(
        self, pipe: DiffusionPipeline, tokenizer: Any, texts: Sequence[str], settings: Mapping[str, Any]
    ) -> list[str]:
        return list(pipe._text_preprocessing(list(texts), clean_caption=settings.get("clean_caption", False)))


PIXART = _PixArt(
    "PixArt",
    denoiser_class="PixArtTransformer2DModel",
    encoders=("",),
    offers=frozenset({"cross_text", "softmax_self", "guidance", "padded_text"}),
    returns=("text", "mask", "negative", "negative_mask"),
    bidirectional=("tokenizer",),
    resizable=("tokenizer",),
    width_names=("caption_channels", "cross_attention_dim"),  # the first is projected to the second
    projection="caption_projection",
)
