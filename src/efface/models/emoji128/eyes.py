"""The two detectors ("eyes") of the 128-pixel models: small CNNs for icons, style and watermark.

The eyes differ in seed, width and training noise and are **never merged**: every answer has one row per eye. Compute a
rate for each row, and report the worse one. Pictures are float [N, 3, 128, 128] in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efface import checks
from efface.models.emoji.eyes import Block, Seen

from . import CURE, FOLDER, HERE, check

VOCABULARY: dict[str, Any] = json.loads((HERE / "vocabulary.json").read_text("utf-8"))
STYLES: tuple[str, ...] = tuple(VOCABULARY["style_shares"])
PEOPLE: tuple[str, ...] = tuple(job[g] for job in VOCABULARY["professions"].values() for g in ("male", "female"))
ICONS: tuple[str, ...] = tuple(icon for group in VOCABULARY["groups"].values() for icon in group) + PEOPLE
INDEX: dict[str, int] = {name: k for k, name in enumerate(ICONS)}
WIDTHS = (128, 144)


class Eye(nn.Module):
    """One of the two detectors.

    Each position of a 16-fold smaller map votes for icons and watermark, and a log-mean-exp pools the votes. The style
    comes from the mean of the map.

    Args:
        width: channels of the last stage, a multiple of 16.

    Raises:
        ValueError: `width` is not a positive multiple of 16.
    """

    def __init__(self, width: int = WIDTHS[0]) -> None:
        super().__init__()
        if width < 16 or width % 16:
            raise ValueError(
                f"Expected `width` to be a positive multiple of 16, got {checks.shown(width)}. Give for example 128."
            )
        self.width = width
        self.body = nn.Sequential(
            nn.Conv2d(3, width // 4, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 4, width // 2, 4, stride=2, padding=1),
            Block(width // 2),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            Block(width),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            Block(width),
            Block(width),
            nn.BatchNorm2d(width),
            nn.SiLU(),
        )
        self.votes = nn.Conv2d(width, len(ICONS) + 1, 1, bias=False)
        self.bias = nn.Parameter(torch.full((len(ICONS) + 1,), -5.0))  # icons are rare
        self.style = nn.Linear(width, len(STYLES))

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps pictures [N, 3, H, W] in [0, 1] to logits of icons [N, I], styles [N, 5] and watermark [N]."""
        features = self.body(2 * x - 1)
        votes = self.votes(features).float().flatten(2)
        pooled = votes.logsumexp(2) - log(votes.shape[2]) + self.bias
        return pooled[:, :-1], self.style(features.mean((2, 3))).float(), pooled[:, -1]

    def forward(self, x: Tensor) -> Seen:
        icons, styles, watermark = self.logits(x)
        return Seen(icons.sigmoid(), styles.softmax(-1), watermark.sigmoid())


