"""Chroma: T5 alone in joint attention, whose padding has less weight, with guidance in a second call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .flux import FluxLike

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Chroma(FluxLike):
    """diffusers adds the product of two columns' masks to their logit: padding behind the first of it gets 0, not 1."""

    def text_mask(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """The first columns of the denoiser's mask, which also covers the picture."""
        mask = super().text_mask(arguments)
        return None if mask is None else mask[:, : arguments[self.text_argument].shape[1]]

    def with_mask(self, arguments: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
        from torch import cat

        old, length = arguments[self.mask_argument], arguments[self.text_argument].shape[1]
        return super().with_mask(arguments, cat([mask.to(old), old[:, length:]], 1))


CHROMA = _Chroma(
    "Chroma",
    denoiser_class="ChromaTransformer2DModel",
    encoders=("T5",),
    offers=frozenset({"joint_text", "guidance", "guidance_scale", "padded_text", "text_inputs"}),
    returns=("text", "ids", "mask", "negative", "other_ids", "negative_mask"),
    bidirectional=("tokenizer",),
    resizable=("tokenizer",),
    mask_argument="attention_mask",
    weighs_padding=True,
    text_inputs=("context_embedder",),
)
