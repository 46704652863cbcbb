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

SCALE = 100.0  # of the cosines in a softmax, as CLIP was trained


@dataclasses.dataclass(frozen=True)
class ZeroShot(Looking):
    """CLIP zero-shot: a picture shows the label with the nearest text. One of `names` must win.

    Args:
        names: the labels to detect.
        labels: all labels; () = the names, against the text `other`.
        template: makes a text from a label.
        other: the opposing text if there are no labels.
        clip: folder or hub id of a CLIP model, or "emoji".
        texts: whole texts that stand for the names, instead of the template.
        threshold: in (0, 1]: the names count if their share of softmax(100 cosine) is at least this.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    template: str = "a photo of {}"
    other: str = "a photo"
    clip: str = CLIP_LARGE
    texts: tuple[str, ...] = ()
    threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", checks.texts("labels", self.labels))
        object.__setattr__(self, "texts", checks.texts("texts", self.texts))
        if self.threshold is not None:
            checks.number("threshold", self.threshold, 0, 1, above=True)
        if self.texts:
            return
        strangers = [n for n in self.names if self.labels and n not in self.labels]
        if strangers or not self.names:
            raise ValueError(
                f"Expected names out of the labels {', '.join(self.labels)}, got {checks.shown(strangers or 'none')}. "
                "Name some of them, add yours to `labels`, or leave `labels` out."
            )

    @property
    def name(self) -> str:
        if self.threshold is not None:
            return f"CLIP zero-shot, {self.clip}, share of {len(self._texts()[0])} texts >= {self.threshold:g}"
        return f"CLIP zero-shot, {self.clip}, the nearest of {len(self._texts()[0])} texts"

    @property
    def look_name(self) -> str:
        return f"encoder {self.clip}"

    def look(self, images: Tensor) -> list[Any]:
        return list(encoder(self.clip).images(images).unbind(1))

    def _texts(self) -> tuple[list[str], list[int]]:
        """All texts, and the numbers of those that stand for the names."""
        others = [self.template.replace("{}", label) for label in self.labels]
        if self.texts:
            return [*self.texts, *(others or [self.other])], list(range(len(self.texts)))
        if others:
            return others, [k for k, label in enumerate(self.labels) if label in self.names]
        named = [self.template.replace("{}", name) for name in self.names]
        return [*named, self.other], list(range(len(named)))

    def _cosines(self, looks: list[Any]) -> Tensor:
        found: Tensor = torch.stack(looks, 1) @ encoder(self.clip).texts(self._texts()[0]).T
        return found

    def ratios(self, looks: list[Any]) -> Tensor | None:
        if self.threshold is None:
            return None
        chances = (SCALE * self._cosines(looks)).softmax(-1) if looks else torch.zeros(1, 0, 1)
        return chances[..., self._texts()[1] if looks else [0]].sum(-1) / self.threshold

    def decide(self, looks: list[Any]) -> Tensor:
        ratios = self.ratios(looks)
        if ratios is not None:
            return ratios >= 1
        return torch.isin(self._cosines(looks).argmax(-1), torch.tensor(self._texts()[1]))
