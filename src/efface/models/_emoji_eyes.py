"""What the eyes of all embedded models share: small CNNs that say which icons, style and watermark a picture shows.

The two eyes of a model differ in seed, width and training noise and are **never merged**: every answer has one row per
eye. Compute a rate for each row, and report the worse one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import checks
from .emoji.concepts import known
from .emoji.weights import check

WIDTHS = (128, 144)


@dataclass(frozen=True)
class Vocabulary:
    """What the eyes of a model know.

    Args:
        model: the model's name.
        icons: the icons, in the order of the eyes' answers.
        styles: the styles, in that order.
        male: the icons of men with a profession.
        female: those of women, in the same order of professions.
        truth: maps a concept's name to its icons, or to a style. Raises ValueError if the name is unknown.
        least: the smallest side of a picture, in pixels.
    """

    model: str
    icons: tuple[str, ...]
    styles: tuple[str, ...]
    male: tuple[str, ...]
    female: tuple[str, ...]
    truth: Callable[[str], tuple[str, ...] | str]
    least: int

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Icon to its place."""
        return {name: k for k, name in enumerate(self.icons)}

    def knows(self, name: str) -> bool:
        """Whether the eyes see a thing of that name."""
        return known(self.what, name)

    def what(self, name: str) -> list[int] | str:
        """The places of a concept's icons, or a style, or "watermark"."""
        if name in (*self.styles, "watermark"):
            return name
        found = self.truth(name)
        return found if isinstance(found, str) else [self.index[icon] for icon in found]


class Seen(NamedTuple):
    """Probabilities for N pictures. One eye returns the shapes below; `Eyes.see` adds a leading 2."""

    icons: Tensor
    """[N, I], each in [0, 1] independently: a picture may show several icons, or none."""
    styles: Tensor
    """[N, 5], with sum 1; flat without a visible style."""
    watermark: Tensor
    """[N], in [0, 1]."""


class Block(nn.Module):
    """Residual block of two 3 x 3 convolutions, width kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.outer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.silu(self.second(self.inner(F.silu(self.first(x))))))


class AnyEye(nn.Module):
    """One of the two detectors.

    Each position of a smaller map votes for icons and watermark, and a log-mean-exp pools the votes. One certain
    position is enough, for any place and size of the icon. The style comes from the mean of the map.

    Args:
        width: channels of the last stage, a multiple of 16.

    Raises:
        ValueError: `width` is not a positive multiple of 16.
    """

    vocabulary: ClassVar[Vocabulary]
    halvings: ClassVar[int]
    """3 or 4: the map is 8-fold or 16-fold smaller than the picture."""

    def __init__(self, width: int = WIDTHS[0]) -> None:
        super().__init__()
        if width < 16 or width % 16:
            raise ValueError(
                f"Expected `width` to be a positive multiple of 16, got {checks.shown(width)}. Give for example 128."
            )
        self.width = width
        layers: list[nn.Module] = [
            nn.Conv2d(3, width // 4, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 4, width // 2, 4, stride=2, padding=1),
            Block(width // 2),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
        ]
        for _ in range(self.halvings - 3):
            layers += [Block(width), nn.Conv2d(width, width, 4, stride=2, padding=1)]
        self.body = nn.Sequential(*layers, Block(width), Block(width), nn.BatchNorm2d(width), nn.SiLU())
        icons, styles = len(self.vocabulary.icons), len(self.vocabulary.styles)
        self.votes = nn.Conv2d(width, icons + 1, 1, bias=False)
        self.bias = nn.Parameter(torch.full((icons + 1,), -5.0))  # icons are rare
        self.style = nn.Linear(width, styles)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps pictures [N, 3, H, W] in [0, 1] to logits of icons [N, I], styles [N, 5] and watermark [N]."""
        features = self.body(2 * x - 1)
        votes = self.votes(features).float().flatten(2)
        pooled = votes.logsumexp(2) - log(votes.shape[2]) + self.bias
        return pooled[:, :-1], self.style(features.mean((2, 3))).float(), pooled[:, -1]

    def forward(self, x: Tensor) -> Seen:
        icons, styles, watermark = self.logits(x)
        return Seen(icons.sigmoid(), styles.softmax(-1), watermark.sigmoid())


