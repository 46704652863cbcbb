"""Both detectors ("eyes") of the `emoji` model. Any of `names` counts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from efface.models import emoji

from ._base import Looking

__all__ = ["EmojiEyes"]


@functools.cache
def networks() -> Any:
    from efface.models.emoji.eyes import load_eyes

    return load_eyes()


@dataclasses.dataclass(frozen=True)
class EmojiEyes(Looking):
    """Both detectors ("eyes") of the `emoji` model. Any of `names` counts."""

    names: tuple[str, ...]

    @property
    def look_name(self) -> str:
        return "eyes"

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in ("watermark", "plain"):
                emoji.truth(name)

    @property
    def name(self) -> str:
        return "both eyes of emoji, frozen thresholds, the worse one"

    def look(self, images: Tensor) -> list[Any]:
        seen = networks().see(images)
        return [type(seen)(*(t[:, k] for t in seen)) for k in range(len(images))]

    def decide(self, looks: list[Any]) -> Tensor:
        if not looks:
            return torch.zeros(2, 0, dtype=torch.bool)
        seen = type(looks[0])(*(torch.stack(part, 1) for part in zip(*looks, strict=True)))
        return networks().concept(seen, self.names) if self.names else networks().icons(seen).any(-1)
