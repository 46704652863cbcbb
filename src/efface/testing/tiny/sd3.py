"""SD 3 and 3.5."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from .parts import louder, picture_model, t5, text_model, tokenizer


def sd3(with_t5: bool = True, **settings: Any) -> StableDiffusion3Pipeline:
    """Two CLIP encoders side by side, T5 behind them, all read beside the picture; a network that predicts velocity."""
    tokens, tokens_2 = tokenizer(), tokenizer("!")
    words, encoder = t5(48)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=8,
        **settings,
    ).eval()
    return StableDiffusion3Pipeline(
        vae=picture_model(shift_factor=0.0),
        text_encoder=text_model(tokens, 16, CLIPTextModelWithProjection),
        tokenizer=tokens,
        text_encoder_2=text_model(tokens_2, 24, CLIPTextModelWithProjection),
        tokenizer_2=tokens_2,
        text_encoder_3=encoder if with_t5 else None,
        tokenizer_3=words if with_t5 else None,
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sd35() -> StableDiffusion3Pipeline:
    """As 3.5 Medium is built, without T5."""
    return sd3(with_t5=False, dual_attention_layers=(0,), qk_norm="rms_norm")


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    return {"max_sequence_length": 24, **given}


BUILDERS = {"sd3": sd3, "sd35": sd35}
EACH = ("sd3",)
PIPELINES = (StableDiffusion3Pipeline,)
