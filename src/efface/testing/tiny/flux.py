"""FLUX.1."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from .parts import louder, picture_model, t5, text_model, tokenizer


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    """T5 beside the picture, CLIP pooled; the unconditional prediction has a call of its own."""
    tokens, (words, encoder) = tokenizer(), t5(24)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    return FluxPipeline(
        vae=picture_model(shift_factor=0.0),
        text_encoder=text_model(tokens, 16),
        tokenizer=tokens,
        text_encoder_2=encoder,
        tokenizer_2=words,
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    """True guidance, of which `guidance_scale` is the scale."""
    given = {"max_sequence_length": 24, "height": 16, "width": 16, **given}
    given["true_cfg_scale"] = given.pop("guidance_scale", 4.0)
    negative = {} if given.get("negative_prompt_embeds") is not None else {"negative_prompt": [""] * prompts}
    return {**negative, **given}


BUILDERS = {"flux": flux}
EACH = ("flux",)
PIPELINES = (FluxPipeline,)
