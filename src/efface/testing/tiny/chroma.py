"""Chroma."""

from __future__ import annotations

from typing import Any

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from .parts import louder, picture_model, t5


def chroma() -> ChromaPipeline:
    """T5 alone, whose padding is masked in T5 and weighted in the transformer; guidance in a second call."""
    words, encoder = t5(24)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    transformer.distilled_guidance_layer.out_proj.weight.data *= 4  # gates
    return ChromaPipeline(
        vae=picture_model(shift_factor=0.0),
        text_encoder=encoder,
        tokenizer=words,
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    return {"max_sequence_length": 24, "height": 16, "width": 16, **given}


BUILDERS = {"chroma": chroma}
EACH = ("chroma",)
PIPELINES = (ChromaPipeline,)
