"""Stage 3: the UNet. `python train_unet.py --minutes 80`; the same command resumes, `--init FILE` starts from weights.

Draws a pool of scenes once (latents and text states in fp16, `work/pool-0.safetensors`), then trains an eps-predicting
`UNet2DConditionModel` with min-SNR-5 weighting and caption dropout. Checkpoints write `work/unet_ema.safetensors`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import scenes
import torch
import training
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_vae import pictures

from efface.models.emoji import SCHEDULER, text_encoder
from efface.models.emoji.vae import EmojiVAE

SEED = 23
CONFIG = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (128, 192),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 384,
    "attention_head_dim": 4,
}


@torch.no_grad()
def text_states(captions: list[str]) -> Tensor:
    """[N, 24, 384] in fp16, as the pipeline's `encode_prompt` gives them."""
    tokenizer, encoder = text_encoder()
    out = []
    for k in range(0, len(captions), 256):
        ids = tokenizer(
            captions[k : k + 256], padding="max_length", max_length=24, truncation=True, return_tensors="pt"
        )
        with torch.autocast("cpu", torch.bfloat16):
            out.append(encoder(ids.input_ids, attention_mask=ids.attention_mask)[0].half())
    return torch.cat(out)


@torch.no_grad()
def make_pool(path: Path, size: int, seed: int) -> None:
    sheets, rng = scenes.icons(), np.random.default_rng([SEED, seed])
    vae = EmojiVAE.from_pretrained(scenes.WORK / "vae").float().to(memory_format=torch.channels_last)
    latents, captions, start = [], [], time.time()
    for _ in range(0, size, 500):
        images, drawn = scenes.batch(rng, sheets, 500)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(pictures(images).contiguous(memory_format=torch.channels_last)).latents
        latents.append((z.float() * vae.config.scaling_factor).half().contiguous())
        captions += [s.caption for s in drawn]
    print(f"pool: {size} scenes in {time.time() - start:.0f} s", flush=True)
    distinct = ["", *sorted(set(captions) - {""})]
    index = {c: k for k, c in enumerate(distinct)}
    states = text_states(distinct)
    print(f"pool: {len(distinct)} captions encoded, {time.time() - start:.0f} s in all", flush=True)
    tensors = {"latents": torch.cat(latents), "caption": torch.tensor([index[c] for c in captions]), "states": states}
    save_file(tensors, path.with_suffix(".partial"), {"vocabulary": scenes.vocabulary_hash(), "seed": str(seed)})
    os.replace(path.with_suffix(".partial"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--pool", type=int, default=90_000)
    parser.add_argument("--pool-seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="start from these weights with a fresh optimiser")
    parser.add_argument("--name", default="unet")
    args = parser.parse_args()
    path = scenes.WORK / f"pool-{args.pool_seed}.safetensors"
    if not path.exists():
        make_pool(path, args.pool, args.pool_seed)
    with safe_open(path, "pt") as f:
        if f.metadata()["vocabulary"] != scenes.vocabulary_hash():
            raise SystemExit(f"{path} was drawn from another vocabulary. Delete it and run again")
    pool = load_file(path)
    latents, caption, states = pool["latents"], pool["caption"], pool["states"]
    spread = float(states[:1000].float().std())

    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**CONFIG)
    if args.init:
        unet.load_state_dict({k: v.float() for k, v in load_file(args.init).items()})
    unet.set_attn_processor(AttnProcessor())  # the fused bf16 backward is slower than this one on CPUs
    noise_schedule = DDIMScheduler(**SCHEDULER)
    alphas = noise_schedule.alphas_cumprod
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=5) / snr

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        rows = torch.randint(len(latents), (args.batch,), generator=rng)
        z = latents[rows].float()
        which = caption[rows] * (torch.rand(args.batch, generator=rng) > 0.12)  # caption 0 is the empty one
        text = states[which].float()
        # A little noise on the text states, so that near meanings draw near pictures.
        text = text + 0.15 * spread * torch.randn(text.shape, generator=rng)
        t = torch.randint(1000, (args.batch,), generator=rng)
        noise = torch.randn(z.shape, generator=rng)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noise_schedule.add_noise(z, noise, t), t, text).sample
        return ((predicted.float() - noise).square().mean((1, 2, 3)) * weight[t]).mean()

    def write(ema: dict[str, Tensor], step: int) -> None:
        metadata = {
            "config": json.dumps(CONFIG),
            "progress": json.dumps(
                {
                    "step": step,
                    "batch": args.batch,
                    "seed": SEED,
                    "pool": args.pool,
                    "pool_seed": args.pool_seed,
                    "init": str(args.init or ""),
                }
            ),
        }
        save_file({k: v.contiguous() for k, v in ema.items()}, scenes.WORK / "unet_ema.partial", metadata)
        os.replace(scenes.WORK / "unet_ema.partial", scenes.WORK / "unet_ema.safetensors")

    training.train(
        args.name,
        scenes.WORK,
        unet,
        loss_of,
        minutes=args.minutes,
        lr=args.lr,
        images=args.batch,
        ema_decay=0.9995,
        on_checkpoint=write,
    )


if __name__ == "__main__":
    main()
