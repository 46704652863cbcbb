"""Stage 2: the two judges. `python train_eyes.py --minutes 8 --eye 0`, the same with `--eye 1`, then `--freeze`.

Training resumes with the same command. `--freeze` calibrates one threshold per eye and concept on held-out autoencoder
reconstructions and writes `eyes.safetensors` and `eyes.json` into the package: do it before any erasure run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
import torch.nn.functional as F
import training
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from efface.models.emoji.eyes import GENDERED, ICONS, INDEX, STYLES, WIDTHS, Eye, Eyes, Seen
from efface.models.emoji.vae import EmojiVAE
from efface.models.emoji.weights import FOLDER, sha256

SEEDS, STRENGTHS = (101, 202), (1.0, 0.6)
HELD = 70_000  # seed of the scenes that thresholds are frozen on
# noto twice: it is the set the diffusion model draws.
SETS = ("noto", "noto", "twemoji", "fluent")
KINDS = {"single": 0.34, "profession": 0.12, "pair": 0.40, "theme": 0.14}
EMPTY = ("ground", "blank", "grey", "white noise", "smooth noise", "random latents", "scrambled latents")
FLOOR, CEILING, FALSE_ALARMS = 0.30, 0.99, 0.01


# ---------------------------------------------------------------- pictures


def ema_of(path: Path) -> dict[str, Tensor]:
    """The EMA weights in a training checkpoint."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: train it first")
    with safe_open(path, "pt") as file:
        return {k.removeprefix("ema."): file.get_tensor(k) for k in file.keys() if k.startswith("ema.")}  # noqa: SIM118