class Eyes:
    """Both eyes with their frozen thresholds.

    Args:
        eyes: the two eyes.
        thresholds: `icons` [2, I], `styles` [2, 5] and `watermark` [2]; a thing counts as seen at or above it.
        facts: the content of eyes.json.

    Raises:
        ValueError: there are not two eyes, or a threshold table has another shape.
    """

    def __init__(
        self, eyes: Sequence[Eye], thresholds: Mapping[str, Any], facts: Mapping[str, Any] | None = None
    ) -> None:
        if len(eyes) != 2:
            raise ValueError(f"Expected two eyes, got {len(eyes)}. Give two.")
        self.eyes = tuple(eye.eval().requires_grad_(False) for eye in eyes)
        self.facts = dict(facts or {})
        shapes = {"icons": (2, len(ICONS)), "styles": (2, len(STYLES)), "watermark": (2,)}
        if set(thresholds) != set(shapes):
            raise ValueError(
                f"Expected thresholds for {', '.join(shapes)}, got {', '.join(thresholds) or 'none'}. Give these."
            )
        self.thresholds = Seen(**{k: torch.as_tensor(thresholds[k], dtype=torch.float32) for k in shapes})
        for name, table in self.thresholds._asdict().items():
            if tuple(table.shape) != shapes[name]:
                raise ValueError(
                    f"Expected thresholds of {name} {shapes[name]}, got {tuple(table.shape)}. Give this shape."
                )

    def to(self, device: str | torch.device) -> Eyes:
        """Moves the eyes to `device`. Results come back to the CPU."""
        for eye in self.eyes:
            eye.to(device)
        return self

    @torch.no_grad()
    def see(self, images: Tensor | Seen) -> Seen:
        """Maps pictures to probabilities `icons` [2, N, I], `styles` [2, N, 5], `watermark` [2, N]. Passes a `Seen`
        through.

        Raises:
            ValueError: the pictures are not float [N, 3, H, W] in [0, 1], or smaller than 32 pixels.
        """
        if isinstance(images, Seen):
            return images
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 32 or not images.is_floating_point():
            raise ValueError(
                f"Expected float images [N, 3, H, W] of at least 32 x 32, got {images.dtype} {tuple(images.shape)}. "
                "Convert or resize them."
            )
        if len(images) == 0:
            return Seen(torch.zeros(2, 0, len(ICONS)), torch.zeros(2, 0, len(STYLES)), torch.zeros(2, 0))
        if not (images.min() >= 0 and images.max() <= 1):  # also when something is NaN
            raise ValueError(
                f"Expected images in [0, 1], got {float(images.min()):g} to {float(images.max()):g}. Scale them first."
            )
        rows = []
        for eye in self.eyes:
            device = next(eye.parameters()).device
            parts = [eye(part.detach().float().to(device)) for part in images.split(256)]
            rows.append(Seen(*(torch.cat(column).cpu() for column in zip(*parts, strict=True))))
        return Seen(*(torch.stack(pair) for pair in zip(*rows, strict=True)))

    def icons(self, images: Tensor | Seen) -> Tensor:
        """The detected icons: bool [2, N, I], in the order of `ICONS`."""
        return self.see(images).icons >= self.thresholds.icons[:, None]

    def styles(self, images: Tensor | Seen) -> Tensor:
        """The likeliest style of each picture: index into `STYLES`, [2, N]."""
        return self.see(images).styles.argmax(-1)

    def style_is(self, images: Tensor | Seen, style: str) -> Tensor:
        """Whether a style is above its threshold: bool [2, N].

        Raises:
            ValueError: the style is unknown.
        """
        if style not in STYLES:
            raise ValueError(f"Expected a style of {', '.join(STYLES)}, got {checks.shown(style)}. Give one of these.")
        k = STYLES.index(style)
        return self.see(images).styles[..., k] >= self.thresholds.styles[:, None, k]

    def watermark(self, images: Tensor | Seen) -> Tensor:
        """Whether the watermark badge is visible: bool [2, N]."""
        return self.see(images).watermark >= self.thresholds.watermark[:, None]

    def gender(self, images: Tensor | Seen) -> Tensor:
        """[2, N]: 0 for a man, 1 for a woman, -1 without a person. The likeliest profession icon decides."""
        seen = self.see(images)
        people = [INDEX[name] for name in PEOPLE]
        there = self.icons(seen)[..., people]
        surest = torch.where(there, seen.icons[..., people], -1.0).argmax(-1)
        return torch.where(there.any(-1), surest % 2, -1)

    def concept(self, images: Tensor | Seen, concept: str) -> Tensor:
        """Whether the pictures show a concept of the vocabulary, an icon, a style or "watermark": bool [2, N].

        Raises:
            ValueError: the name is unknown.
        """
        seen = self.see(images)
        if concept == "watermark":
            return self.watermark(seen)
        if concept in STYLES:
            return self.style_is(seen, concept)
        icons = VOCABULARY["concepts"].get(concept, {}).get("icons") or VOCABULARY["groups"].get(concept)
        icons = icons or ([concept] if concept in INDEX else [])
        if not icons:
            known = ", ".join([*VOCABULARY["concepts"], *STYLES])
            raise ValueError(
                f"Expected a concept such as {known}, got {checks.shown(concept)}. Give a name of the vocabulary."
            )
        return self.icons(seen)[..., [INDEX[icon] for icon in icons]].any(-1)


def load_eyes(folder: Path | None = None) -> Eyes:
    """Loads both eyes from eyes.safetensors (fp16) and eyes.json in `folder`. Default: the shipped files.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is damaged, or was made for another vocabulary.
    """
    from safetensors.torch import load_file

    folder = FOLDER if folder is None else Path(folder)
    card = folder / "eyes.json"
    if not card.is_file():
        raise FileNotFoundError(f"{card} is missing. {CURE}")
    try:
        facts = json.loads(card.read_text("utf-8"))
        icons, styles, thresholds, expected = (facts[key] for key in ("icons", "styles", "thresholds", "sha256"))
        models = [Eye(width) for width in facts["widths"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{card} is damaged ({error}). {CURE}") from error
    if (icons, styles) != (list(ICONS), list(STYLES)):
        raise ValueError(f"{card} was made for another vocabulary. {CURE}")
    path = check(folder / "eyes.safetensors", expected)
    tensors = load_file(path)
    for k, eye in enumerate(models):
        # `num_batches_tracked` is bookkeeping of training and not stored.
        wanted = {name: t.shape for name, t in eye.state_dict().items() if t.is_floating_point()}
        mine = {name.removeprefix(f"{k}."): t.float() for name, t in tensors.items() if name.startswith(f"{k}.")}
        if {name: t.shape for name, t in mine.items()} != wanted:
            raise ValueError(f"{path} does not hold an eye of width {eye.width} under {k!r}. {CURE}")
        eye.load_state_dict(mine, strict=False)
    return Eyes(models, thresholds, facts)
