"""Feature vectors of pictures, for distances between sets of pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efface import checks
from efface.detectors._encoders import encoder
from efface.records import Row, Sample

from ._samples import batches

Extract = Callable[[Tensor], Tensor]
"""Maps pictures [N, 3, H, W] in [0, 1] to features [J, N, D], one row per judge."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def extractor(features: str | Extract) -> tuple[Extract, str]:
    """The extractor, and its description in reports.

    Args:
        features: "eye" (mean of the last map of both `emoji` detectors), "inception" (Inception-v3 pool3, the ported
            weights, through torchmetrics), "clip:FOLDER" (projected features of a CLIP model), or a callable.

    Raises:
        ValueError: the name is unknown.
        ImportError: a package is missing. The message has the pip command.
    """
    if callable(features):
        return features, getattr(features, "name", "given features")
    if features == "eye":
        return _eye, "mean of the last map of each eye of emoji, the worse eye"
    if features == "inception":
        net = _inception()
        return (lambda x: net(_bytes(x))[None].float()), "Inception-v3 pool3 (2,048) of torch-fidelity, resized by it"
    if str(features).startswith("clip:"):
        judge = encoder(features.removeprefix("clip:"))
        return judge.images, judge.name.replace("raw cosine", "projected features of length 1")
    raise ValueError(
        checks.refusal("`features` to be 'eye', 'inception' or 'clip:FOLDER'", features, "Give one of these.")
    )


def _bytes(x: Tensor) -> Tensor:
    return (x * 255).round().byte()


@torch.no_grad()
def _eye(x: Tensor) -> Tensor:
    from efface.detectors.eyes import networks
    from efface.models.emoji.aligned import features

    both = [features(eye, x)[:, : eye.width] for eye in networks(x).eyes]
    wide = max(f.shape[1] for f in both)  # the detectors differ in width; columns of zeros change no distance
    return torch.stack([torch.nn.functional.pad(f, (0, wide - f.shape[1])) for f in both])


@functools.cache
def _inception() -> Any:
    import importlib.util

    if importlib.util.find_spec("torchmetrics") is None or importlib.util.find_spec("torch_fidelity") is None:
        raise ImportError(
            "Inception features need torchmetrics and torch-fidelity. Install them with "
            'pip install "efface[bench]" torch-fidelity.'
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(feature=2048).inception


def of(samples: Sequence[Sample], extract: Extract) -> list[np.ndarray]:
    """Features of all samples, one [N, D] per judge."""
    parts = [extract(x) for x in batches(samples)]
    return [each.double().numpy() for each in torch.cat(parts, 1)]


def folder_of(pictures: str) -> list[Sample]:
    """The pictures of a folder, sorted by name.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no picture.
    """
    paths = sorted(p for p in Path(pictures).glob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise FileNotFoundError(
            f"{pictures} is not a folder with pictures ({', '.join(PICTURES)}). Name another folder."
        )
    return [Sample(Row(f"reference-{k}", p.name, 0), p) for k, p in enumerate(paths)]


def named(metric: str, features: str | Extract, reference: str) -> str:
    """fid_eye and fid_base compare with the base model, fid_eye_coco and fid_coco with a folder of real pictures."""
    kind = "" if features == "inception" else f"_{features}" if features == "eye" else "_features"
    if isinstance(features, str) and features.startswith("clip:"):
        kind = "_clip"
    return f"{metric}{kind}" + ("_coco" if reference else "" if kind else "_base")
