"""SD 3 and 3.5: two CLIP encoders side by side, followed by an optional T5, in joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

_CLIP = ("tokenizer", "tokenizer_2")
_STREAM = {  # of a block, for the picture and for the text
    "attn.to_q": "x_block.attn.qkv:0",
    "attn.to_k": "x_block.attn.qkv:1",
    "attn.to_v": "x_block.attn.qkv:2",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_q": "x_block.attn2.qkv:0",
    "attn2.to_k": "x_block.attn2.qkv:1",
    "attn2.to_v": "x_block.attn2.qkv:2",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.add_q_proj": "context_block.attn.qkv:0",
    "attn.add_k_proj": "context_block.attn.qkv:1",
    "attn.add_v_proj": "context_block.attn.qkv:2",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
_ORIGINAL = {f"transformer_blocks.*.{name}": f"joint_blocks.*.{own}" for name, own in _STREAM.items()} | {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}


@dataclass(frozen=True)
class _SD3(Family):
    def training_added(self, pipe: DiffusionPipeline, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.pooled_argument: parts["pooled"]}

    def set_steps(self, pipe: DiffusionPipeline, scheduler: Any, steps: int, device: Any) -> None:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config, shifted = scheduler.config, {}
        if config.get("use_dynamic_shifting"):
            _, height, width = self.latent_shape(pipe)
            patch = pipe.transformer.config.patch_size
            columns = (height // patch) * (width // patch)
            sizes = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            shifted["mu"] = calculate_shift(
                columns, *sizes, config.get("base_shift", 0.5), config.get("max_shift", 1.16)
            )
        scheduler.set_timesteps(steps, device=device, **shifted)


SD3 = _SD3(
    "SD 3/3.5",
    denoiser_class="SD3Transformer2DModel",
    encoders=("", ""),
    offers=frozenset({"joint_text", "guidance", "guidance_scale", "padded_text", "text_inputs", "flow_training"}),
    returns=("text", "negative", "pooled", "negative_pooled"),
    texts=(_CLIP, ("tokenizer_3",)),
    pools=_CLIP,
    bidirectional=("tokenizer_3",),
    skip_argument="skip_layers",
    text_first=False,
    resizable=("tokenizer_3",),
    picture_output=1,
    text_inputs=("context_embedder",),
    pooled_inputs=("time_text_embed.text_embedder.linear_1",),
    outer_layers=("pos_embed.", "time_text_embed.", "context_embedder.", "norm_out.", "proj_out."),
    original=_ORIGINAL,
)
