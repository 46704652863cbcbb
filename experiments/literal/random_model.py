"""Pipelines with random weights of the sizes that are measured, scaled so that the text matters."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from efface.models.emoji import SCHEDULER

SEED = 1_000_000
GAIN = 3  # on all projections of cross-attention: sharper attention, more of it in the output

UNETS: dict[str, dict[str, Any]] = {
    # Stable Diffusion 1.5: 64 x 64 latents, text of width 768, 8 heads (the config calls them `attention_head_dim`).
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    # Small, to try the script on.
    "tiny": {
        "sample_size": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    },
}


def random_pipeline(unet: dict[str, Any], tokens: int = 77) -> Any:
    """A `StableDiffusionPipeline` without VAE around a random UNet.

    The tokenizer is a real one, in which each letter is a token; the text model is CLIP's, with one random layer.

    Args:
        unet: config of the UNet.
        tokens: length of a text.
    """
    logging.set_verbosity_error()  # importing the pipeline without torchvision prints warnings
    from diffusers import StableDiffusionPipeline

    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocabulary = {token: k for k, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tokens)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=unet["cross_attention_dim"],
        intermediate_size=unet["cross_attention_dim"],
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        encoder, denoiser = CLIPTextModel(config).eval(), UNet2DConditionModel(**unet).eval()
        for name, weight in denoiser.named_parameters():
            if ".attn2.to_" in name and name.endswith("weight"):
                weight *= GAIN
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
