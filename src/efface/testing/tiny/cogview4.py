"""CogView4."""

from __future__ import annotations

import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerFast

from .parts import WORDS, picture_model

PAD = "<|endoftext|>"


def glm(width: int) -> tuple[PreTrainedTokenizerFast, GlmModel]:
    """Its tokenizer, which puts two tokens and padding in front of a text and no token behind it, and a decoder."""
    vocabulary = {word: k for k, word in enumerate((PAD, "[gMASK]", "<sop>", "<unk>", "!", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 1), ("<sop>", 2)]
    )
    marks = {"pad_token": PAD, "eos_token": PAD, "unk_token": "<unk>", "padding_side": "left"}
    config = GlmConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=0,
        max_position_embeddings=128,
        initializer_range=0.3,  # else a token hardly sees the others
    )
    model = GlmModel(config).eval()
    torch.nn.init.normal_(model.embed_tokens.weight, std=1.0)
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=128, **marks), model


def cogview4() -> CogView4Pipeline:
    """A decoder's text, padding and all, joins the picture; unconditional predictions have a call of their own."""
    words, encoder = glm(24)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    ).eval()
    for name, weight in transformer.named_parameters():
        if ("text_proj" in name or ".to_v." in name) and name.endswith("weight"):
            weight.data *= 4
    return CogView4Pipeline(
        tokenizer=words,
        text_encoder=encoder,
        vae=picture_model(shift_factor=0.0),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )


BUILDERS = {"cogview4": cogview4}
EACH = ("cogview4",)
