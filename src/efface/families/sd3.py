"""SD 3 and 3.5: two CLIP encoders side by side, followed by an optional T5, in joint attention."""

from __future__ import annotations

from .base import Family

_CLIP = ("tokenizer", "tokenizer_2")

SD3 = Family(
    "SD 3/3.5",
    denoiser_class="SD3Transformer2DModel",
    encoders=("", ""),
    offers=frozenset({"joint_text", "guidance", "guidance_scale", "padded_text"}),
    returns=("text", "negative", "pooled", "negative_pooled"),
    texts=(_CLIP, ("tokenizer_3",)),
    pools=_CLIP,
    bidirectional=("tokenizer_3",),
    skip_argument="skip_layers",
    text_first=False,
    resizable=("tokenizer_3",),
    picture_output=1,
)
