"""Stage 1: the autoencoder. `python train_vae.py --minutes 30`; the same command resumes."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import scenes
import torch
import training
from torch import Tensor

from efface.models.emoji.vae import EmojiVAE

SEED = 11


def pictures(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + L2 + differences of neighbours, so that lines stay sharp."""
    loss = (y - x).abs().mean() + 2 * (y - x).square().mean()
    for a, b in zip(gradient(y), gradient(x), strict=True):
        loss = loss + (a - b).abs().mean() + 2 * (a - b).square().mean()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decoder-of", type=Path, help="keep the encoder of this autoencoder, train its decoder on")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    sheets = scenes.icons()
    vae = EmojiVAE(latent_channels=args.channels)
    if args.decoder_of:  # latents stay what they are, so a UNet trained on them stays valid
        vae = EmojiVAE.from_pretrained(args.decoder_of).float()
        vae.encoder.requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    held, _ = scenes.batch(np.random.default_rng(9_999), sheets, 256)
    held_x = pictures(held)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([SEED, step])
        # The UNet draws noto only; the other two sets are here so that the eyes meet honest reconstructions of them.
        which = scenes.SETS if step % 3 == 0 else ("noto",)
        x = pictures(scenes.batch(rng, sheets, args.batch, which)[0]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encoder(x).float()
            y = vae.decoder(z + 0.05 * torch.randn_like(z)).float()
        # Latents near unit scale and zero mean: the noise above is then 5 %.
        keep = (z.std() - 1).square() + z.mean((0, 2, 3)).square().mean()
        return reconstruction_loss(y, x) + 0.05 * keep

    def show(ema: dict[str, Tensor], step: int) -> None:
        copy = EmojiVAE(latent_channels=args.channels)
        copy.load_state_dict(ema)
        with torch.no_grad():
            y = copy(held_x)
            z = copy.encoder(held_x)
        psnr = -10 * torch.log10(((y - held_x) / 2).square().mean((1, 2, 3))).mean()
        print(f"vae held-out PSNR {psnr:.2f} dB, latent std {z.std():.3f}", flush=True)
        back = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        rows = np.concatenate([p for k in range(0, 56, 14) for p in (held[k : k + 14], back[k : k + 14])])
        scenes.sheet(rows, 14).save(scenes.WORK / "vae.png")

    ema = training.train(
        "vae", scenes.WORK, vae, loss_of, minutes=args.minutes, lr=args.lr, images=args.batch, on_checkpoint=show
    )
    final = EmojiVAE(latent_channels=args.channels)
    final.load_state_dict(ema)
    with torch.no_grad():
        x = pictures(scenes.batch(np.random.default_rng(9_998), sheets, 2048)[0])
        std = float(torch.cat([final.encoder(p) for p in x.split(256)]).std())
    scaling_factor = vae.config.scaling_factor if args.decoder_of else round(1 / std, 5)
    final.register_to_config(scaling_factor=scaling_factor)
    final.half().save_pretrained(scenes.WORK / "vae")
    size = sum(p.numel() for p in final.parameters()) / 1e6
    print(f"vae saved, scaling_factor {scaling_factor:.4f}, {size:.2f} M parameters")


if __name__ == "__main__":
    main()
