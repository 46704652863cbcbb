"""The two detectors ("eyes") of the `emoji` model: small CNNs for icons, style, gender and watermark.

They judge the `emoji` model's pictures. The eyes differ in seed, width and training noise and are **never merged**:
every answer has one row per eye. Compute a rate for each row, and report the worse one.

Pictures are float [N, 3, H, W] in [0, 1], 64 x 64 in training. A method of `Eyes` takes pictures, or the result of
`Eyes.see`, so that several questions need one evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ... import checks
from .concepts import truth, vocabulary
from .weights import CURE, FOLDER, check

GENDERED: tuple[str, ...] = tuple(p[g] for p in vocabulary()["professions"].values() for g in ("male", "female"))
ICONS: tuple[str, ...] = tuple(icon for group in vocabulary()["groups"].values() for icon in group) + GENDERED
STYLES: tuple[str, ...] = tuple(vocabulary()["style_shares"])
INDEX: dict[str, int] = {name: k for k, name in enumerate(ICONS)}
MALE = [INDEX[name] for name in GENDERED[0::2]]
FEMALE = [INDEX[name] for name in GENDERED[1::2]]
WIDTHS = (128, 144)


class Seen(NamedTuple):
    """Probabilities for N pictures. One eye returns the shapes below; `Eyes.see` adds a leading 2."""

    icons: Tensor
    """[N, 149], each in [0, 1] independently: a picture may show several icons, or none."""
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


class Eye(nn.Module):
    """One of the two detectors.

    Each position of an 8-fold smaller map votes for icons and watermark, and a log-mean-exp pools the votes. One
    certain position is enough, for any place and size of the icon. The style comes from the mean of the map.

    Args:
        width: channels of the last stage, a multiple of 16; 128 makes 0.9 M parameters.

    Raises:
        ValueError: `width` is not a positive multiple of 16.

    Example:
        >>> import torch
        >>> from efface.models.emoji.eyes import Eye
        >>> seen = Eye(width=16).eval()(torch.rand(2, 3, 64, 64))
        >>> seen.icons.shape, seen.styles.shape, seen.watermark.shape
        (torch.Size([2, 149]), torch.Size([2, 5]), torch.Size([2]))
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
            Block(width),
            nn.BatchNorm2d(width),
            nn.SiLU(),
        )
        self.votes = nn.Conv2d(width, len(ICONS) + 1, 1, bias=False)
        self.bias = nn.Parameter(torch.full((len(ICONS) + 1,), -5.0))  # icons are rare
        self.style = nn.Linear(width, len(STYLES))

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps pictures [N, 3, H, W] in [0, 1] to logits of icons [N, 149], styles [N, 5] and watermark [N]."""
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
        thresholds: `icons` [2, 149], `styles` [2, 5] and `watermark` [2]; a thing counts as seen at or above it.
        facts: the content of `eyes.json`: the measured recall, precision and false alarms.

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

    @torch.no_grad()
    def see(self, images: Tensor | Seen) -> Seen:
        """Maps pictures [N, 3, H, W] in [0, 1] to probabilities `icons` [2, N, 149], `styles` [2, N, 5], `watermark`
        [2, N].

        Evaluates 256 pictures at a time. Passes results of `see` through.

        Raises:
            ValueError: the pictures are not float [N, 3, H, W] in [0, 1], or smaller than 16 pixels.
        """
        if isinstance(images, Seen):
            return images
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 16 or not images.is_floating_point():
            raise ValueError(
                f"Expected float images [N, 3, H, W] of at least 16 x 16, got {images.dtype} {tuple(images.shape)}. "
                "Convert or resize them."
            )
        if len(images) == 0:
            return Seen(torch.zeros(2, 0, len(ICONS)), torch.zeros(2, 0, len(STYLES)), torch.zeros(2, 0))
        if not (images.min() >= 0 and images.max() <= 1):  # also when something is NaN
            raise ValueError(
                f"Expected images in [0, 1], got values from {float(images.min()):g} to {float(images.max()):g}. Scale "
                "them first."
            )
        x = images.detach().float().cpu()
        rows = []
        for eye in self.eyes:
            parts = [eye(part.contiguous(memory_format=torch.channels_last)) for part in x.split(256)]
            rows.append(Seen(*(torch.cat(column) for column in zip(*parts, strict=True))))
        return Seen(*(torch.stack(pair) for pair in zip(*rows, strict=True)))

    def icons(self, images: Tensor | Seen) -> Tensor:
        """The detected icons: bool [2, N, 149], in the order of `ICONS`."""
        return self.see(images).icons >= self.thresholds.icons[:, None]

    def styles(self, images: Tensor | Seen) -> Tensor:
        """The likeliest style of each picture: index into `STYLES`, [2, N]. Always names one; see `style_is`."""
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
        people = MALE + FEMALE
        there = self.icons(seen)[..., people]
        surest = torch.where(there, seen.icons[..., people], -1.0).argmax(-1)
        return torch.where(there.any(-1), (surest >= len(MALE)).long(), -1)

    def concept(self, images: Tensor | Seen, concept: str | Sequence[str]) -> Tensor:
        """Whether the pictures show a concept: bool [2, N].

        Args:
            images: pictures, or the result of `see`.
            concept: a name that `concepts.truth` knows (an icon, a group of icons such as "alcohol", a profession, a
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
            if name == "watermark":
                found |= self.watermark(seen)
                continue
            what = name if name in STYLES else truth(name)
            if isinstance(what, str):
                found |= self.style_is(seen, what)
            else:
                found |= icons[..., [INDEX[icon] for icon in what]].any(-1)
        return found

    def log_odds(self, images: Tensor, concept: str | Sequence[str]) -> Tensor:
        """The log-odds of a concept less those of its threshold, [2, N], with gradients: positive where it is seen.

        Args:
            images: pictures [N, 3, H, W] in [0, 1].
            concept: as in `concept`. The surest of several icons counts.
        """
        rows = []
        for k, eye in enumerate(self.eyes):
            icons, styles, watermark = eye.logits(images.float().cpu())
            styles = styles.softmax(-1).logit(eps=1e-6)
            limits = Seen(*(each[k].logit(eps=1e-6) for each in self.thresholds))
            surest = []
            for name in [concept] if isinstance(concept, str) else list(concept):
                what = name if name in (*STYLES, "watermark") else truth(name)
                if what == "watermark":
                    surest.append(watermark - limits.watermark)
                elif isinstance(what, str):
                    surest.append(styles[:, STYLES.index(what)] - limits.styles[STYLES.index(what)])
                else:
                    some = [INDEX[icon] for icon in what]
                    surest.append((icons[:, some] - limits.icons[some]).amax(-1))
            rows.append(torch.stack(surest).amax(0))
        return torch.stack(rows)


class ConceptEyes:
    """Both eyes as the detector of one concept.

    Args:
        concept: a name that `Eyes.concept` knows.
        eyes: the eyes. Default: the shipped ones.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> import torch
        >>> ConceptEyes("alcohol")(torch.rand(3, 3, 64, 64)).shape
        torch.Size([2, 3])
    """

    def __init__(self, concept: str, eyes: Eyes | None = None) -> None:
        what = concept if concept in (*STYLES, "watermark") else truth(concept)
        self.name, self.concept = f"emoji eyes: {concept}", concept
        self.eyes = eyes or load_eyes()
        others = [INDEX[icon] for icon in ICONS if isinstance(what, str) or icon not in what]
        self._others = torch.tensor(others)

    def __call__(self, images: Tensor) -> Tensor:
        """Whether the pictures show the concept: bool [2, N]."""
        return self.eyes.concept(images, self.concept)

    def log_odds(self, images: Tensor) -> Tensor:
        """The log-odds less those of the thresholds, [2, N], with gradients."""
        return self.eyes.log_odds(images, self.concept)

    def kept(self, erased: Tensor, plain: Tensor) -> Tensor:
        """Retention of other icons: int8 [2, N]. 1 if the erased picture shows another icon of the base model's
        picture, 0 if it lost all of them, -1 if there were none."""
        before, after = (self.eyes.icons(images)[..., self._others] for images in (plain, erased))
        found = (before & after).any(-1).to(torch.int8)
        return torch.where(before.any(-1), found, torch.full_like(found, -1))

    def faithful(self, erased: Tensor, plain: Tensor) -> Tensor:
        """The share of the base model's other icons that the erased picture still shows, [N], by the eye with the lower
        share; 1 if there were none."""
        before, after = (self.eyes.icons(images)[..., self._others] for images in (plain, erased))
        there = before.sum(-1)
        share = (before & after).sum(-1) / there.clamp_min(1)
        return torch.where(there > 0, share, torch.ones_like(share)).amin(0)


def load_eyes(folder: Path | None = None) -> Eyes:
    """Loads both eyes from `eyes.safetensors` (fp16) and `eyes.json` in `folder`. Default: the shipped files.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is damaged, or was made for another vocabulary.
    """
    folder = FOLDER if folder is None else Path(folder)
    card = folder / "eyes.json"
    if not card.is_file():
        raise FileNotFoundError(f"{card} is missing. {CURE}")
    try:
        facts = json.loads(card.read_text())
        icons, styles, thresholds, expected = (facts[key] for key in ("icons", "styles", "thresholds", "sha256"))
        models = [Eye(width) for width in facts["widths"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{card} is damaged ({error}). {CURE}") from error
    if (icons, styles) != (list(ICONS), list(STYLES)):
        raise ValueError(f"{card} was made for another vocabulary. {CURE}")
    path = check(folder / "eyes.safetensors", expected)
    tensors = load_file(path)
    for k, eye in enumerate(models):
        # training state that is not stored
        wanted = {name: t.shape for name, t in eye.state_dict().items() if t.is_floating_point()}
        mine = {name.removeprefix(f"{k}."): t.float() for name, t in tensors.items() if name.startswith(f"{k}.")}
        if {name: t.shape for name, t in mine.items()} != wanted:
            raise ValueError(f"{path} does not hold an eye of width {eye.width} under {k!r}. {CURE}")
        eye.load_state_dict(mine, strict=False)
    return Eyes(models, thresholds, facts)
