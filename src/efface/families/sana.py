"""Sana: a decoder whose projected and normalised text is masked, in cross-attention; self-attention is linear.

A prompt follows an instruction, of whose columns the first and the last one remain. A negative prompt stands alone.
For several prompts with several images each, diffusers repeats masks in another order than texts; Qwen-Image's, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._parts import Reading, between, tokenizer_of
from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn


@dataclass(frozen=True)
class _Sana(Family):
    def cleaned(
        self, pipe: DiffusionPipeline, tokenizer: Any, texts: Sequence[str], settings: Mapping[str, Any]
    ) -> list[str]:
        return list(pipe._text_preprocessing(list(texts), clean_caption=settings.get("clean_caption", False)))

    def read(self, pipe: DiffusionPipeline, tokenizer: str, text: str, settings: Mapping[str, Any]) -> Reading:
        make, before = tokenizer_of(pipe, tokenizer), "\n".join(settings.get("complex_human_instruction") or ())
        ids, empty = (list(make(before + each).input_ids) for each in (text, ""))
        own, cut = between(ids, empty), max(len(empty) - 2, 0)  # the pipeline cuts these columns behind the first one
        return Reading(ids[:1] + ids[1 + cut :], slice(own.start - cut, own.stop - cut))

    def train_timesteps(self, pipe: DiffusionPipeline) -> int:
        return int(super().train_timesteps(pipe) * getattr(pipe, self.denoiser).config.timestep_scale)

    def distilled(self, denoiser: nn.Module) -> bool:
        return bool(getattr(getattr(denoiser, "config", None), "guidance_embeds", False))

    def training_added(self, pipe: DiffusionPipeline, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mask, and the factor of the denoiser's times."""
        scale = parts["mask"].new_ones(len(parts["mask"])) * float(pipe.transformer.config.timestep_scale)
        return {**super().training_added(pipe, parts), "scale": scale}

    def training_call(
        self, x: Tensor, t: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        scale = arguments.get("scale", 1.0)
        return super().training_call(x, t * scale, {name: v for name, v in arguments.items() if name != "scale"})

    def projects(self, denoiser: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The projection stands before the norm."""
        projection: Any = denoiser.caption_projection
        return lambda states: forward(projection(states))


SANA = _Sana(
    "Sana",
    denoiser_class="SanaTransformer2DModel",
    encoders=("Gemma2",),
    offers=frozenset({"cross_text", "causal_text", "guidance", "guidance_scale", "padded_text", "flow_training"}),
    returns=("text", "mask", "negative", "negative_mask"),
    resizable=("tokenizer",),
    settings=("clean_caption", "max_sequence_length", "complex_human_instruction", "lora_scale"),
    width_names=("caption_channels",),
    projection="caption_norm",
    variances=True,
    outer_layers=(
        "patch_embed.",
        "time_embed.",
        "caption_projection.",
        "caption_norm.",
        "proj_out.",
        "scale_shift_table",
    ),
)
