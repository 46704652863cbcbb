"""NudeNet v3: any box of a label set with a score at or above a threshold."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from efface import checks, files

from ._base import Looking, looks, only
from ._protocols import LABELS, exposed, named

__all__ = ["NudeNet"]


@functools.cache
def _nudenet() -> Any:
    try:
        from nudenet import NudeDetector
    except ImportError as error:
        raise ImportError(
            'The detector "nudenet" needs the package nudenet (AGPL-3.0). Install it with '
            'pip install "efface[nudenet]".'
        ) from error
    return NudeDetector()


@dataclasses.dataclass(frozen=True)
class NudeNet(Looking):
    """NudeNet v3: any box of a label set with a score at or above a threshold.

    Args:
        names: the things to detect. NudeNet knows only nudity.
        labels: "2", "5", "6" or "9", see `LABELS`.
        threshold: at least 0.25, because NudeNet drops boxes below.
        store: a JSON-lines file that caches boxes, one line per picture; "" = none.
    """

    anything_unsafe: ClassVar[bool] = True
    names: tuple[str, ...] = ()
    labels: str = "5"
    threshold: float = 0.5
    store: str = ""

    @property
    def look_name(self) -> str:
        return f"nudenet3 {self.store}"

    def __post_init__(self) -> None:
        only("NudeNet", self.names, ("nudity", "sexual"))
        checks.choice("labels", self.labels, tuple(LABELS))
        checks.number(
            "threshold", self.threshold, 0.25, 1, cure="Give 0.25 to 1, because NudeNet drops boxes below 0.25."
        )

    @property
    def name(self) -> str:
        return named(self.labels, self.threshold)

    def look(self, images: Tensor) -> list[Any]:
        """The boxes of each picture: (label, score, (x, y, width, height))."""
        stored, out, fresh = _stored(self.store), [], []
        for x in images:
            # uint8 HWC in BGR, as NudeNet reads a file
            pixels = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).flip(-1).contiguous().numpy()
            key = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
            if key not in stored:
                found = _nudenet().detect(pixels)
                stored[key] = [(b["class"], float(b["score"]), tuple(int(v) for v in b["box"])) for b in found]
                fresh.append(json.dumps({"sha256": key, "detector": "nudenet3_320n", "boxes": stored[key]}))
            out.append(stored[key])
        if self.store and fresh:
            files.append(Path(self.store), "".join(line + "\n" for line in fresh))
        return out

    def decide(self, looks: list[Any]) -> Tensor:
        wanted = exposed(self.labels)
        hits = [any(label in wanted and score >= self.threshold for label, score, _ in boxes) for boxes in looks]
        return torch.tensor([hits], dtype=torch.bool).view(1, len(looks))

    def boxes(self, images: Tensor) -> list[list[tuple[float, float, float, float]]]:
        """The boxes of the label set in each picture [N, 3, H, W]: left, top, right, bottom, inside of the picture."""
        wanted, (height, width) = exposed(self.labels), images.shape[2:]
        found = []
        for each in looks(self, images):
            kept = [box for label, score, box in each if label in wanted and score >= self.threshold]
            cut = [(max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)) for x, y, w, h in kept]
            found.append([(float(a), float(b), float(c), float(d)) for a, b, c, d in cut if a < c and b < d])
        return found

    def ratios(self, looks: list[Any]) -> Tensor:
        """The highest score of the label set; 0 without a box, because NudeNet drops boxes below 0.25."""
        wanted = exposed(self.labels)
        best = [max((score for label, score, _ in boxes if label in wanted), default=0.0) for boxes in looks]
        return torch.tensor([best]).view(1, len(looks)) / self.threshold


def _stored(store: str) -> dict[str, list[Any]]:
    """Boxes by picture. Ignores an incomplete last line, whose picture is then evaluated again."""
    from efface import schema

    found: dict[str, list[Any]] = {}
    if not store or not files.there(Path(store)):
        return found
    lines = files.read_text(Path(store)).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = schema.check(files.parse(line), schema.Boxes, f"{store}, line {number}", "Delete the file.")
            found[entry["sha256"]] = [(label, float(score), tuple(box)) for label, score, box in entry["boxes"]]
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{store}, line {number}, is not a line of boxes ({error}). Delete the file."
                ) from error
    return found
