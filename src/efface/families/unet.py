"""SD 1.x and 2.x, and the embedded `emoji` models with the same UNet: one text encoder, in cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._parts import bare
from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

OFFERED = frozenset(
    {
        "cross_text",
        "softmax_self",
        "guidance",
        "guidance_scale",
        "padded_text",
        "text_weights",
        "training",
        "bottleneck",
        "learned_words",
    }
)
EMOJI_128 = "emoji-128"
LARGER = {"sample_size": 16, "in_channels": 8, "cross_attention_dim": 384}  # of its denoiser's config
OUTER = ("time_embedding.", "add_embedding.", "conv_norm_out.", "conv_out.")


@dataclass(frozen=True)
class UNet(Family):
    """A family whose denoiser is diffusers' `UNet2DConditionModel`."""

    denoiser_class: str = "UNet2DConditionModel"
    encoders: tuple[str, ...] = ("CLIPText",)
    offers: frozenset[str] = OFFERED
    denoiser: str = "unet"
    width_names: tuple[str, ...] = ("cross_attention_dim",)
    bottleneck: str = "mid_block"
    outer_layers: tuple[str, ...] = OUTER

    def distilled(self, denoiser: nn.Module) -> bool:
        return getattr(getattr(denoiser, "config", None), "time_cond_proj_dim", None) is not None

    def pooled_text(self, arguments: Mapping[str, Any]) -> Tensor | None:
        return (arguments.get("added_cond_kwargs") or {}).get("text_embeds")

    def with_pooled(self, arguments: Mapping[str, Any], pooled: Tensor) -> dict[str, Any]:
        return {**arguments, "added_cond_kwargs": {**arguments["added_cond_kwargs"], "text_embeds": pooled}}

    def training_arguments(self, text: Tensor, added: Mapping[str, Tensor]) -> dict[str, Any]:
        return {self.text_argument: text, "added_cond_kwargs": dict(added)}

    def training_call(
        self, x: Tensor, t: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (x, t), dict(arguments)


@dataclass(frozen=True)
class Emoji(UNet):
    """The family of the embedded `emoji` models, told apart by the size of their latents."""

    def model(self, pipe: DiffusionPipeline) -> str:
        config = getattr(bare(getattr(pipe, self.denoiser)), "config", {})
        return EMOJI_128 if LARGER.items() <= dict(config).items() else self.name


SD = UNet("SD 1.x/2.x", offers=OFFERED | {"causal_text"})
EMOJI = Emoji("emoji", encoders=("Bert",), bidirectional=("tokenizer",))
