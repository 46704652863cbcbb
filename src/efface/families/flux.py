"""FLUX.1 and the embedded `emoji-flux`: T5 in joint attention, pooled CLIP, guidance in a second call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._parts import is_kind
from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

_DOUBLE = {
    "attn.to_q": "img_attn.qkv:0",
    "attn.to_k": "img_attn.qkv:1",
    "attn.to_v": "img_attn.qkv:2",
    "attn.to_out.0": "img_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "norm1.linear": "img_mod.lin",
    "attn.add_q_proj": "txt_attn.qkv:0",
    "attn.add_k_proj": "txt_attn.qkv:1",
    "attn.add_v_proj": "txt_attn.qkv:2",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1_context.linear": "txt_mod.lin",
}
_SINGLE = {
    "attn.to_q": "linear1:0",
    "attn.to_k": "linear1:1",
    "attn.to_v": "linear1:2",
    "proj_mlp": "linear1:3",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
}
# diffusers loses changes of the modules around the blocks in files with these names, so they are not here
_ORIGINAL = {f"transformer_blocks.*.{name}": f"double_blocks.*.{own}" for name, own in _DOUBLE.items()} | {
    f"single_transformer_blocks.*.{name}": f"single_blocks.*.{own}" for name, own in _SINGLE.items()
}


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
    offers: frozenset[str] = frozenset({"joint_text", "guidance", "padded_text", "text_inputs", "flow_training"})
    returns: tuple[str, ...] = ("text", "pooled", "ids")
    texts: tuple[tuple[str, ...], ...] = (("tokenizer_2",),)
    pools: tuple[str, ...] = ("tokenizer",)
    bidirectional: tuple[str, ...] = ("tokenizer_2",)
    resizable: tuple[str, ...] = ("tokenizer_2",)
    scale: str = "true_cfg_scale"
    text_inputs: tuple[str, ...] = ("context_embedder",)
    pooled_inputs: tuple[str, ...] = ("time_text_embed.text_embedder.linear_1",)
    outer_layers: tuple[str, ...] = ("x_embedder.", "time_text_embed.", "context_embedder.", "norm_out.", "proj_out.")
    original: Mapping[str, str] = field(default_factory=lambda: _ORIGINAL, hash=False)

    def training_added(self, pipe: DiffusionPipeline, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pooled text; and an embedded guidance of 1, where the model takes one."""
        pooled = parts["pooled"]
        embedded = pipe.transformer.config.guidance_embeds
        return {self.pooled_argument: pooled} | ({"guidance": pooled.new_ones(len(pooled)).float()} if embedded else {})

    def training_arguments(self, text: Tensor, added: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**super().training_arguments(text, added), "txt_ids": text.new_zeros(text.shape[1], 3)}

    def training_call(
        self, x: Tensor, t: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A column of the picture is a square of 2 x 2 latents."""
        from torch import arange
        from torch.nn.functional import pixel_unshuffle

        squares = pixel_unshuffle(x, 2)
        ids = x.new_zeros(*squares.shape[2:], 3)
        ids[..., 1] += arange(ids.shape[0]).to(ids)[:, None]
        ids[..., 2] += arange(ids.shape[1]).to(ids)
        time = t.to(x.dtype).expand(len(x)) / 1000
        given = {"hidden_states": squares.flatten(2).mT, self.time_argument: time, "img_ids": ids.flatten(0, 1)}
        return (), {**given, **arguments}

    def training_output(self, out: Tensor, x: Tensor) -> Tensor:
        from torch.nn.functional import pixel_shuffle

        return pixel_shuffle(out.mT.unflatten(2, (x.shape[2] // 2, x.shape[3] // 2)), 2)

    def latent_shape(self, pipe: DiffusionPipeline) -> tuple[int, int, int]:
        side = 2 * (pipe.default_sample_size // 2)
        return pipe.transformer.config.in_channels // 4, side, side

    def set_steps(self, pipe: DiffusionPipeline, scheduler: Any, steps: int, device: Any) -> None:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift
        from numpy import linspace

        config, (_, height, width) = scheduler.config, self.latent_shape(pipe)
        given: dict[str, Any] = {}
        if config.get("use_dynamic_shifting"):
            sizes = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            shifts = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            given["mu"] = calculate_shift(height * width // 4, *sizes, *shifts)
        if not config.get("use_flow_sigmas"):
            given["sigmas"] = linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(steps, device=device, **given)


class _Flux1(_Flux):
    def recognises(self, pipe: DiffusionPipeline) -> bool:
        return super().recognises(pipe) and not is_kind(pipe.text_encoder, "Bert")

    def few_steps(self, pipe: DiffusionPipeline) -> bool:
        """FLUX.1 schnell takes no guidance scale, and its scheduler does not shift times by the picture's size."""
        embedded = pipe.transformer.config.guidance_embeds
        return not embedded and not pipe.scheduler.config.get("use_dynamic_shifting")


FLUX = _Flux1("FLUX.1")
EMOJI_FLUX = _Flux("emoji-flux", encoders=("Bert", ""), bidirectional=("tokenizer", "tokenizer_2"))  # BERT twice
