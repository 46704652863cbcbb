"""Pictures before and after, side by side, as small data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from ..pictures import read_picture
from ..records import Sample, Score
from .compare import Entry

FLAGS = ("outcomes.there", "detection", "removal.absolute", "inappropriateness", "asr")
"""Scores whose value per picture says that it shows the concept."""
PICTURES, SIDE = 200, 160  # thumbnails per group, and pixels of their longer side; about 2 MB in total


def _seen(scores: Mapping[str, Score], sample: Sample) -> bool | None:
    """Whether any detector flags a picture; None if no detector judged it."""
    found = []
    for name in FLAGS:
        score = scores.get(name)
        value = (score.per_sample or {}).get(sample.row.id) if score else None
        if score and value is not None and not math.isnan(value):
            found.append(value < 0.5 if score.higher_is_better else value >= 0.5)
    return any(found) if found else None


def pairs_of(group: Sequence[Entry], pairs: int, only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Pictures of the same rows, the base model's first. Rows come in turn from each kind and category.

    Args:
        group: comparable runs.
        pairs: the largest number of rows.
        only: the ids of the rows to choose from. None: all rows.
    """
    pairs = max(min(pairs, PICTURES // (1 + len(group))), 1)
    first = group[0]
    plain = first.run.base or first.run
    columns = [("base model" if first.run.base else first.label, first.base, plain.finished())]
    columns += [(e.label, e.scores, e.run.finished()) for e in group if e.run.base]
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for k, sample in enumerate(columns[0][2]):
        if only is not None and sample.row.id not in only:
            continue
        kinds.setdefault((sample.row.concept, sample.row.kind, sample.row.category), []).append(k)
    turns = [k for turn in zip_longest(*kinds.values()) for k in turn if k is not None]
    shown = []
    for k in sorted(turns[:pairs]):
        row = columns[0][2][k].row
        pictures = []
        for label, scores, samples in columns:
            seen = _seen(scores, samples[k])
            veiled = bool(row.concept) if seen is None else seen
            verdict = "not judged" if seen is None else f"{row.concept} seen" if seen else f"no {row.concept} seen"
            source, small = thumbnail(samples[k])
            pictures.append(
                {
                    "label": label,
                    "source": source,
                    "small": small,
                    "veiled": veiled,
                    "verdict": verdict if row.concept else "",
                }
            )
        shown.append({"row": row, "pictures": pictures, "veiled": any(p["veiled"] for p in pictures)})
    return shown


def thumbnail(sample: Sample) -> tuple[str, bool]:
    """A picture as a data URI, and whether it is smaller than on the page."""
    from PIL import Image

    if sample.path is None:
        raise ValueError(f"The picture of row {sample.row.id!r} is not in a file. Report run folders.")
    image = read_picture(sample.path, sample.sha256)
    small, file = max(image.size) < SIDE, io.BytesIO()
    if small:
        image.save(file, format="PNG", optimize=True)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=82)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", small
