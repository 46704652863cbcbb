"""Reads and writes pictures, and makes labelled grids."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from . import checks, files

if TYPE_CHECKING:
    from torch import Tensor

MARGIN, LABEL = 4, 64
FORMATS = ("PNG", "JPEG", "WEBP")  # the only formats read: other decoders of Pillow run programs or are rarely tested
BROKEN = OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError
AGAIN = "Delete it, and run the command that made it again."
BYTES, PIXELS = 64 * files.MIB, 8192 * 8192


def read_picture(path: Path, sha256: str = "") -> Image.Image:
    """Reads a PNG, JPEG or WebP file as RGB.

    Args:
        path: the file.
        sha256: the expected hash of its bytes; "" means unknown.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the hash or the format differs, the picture is damaged, or it is larger than 64 MiB or 8,192 x 8,192
            pixels.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "red.png"
        >>> Image.new("RGB", (8, 8), "red").save(path)
        >>> read_picture(path).getpixel((0, 0))
        (255, 0, 0)
    """
    content = files.read(path, BYTES)
    if sha256 and files.sha256(content) != sha256:
        raise ValueError(f"{path} is not the picture that was drawn, because its SHA-256 differs. Draw the run again.")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, more than the limit of {PIXELS:,}")
            return picture.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a PNG, JPEG or WebP picture. {AGAIN}") from error
    except BROKEN as error:
        why = checks.short(str(error), 160)
        raise ValueError(f"{path} cannot be read as a PNG, JPEG or WebP picture ({why}). {AGAIN}") from error


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures float [N, 3, H, W] in [0, 1] as PIL images."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def png(picture: Image.Image) -> bytes:
    """The bytes of a picture as a PNG file."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """The similarity of pictures [N, 3, H, W], [N] in [0, 1]: the correlation of their 16 x 16 reductions, 0 if
    negative.

    Example:
        >>> import torch
        >>> a = torch.rand(1, 3, 32, 32)
        >>> bool(likeness(a, a) > 0.999), float(likeness(a, 1 - a))
        (True, 0.0)
    """
    from torch.nn.functional import adaptive_avg_pool2d

    x, y = (adaptive_avg_pool2d(pictures.float(), 16).flatten(1) for pictures in (a, b))
    x, y = (v - v.mean(1, keepdim=True) for v in (x, y))
    norm = (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-12)
    return ((x * y).sum(1) / norm).clamp(0, 1)


def grid(
    images: Tensor | Sequence[Image.Image] | Mapping[str, Sequence[Image.Image]],
    columns: int | Sequence[str] = 4,
    labels: Sequence[str] = (),
    side: int = 128,
) -> Image.Image:
    """Pictures in a labelled grid.

    Args:
        images: PIL pictures or float [N, 3, H, W] in [0, 1], row by row; or a mapping from row labels to pictures.
        columns: number of pictures per row, or one heading per column.
        labels: one text per row, shown at its left.
        side: longer side of a picture in the grid, in pixels. Small pictures are enlarged without smoothing.

    Raises:
        ValueError: there are no pictures, the numbers of labels and rows differ, or rows differ in length.

    Example:
        >>> import efface
        >>> from PIL import Image
        >>> pictures = [Image.new("RGB", (8, 8)) for _ in range(4)]
        >>> efface.grid(pictures, columns=["cat", "dog"], labels=["before", "after"], side=16).size
        (108, 58)
    """
    if isinstance(images, Mapping):
        return _drawn(images, () if isinstance(columns, int) else columns, side)
    pictures = list(images) if isinstance(images, Sequence) else to_pil(images)
    width = checks.whole("columns", columns) if isinstance(columns, int) else len(columns)
    rows = [pictures[k : k + width] for k in range(0, len(pictures), width or 1)]
    if labels and len(labels) != len(rows):
        raise ValueError(
            f"Expected a label for each of {len(rows)} rows, got {len(labels)}. Give as many labels as rows."
        )
    if rows:
        blank = Image.new("RGB", rows[-1][-1].size, "white")
        rows[-1] += [blank] * (min(width, len(pictures)) - len(rows[-1]))
    names = labels or [" " * k for k in range(len(rows))]  # distinct keys that print as blanks
    return _drawn(dict(zip(names, rows, strict=True)), () if isinstance(columns, int) else columns, side)


def _drawn(rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str], side: int) -> Image.Image:
    """Draws one line per entry of `rows`, with its label at the left and `columns` as headings."""
    lengths = {len(pictures) for pictures in rows.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"Expected rows of one length with at least one picture, got lengths {sorted(lengths)}. Fill the rows."
        )
    scaled = {name: [_scaled(p, side) for p in pictures] for name, pictures in rows.items()}
    width = max(p.width for line in scaled.values() for p in line) + MARGIN
    height = max(p.height for line in scaled.values() for p in line) + MARGIN
    top = 18 if columns else MARGIN
    out = Image.new("RGB", (LABEL + MARGIN + width * lengths.pop(), top + height * len(rows)), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(12)
    for k, heading in enumerate(columns):
        draw.text((LABEL + MARGIN + width * k + width / 2, 2), heading, fill="black", font=font, anchor="ma")
    for j, (name, line) in enumerate(scaled.items()):
        y = top + height * j
        draw.text((MARGIN, y + height / 2), name, fill="black", font=font, anchor="lm")
        for k, picture in enumerate(line):
            out.paste(picture, (LABEL + MARGIN + width * k, y))
    return out


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    factor = side / max(picture.size)
    how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    size = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
    return picture.convert("RGB").resize(size, how)
