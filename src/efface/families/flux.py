"""FLUX.1 and the embedded `emoji-flux`: T5 in joint attention, pooled CLIP, guidance in a second call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._parts import is_kind
from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class FluxLike(Family):
    """A family whose denoiser takes positions, which are zero for text, and times from 0 to 1."""

    guidance_in_two_calls: bool = True
    unit_time: bool = True
    picture_output: int = 1
    shared_arguments: tuple[str, ...] = ("img_ids", "txt_ids")  # positions

    def for_length(self, arguments: dict[str, Any], length: int) -> dict[str, Any]:
        """Adds the positions of the text, which are all zero."""
        return {**arguments, "txt_ids": arguments["txt_ids"].new_zeros(length, arguments["txt_ids"].shape[-1])}


@dataclass(frozen=True)
class _Flux(FluxLike):
    denoiser_class: str = "FluxTransformer2DModel"
    encoders: tuple[str, ...] = ("", "")
    offers: frozenset[str] = frozenset({"joint_text", "guidance", "padded_text"})
    returns: tuple[str, ...] = ("text", "pooled", "ids")
    texts: tuple[tuple[str, ...], ...] = (("tokenizer_2",),)
    pools: tuple[str, ...] = ("tokenizer",)
    bidirectional: tuple[str, ...] = ("tokenizer_2",)
    resizable: tuple[str, ...] = ("tokenizer_2",)
    scale: str = "true_cfg_scale"


class _Flux1(_Flux):
    def recognises(self, pipe: DiffusionPipeline) -> bool:
        return super().recognises(pipe) and not is_kind(pipe.text_encoder, "Bert")


FLUX = _Flux1("FLUX.1")
EMOJI_FLUX = _Flux("emoji-flux", encoders=("Bert", ""), bidirectional=("tokenizer", "tokenizer_2"))  # BERT twice
