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

    def ratios(self, looks: list[Any]) -> Tensor:
        """The largest ratio over the icons, or the style, of `names`; over all icons without names."""
        from efface.models.emoji.eyes import INDEX, STYLES

        if not looks:
            return torch.zeros(2, 0)
        seen, limits = _joined(looks), networks().thresholds
        icons, styles = seen.icons / limits.icons[:, None], seen.styles / limits.styles[:, None]
        found = [] if self.names else [icons.amax(-1)]
        for name in self.names:
            what = name if name in (*STYLES, "watermark") else emoji.truth(name)
            if what == "watermark":
                found.append(seen.watermark / limits.watermark[:, None])
            elif isinstance(what, str):
                found.append(styles[..., STYLES.index(what)])
            else:
                found.append(icons[..., [INDEX[icon] for icon in what]].amax(-1))
        return torch.stack(found).amax(0)

    def log_odds(self, images: Tensor) -> Tensor:
        """The log-odds less those of the thresholds, [2, N], with gradients. Without names, of the surest icon."""
        from efface.models.emoji.eyes import ICONS

        found: Tensor = networks().log_odds(images, self.names or ICONS)
        return found

    def decide(self, looks: list[Any]) -> Tensor:
        if not looks:
            return torch.zeros(2, 0, dtype=torch.bool)
        seen = _joined(looks)
        return networks().concept(seen, self.names) if self.names else networks().icons(seen).any(-1)


def _joined(looks: list[Any]) -> Any:
    """The results of several pictures as one."""
    return type(looks[0])(*(torch.stack(part, 1) for part in zip(*looks, strict=True)))
