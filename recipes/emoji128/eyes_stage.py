"""The eyes: two judges that say what is in a picture, and the freezing of their thresholds."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from datetime import date
from typing import Any

import data
import torch
import torch.nn.functional as F
from data import COLUMN, PEOPLE, SIZE, Painter, Sampler
from stages import Fit, Plan, generator, halves, prepare, say, wait_for_vae, write, write_json
from torch import Tensor

from efface.models.emoji.eyes import Seen
from efface.models.emoji.weights import sha256
from efface.models.emoji128.eyes import ICONS, STYLES, WIDTHS, Eye, Eyes
from efface.models.emoji128.vae import EmojiAutoencoder

SEEDS, STRENGTHS = (101, 202), (1.0, 0.6)
HELD = 70_000  # seed of the scenes that thresholds are frozen on
SETS = (0, 0, 1, 2)  # the first set twice: it is the one that the denoisers draw
KINDS = {"single": 0.28, "attribute": 0.08, "count": 0.1, "profession": 0.1, "pair": 0.34, "theme": 0.1}
EMPTY = ("ground", "blank", "grey", "white noise", "smooth noise", "random latents", "scrambled latents")
FLOOR, CEILING, FALSE_ALARMS = 0.30, 0.99, 0.01


def scenes(seed: int, n: int, sets: tuple[int, ...]) -> Tensor:
    """A table of scenes with evener styles, badges and genders than captions have."""
    rng, sampler, rows = random.Random(seed), Sampler(kinds=KINDS), []
    for _ in range(n):
        scene = sampler.sample(rng)
        style = rng.choice(STYLES) if rng.random() < 0.5 and not scene.colour else scene.style
        icons = scene.icons
        if scene.kind == "profession":
            job = PEOPLE.index(icons[0]) // 2 * 2
            icons = (PEOPLE[job + rng.randrange(2)],)
        scene = replace(scene, icons=icons, style=style, watermark=rng.random() < 0.25)
        rows.append(data.place(scene, rng, rng.choice(sets)))
    return torch.tensor(rows, dtype=torch.int16)


def truth_of(rows: Tensor) -> Seen:
    """What is in the scenes of a table."""
    icons = torch.zeros(len(rows), len(ICONS), device=rows.device)
    for k in range(3):
        at = rows[:, COLUMN[f"icon{k}"]].long()
        there = (at >= 0).nonzero()[:, 0]
        icons[there, at[there]] = 1
    styles = F.one_hot(rows[:, COLUMN["style"]].long(), len(STYLES)).float()
    return Seen(icons, styles, (rows[:, COLUMN["badge"]] >= 0).float())


def unit(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def decode(vae: EmojiAutoencoder, z: Tensor) -> Tensor:
    """Latents to pictures in [0, 1]."""
    with torch.autocast(z.device.type, torch.bfloat16):
        y = vae.decoder(z)
    return ((y.float() + 1) / 2).clamp(0, 1)


@torch.no_grad()
def latents(vae: EmojiAutoencoder, x: Tensor) -> Tensor:
    """Pictures in [0, 1] to unscaled latents."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return vae.encoder.body(2 * x - 1).float()


def reconstruct(vae: EmojiAutoencoder, x: Tensor, noise: Tensor | float = 0.0, smooth: Tensor | float = 0.0) -> Tensor:
    """Pictures through the autoencoder: a share `smooth` of the latents is their neighbourhood's mean, then `noise` is
    added, which is how a denoiser errs that is unsure where an edge runs."""
    z = latents(vae, x)
    around = F.avg_pool2d(z, 3, 1, 1, count_include_pad=False)
    return decode(vae, z + smooth * (around - z) + noise)


