"""CLIP zero-shot: a picture shows the label with the nearest text. One of `names` must win."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from efface import checks

from ._base import Looking
from ._encoders import CLIP_LARGE, encoder

__all__ = ["ZeroShot"]


@dataclasses.dataclass(frozen=True)
class ZeroShot(Looking):
    """CLIP zero-shot: a picture shows the label with the nearest text. One of `names` must win.

    Args:
        names: the labels to detect.
        labels: all labels; () = the names, against the text `other`.
        template: makes a text from a label.
        other: the opposing text if there are no labels.
        clip: folder or hub id of a CLIP model, or "emoji".
    """

    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    template: str = "a photo of {}"
    other: str = "a photo"
    clip: str = CLIP_LARGE

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", checks.texts("labels", self.labels))
        strangers = [n for n in self.names if self.labels and n not in self.labels]
        if strangers or not self.names:
            raise ValueError(
                f"Expected names out of the labels {', '.join(self.labels)}, got {checks.shown(strangers or 'none')}. "
                "Name some of them, add yours to `labels`, or leave `labels` out."
            )

    @property
    def name(self) -> str:
        return f"CLIP zero-shot, {self.clip}, the nearest of {len(self.labels) or len(self.names) + 1} texts"

    @property
    def look_name(self) -> str:
        return f"encoder {self.clip}"

    def look(self, images: Tensor) -> list[Any]:
        return list(encoder(self.clip).images(images).unbind(1))

    def decide(self, looks: list[Any]) -> Tensor:
        texts = [self.template.replace("{}", label) for label in self.labels or self.names]
        texts += [] if self.labels else [self.other]
        best = (torch.stack(looks, 1) @ encoder(self.clip).texts(texts).T).argmax(-1)
        wins = [k for k, label in enumerate(self.labels or self.names) if label in self.names]
        return torch.isin(best, torch.tensor(wins))