class AnyEyes:
    """Both eyes of a model with their frozen thresholds.

    Args:
        eyes: the two eyes.
        thresholds: `icons` [2, I], `styles` [2, 5] and `watermark` [2]; a thing counts as seen at or above it.
        facts: the content of `eyes.json`: the measured recall, precision and false alarms.

    Raises:
        ValueError: there are not two eyes, or a threshold table has another shape.
    """

    vocabulary: ClassVar[Vocabulary]
    eye: ClassVar[type[AnyEye]]

    def __init__(
        self, eyes: Sequence[AnyEye], thresholds: Mapping[str, Any], facts: Mapping[str, Any] | None = None
    ) -> None:
        if len(eyes) != 2:
            raise ValueError(f"Expected two eyes, got {len(eyes)}. Give two.")
        self.eyes = tuple(eye.eval().requires_grad_(False) for eye in eyes)
        self.facts = dict(facts or {})
        icons, styles = len(self.vocabulary.icons), len(self.vocabulary.styles)
        shapes = {"icons": (2, icons), "styles": (2, styles), "watermark": (2,)}
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

    def to(self, device: str | torch.device) -> Self:
        """Moves the eyes to `device`. Results come back to the CPU."""
        for eye in self.eyes:
            eye.to(device)
        return self

    @torch.no_grad()
    def see(self, images: Tensor | Seen) -> Seen:
        """Maps pictures [N, 3, H, W] in [0, 1] to probabilities `icons` [2, N, I], `styles` [2, N, 5], `watermark`
        [2, N].

        Evaluates 256 pictures at a time. Passes results of `see` through.

        Raises:
            ValueError: the pictures are not float [N, 3, H, W] in [0, 1], or too small.
        """
        if isinstance(images, Seen):
            return images
        least = self.vocabulary.least
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < least or not images.is_floating_point():
            raise ValueError(
                f"Expected float images [N, 3, H, W] of at least {least} x {least}, got {images.dtype} "
                f"{tuple(images.shape)}. Convert or resize them."
            )
        if len(images) == 0:
            icons, styles = len(self.vocabulary.icons), len(self.vocabulary.styles)
            return Seen(torch.zeros(2, 0, icons), torch.zeros(2, 0, styles), torch.zeros(2, 0))
        if not (images.min() >= 0 and images.max() <= 1):  # also when something is NaN
            raise ValueError(
                f"Expected images in [0, 1], got values from {float(images.min()):g} to {float(images.max()):g}. Scale "
                "them first."
            )
        rows = []
        for eye in self.eyes:
            x = images.detach().float().to(eye.bias.device)
            parts = [eye(part.contiguous(memory_format=torch.channels_last)) for part in x.split(256)]
            rows.append(Seen(*(torch.cat(column).cpu() for column in zip(*parts, strict=True))))
        return Seen(*(torch.stack(pair) for pair in zip(*rows, strict=True)))

    def icons(self, images: Tensor | Seen) -> Tensor:
        """The detected icons: bool [2, N, I], in the order of the vocabulary."""
        return self.see(images).icons >= self.thresholds.icons[:, None]

    def styles(self, images: Tensor | Seen) -> Tensor:
        """The likeliest style of each picture, always one: its place in the vocabulary, [2, N]. See `style_is`."""
        return self.see(images).styles.argmax(-1)

    def style_is(self, images: Tensor | Seen, style: str) -> Tensor:
        """Whether a style is above its threshold: bool [2, N].

        Raises:
            ValueError: the style is unknown.
        """
        styles = self.vocabulary.styles
        if style not in styles:
            raise ValueError(f"Expected a style of {', '.join(styles)}, got {checks.shown(style)}. Give one of these.")
        k = styles.index(style)
        return self.see(images).styles[..., k] >= self.thresholds.styles[:, None, k]

    def watermark(self, images: Tensor | Seen) -> Tensor:
        """Whether the watermark badge is visible: bool [2, N]."""
        return self.see(images).watermark >= self.thresholds.watermark[:, None]

    def gender(self, images: Tensor | Seen) -> Tensor:
        """[2, N]: 0 for a man, 1 for a woman, -1 without a person. The likeliest profession icon decides."""
        seen, men = self.see(images), len(self.vocabulary.male)
        people = [self.vocabulary.index[name] for name in (*self.vocabulary.male, *self.vocabulary.female)]
        there = self.icons(seen)[..., people]
        surest = torch.where(there, seen.icons[..., people], -1.0).argmax(-1)
        return torch.where(there.any(-1), (surest >= men).long(), -1)

    def concept(self, images: Tensor | Seen, concept: str | Sequence[str]) -> Tensor:
        """Whether the pictures show a concept: bool [2, N].

        Args:
            images: pictures, or the result of `see`.
            concept: a name that the vocabulary knows (an icon, a group of icons such as "alcohol", a profession, a
                style), "plain", "watermark", or a list of these. Any icon of any name counts.

        Raises:
            ValueError: a name is unknown, or the list is empty.
        """
        names = [concept] if isinstance(concept, str) else list(concept)
        if not names:
            raise ValueError("Expected at least one concept, got none. Name one.")
        seen = self.see(images)
        icons = self.icons(seen)
        found = torch.zeros(icons.shape[:2], dtype=torch.bool)
        for name in names:
            what = self.vocabulary.what(name)
            if what == "watermark":
                found |= self.watermark(seen)
            elif isinstance(what, str):
                found |= self.style_is(seen, what)
            else:
                found |= icons[..., what].any(-1)
        return found

    def ratios(self, seen: Seen, names: Sequence[str]) -> Tensor:
        """The largest probability over its threshold of the things of that name, [2, N]; of any icon without names."""
        limits = self.thresholds
        icons, styles = seen.icons / limits.icons[:, None], seen.styles / limits.styles[:, None]
        found = [] if names else [icons.amax(-1)]
        for what in map(self.vocabulary.what, names):
            if what == "watermark":
                found.append(seen.watermark / limits.watermark[:, None])
            elif isinstance(what, str):
                found.append(styles[..., self.vocabulary.styles.index(what)])
            else:
                found.append(icons[..., what].amax(-1))
        return torch.stack(found).amax(0)

    def log_odds(self, images: Tensor, concept: str | Sequence[str]) -> Tensor:
        """The log-odds of a concept less those of its threshold, [2, N], with gradients: positive where it is seen.

        Args:
            images: pictures [N, 3, H, W] in [0, 1].
            concept: as in `concept`. The surest of several icons counts.
        """
        rows = []
        for k, eye in enumerate(self.eyes):
            icons, styles, watermark = (each.cpu() for each in eye.logits(images.float().to(eye.bias.device)))
            styles = styles.softmax(-1).logit(eps=1e-6)
            limits = Seen(*(each[k].logit(eps=1e-6) for each in self.thresholds))
            surest = []
            for what in map(self.vocabulary.what, [concept] if isinstance(concept, str) else concept):
                if what == "watermark":
                    surest.append(watermark - limits.watermark)
                elif isinstance(what, str):
                    place = self.vocabulary.styles.index(what)
                    surest.append(styles[:, place] - limits.styles[place])
                else:
                    surest.append((icons[:, what] - limits.icons[what]).amax(-1))
            rows.append(torch.stack(surest).amax(0))
        return torch.stack(rows)

    @classmethod
    def load(cls, folder: Path, cure: str) -> Self:
        """Loads both eyes from `eyes.safetensors` (fp16) and `eyes.json` in `folder`.

        Args:
            folder: where the files are.
            cure: what to do if a file is missing or damaged.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: a file is damaged, or was made for another vocabulary.
        """
        card = folder / "eyes.json"
        if not card.is_file():
            raise FileNotFoundError(f"{card} is missing. {cure}")
        try:
            facts = json.loads(card.read_text("utf-8"))
            icons, styles, thresholds, expected = (facts[key] for key in ("icons", "styles", "thresholds", "sha256"))
            models = [cls.eye(width) for width in facts["widths"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{card} is damaged ({error}). {cure}") from error
        if (icons, styles) != (list(cls.vocabulary.icons), list(cls.vocabulary.styles)):
            raise ValueError(f"{card} was made for another vocabulary. {cure}")
        path = check(folder / "eyes.safetensors", expected, cure)
        tensors = load_file(path)
        for k, eye in enumerate(models):
            # `num_batches_tracked` is bookkeeping of training and not stored.
            wanted = {name: t.shape for name, t in eye.state_dict().items() if t.is_floating_point()}
            mine = {name.removeprefix(f"{k}."): t.float() for name, t in tensors.items() if name.startswith(f"{k}.")}
            if {name: t.shape for name, t in mine.items()} != wanted:
                raise ValueError(f"{path} does not hold an eye of width {eye.width} under {k!r}. {cure}")
            eye.load_state_dict(mine, strict=False)
        return cls(models, thresholds, facts)
