"""The texts that a method asks for, encoded by ComfyUI's CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Encoder:
    """Encodes texts by a ComfyUI CLIP, without its syntax for weights.

    Args:
        clip: the CLIP object of a workflow.
    """

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.length = self("")[0].shape[1]

    def __call__(self, text: str) -> tuple[Tensor, Tensor | None]:
        """The states [1, L, D] of a text and its pooled state [1, P]."""
        for mark in ("\\", "(", ")"):
            text = text.replace(mark, f"\\{mark}")
        states, pooled = self.clip.encode_from_tokens(self.clip.tokenize(text), return_pooled=True)
        return states, pooled

    def fits(self, text: str) -> bool:
        return self(text)[0].shape[1] == self.length

    def states(self, texts: list[str]) -> Tensor:
        """The states of texts that fit into one window of the text encoder: [N, L, D]."""
        for text in texts:
            if not self.fits(text):
                raise ValueError(f"Expected a phrase that fits into the text encoder, got {text!r}. Shorten it.")
        return torch.cat([self(text)[0] for text in texts])

    def pack(self, phrases: list[str], separator: str) -> list[str]:
        """Joins phrases into as few texts as fit."""
        packed: list[str] = []
        for phrase in phrases:
            joined = f"{packed[-1]}{separator}{phrase}" if packed else phrase
            if packed and self.fits(joined):
                packed[-1] = joined
            else:
                packed.append(phrase)
        return packed

    def erasure_prompts(self, method: Any, separator: str) -> list[str]:
        """The erasure prompts of a method, as Efface makes them in a diffusers pipeline."""
        found = []
        for group in method.groups(method.concepts):
            phrases = [phrase for concept in group for phrase in concept.phrases]
            found += self.pack(phrases, separator) if method.packs else phrases
        return found
