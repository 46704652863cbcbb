"""Both detectors ("eyes") of an embedded model: `emoji-128`'s for pictures of 128 pixels, else `emoji`'s."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from efface.models import emoji, emoji128, eyes_of
from efface.models.emoji.concepts import known
from efface.models.emoji128 import concepts as larger

from ._base import Looking

__all__ = ["EmojiEyes"]


def networks(images: Tensor) -> Any:
    """The detectors of the model that draws pictures [..., H, W] of this size."""
    return eyes_of("emoji-128" if tuple(images.shape[-2:]) == (emoji128.SIDE, emoji128.SIDE) else "emoji")


@dataclasses.dataclass(frozen=True)
class EmojiEyes(Looking):
    """Both detectors ("eyes") of an embedded model: `emoji-128`'s for pictures of 128 pixels, else `emoji`'s.

    Any of `names` counts.
    """

    names: tuple[str, ...]

    @property
    def look_name(self) -> str:
        return "eyes"

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in ("watermark", "plain") and not known(larger.truth, name):
                emoji.truth(name)

    @property
    def name(self) -> str:
        return "both eyes of emoji, or of emoji-128 at 128 pixels, frozen thresholds, the worse one"

    def look(self, images: Tensor) -> list[Any]:
        eyes = networks(images)
        seen = eyes.see(images)
        return [(eyes, type(seen)(*(t[:, k] for t in seen))) for k in range(len(images))]

    def ratios(self, looks: list[Any]) -> Tensor:
        """The largest ratio over the icons, or the style, of `names`; over all icons without names."""
        if not looks:
            return torch.zeros(2, 0)
        eyes, seen = joined(looks)
        found: Tensor = eyes.ratios(seen, self.names)
        return found

    def log_odds(self, images: Tensor) -> Tensor:
        """The log-odds less those of the thresholds, [2, N], with gradients. Without names, of the surest icon."""
        eyes = networks(images)
        found: Tensor = eyes.log_odds(images, self.names or eyes.vocabulary.icons)
        return found

    def decide(self, looks: list[Any]) -> Tensor:
        if not looks:
            return torch.zeros(2, 0, dtype=torch.bool)
        eyes, seen = joined(looks)
        found: Tensor = eyes.concept(seen, self.names) if self.names else eyes.icons(seen).any(-1)
        return found


def joined(looks: list[Any]) -> tuple[Any, Any]:
    """The detectors that looked at some pictures, and what they saw in all of them.

    Raises:
        ValueError: the pictures are of several models, whose detectors know different things.
    """
    eyes, seen = zip(*looks, strict=True)
    if any(each is not eyes[0] for each in eyes):
        raise ValueError(
            "Expected pictures of one model, got some of 128 pixels and others, which have other detectors. Judge them "
            "apart."
        )
    return eyes[0], type(seen[0])(*(torch.stack(part, 1) for part in zip(*seen, strict=True)))