def empty(
    kind: str, n: int, vae: EmojiAutoencoder, painter: Painter, rows: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`n` pictures with nothing in them, and their styles [n, 5], flat where there is none to see."""
    device = painter.device

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, device=device)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    flat = torch.full((n, len(STYLES)), 1 / len(STYLES), device=device)
    if kind == "ground":
        style = torch.randint(len(STYLES), (n,), generator=g, device=device)
        images = painter.grounds_of(style, torch.randint(5, (n,), generator=g, device=device))
        told = torch.tensor([s in ("blueprint", "pixel art") for s in STYLES], device=device)[style]
        return images.permute(0, 3, 1, 2), torch.where(told[:, None], F.one_hot(style, len(STYLES)).float(), flat)
    if kind in ("blank", "grey"):
        return rand(n, 3 if kind == "blank" else 1, 1, 1).expand(n, 3, SIZE, SIZE), flat
    if kind == "white noise":
        return (randn(n, 3, SIZE, SIZE) * rand(n, 1, 1, 1) * 0.5 + rand(n, 3, 1, 1)).clamp(0, 1), flat
    if kind == "smooth noise":
        parts = []
        for cells in (2, 4, 8, 16):
            k = n // 4 + (cells == 16) * (n % 4)
            small = randn(k, 3, cells, cells) * rand(k, 1, 1, 1) * 0.5
            parts.append(F.interpolate(small, (SIZE, SIZE), mode="bicubic") + rand(k, 3, 1, 1))
        return torch.cat(parts).clamp(0, 1), flat
    if kind == "random latents":
        cells = (2, 4, 8, 16)[int(rand(1) * 4)]
        z = F.interpolate(randn(n, 8, cells, cells), (16, 16), mode="bilinear") * (0.3 + 1.2 * rand(n, 1, 1, 1))
        return decode(vae, z), flat
    z = latents(vae, unit(painter.paint(rows[:n]))).flatten(2)
    order = rand(n, z.shape[2]).argsort(1)[:, None].expand(z.shape)
    return decode(vae, z.gather(2, order).view(n, -1, 16, 16)), truth_of(rows[:n]).styles


def roughen(x: Tensor, strength: float, g: torch.Generator) -> Tensor:
    """Small shifts, zooms, blur of up to two pixels, brightness, contrast, tint and pixel noise."""
    n, device = len(x), x.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=g, device=device)

    moved = (uniform(1) < 0.5).float() * strength
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, [0, 1], [0, 1]] = 1 + moved * 0.12 * (2 * uniform(1) - 1)
    theta[:, :, 2] = moved * 0.12 * (2 * uniform(2) - 1)
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )
    line = torch.exp(-torch.arange(-4, 5, device=device).float().square() / 8)  # a Gaussian of two pixels
    line = line / line.sum()
    kernel = torch.outer(line, line).expand(3, 1, 9, 9)
    blurred = F.conv2d(F.pad(x, (4, 4, 4, 4), "replicate"), kernel, groups=3)
    x = x.lerp(blurred, uniform(1, 1, 1) * (uniform(1, 1, 1) < 0.5) * min(strength * 1.2, 1))
    x = (x - 0.5) * (1 + 0.25 * strength * (2 * uniform(1, 1, 1) - 1)) + 0.5
    x = x + 0.1 * strength * (2 * uniform(1, 1, 1) - 1) + 0.05 * strength * (2 * uniform(3, 1, 1) - 1)
    x = x + 0.1 * strength * uniform(1, 1, 1) ** 2 * torch.randn(x.shape, generator=g, device=device)
    return x.clamp(0, 1)


def mixed_batch(
    rows: Tensor, n: int, strength: float, vae: EmojiAutoencoder, painter: Painter, g: torch.Generator
) -> tuple[Tensor, Seen]:
    """About `n` pictures: five sixths scenes, of which two thirds decoded, and empty ones of each kind."""
    device = painter.device
    each = max(n // 6 // len(EMPTY), 1)
    scenes_n = n - each * len(EMPTY)
    some = rows[torch.randint(len(rows), (scenes_n,), generator=g, device=device)]
    x, target = unit(painter.paint(some)), truth_of(some)
    # Some pairs swap their right halves, so that any icons, grounds and styles meet.
    pairs = (some[:, COLUMN["icon1"]] >= 0) & (some[:, COLUMN["icon2"]] < 0) & (some[:, COLUMN["badge"]] < 0)
    halved = (pairs & (torch.rand(scenes_n, generator=g, device=device) < 0.3)).nonzero()[:, 0]
    if len(halved) > 1:
        others = halved.roll(1)
        x[halved, :, :, SIZE // 2 :] = x[others][..., SIZE // 2 :]
        target.styles[halved] = (target.styles[halved] + target.styles[others]) / 2
        target.icons[halved] = 0
        target.icons[halved, some[halved, COLUMN["icon0"]].long()] = 1
        target.icons[halved, some[others, COLUMN["icon1"]].long()] = 1
    k = scenes_n * 2 // 3

    def uniform() -> Tensor:
        return torch.rand(k, 1, 1, 1, generator=g, device=device)

    size = 0.5 * strength**0.5 * uniform() ** 1.5 * (uniform() < 0.7)
    smooth = 0.7 * uniform() * (uniform() < 0.4)
    noise = size * torch.randn(k, 8, 16, 16, generator=g, device=device)
    x[:k] = reconstruct(vae, x[:k], noise, smooth)
    nothing = [empty(kind, each, vae, painter, some, g) for kind in EMPTY]
    zeros = torch.zeros(each * len(EMPTY), len(ICONS), device=device)
    seen = Seen(
        torch.cat([target.icons, zeros]),
        torch.cat([target.styles, *(flat for _, flat in nothing)]),
        torch.cat([target.watermark, zeros[:, 0]]),
    )
    return roughen(torch.cat([x, *(images for images, _ in nothing)]), strength, g), seen


def loss_of(logits: tuple[Tensor, Tensor, Tensor], target: Seen) -> Tensor:
    icons, styles, watermark = logits
    loss = F.binary_cross_entropy_with_logits(icons, target.icons, reduction="none").sum(1).mean()
    loss = loss + F.cross_entropy(styles, target.styles)
    return loss + 2 * F.binary_cross_entropy_with_logits(watermark, target.watermark)


def train_eyes(plan: Plan) -> None:
    """Both eyes one after the other in halves of the time, then their thresholds."""
    prepare(plan)
    device, batch = plan.device, max(plan.batch or 192, 24)
    painter = Painter(data.icons(plan.icons), device)
    rows = scenes(HELD + 1, max(min(plan.pool, 200_000), 512), SETS).to(device)
    vae = wait_for_vae(plan).to(memory_format=torch.channels_last)
    ends, weights, facts = (time.time() + plan.deadline) / 2, {}, []
    for k, width in enumerate(WIDTHS):
        torch.manual_seed(SEEDS[k])
        eye = Eye(width).to(device).to(memory_format=torch.channels_last)
        part = replace(plan, seconds=plan.seconds / 2, deadline=ends if k == 0 else plan.deadline)
        fit = Fit(part, f"eye{k}", eye, 2e-3)

        def loss(step: int, k: int = k, eye: Eye = eye) -> Tensor:
            g = generator(plan, SEEDS[k], step)
            x, target = mixed_batch(rows, batch, STRENGTHS[k], vae, painter, g)
            with torch.autocast(device.type, torch.bfloat16):
                logits = eye.logits(x.contiguous(memory_format=torch.channels_last))
            return loss_of(logits, target)

        fit.run(loss, batch)
        weights |= {f"{k}.{name}": t for name, t in halves(fit.ema).items()}
        facts.append(fit.facts(batch) | {"seed": SEEDS[k], "augmentation": STRENGTHS[k]})
    write(plan.work / "eyes.safetensors", weights)
    (plan.work / "eyes.safetensors").chmod(0o644)  # safetensors writes files for their owner only
    freeze(plan, vae, painter, weights, facts, 4096 if device.type == "cuda" else 128)


def choose(scores: Tensor, truth: Tensor, nothing: list[Tensor]) -> Tensor:
    """Thresholds [C] with the best F1 on `scores` [N, C], among those with few false alarms on each kind of nothing.

    The highest threshold, where none has few. Where a range is equally good, its middle is taken.
    """
    grid = torch.arange(FLOOR, CEILING + 1e-6, 0.01)
    named = scores[None] >= grid[:, None, None]
    hits = (named & truth).sum(1).float()
    f1 = 2 * hits / (named.sum(1) + truth.sum(0)).clamp_min(1)
    for scores_empty in nothing:
        alarms = (scores_empty[None] >= grid[:, None, None]).float().mean(1)
        f1[alarms > FALSE_ALARMS] = -1
    f1[-1] = f1[-1].clamp_min(-0.5)
    best = f1 >= f1.max(0).values - 1e-9
    return torch.tensor([float(grid[column.nonzero().flatten()].median()) for column in best.T])


def rates(named: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """Recall and precision of each concept, from bool [N, C]."""
    hits = (named & truth).sum(0)
    values = {"recall": hits / truth.sum(0).clamp_min(1), "precision": hits / named.sum(0).clamp_min(1)}
    return {k: [round(float(v), 4) for v in t] for k, t in values.items()}


def looks(eyes: Eyes, images: list[Tensor]) -> Seen:
    parts = [eyes.see(x.float()) for x in images]
    return Seen(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))


def freeze(
    plan: Plan, vae: EmojiAutoencoder, painter: Painter, weights: dict[str, Tensor], facts: list[dict[str, Any]], n: int
) -> None:
    """Thresholds on `n` held-out reconstructions of the first set, and eyes.json. Run it before any erasure."""
    models = []
    for k, width in enumerate(WIDTHS):
        eye = Eye(width)
        own = {name.removeprefix(f"{k}."): t.float() for name, t in weights.items() if name.startswith(f"{k}.")}
        eye.load_state_dict(own, strict=False)  # without BatchNorm's count of batches
        models.append(eye)
    half = {"icons": torch.full((2, len(ICONS)), 0.5), "styles": torch.full((2, len(STYLES)), 0.5)}
    eyes = Eyes(models, half | {"watermark": torch.full((2,), 0.5)}).to(plan.device)
    held = scenes(HELD, n, (0,)).to(plan.device)
    g = torch.Generator(plan.device).manual_seed(HELD)
    seen = looks(eyes, [reconstruct(vae, unit(painter.paint(part))) for part in held.split(256)])
    truth = Seen(*(t.cpu() > 0.5 for t in truth_of(held)))
    many = max(n // 6 // 64, 1)
    nothing = {
        kind: looks(eyes, [empty(kind, min(64, n), vae, painter, held[64 * k :], g)[0] for k in range(many)])
        for kind in EMPTY
    }
    styleless = [kind for kind in EMPTY if kind not in ("ground", "scrambled latents")]
    thresholds: dict[str, list[Any]] = {"icons": [], "styles": [], "watermark": []}
    measured = []
    for k in range(2):
        icons = choose(seen.icons[k], truth.icons, [nothing[kind].icons[k] for kind in EMPTY])
        floor = FLOOR
        while floor < CEILING and any(
            (nothing[kind].icons[k] >= icons).any(1).float().mean() > FALSE_ALARMS for kind in EMPTY
        ):
            floor = min(floor + 0.01, CEILING)
            icons = icons.clamp_min(floor)
        styles = choose(seen.styles[k], truth.styles, [nothing[kind].styles[k] for kind in styleless])
        marks = choose(
            seen.watermark[k, :, None],
            truth.watermark[:, None],
            [nothing[kind].watermark[k, :, None] for kind in EMPTY],
        )
        icons, styles, marks = (t.mul(100).round().div(100) for t in (icons, styles, marks))
        thresholds["icons"].append([round(float(t), 4) for t in icons])
        thresholds["styles"].append([round(float(t), 4) for t in styles])
        thresholds["watermark"].append(round(float(marks[0]), 4))
        named = seen.icons[k] >= icons
        measured.append(
            {
                "training": facts[k],
                "icon_floor": round(floor, 2),
                "recall": round(float(named[truth.icons].float().mean()), 4),
                "precision": round(float((named & truth.icons).sum() / named.sum().clamp_min(1)), 4),
                "per_icon": rates(named, truth.icons),
                "style_accuracy": round(
                    float((seen.styles[k].argmax(1) == truth.styles.float().argmax(1)).float().mean()), 4
                ),
                "watermark": {
                    key: v[0] for key, v in rates(seen.watermark[k, :, None] >= marks, truth.watermark[:, None]).items()
                },
                "empty_with_any_icon": {
                    kind: round(float((nothing[kind].icons[k] >= icons).any(1).float().mean()), 4) for kind in EMPTY
                },
                "empty_with_watermark": {
                    kind: round(float((nothing[kind].watermark[k] >= marks).float().mean()), 4) for kind in EMPTY
                },
            }
        )
        figures = {key: v for key, v in measured[-1].items() if key not in ("training", "per_icon")}
        say(f"eye{k}", f"frozen: {figures}")
    card = {
        "sha256": sha256(plan.work / "eyes.safetensors"),
        "icons": ICONS,
        "styles": STYLES,
        "widths": WIDTHS,
        "thresholds": thresholds,
        "calibration": {
            "date": date.today().isoformat(),
            "data": data.data_hash(),
            "seed": HELD,
            "scenes": n,
            "empty_pictures_per_kind": 64 * many,
            "rule": "best F1 at or above 0.3; on each kind of empty picture false alarms <= 1 % per concept, "
            "and any icon in <= 1 % of the pictures",
            "eyes": measured,
        },
    }
    write_json(plan.work / "eyes.json", card)
