"""Boxes as words: which bins of a grid they cover, and the weights of the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import checks

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels, from the top left corner of the picture."""
Bin = tuple[int, int]
"""Column and row of a bin, from 0."""
Encoding = Literal["bins", "corners"]


def check_box(box: Sequence[float], size: tuple[int, int], where: str) -> Box:
    """The box. Raises ValueError unless it has an area and lies inside the picture of this size (width, height)."""
    numbers = [float(v) for v in box] if len(box) == 4 else []
    x1, y1, x2, y2 = numbers if numbers else (math.nan,) * 4
    if not (0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]):
        raise ValueError(
            f"Expected boxes (left, top, right, bottom) with an area inside the {size[0]} x {size[1]} pixels of "
            f"{where}, got {checks.shown(tuple(box))}. Correct the box, or the detector that gives it."
        )
    return x1, y1, x2, y2


def flipped(boxes: Sequence[Box], width: float) -> list[Box]:
    """The boxes of the picture that is mirrored left to right."""
    return [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in boxes]


def cropped(boxes: Sequence[Box], window: Box, scale: float = 1.0) -> list[Box]:
    """The boxes of a part of the picture, which is scaled afterwards. Boxes outside of it are left out."""
    left, top, right, bottom = window
    found = []
    for x1, y1, x2, y2 in boxes:
        x1, x2, y1, y2 = max(x1, left), min(x2, right), max(y1, top), min(y2, bottom)
        if x1 < x2 and y1 < y2:
            found.append(((x1 - left) * scale, (y1 - top) * scale, (x2 - left) * scale, (y2 - top) * scale))
    return found


@dataclass(frozen=True)
class Grid:
    """The bins of a picture, and their words.

    Args:
        name: the concept's name in texts.
        bins: bins in each direction.
        encoding: "bins" names every covered bin, "corners" the first and the last bin of each box.
    """

    name: str
    bins: int
    encoding: Encoding

    def word(self, at: Bin) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40] or "concept"
        return f"<{slug}:{at[0]},{at[1]}>"

    @property
    def words(self) -> tuple[str, ...]:
        """The words of all bins, row by row."""
        return tuple(self.word((m, n)) for n in range(self.bins) for m in range(self.bins))

    def corners(self, box: Box, size: tuple[int, int]) -> tuple[Bin, Bin]:
        """The first and the last bin of a box. An edge on the border of the picture belongs to the last bin."""
        places = [math.floor(v * self.bins / size[k % 2]) for k, v in enumerate(box)]
        m1, n1, m2, n2 = (min(v, self.bins - 1) for v in places)
        return (m1, n1), (m2, n2)

    def covered(self, boxes: Sequence[Box], size: tuple[int, int]) -> list[Bin]:
        """The bins that at least one box covers, row by row."""
        found = set()
        for box in boxes:
            (m1, n1), (m2, n2) = self.corners(box, size)
            found |= {(m, n) for m in range(m1, m2 + 1) for n in range(n1, n2 + 1)}
        return sorted(found, key=lambda at: (at[1], at[0]))

    def named(self, boxes: Sequence[Box], size: tuple[int, int]) -> list[str]:
        """The location words of boxes, in the encoding."""
        if self.encoding == "bins":
            return [self.word(at) for at in self.covered(boxes, size)]
        return [self.word(at) for box in boxes for at in self.corners(box, size)]

    def text(self, boxes: Sequence[Box], size: tuple[int, int]) -> str:
        """The concept's name and the location words; "" without boxes."""
        return " ".join([self.name, *self.named(boxes, size)]) if boxes else ""

    def weights(self, boxes: Sequence[Box], size: tuple[int, int], shape: tuple[int, int], ratio: float) -> Tensor:
        """The weight [h, w] of each latent position of one picture.

            inside T / (K + a (T - K)),    outside a times as much            T positions, K of them inside

        The mean is 1. Without boxes, or if they cover everything, all weights are 1.
        """
        inside, covered = torch.zeros(shape, dtype=torch.bool), set(self.covered(boxes, size))
        for i in range(shape[0]):
            for j in range(shape[1]):
                inside[i, j] = (j * self.bins // shape[1], i * self.bins // shape[0]) in covered
        total, k = inside.numel(), int(inside.sum())
        if k in (0, total):
            return torch.ones(shape)
        low = total / (k + ratio * (total - k))
        return torch.where(inside, low, ratio * low)


def sincos(bins: int, width: int) -> Tensor:
    """A start for the words' embeddings [bins * bins, width]: sines and cosines of column and row."""
    quarter = width // 4
    speeds = 10_000 ** -(torch.arange(quarter) / max(quarter, 1))
    at = torch.arange(bins)[:, None] * speeds
    waves = torch.cat([at.sin(), at.cos()], 1)
    columns, rows = waves.repeat(bins, 1), waves.repeat_interleave(bins, 0)
    found = torch.cat([columns, rows], 1)
    return torch.nn.functional.pad(found, (0, width - found.shape[1]))


def start(bins: int, table: Tensor) -> Tensor:
    """The words' first embeddings, as long as the median embedding of a vocabulary [ids, D]."""
    waves, length = sincos(bins, table.shape[1]), table.float().norm(dim=1).median()
    return waves * (length.cpu() / waves.norm(dim=1, keepdim=True).clamp_min(1e-6))
