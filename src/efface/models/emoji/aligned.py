"""The counterpart of CLIP: heads that map each eye's features into a space of sentences.

The space is that of all-MiniLM-L6-v2's unchanged sentence vectors. One head per eye maps pictures into it.
`recipes/emoji/train_aligned.py` trains the heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ...checks import refusal
from .._emoji_eyes import AnyEye
from . import text_encoder
from .eyes import Eyes, load_eyes
from .weights import CURE, FOLDER, check, sha256

if TYPE_CHECKING:
    from transformers import BertModel, BertTokenizer

SPACE = 384
SIDE = 64
HIDDEN = 512


def features(eye: AnyEye, images: Tensor) -> Tensor:
    """Maps pictures [N, 3, H, W] in [0, 1] to mean and maximum of the eye's last map: [N, 2 width]."""
    places = eye.body((2 * images - 1).contiguous(memory_format=torch.channels_last)).float().flatten(2)
    return torch.cat([places.mean(2), places.amax(2)], 1)


def sentences(texts: Sequence[str], tokenizer: BertTokenizer, encoder: BertModel) -> Tensor:
    """Sentence vectors of length 1, [N, 384]: the mean over tokens without padding, cut at 24 tokens."""
    parts = []
    for k in range(0, len(texts), 256):
        some = list(texts[k : k + 256])
        ids = tokenizer(some, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(ids.input_ids, attention_mask=ids.attention_mask)[0].float()
        mask = ids.attention_mask[..., None].float()
        parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts) if parts else torch.zeros(0, SPACE)


class Head(nn.Module):
    """Maps an eye's features [N, 2 width] to sentence vectors [N, 384] of length 1.

    Args:
        width: width of the eye.
        hidden: number of hidden units.
    """

    def __init__(self, width: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, hidden), nn.SiLU(), nn.Linear(hidden, SPACE)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=-1)


class Aligned:
    """Both eyes with their heads, and the text encoder.

    Args:
        eyes: the two eyes.
        heads: one per eye.
        name: its name in reports.
    """

    def __init__(self, eyes: Eyes, heads: Sequence[Head], name: str = "emoji, eyes aligned to MiniLM, cosine") -> None:
        self.eyes, self.heads, self.name = eyes, [head.eval().requires_grad_(False) for head in heads], name
        self.tokenizer, self.encoder = text_encoder()

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Maps pictures [N, 3, 64, 64] in [0, 1] to [2, N, 384], one row per eye.

        Raises:
            ValueError: the pictures are of another size, so of another model.
        """
        if tuple(images.shape[-2:]) != (SIDE, SIDE):
            cure = "Name a CLIP model as the encoder."
            what = f"pictures of {SIDE} x {SIDE} pixels, as the model `emoji` draws them, for its encoder"
            raise ValueError(refusal(what, tuple(images.shape[-2:]), cure))
        x = images.detach().float().cpu()
        return torch.stack([head(features(eye, x)) for eye, head in zip(self.eyes.eyes, self.heads, strict=True)])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Maps texts to [N, 384]."""
        return sentences(texts, self.tokenizer, self.encoder)


def load_aligned(folder: Path | None = None) -> Aligned:
    """Loads the heads from `aligned.safetensors` and `aligned.json` in `folder`, with their eyes. Default: the shipped
    files.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is damaged, or the heads were trained for other eyes.
        ImportError: the text encoder is not installed.
    """
    folder = FOLDER if folder is None else Path(folder)
    card = folder / "aligned.json"
    if not card.is_file():
        raise FileNotFoundError(
            f"{card} is missing. Make it with recipes/emoji/train_aligned.py, or use another encoder."
        )
    try:
        facts = json.loads(card.read_text("utf-8"))
        expected, of_eyes, hidden = facts["sha256"], facts["eyes_sha256"], int(facts["hidden"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{card} is damaged ({error}). {CURE}") from error
    if of_eyes != sha256(FOLDER / "eyes.safetensors"):
        raise ValueError(f"{card} belongs to other eyes. Train the heads again with recipes/emoji/train_aligned.py.")
    tensors = load_file(check(folder / "aligned.safetensors", expected))
    eyes = load_eyes()
    heads = [Head(eye.width, hidden) for eye in eyes.eyes]
    for k, head in enumerate(heads):
        mine = {n.removeprefix(f"{k}."): t.float() for n, t in tensors.items() if n.startswith(f"{k}.")}
        try:
            head.load_state_dict(mine)
        except RuntimeError as error:
            raise ValueError(f"{folder / 'aligned.safetensors'} holds no head for eye {k}. {CURE}\n{error}") from error
    return Aligned(eyes, heads)
