"""SDXL."""

from __future__ import annotations

from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModelWithProjection

from .parts import denoiser, picture_model, scheduler, text_model, tokenizer


def sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders side by side, padded differently, and a pooled text past the cross-attention."""
    tokens, tokens_2 = tokenizer(), tokenizer("!")
    unet = denoiser(
        16 + 24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    return StableDiffusionXLPipeline(
        vae=picture_model(),
        text_encoder=text_model(tokens, 16),
        text_encoder_2=text_model(tokens_2, 24, CLIPTextModelWithProjection),
        tokenizer=tokens,
        tokenizer_2=tokens_2,
        unet=unet,
        scheduler=scheduler(),
        add_watermarker=False,
    )


BUILDERS = {"sdxl": sdxl}
EACH = ("sdxl",)
