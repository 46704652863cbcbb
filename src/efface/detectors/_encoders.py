"""Encoders of pictures and texts in one space: CLIP, or the aligned heads of the `emoji` model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from efface._hub import allowed
from efface.files import there
from efface.pictures import read_picture

CLIP_LARGE = "openai/clip-vit-large-patch14"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


BATCH = 64  # pictures at a time


class Encoder(Protocol):
    """Maps pictures [N, 3, H, W] to [J, N, D], one row per judge, and N texts to [N, D]. All vectors have length 1."""

    name: str

    def images(self, images: Tensor) -> Tensor: ...
    def texts(self, texts: Sequence[str]) -> Tensor: ...


class Clip:
    """A CLIP model of transformers, in float32. It cuts texts at 77 tokens."""

    def __init__(self, name: str) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        local: dict[str, Any] = {"local_files_only": not allowed()}
        try:
            self.model = cast("Any", CLIPModel.from_pretrained(name, use_safetensors=True, **local).float().eval())
            self.tokenizer = CLIPTokenizer.from_pretrained(name, **local)
        except OSError as error:
            if allowed() or there(Path(name)):
                raise OSError(f"Cannot load the CLIP model {name!r} ({error}). Give a folder that holds it.") from error
            raise OSError(
                f"There is no CLIP model {name!r}, neither a folder nor in the local cache of the Hugging Face hub. "
                f"Give a folder that holds it, download it with `hf download {name}`, or allow it with --allow-hub."
            ) from error
        self.limit = self.model.config.text_config.max_position_embeddings
        self.size = self.model.config.vision_config.image_size
        self.name = f"{name}, raw cosine"

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        x = resized(images, {"shortest_edge": self.size}, {"height": self.size, "width": self.size})
        return _unit(self.model.get_image_features(pixel_values=normalised(x, MEAN, STD)))[None]

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        parts = []
        for k in range(0, len(texts), 64):
            some = list(texts[k : k + 64])
            tokens = self.tokenizer(some, padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
            parts.append(_unit(self.model.get_text_features(**tokens)))
        return torch.cat(parts)


def _unit(features: Any) -> Tensor:
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)


@functools.cache
def encoder(name: str) -> Encoder:
    """Makes an encoder from "emoji", or from the folder or hub id of a CLIP model.

    Raises:
        FileNotFoundError: the aligned heads of `emoji` are missing.
        OSError: the CLIP model does not exist, is not in the local cache, or there is no network.
    """
    if name == "emoji":
        from efface.models.emoji.aligned import load_aligned

        return load_aligned()
    return Clip(name)


def embedded(encoder: Encoder, pictures: Sequence[Path]) -> Tensor:
    """The embeddings of picture files, [N, D] of length 1: those of all judges of an encoder, one after the other.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not a picture.
    """
    parts: list[Tensor] = []
    for start in range(0, len(pictures), BATCH):
        read = [np.array(read_picture(path)) for path in pictures[start : start + BATCH]]
        for _, group in itertools.groupby(read, lambda picture: picture.shape):  # pictures of one size, in their order
            images = torch.from_numpy(np.stack(list(group))).permute(0, 3, 1, 2).float() / 255
            parts.append(F.normalize(encoder.images(images).transpose(0, 1).flatten(1).float(), dim=-1))
    return torch.cat(parts) if parts else torch.zeros(0, 1)


def resized(images: Tensor, size: dict[str, int], crop: dict[str, int] | None) -> Tensor:
    """Resizes pictures to `size` (height and width, or shortest_edge) by bicubic interpolation, then crops the
    centre."""
    h, w = images.shape[2:]
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        new = (edge, max(round(w * edge / h), 1)) if h <= w else (max(round(h * edge / w), 1), edge)
    else:
        new = (size["height"], size["width"])
    x = images.float()
    if new != (h, w):
        x = F.interpolate(x, new, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    if crop:
        top, left = (new[0] - crop["height"]) // 2, (new[1] - crop["width"]) // 2
        x = x[:, :, top : top + crop["height"], left : left + crop["width"]]
    return x


def normalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def preprocessed(images: Tensor, folder: Path) -> Tensor:
    """Resizes, crops and normalises pictures as preprocessor_config.json says. Interpolation is always bicubic.

    Raises:
        FileNotFoundError, ValueError: the file does not exist, or does not match the schema.
    """
    path, cure = folder / "preprocessor_config.json", "Save the classifier again, with its image processor."
    if not there(path):
        raise FileNotFoundError(f"{path} is missing, which says how to prepare pictures. {cure}")
    from efface import schema

    facts = schema.read(path, schema.Preprocessor, cure)
    size = facts["size"]
    size = {"height": size, "width": size} if isinstance(size, int) else size
    crop = facts.get("crop_size") if facts.get("do_center_crop") else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    x = resized(images, size, crop)
    return normalised(x, facts["image_mean"], facts["image_std"]) if facts.get("do_normalize", True) else x
