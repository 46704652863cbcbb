"""Selects, pairs and loads samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from efface import checks
from efface.records import Row, Sample

BATCH = 64


def chosen(samples: Sequence[Sample], keep: Callable[[Row], object]) -> list[Sample]:
    return [s for s in samples if keep(s.row)]


def groups(samples: Sequence[Sample], by: Sequence[str]) -> dict[str, list[Sample]]:
    """Groups samples: all under "". If the fields `by` have several combinations, each also under "/a/b".

    Raises:
        ValueError: a row lacks a field.
    """
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        for field in by:
            checks.choice("by", field, ("kind", "category", "concept"))
        key = "".join(f"/{getattr(sample.row, field) or 'none'}" for field in by)
        found.setdefault(key, []).append(sample)
    return {"": list(samples)} | (found if len(found) > 1 else {}) if samples else {}


def paired(samples: Sequence[Sample], base: Sequence[Sample] | None, metric: str) -> list[Sample]:
    """The base model's samples, in the order of `samples`.

    Raises:
        ValueError: there are none, or a row is missing or differs.
    """
    if base is None:
        raise ValueError(f"{metric} needs the base model's pictures of the same rows. Give them as `base`.")
    by_id = {s.row.id: s for s in base}
    for s in samples:
        if s.row.id not in by_id:
            raise ValueError(
                f"{metric} needs the base model's picture of row {s.row.id!r}, which `base` lacks. Draw the same rows "
                "with the base model."
            )
        if by_id[s.row.id].row != s.row:
            raise ValueError(
                f"{metric} needs equal rows, got another row with id {s.row.id!r} in `base`. Draw the same suite."
            )
    return [by_id[s.row.id] for s in samples]


def batches(samples: Sequence[Sample], size: int = BATCH) -> Iterator[Tensor]:
    """The pictures in order, as [n, 3, H, W]. All pictures of a batch have the same size.

    Raises:
        ValueError: a picture is not float [3, H, W] in [0, 1]. The message names its row.
    """
    waiting: list[Tensor] = []
    for sample in samples:
        x = sample.image()
        if x.ndim != 3 or x.shape[0] != 3 or not x.is_floating_point() or not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f"Expected the picture of row {sample.row.id!r} to be float [3, H, W] in [0, 1] without NaN, got "
                f"{x.dtype} {tuple(x.shape)} from {float(x.min()):g} to {float(x.max()):g}. Draw it again."
            )
        if waiting and (len(waiting) == size or waiting[0].shape != x.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(x.detach().float().cpu())
    if waiting:
        yield torch.stack(waiting)
