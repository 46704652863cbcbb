"""The denoisers of the 128-pixel models: their shapes, losses and samplers, and the text encoder they read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from data import MODEL
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from efface.models import emoji128
from efface.models.emoji128 import FLOW_SCHEDULER, MAX_TOKENS, SCHEDULER

CHANNELS, SIDE, WIDTH = 8, 16, 384  # of the latents; of the text states
_CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
UNET: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": (96, 128, 192),
    "layers_per_block": 1,
    "down_block_types": (_CROSS[0],) * 3,
    "up_block_types": (_CROSS[1],) * 3,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
}
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4 * CHANNELS,
    "num_layers": 3,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 7,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
SEED = 23  # of the UNet and of its twin
FLUX_SEED = 31
TEXT_NOISE = 0.15  # of the spread of the text states, so that near meanings draw near pictures


# ---------------------------------------------------------------- text


def pack_text(folder: Path, texts: Sequence[str]) -> int:
    """Writes tokenizer and text encoder in fp16 into `folder`, with the embeddings of the tokens of `texts` only."""
    tokenizer, encoder = emoji128.text_encoder()
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token for row in tokenizer(list(texts)).input_ids for token in row} | set(tokenizer.all_special_ids)
    kept = torch.tensor(sorted(ids))
    weights = {name: t.half().contiguous() for name, t in encoder.state_dict().items() if t.is_floating_point()}
    table = "embeddings.word_embeddings.weight"
    weights[table] = weights[table][kept].contiguous()
    save_file(weights | {"kept": kept}, folder / "encoder.safetensors")
    (folder / "config.json").write_text(encoder.config.to_json_string(use_diff=False), "utf-8")
    tokenizer.save_pretrained(folder)
    return len(kept)


def load_text(folder: Path | None, device: torch.device) -> tuple[Any, nn.Module, Tensor]:
    """Tokenizer, text encoder, and which token ids it knows: all of them without a `folder` of `pack_text`."""
    if folder is None:
        tokenizer, encoder = emoji128.text_encoder()
        return tokenizer, encoder.to(device), torch.ones(len(tokenizer), dtype=torch.bool)
    from transformers import BertConfig

    from efface.models.emoji128.text import EmojiTextEncoder, EmojiTokenizer

    tokenizer = EmojiTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    encoder = EmojiTextEncoder(BertConfig.from_json_file(folder / "config.json"))
    weights = {
        name: t.float() if t.is_floating_point() else t for name, t in load_file(folder / "encoder.safetensors").items()
    }
    kept, table = weights.pop("kept"), "embeddings.word_embeddings.weight"
    whole = torch.zeros_like(encoder.state_dict()[table])
    whole[kept] = weights[table]
    missing, unexpected = encoder.load_state_dict(weights | {table: whole}, strict=False)
    if unexpected or any("position_ids" not in name for name in missing):
        raise SystemExit(f"{folder} does not hold the text encoder: missing {missing}, unexpected {unexpected}")
    known = torch.zeros(len(whole), dtype=torch.bool)
    known[kept] = True
    return tokenizer, encoder.eval().to(device), known


class Texts:
    """Text states of captions, as the pipelines encode them.

    Args:
        folder: of `pack_text`; None takes the installed package.
        device: where the encoder runs and the states lie.
    """

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self.tokenizer, self.encoder, self.known = load_text(folder, device)
        self.device = device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], size: int = 2048) -> tuple[Tensor, Tensor]:
        """Token states fp16 [N, 24, 384] and the means of the texts' own states fp16 [N, 384]."""
        states, pooled = [], []
        for k in range(0, len(texts), size):
            some = list(texts[k : k + size])
            ids = self.tokenizer(
                some, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
            ).input_ids
            if not self.known[ids].all():
                bad = next(t for t, row in zip(some, ids, strict=True) if not self.known[row].all())
                raise SystemExit(f"The packed text encoder lacks a token of {bad!r}: pack it again with this text.")
            out = self.encoder(ids.to(self.device))
            states.append(out.last_hidden_state.half())
            pooled.append(out.pooler_output.half())
        return torch.cat(states), torch.cat(pooled)


# ---------------------------------------------------------------- losses


def pack(z: Tensor) -> Tensor:
    """Latents [N, 8, 16, 16] to FLUX's tokens [N, 64, 32]: 2 x 2 places side by side."""
    n, c, h, w = z.shape
    return z.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor) -> Tensor:
    """FLUX's tokens [N, 64, 32] to latents [N, 8, 16, 16]."""
    n, half = len(tokens), SIDE // 2
    return tokens.view(n, half, half, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, CHANNELS, SIDE, SIDE)


