"""CogView4: a GLM decoder, read in joint attention including its leading padding, with guidance in a second call."""

from __future__ import annotations

from .base import Family

COGVIEW4 = Family(
    "CogView4",
    denoiser_class="CogView4Transformer2DModel",
    encoders=("Glm",),
    offers=frozenset({"joint_text", "causal_text", "guidance", "guidance_scale"}),
    resizable=("tokenizer",),
    left_padded=("tokenizer",),
    padded_to_limit=False,  # to the next 16 above the longest text of an `encode_prompt` call
    width_names=("text_embed_dim",),
    guidance_in_two_calls=True,
    joint="attn1",
    shared_arguments=("image_rotary_emb",),  # positions
)
