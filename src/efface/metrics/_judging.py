"""Samples judged by a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from efface.core import Detector
from efface.detectors._base import Looking, looks
from efface.detectors._named import Spec, detector
from efface.records import Sample

from ._samples import batches

SHOWN = 0.30
"""The smallest share of the base model's pictures that has to show a concept before its removal is judged."""


def judged(samples: Sequence[Sample], spec: Spec, names: Callable[[Sample], tuple[str, ...]]) -> tuple[Tensor, str]:
    """Whether each of the samples, at least one, shows what `names` says: bool [J, N], and the protocol in words."""
    asked = [names(s) for s in samples]
    found = {each: detector(spec, each) for each in dict.fromkeys(asked)}
    first = next(iter(found.values()))
    seen = [x for images in batches(samples) for x in looks(first, images)] if isinstance(first, Looking) else []
    columns: dict[int, Tensor] = {}
    for each, judge in found.items():
        where = [k for k, a in enumerate(asked) if a == each]
        if isinstance(judge, Looking):
            hits = _checked(judge.decide([seen[k] for k in where]), judge, len(where))
        else:
            parts = [_checked(judge(images), judge, len(images)) for images in batches([samples[k] for k in where])]
            hits = torch.cat(parts, 1)
        columns |= {k: hits[:, j] for j, k in enumerate(where)}
    return torch.stack([columns[k] for k in range(len(samples))], 1), first.name


def _checked(hits: Tensor, judge: Detector, n: int) -> Tensor:
    if hits.dtype != torch.bool or hits.ndim != 2 or hits.shape[1] != n:
        raise ValueError(
            f"Expected the detector {judge.name!r} to answer bool [judges, {n}], got {hits.dtype} {tuple(hits.shape)}. "
            "Return one row for each judge."
        )
    return hits
