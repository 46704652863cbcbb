"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .parts import decoder_words, louder


def parts(pictures: tuple[str, ...] = ()) -> dict[str, Any]:
    """The components of a pipeline. `pictures`: the tokenizer's further marks, the third of which is a picture's."""
    words = decoder_words(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *pictures))
    marks = {"image_token_id": words.convert_tokens_to_ids(pictures[2])} if pictures else {}
    config = Qwen2_5_VLConfig(
        **marks,
        text_config={
            "vocab_size": len(words),
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 24,
            **({"patch_size": 4, "window_size": 16} if pictures else {}),
        },
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    for name, weight in transformer.named_parameters():
        if "_mod." in name and name.endswith("weight"):
            weight.data *= 4  # gates
    return {
        "vae": AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        "text_encoder": encoder,
        "tokenizer": words,
        "transformer": louder(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def qwenimage() -> QwenImagePipeline:
    """A decoder's text without its first tokens, padded to the longest and masked; guidance in a second call."""
    pipe = QwenImagePipeline(**parts())
    start, _ = pipe.prompt_template_encode.split("{}")
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(start).input_ids)
    return pipe


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    """True guidance, of which `guidance_scale` is the scale."""
    given = {"max_sequence_length": 40, "height": 16, "width": 16, **given}
    given["true_cfg_scale"] = given.pop("guidance_scale", 4.0)
    negative = {} if given.get("negative_prompt_embeds") is not None else {"negative_prompt": [""] * prompts}
    return {**negative, **given}


BUILDERS = {"qwenimage": qwenimage}
EACH = ("qwenimage",)
PIPELINES = (QwenImagePipeline,)
