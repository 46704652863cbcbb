"""Pictures with captions and boxes: read from a folder or from memory, detected, cut to the model's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import checks, files
from ..core import check_pictures
from ..pictures import read_picture, to_pil
from ._geometry import Box, check_box, cropped, flipped

METADATA = "metadata.jsonl"
FORM = 'Write one line per picture: {"file_name": "a.png", "text": "a cat", "boxes": [[2, 2, 35, 15]]}.'


@dataclass(frozen=True, eq=False)
class Example:
    """A picture with its caption and the boxes of the concept.

    Args:
        picture: in RGB.
        text: its caption, without the concept.
        boxes: where the concept is; () if it is not there, None if nobody looked.
        where: the file, for messages.
    """

    picture: Image.Image
    text: str
    boxes: tuple[Box, ...] | None
    where: str

    @property
    def size(self) -> tuple[int, int]:
        return self.picture.width, self.picture.height

    @property
    def pixels(self) -> Tensor:
        """Float [1, 3, H, W] in [0, 1]."""
        values = np.asarray(self.picture, np.float32) / 255
        return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()


def read(folder: Path) -> list[Example]:
    """The pictures that a folder's metadata.jsonl lists.

    Raises:
        FileNotFoundError: the folder or its metadata.jsonl is missing.
        ValueError: a line or a picture cannot be read, a file is named twice, or nothing is listed.
    """
    from .. import schema
    from ._forms import ExampleLine

    path = folder / METADATA
    if not files.there(path):
        raise FileNotFoundError(f"Expected a folder of pictures with {METADATA}, got {folder} without one. {FORM}")
    found: dict[str, Example] = {}
    for number, line in enumerate(files.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = schema.check(files.json_of(line, where, FORM), ExampleLine, where, FORM)
        name = entry["file_name"]
        if name in found:
            raise ValueError(f"Expected each picture once in {path}, got {checks.shown(name)} twice. Leave one out.")
        picture = _picture(folder, name, where)
        found[name] = Example(picture, entry["text"], _checked(entry.get("boxes"), picture, f"{name} ({where})"), name)
    if not found:
        raise ValueError(f"Expected pictures in {path}, got none. {FORM}")
    return list(found.values())


def _picture(folder: Path, name: str, where: str) -> Image.Image:
    try:
        path = files.inside(folder, name)
        if not files.there(path):
            raise ValueError(f"{path} is not there")
        return read_picture(path)
    except ValueError as error:
        why = str(error).removesuffix(".")
        raise ValueError(f"{where} names a picture that cannot be read ({why}). Correct the line.") from error


def given(examples: Iterable[Any]) -> list[Example]:
    """Examples from tuples (picture, text, boxes); a picture is a PIL image, or float [3, H, W] in [0, 1]."""
    found = []
    for k, each in enumerate(examples):
        if not isinstance(each, (tuple, list)) or len(each) != 3:
            raise TypeError(
                checks.refusal("examples (picture, text, boxes)", each, "Give boxes () for a picture without any.")
            )
        picture, text, boxes = each
        image = picture.convert("RGB") if isinstance(picture, Image.Image) else to_pil(check_pictures(picture[None]))[0]
        where = f"example {k}"
        found.append(Example(image, checks.text("text", text, empty=True), _checked(boxes, image, where), where))
    if not found:
        raise ValueError("Expected at least one example, got none. Give tuples (picture, text, boxes).")
    return found


def _checked(boxes: Any, picture: Image.Image, where: str) -> tuple[Box, ...] | None:
    return None if boxes is None else tuple(check_box(box, picture.size, where) for box in boxes)


# ---------------------------------------------------------------- detectors


def boxes_of(detector: Callable[[Tensor], Any], pictures: Tensor, threshold: float) -> list[tuple[Box, ...]]:
    """The boxes that a detector gives for pictures [N, 3, H, W].

    A detector has a method `boxes` that returns a list of boxes per picture, or returns such lists itself. A fifth
    number of a box is its score. A detector that returns bool [J, N] has no boxes: if all its judges see the concept,
    the box is the whole picture.
    """
    found = getattr(detector, "boxes", detector)(pictures)
    size, whole = (pictures.shape[3], pictures.shape[2]), (0.0, 0.0, float(pictures.shape[3]), float(pictures.shape[2]))
    if isinstance(found, Tensor):
        if found.dtype != torch.bool or found.ndim != 2 or found.shape[1] != len(pictures):
            cure = "Return bool [judges, pictures], or a list of boxes per picture."
            raise ValueError(f"Expected answers of the detector as bool [J, N], got {list(found.shape)}. {cure}")
        return [(whole,) if seen else () for seen in found.all(0).tolist()]
    if not isinstance(found, (list, tuple)) or len(found) != len(pictures):
        cure = "Return one list of boxes per picture."
        raise ValueError(checks.refusal(f"lists of boxes for {len(pictures)} pictures from the detector", found, cure))
    kept = [[box[:4] for box in each if len(box) < 5 or float(box[4]) >= threshold] for each in found]
    return [tuple(check_box(box, size, "a picture") for box in each) for each in kept]


def detected(examples: Sequence[Example], detector: Any, threshold: float) -> list[Example]:
    """The examples with the boxes that the detector gives.

    Raises:
        ValueError: an example has no boxes and there is no detector, or no example has a box.
    """
    if detector is not None:
        examples = [replace(e, boxes=boxes_of(detector, e.pixels, threshold)[0]) for e in examples]
    elif lost := [e.where for e in examples if e.boxes is None]:
        raise ValueError(
            f"Expected boxes for every picture, got none for {lost[0]}. Give it `boxes` ([] if the concept is not "
            "there), or a detector."
        )
    if not any(e.boxes for e in examples):
        who = "the boxes" if detector is None else "the detector"
        raise ValueError(
            f"Expected the concept in at least one picture, but {who} found it in none of {len(examples)}. Give "
            "pictures with it, or a lower threshold."
        )
    return list(examples)


# ---------------------------------------------------------------- to the model's size


def fitted(example: Example, size: tuple[int, int], *, flip: bool = False) -> Example:
    """The middle of a picture, scaled to this size (width, height), with its boxes; mirrored if `flip`."""
    width, height = example.size
    scale = max(size[0] / width, size[1] / height)
    left, top = (width - size[0] / scale) / 2, (height - size[1] / scale) / 2
    window = (left, top, width - left, height - top)
    picture = example.picture
    if (width, height) != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS, box=window)
    boxes = cropped(example.boxes or (), window, scale)
    if flip:
        picture, boxes = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flipped(boxes, size[0])
    return replace(example, picture=picture, boxes=tuple(boxes))
