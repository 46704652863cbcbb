"""How far each picture has moved from the base model's picture of the same seed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from efface import checks
from efface.records import Sample, Score

from ._samples import batches, chosen, paired
from ._stats import mean

__all__ = ["LPIPS"]


@dataclasses.dataclass(frozen=True)
class LPIPS:
    """Mean perceptual distance between a picture and the base model's, same row and seed; 0 for equal pictures.

    For rows that name the concept, far is what one wants; for others, near.

    Paper: Zhang, Isola, Efros, Shechtman, Wang 2018, "The Unreasonable Effectiveness of Deep Features", arXiv
    1801.03924.

    Differs: through torchmetrics. It was not run here, where the backbone's weights cannot be had: tested with a stub.
    ESD and RECE shrink pictures to 64 pixels first; `size` says which was done.

    Args:
        net: "alex", "vgg" or "squeeze".
        size: side that pictures are resized to; 0 = as they are.
        kinds: kinds of rows to take; () = all.

    Raises:
        ValueError: an unknown net, a negative size, or no base.
        ImportError: torchmetrics or torchvision is missing.

    Example:
        >>> from efface.metrics.lpips import LPIPS
        >>> LPIPS(size=64).net
        'alex'
    """

    name: ClassVar[str] = "lpips"
    unit: ClassVar[str] = "distance"
    higher_is_better: ClassVar[bool | None] = False
    net: str = "alex"
    size: int = 0
    kinds: tuple[str, ...] = ("benign",)

    def __post_init__(self) -> None:
        checks.choice("net", self.net, ("alex", "vgg", "squeeze"))
        checks.whole("size", self.size, 0)

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """One score."""
        group = chosen(samples, lambda row: not self.kinds or row.kind in self.kinds)
        if not group:
            return []
        net, parts = _net(self.net), []
        for x, y in zip(batches(group, 16), batches(paired(group, base, self.name), 16), strict=True):
            if x.shape != y.shape:
                raise ValueError(
                    f"Expected pictures of one size for lpips, got {tuple(x.shape)} and {tuple(y.shape)}. Give `size`."
                )
            with torch.no_grad():
                parts.append(net(2 * self._sized(x) - 1, 2 * self._sized(y) - 1).reshape(-1).float())
        words = (
            f"LPIPS {self.net}, {f'{self.size} pixels' if self.size else 'full size'}, against the base model's picture"
        )
        values = torch.cat(parts)[None]
        return [mean("lpips", values, group, unit=self.unit, higher_is_better=False, protocol=words)]

    def _sized(self, x: torch.Tensor) -> torch.Tensor:
        if not self.size:
            return x
        return F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)


@functools.cache
def _net(net: Any) -> Any:
    """Pairs of pictures in [-1, 1] to distances [N]."""
    if importlib.util.find_spec("torchmetrics") is None or importlib.util.find_spec("torchvision") is None:
        raise ImportError('LPIPS needs torchmetrics and torchvision: pip install "efface[bench]" torchvision')
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type=net).net
