"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from .parts import QWEN, TEXT, decoder_words, picture_model


def zimage() -> ZImagePipeline:
    """One stream of picture and text, in lists; prompts before negative prompts."""
    words = decoder_words(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), chat_template=QWEN)
    encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), max_position_embeddings=128, **TEXT)).eval()
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    ).eval()
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad, std=0.5)
    for name, weight in transformer.named_parameters():
        if "layers." in name and ("to_q" in name or "to_k" in name or "to_v" in name):
            weight.data *= 2.5
    return ZImagePipeline(
        vae=picture_model(shift_factor=0.0),
        text_encoder=encoder,
        tokenizer=words,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    return {"max_sequence_length": 64, "height": 16, "width": 16, **given}


BUILDERS = {"zimage": zimage}
EACH = ()
PIPELINES = (ZImagePipeline,)
