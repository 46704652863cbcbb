"""Sana."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import processors
from transformers import Gemma2Config, Gemma2Model

from .parts import decoder_words

INSTRUCTION = ["a night of", "the moon and "]


def sana(qk_norm: str | None = None) -> SanaPipeline:
    """A decoder's text after an instruction, projected, normalised and masked; linear self-attention."""
    words = decoder_words(("<pad>", "<bos>"))
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=8,
        qk_norm=qk_norm,
    ).eval()
    for name, weight in transformer.named_parameters():
        if ".attn2.to_" in name and name.endswith("weight"):
            weight.data *= 2.5
    encoder = Gemma2Model(config).eval()
    torch.nn.init.normal_(encoder.embed_tokens.weight, std=0.3)
    channels = {"encoder_block_out_channels": (4, 4, 4), "decoder_block_out_channels": (4, 4, 4)}
    depth = {"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1)}
    scales = {"encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ())}
    return SanaPipeline(
        tokenizer=words,
        text_encoder=encoder,
        vae=AutoencoderDC(latent_channels=4, attention_head_dim=4, **channels, **depth, **scales).eval(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sana15() -> SanaPipeline:
    """As 1.5 is built, with a norm of queries and keys across heads."""
    return sana(qk_norm="rms_norm_across_heads")


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    own = {"use_resolution_binning": False, "clean_caption": False, "height": 32, "width": 32}
    return {**own, "max_sequence_length": 24, "complex_human_instruction": INSTRUCTION, **given}


BUILDERS = {"sana": sana, "sana15": sana15}
EACH = ("sana",)
PIPELINES = (SanaPipeline,)
