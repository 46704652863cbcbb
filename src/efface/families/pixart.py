"""PixArt-alpha and -sigma: T5 with projected text and masked padding, in cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclass(frozen=True)
class _PixArt(Family):
    def cleaned(
        self, pipe: DiffusionPipeline, tokenizer: Any, texts: Sequence[str], settings: Mapping[str, Any]
    ) -> list[str]:
        return list(pipe._text_preprocessing(list(texts), clean_caption=settings.get("clean_caption", False)))

    def training_added(self, pipe: DiffusionPipeline, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mask; and the picture's size in pixels and its aspect ratio, where the model takes them."""
        found = super().training_added(pipe, parts)
        if not pipe.transformer.use_additional_conditions:
            return found
        text, (_, height, width) = parts["text"], self.latent_shape(pipe)
        size = [float(side * pipe.vae_scale_factor) for side in (height, width)]
        sizes = {"resolution": text.new_tensor(size), "aspect_ratio": text.new_tensor([height / width])}
        return found | {name: value.repeat(len(text), 1) for name, value in sizes.items()}

    def training_arguments(self, text: Tensor, added: Mapping[str, Tensor]) -> dict[str, Any]:
        sizes = {name: added.get(name) for name in ("resolution", "aspect_ratio")}
        return {self.text_argument: text, self.mask_argument: added[self.mask_argument], "added_cond_kwargs": sizes}


PIXART = _PixArt(
    "PixArt",
    denoiser_class="PixArtTransformer2DModel",
    encoders=("",),
    offers=frozenset({"cross_text", "softmax_self", "guidance", "padded_text", "training"}),
    returns=("text", "mask", "negative", "negative_mask"),
    bidirectional=("tokenizer",),
    resizable=("tokenizer",),
    width_names=("caption_channels", "cross_attention_dim"),  # the first is projected to the second
    projection="caption_projection",
    variances=True,
    outer_layers=("pos_embed.", "adaln_single.", "caption_projection.", "proj_out.", "scale_shift_table"),
)