def image_ids(device: torch.device | str) -> Tensor:
    """FLUX's places of the 64 picture tokens."""
    k = torch.arange((SIDE // 2) ** 2, device=device)
    return torch.stack([torch.zeros_like(k), k // (SIDE // 2), k % (SIDE // 2)], 1).float()


Forward = Callable[..., Any]
Loss = Callable[[Forward, Tensor, Tensor, Tensor, torch.Generator], Tensor]


def unet_loss(device: torch.device, floor: float = 0.0) -> Loss:
    """v-prediction with min-SNR-5 weights, none below `floor`."""
    schedule = DDIMScheduler(**{k: v for k, v in SCHEDULER.items() if k.startswith(("beta", "num", "prediction"))})
    alphas = schedule.alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    weight = (snr.clamp(max=5) / (snr + 1)).clamp(min=floor)

    def loss(net: Forward, z: Tensor, text: Tensor, pooled: Tensor, rng: torch.Generator) -> Tensor:
        t = torch.randint(len(alphas), (len(z),), generator=rng, device=device)
        noise = torch.randn(z.shape, generator=rng, device=device)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            predicted = net(a * z + s * noise, t, text, return_dict=False)[0]
        return ((predicted.float() - (a * noise - s * z)).square().mean((1, 2, 3)) * weight[t]).mean()

    return loss


def flux_loss(device: torch.device, bf16: bool = False) -> Loss:
    """Rectified flow with logit-normal times, shifted as the scheduler shifts them.

    Args:
        device: of the training.
        bf16: whether a GPU computes in bfloat16; a CPU always does. On one NVIDIA H200 with torch 2.11, FLUX's backward
            pass died in bfloat16, compiled and not ("illegal memory access", CUBLAS_STATUS_EXECUTION_FAILED).
    """
    places, text_ids = image_ids(device), torch.zeros(MAX_TOKENS, 3, device=device)
    shift = torch.tensor(FLOW_SCHEDULER["shift"], device=device).log()

    def loss(net: Forward, z: Tensor, text: Tensor, pooled: Tensor, rng: torch.Generator) -> Tensor:
        z = pack(z)
        t = torch.sigmoid(torch.randn(len(z), generator=rng, device=device) + shift)
        noise = torch.randn(z.shape, generator=rng, device=device)
        x = torch.lerp(z, noise, t[:, None, None])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16 or device.type == "cpu"):
            predicted = net(
                hidden_states=x,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=t,
                img_ids=places,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        return (predicted.float() - (noise - z)).square().mean()

    return loss


def build(kind: str) -> nn.Module:
    """A denoiser with fresh weights, the same ones each time: "unet", "twin" (a UNet) or "flux"."""
    if kind == "flux":
        torch.manual_seed(FLUX_SEED)
        return FluxTransformer2DModel(**FLUX)
    torch.manual_seed(SEED)
    return UNet2DConditionModel(**UNET)


# ---------------------------------------------------------------- drawing


@torch.no_grad()
def draw(
    kind: str,
    net: Forward,
    condition: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    seed: int,
    guidance: float,
    steps: int = 20,
) -> Tensor:
    """Scaled latents [N, 8, 16, 16] of N texts, with seeds from `seed` on, as the pipelines draw them.

    Args:
        kind: of the denoiser.
        net: the denoiser.
        condition: token and pooled states of the texts.
        empty: those of the empty text, with N = 1.
        seed: picture k starts from the noise of `seed` + k, whatever the device.
        guidance: scale; at 1 the empty text is left out.
        steps: of DPM-Solver++ (UNet) or Euler (FLUX).
    """
    text, pooled = (t.float() for t in condition)
    device, n = text.device, len(text)
    start = [torch.randn(CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed + k)) for k in range(n)]
    x = torch.stack(start).to(device)
    twice = guidance != 1
    if twice:
        text = torch.cat([empty[0].float().expand(n, -1, -1), text])
        pooled = torch.cat([empty[1].float().expand(n, -1), pooled])

    def guided(predict: Forward, x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = predict(torch.cat([x, x]) if twice else x).float()
        if not twice:
            return out
        without, with_text = out.chunk(2)
        return without + guidance * (with_text - without)

    if kind != "flux":
        scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
        scheduler.set_timesteps(steps, device=device)
        for t in scheduler.timesteps:
            v = guided(lambda rows, t=t: net(rows, t, text, return_dict=False)[0], x)
            x = scheduler.step(v, t, x, return_dict=False)[0]
        return x
    import numpy as np

    flow = FlowMatchEulerDiscreteScheduler(**FLOW_SCHEDULER)
    flow.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)
    places, text_ids, tokens = image_ids(device), torch.zeros(text.shape[1], 3, device=device), pack(x)
    for t in flow.timesteps:

        def predict(rows: Tensor, t: Tensor = t) -> Tensor:
            return net(
                hidden_states=rows,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=(t / 1000).expand(len(rows)),
                img_ids=places,
                txt_ids=text_ids,
                return_dict=False,
            )[0]

        tokens = flow.step(guided(predict, tokens), t, tokens, return_dict=False)[0]
    return unpack(tokens)


def config_of(kind: str) -> str:
    return json.dumps(FLUX if kind == "flux" else UNET)


__all__ = ["MODEL", "Texts", "build", "config_of", "draw", "flux_loss", "pack", "pack_text", "unet_loss", "unpack"]