def load_vae() -> EmojiVAE:
    """The finished autoencoder, or the EMA of its latest checkpoint while it is still in training."""
    if (scenes.WORK / "vae").exists():
        vae = EmojiVAE.from_pretrained(scenes.WORK / "vae").float()
    else:
        weights = ema_of(scenes.WORK / "vae.safetensors")
        vae = EmojiVAE(latent_channels=weights["decoder.0.weight"].shape[1])
        vae.load_state_dict(weights)
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def unit(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def decode(vae: EmojiVAE, z: Tensor) -> Tensor:
    """Latents to pictures in [0, 1]."""
    return ((vae.decoder(z).float() + 1) / 2).clamp(0, 1)


@torch.no_grad()
def reconstruct(vae: EmojiVAE, x: Tensor, noise: Tensor | float = 0.0, smooth: Tensor | float = 0.0) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1] through the autoencoder.

    A share `smooth` [N, 1, 1, 1] of the latents is the mean of the neighbourhood, which blurs as a diffusion model does
    that is unsure where an edge runs; then `noise` [N, C, h, w] is added.
    """
    z = vae.encoder((2 * x - 1).contiguous(memory_format=torch.channels_last)).float()
    around = F.avg_pool2d(z, 3, 1, 1, count_include_pad=False)
    return decode(vae, z + smooth * (around - z) + noise)


def draw(
    rng: np.random.Generator, sheets: dict[str, np.ndarray], n: int, sets: tuple[str, ...], mix: bool = True
) -> tuple[Tensor, Seen]:
    """`n` scenes [n, 3, 64, 64] in [0, 1] and what is in them; styles, watermarks and genders evener than for captions.

    With `mix`, some pairs swap their right halves, so that any icons, grounds and styles meet.
    """
    drawn = []
    for _ in range(n):
        scene = scenes.sample_scene(rng, KINDS)
        style = str(rng.choice(STYLES)) if rng.random() < 0.5 else scene.style
        icons = scene.icons
        if scene.kind == "profession":  # as many women as men, whatever the bias of the job
            icons = (str(rng.choice(GENDERED[GENDERED.index(icons[0]) // 2 * 2 :][:2])),)
        drawn.append(replace(scene, icons=icons, style=style, watermark=bool(rng.random() < 0.25)))
    images = np.stack([scenes.draw(s, sheets, rng, sets[rng.integers(len(sets))]) for s in drawn])
    names = [list(s.icons) for s in drawn]
    styles = torch.zeros(n, len(STYLES))
    styles[range(n), [STYLES.index(s.style) for s in drawn]] = 1
    halves = [k for k, s in enumerate(drawn) if len(s.icons) == 2 and not s.watermark and mix and rng.random() < 0.3]
    others = halves[1:] + halves[:1]
    images[halves, :, 32:] = images[others, :, 32:]
    styles[halves] = (styles[halves] + styles[others]) / 2
    for k, right in zip(halves, [names[k][1] for k in others], strict=True):
        names[k] = [names[k][0], right]
    icons = torch.zeros(n, len(ICONS))
    for k, present in enumerate(names):
        icons[k, [INDEX[name] for name in present]] = 1
    return unit(images), Seen(icons, styles, torch.tensor([float(s.watermark) for s in drawn]))


def empty(
    kind: str, rng: np.random.Generator, n: int, vae: EmojiVAE, sheets: dict[str, np.ndarray]
) -> tuple[Tensor, Tensor]:
    """`n` pictures with nothing in them, and their styles [n, 5], flat where there is none to see."""
    flat = torch.full((n, len(STYLES)), 1 / len(STYLES))
    if kind == "ground":
        which = [STYLES[k] for k in rng.integers(len(STYLES), size=n)]
        images = np.stack([scenes._ground(s, rng) for s in which])
        for k, style in enumerate(which):
            if style in ("blueprint", "pixel art"):  # grid and checks tell; the other grounds are mere colours
                flat[k] = F.one_hot(torch.tensor(STYLES.index(style)), len(STYLES)).float()
        return torch.from_numpy(images).permute(0, 3, 1, 2).float(), flat
    if kind in ("blank", "grey"):
        colours = rng.random((n, 3 if kind == "blank" else 1, 1, 1), np.float32)
        return torch.from_numpy(np.broadcast_to(colours, (n, 3, 64, 64)).copy()), flat
    if kind == "white noise":
        spread = rng.random((n, 1, 1, 1), np.float32) * 0.5
        channels = 3 if rng.random() < 0.7 else 1
        noise = rng.standard_normal((n, channels, 64, 64), np.float32) * spread + rng.random((n, channels, 1, 1))
        return torch.from_numpy(noise).float().expand(n, 3, 64, 64).clamp(0, 1), flat
    if kind == "smooth noise":
        images = torch.empty(n, 3, 64, 64)
        for k in range(n):
            cells = int(rng.integers(2, 17))
            small = torch.from_numpy(rng.standard_normal((1, 3, cells, cells), np.float32)) * float(rng.random()) * 0.5
            base = torch.from_numpy(rng.random((3, 1, 1), np.float32))
            images[k] = F.interpolate(small, (64, 64), mode="bicubic")[0] + base
        return images.clamp(0, 1), flat
    if kind == "random latents":
        channels = vae.config.latent_channels
        cells = int(rng.choice([2, 4, 8, 8, 8]))
        z = torch.from_numpy(rng.standard_normal((n, channels, cells, cells), np.float32))
        z = F.interpolate(z, (8, 8), mode="bilinear") * torch.from_numpy(rng.uniform(0.3, 1.5, (n, 1, 1, 1))).float()
        return decode(vae, z), flat
    if kind == "scrambled latents":
        x, seen = draw(rng, sheets, n, ("noto",), mix=False)
        with torch.no_grad():
            z = vae.encoder((2 * x - 1).contiguous(memory_format=torch.channels_last)).float()
        order = torch.from_numpy(np.stack([rng.permutation(64) for _ in range(n)]))[:, None].expand(z.flatten(2).shape)
        return decode(vae, z.flatten(2).gather(2, order).view(z.shape)), seen.styles
    raise ValueError(f"unknown kind {kind!r}; expected one of {EMPTY}")


def roughen(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Small shifts, zooms, blur of up to a pixel, brightness, contrast, tint and pixel noise, different for each
    picture."""
    n = len(x)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    moved = (uniform(1) < 0.5).float() * strength
    theta = torch.zeros(n, 2, 3)
    theta[:, [0, 1], [0, 1]] = 1 + moved * 0.12 * (2 * uniform(1) - 1)
    theta[:, :, 2] = moved * 0.12 * (2 * uniform(2) - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    line = torch.tensor([0.0545, 0.2442, 0.4026, 0.2442, 0.0545])  # a Gaussian of one pixel
    blurred = F.conv2d(F.pad(x, (2, 2, 2, 2), "replicate"), torch.outer(line, line).expand(3, 1, 5, 5), groups=3)
    x = x.lerp(blurred, uniform(1, 1, 1) * (uniform(1, 1, 1) < 0.5) * min(strength * 1.2, 1))
    x = (x - 0.5) * (1 + 0.25 * strength * (2 * uniform(1, 1, 1) - 1)) + 0.5
    x = x + 0.1 * strength * (2 * uniform(1, 1, 1) - 1) + 0.05 * strength * (2 * uniform(3, 1, 1) - 1)
    x = x + 0.1 * strength * uniform(1, 1, 1) ** 2 * torch.randn(x.shape, generator=generator)
    return x.clamp(0, 1)


def mixed_batch(eye: int, step: int, n: int, vae: EmojiVAE, sheets: dict[str, np.ndarray]) -> tuple[Tensor, Seen]:
    """About `n` pictures for training: five sixths scenes, of which two thirds decoded, and empty ones of each kind."""
    rng = np.random.default_rng([SEEDS[eye], step])
    generator = torch.Generator().manual_seed(SEEDS[eye] * 10_000_019 + step)
    each = max(n // 6 // len(EMPTY), 1)
    x, target = draw(rng, sheets, n - each * len(EMPTY), SETS)
    decoded = len(x) * 2 // 3
    size = torch.rand(decoded, 1, 1, 1, generator=generator)
    size = 0.5 * STRENGTHS[eye] ** 0.5 * size**1.5 * (torch.rand(decoded, 1, 1, 1, generator=generator) < 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        noise = size * torch.randn(decoded, vae.config.latent_channels, 8, 8, generator=generator)
        smooth = torch.rand(decoded, 1, 1, 1, generator=generator)
        smooth = 0.7 * smooth * (torch.rand(decoded, 1, 1, 1, generator=generator) < 0.4)
        x[:decoded] = reconstruct(vae, x[:decoded], noise, smooth)
        nothing = [empty(kind, rng, each, vae, sheets) for kind in EMPTY]
    x = torch.cat([x, *(images for images, _ in nothing)])
    icons = torch.cat([target.icons, torch.zeros(each * len(EMPTY), len(ICONS))])
    styles = torch.cat([target.styles, *(flat for _, flat in nothing)])
    watermark = torch.cat([target.watermark, torch.zeros(each * len(EMPTY))])
    return roughen(x, STRENGTHS[eye], generator), Seen(icons, styles, watermark)


def loss_of(logits: tuple[Tensor, Tensor, Tensor], target: Seen) -> Tensor:
    icons, styles, watermark = logits
    loss = F.binary_cross_entropy_with_logits(icons, target.icons, reduction="none").sum(1).mean()
    loss = loss + F.cross_entropy(styles, target.styles)
    return loss + 2 * F.binary_cross_entropy_with_logits(watermark, target.watermark)


# ---------------------------------------------------------------- train


def train(eye: int, minutes: float, size: int, work: Path, init: Path | None) -> None:
    torch.manual_seed(SEEDS[eye])
    sheets, vae = scenes.icons(), load_vae()
    model = Eye(WIDTHS[eye])
    if init:
        stored = {k.removeprefix(f"{eye}."): v.float() for k, v in load_file(init).items() if k.startswith(f"{eye}.")}
        model.load_state_dict(stored, strict=False)  # without BatchNorm's count of batches, which nothing reads
    model.to(memory_format=torch.channels_last)
    x, held = draw(np.random.default_rng(HELD + 1), sheets, 512, ("noto",), mix=False)
    held_x = reconstruct(vae, x)

    def loss(step: int) -> Tensor:
        images, target = mixed_batch(eye, step, size, vae, sheets)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logits(images.contiguous(memory_format=torch.channels_last))
        return loss_of(logits, target)

    def show(ema: dict[str, Tensor], step: int) -> None:
        copy: nn.Module = Eye(WIDTHS[eye])
        copy.load_state_dict(ema)
        with torch.no_grad():
            seen = copy.eval()(held_x)
        there, named = held.icons > 0.5, seen.icons > 0.5
        hits = (there & named).sum()
        right = (seen.styles.argmax(1) == held.styles.argmax(1)).float().mean()
        marks = ((seen.watermark > 0.5) == (held.watermark > 0.5)).float().mean()
        print(
            f"eye {eye} held-out recall {hits / there.sum():.3f} precision {hits / named.sum().clamp_min(1):.3f} "
            f"style {right:.3f} watermark {marks:.3f}",
            flush=True,
        )

    training.train(f"eye{eye}", work, model, loss, minutes=minutes, lr=2e-3, images=size, on_checkpoint=show)


# ---------------------------------------------------------------- freeze


def choose(scores: Tensor, truth: Tensor, nothing: list[Tensor]) -> Tensor:
    """Thresholds [C] with the best F1 on `scores` [N, C], among those with few false alarms on each kind of nothing.

    Where a range of thresholds is equally good, its middle is taken.
    """
    grid = torch.arange(FLOOR, CEILING + 1e-6, 0.01)
    named = scores[None] >= grid[:, None, None]
    hits = (named & truth).sum(1).float()
    f1 = 2 * hits / (named.sum(1) + truth.sum(0)).clamp_min(1)
    for empty_scores in nothing:
        alarms = (empty_scores[None] >= grid[:, None, None]).float().mean(1)
        f1[alarms > FALSE_ALARMS] = -1
    if (f1.max(0).values < 0).any():
        raise SystemExit("no threshold keeps false alarms below 1 %: train longer")
    best = f1 >= f1.max(0).values - 1e-9
    return torch.tensor([float(grid[column.nonzero().flatten()].median()) for column in best.T])


def rates(named: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """Recall and precision of each concept, from bool [N, C]."""
    hits = (named & truth).sum(0)
    values = {"recall": hits / truth.sum(0).clamp_min(1), "precision": hits / named.sum(0).clamp_min(1)}
    return {k: [round(float(v), 4) for v in t] for k, t in values.items()}


def held_out(
    seed: int, n: int, vae: EmojiVAE, sheets: dict[str, np.ndarray], eyes: Eyes
) -> tuple[Seen, Seen, dict[str, Seen]]:
    """What the eyes see in `n` noto scenes after the autoencoder, the truth, and the same for n / 6 of each nothing."""
    rng = np.random.default_rng(seed)
    looks, truths = [], []
    for _ in range(0, n, 256):
        x, target = draw(rng, sheets, 256, ("noto",), mix=False)
        looks.append(eyes.see(reconstruct(vae, x)))
        truths.append(target)
    nothing = {}
    for kind in EMPTY:
        parts = [eyes.see(empty(kind, rng, 64, vae, sheets)[0]) for _ in range(max(n // 6 // 64, 1))]
        nothing[kind] = Seen(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))
    seen = Seen(*(torch.cat(column, 1) for column in zip(*looks, strict=True)))
    return seen, Seen(*(torch.cat(column) for column in zip(*truths, strict=True))), nothing


def freeze(work: Path, out: Path, n: int) -> None:
    tensors, models, progress = {}, [], []
    for k, width in enumerate(WIDTHS):
        path = work / f"eye{k}.safetensors"
        # The thresholds belong to the rounded weights, which are those on disk.
        weights = {name: t.half() for name, t in ema_of(path).items() if t.is_floating_point()}
        tensors |= {f"{k}.{name}": t.contiguous() for name, t in weights.items()}
        eye = Eye(width)
        eye.load_state_dict({name: t.float() for name, t in weights.items()}, strict=False)
        models.append(eye)
        with safe_open(path, "pt") as file:
            progress.append(json.loads(file.metadata()["progress"]))
    vae, sheets = load_vae(), scenes.icons()
    neutral = {"icons": torch.full((2, len(ICONS)), 0.5), "styles": torch.full((2, len(STYLES)), 0.5)}
    eyes = Eyes(models, neutral | {"watermark": torch.full((2,), 0.5)})
    seen, truth, nothing = held_out(HELD, n, vae, sheets, eyes)
    there = Seen(*(t > 0.5 for t in truth))
    styleless = [kind for kind in EMPTY if kind not in ("ground", "scrambled latents")]
    thresholds: dict[str, list[Any]] = {"icons": [], "styles": [], "watermark": []}
    measured = []
    for k in range(2):
        icons = choose(seen.icons[k], there.icons, [nothing[kind].icons[k] for kind in EMPTY])
        floor = FLOOR
        while any(
            (nothing[kind].icons[k] >= icons).any(1).float().mean() > FALSE_ALARMS for kind in EMPTY
        ):  # any icon at all, in each kind of nothing
            floor += 0.01
            if floor > CEILING:
                raise SystemExit("no floor keeps icons out of empty pictures: train longer")
            icons = icons.clamp_min(floor)
        styles = choose(seen.styles[k], there.styles, [nothing[kind].styles[k] for kind in styleless])
        marks = choose(
            seen.watermark[k, :, None],
            there.watermark[:, None],
            [nothing[kind].watermark[k, :, None] for kind in EMPTY],
        )
        icons, styles, marks = (t.mul(100).round().div(100) for t in (icons, styles, marks))  # as they are written
        thresholds["icons"].append([round(float(t), 4) for t in icons])
        thresholds["styles"].append([round(float(t), 4) for t in styles])
        thresholds["watermark"].append(round(float(marks[0]), 4))
        named = seen.icons[k] >= icons
        per_icon = rates(named, there.icons)
        alarms = torch.stack([(nothing[kind].icons[k] >= icons).float().mean(0) for kind in EMPTY]).max(0).values
        measured.append(
            {
                "training": progress[k] | {"seed": SEEDS[k], "augmentation": STRENGTHS[k]},
                "icon_floor": round(floor, 2),
                "icons": {
                    "recall": round(float(named[there.icons].float().mean()), 4),
                    "precision": round(float((named & there.icons).sum() / named.sum().clamp_min(1)), 4),
                    "wrong_icons_per_picture": round(float((named & ~there.icons).sum(1).float().mean()), 4),
                    "per_icon": per_icon | {"false_alarms": [round(float(a), 4) for a in alarms]},
                },
                "styles": {
                    "accuracy": round(float((seen.styles[k].argmax(1) == truth.styles.argmax(1)).float().mean()), 4)
                }
                | rates(seen.styles[k] >= styles, there.styles)
                | {"false_alarms": {kind: _rate(nothing[kind].styles[k] >= styles) for kind in styleless}},
                "watermark": {
                    key: value[0]
                    for key, value in rates(seen.watermark[k, :, None] >= marks, there.watermark[:, None]).items()
                }
                | {"false_alarms": {kind: _rate(nothing[kind].watermark[k, :, None] >= marks) for kind in EMPTY}},
                "empty_with_any_icon": {kind: _rate(nothing[kind].icons[k] >= icons) for kind in EMPTY},
            }
        )
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "eyes.safetensors")
    (out / "eyes.safetensors").chmod(0o644)  # safetensors writes files for their owner only
    card = {
        "sha256": sha256(out / "eyes.safetensors"),
        "icons": ICONS,
        "styles": STYLES,
        "widths": WIDTHS,
        "thresholds": thresholds,
        "calibration": {
            "date": date.today().isoformat(),
            "vocabulary": scenes.vocabulary_hash(),
            "seed": HELD,
            "scenes": len(truth.icons),
            "empty_pictures_per_kind": len(nothing["blank"].icons[0]),
            "rule": "best F1 at or above 0.3; on each kind of empty picture false alarms <= 1 % per concept, "
            "and any icon in <= 1 % of the pictures",
            "eyes": measured,
        },
    }
    (out / "eyes.json").write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")
    for k, facts in enumerate(measured):
        figures = {key: value for key, value in facts["icons"].items() if key != "per_icon"}
        print(f"eye {k} icons {figures} floor {facts['icon_floor']}")
        print(f"      styles {facts['styles']['accuracy']} watermark {facts['watermark']['recall']}")
        print(f"      any icon in {facts['empty_with_any_icon']}")
        worst = sorted(zip(facts["icons"]["per_icon"]["recall"], ICONS, strict=True))[:8]
        print("      weakest recall " + ", ".join(f"{name} {value:.2f}" for value, name in worst), flush=True)
    print(f"wrote {out / 'eyes.safetensors'} and eyes.json")


def _rate(named: Tensor) -> float:
    """Share of the pictures [N, C] in which anything is named."""
    return round(float(named.any(1).float().mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--eye", type=int, choices=(0, 1))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--init", type=Path, help="start from these weights (an eyes.safetensors), fresh optimiser")
    parser.add_argument("--freeze", action="store_true")
    parser.add_argument("--scenes", type=int, default=12_288, help="held-out scenes that --freeze calibrates on")
    parser.add_argument("--work", type=Path, default=scenes.WORK, help="checkpoints of the eyes")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where --freeze writes")
    args = parser.parse_args()
    if args.freeze:
        freeze(args.work, args.out, args.scenes)
    elif args.eye is None:
        parser.error("name an eye with --eye 0 or --eye 1, or --freeze both")
    else:
        train(args.eye, args.minutes, args.batch, args.work, args.init)


if __name__ == "__main__":
    main()
