"""One block with joint attention at its true width, with and without EIUP's carried texts.

Random weights; one picture of 4,096 columns, and a text of the true length and width from a small encoder. The first
prediction stands for a step: every block of a kind costs the same. A ratio says nothing of outcomes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextModelWithProjection

import efface
from efface import Concept
from efface.testing import tiny

from ..gpu_check import PHRASES, PROMPT, clip, t5_xxl, vae

SEED = 1_000_000
SIDE = 128  # of the latents, which makes 4,096 columns


@dataclass(frozen=True)
class Scene:
    """A pipeline whose transformer has few blocks, and the arguments of one call of it, for `rows`."""

    pipe: Any
    arguments: dict[str, Any]
    rows: list[bool]


def scene(make: Callable[[bool], tuple[Any, dict[str, Any], list[bool]]], small: bool = False) -> Scene:
    """Built with the same random weights and latents each time. `small`: a tiny pipeline, to try the code."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(SEED)
        pipe, arguments, rows = make(small)
    pipe.transformer.eval()
    return Scene(pipe, arguments, rows)


def flux(double: int, single: int, small: bool) -> tuple[Any, dict[str, Any], list[bool]]:
    """Blocks of FLUX.1 dev, without true guidance."""
    if small:
        pipe, side, length = tiny.pipeline("flux"), 4, 24
    else:
        (tokens, encoder), (words, encoder_2) = clip(768), t5_xxl()
        pipe = FluxPipeline(
            vae=vae(16, shift_factor=0.0),
            text_encoder=encoder,
            tokenizer=tokens,
            text_encoder_2=encoder_2,
            tokenizer_2=words,
            transformer=FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        )
        side, length = SIDE // 2, 512
    text, pooled, ids = pipe.encode_prompt(PROMPT, device="cpu", max_sequence_length=length)
    arguments = {
        "hidden_states": torch.randn(1, side * side, pipe.transformer.config.in_channels),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": pipe._prepare_latent_image_ids(1, side, side, "cpu", text.dtype),
        "txt_ids": ids,
    }
    return pipe, arguments, [True]


def sd35(small: bool) -> tuple[Any, dict[str, Any], list[bool]]:
    """A whole block and the last one, whose text goes no further, of SD 3.5 Large, with guidance."""
    if small:
        pipe, side, length = tiny.pipeline("sd35"), 8, 24
    else:
        (tokens, encoder), (tokens_2, encoder_2) = (clip(n, CLIPTextModelWithProjection) for n in (768, 1280))
        words, encoder_3 = t5_xxl()
        transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=38,
            joint_attention_dim=4096,
            caption_projection_dim=64 * 38,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        )
        pipe = StableDiffusion3Pipeline(
            vae=vae(16, shift_factor=0.0),
            text_encoder=encoder,
            tokenizer=tokens,
            text_encoder_2=encoder_2,
            tokenizer_2=tokens_2,
            text_encoder_3=encoder_3,
            tokenizer_3=words,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        side, length = SIDE, 256
    text, null, pooled, null_pooled = pipe.encode_prompt(PROMPT, None, None, device="cpu", max_sequence_length=length)
    arguments = {
        "hidden_states": torch.randn(1, pipe.transformer.config.in_channels, side, side).expand(2, -1, -1, -1),
        "encoder_hidden_states": torch.cat([null, text]),
        "pooled_projections": torch.cat([null_pooled, pooled]),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    return pipe, arguments, [False, True]


@torch.no_grad()
def seconds(phrases: int, scene: Scene) -> tuple[float, Tensor]:
    """Of one call of the transformer, with EIUP on so many phrases or, for 0, without it; and its prediction on the
    conditional row."""
    eraser = efface.EIUP(Concept("several", PHRASES[:phrases])) if phrases else None
    handle = eraser.apply(scene.pipe) if eraser else None
    try:
        with efface.conditional_rows(scene.pipe, scene.rows):
            start = time.perf_counter()
            out = scene.pipe.transformer(**scene.arguments, return_dict=False)[0]
            return time.perf_counter() - start, out[-1:].clone()
    finally:
        if handle is not None:
            handle.remove()
