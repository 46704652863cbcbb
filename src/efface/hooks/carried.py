"""Texts that a denoiser with joint attention carries beside the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families import Family
from . import watch
from .texts import Text


def compressed(text: Text, padding: Tensor) -> Text:
    """Texts with one column for all padding of an encoder, which counts as often as the padding's columns.

    Args:
        text: states [N, L, D].
        padding: [N, L] on the CPU, as `Encoded.padding`.
    """
    new = torch.ones_like(padding, dtype=torch.bool)
    new[:, 1:] = (padding[:, 1:] == 0) | (padding[:, 1:] != padding[:, :-1])
    to = F.one_hot(new.cumsum(1) - 1).double()  # [N, L, K]: the column that each column joins
    repeats = to.sum(1)
    return Text((to / repeats[:, None].clamp_min(1)).mT.to(text.states) @ text.states, None, repeats)


class Carried:
    """The texts that one denoiser call carries beside the prompt.

    Args:
        texts: texts with `repeats`, each with the positions in it of the texts that methods ask for, by their `id`.
        rows: the rows of the batch that need them; the others have their columns too, without use.
        prompt: the length of the prompt.
        first: whether text precedes the picture.

    Attributes:
        places: the `id` of a text to its positions among all T texts.
        bias: [T, K], the logarithm of `Text.repeats`; minus infinity where a text has fewer columns.
        present: the columns of texts that the denoiser carries, among all T * K.
        spread: [T * K], the carried column for each column.
    """

    def __init__(
        self, texts: Sequence[tuple[Text, dict[int, list[int]]]], rows: slice, prompt: int, first: bool
    ) -> None:
        self.rows, self.prompt, self.first = rows, prompt, first
        width, start = max(text.states.shape[1] for text, _ in texts), 0
        states, repeats = [], []
        self.places: dict[int, list[int]] = {}
        for text, places in texts:
            more = width - text.states.shape[1]
            states.append(F.pad(text.states, (0, 0, 0, more)))
            once = torch.ones(text.states.shape[:2], dtype=torch.float64)
            repeats.append(F.pad(once if text.repeats is None else text.repeats, (0, more)))
            self.places |= {name: [start + k for k in at] for name, at in places.items()}
            start += len(text)
        together, counts, device = torch.cat(states), torch.cat(repeats), states[0].device
        there = counts.flatten() > 0
        self.present = there.nonzero()[:, 0].to(device)
        self.spread = (there.cumsum(0) - 1).to(device)
        self.states = together.flatten(0, 1)[self.present]
        self.bias = counts.log().to(torch.promote_types(self.states.dtype, torch.float32)).to(device)
        self.picture: int | None = None  # its length, which the first layer says

    @property
    def columns(self) -> int:
        """The number of further columns."""
        return len(self.states)

    def beside(self, facts: Family, arguments: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's arguments with these texts beside the prompt."""
        text = arguments[facts.text_argument]
        more = self.states.to(text).expand(len(text), -1, -1)
        longer = torch.cat([more, text] if self.first else [text, more], 1)
        return facts.for_length({**arguments, facts.text_argument: longer}, longer.shape[1])

    def check(self, layer: str, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
        """Raises RuntimeError unless a layer attends from all columns to all columns, as every layer before."""
        picture, got = query.shape[2] - self.columns - self.prompt, ""
        given = [
            name for name in ("attn_mask", "is_causal", "enable_gqa", "dropout_p") if options.get(name) is not None
        ]
        if given := [name for name in given if name == "attn_mask" or options[name]]:
            got = f"`{given[0]}`"
        elif query.shape != key.shape or picture < 1 or picture != (self.picture or picture):
            got = f"{query.shape[2]} columns"
        if got:
            raise RuntimeError(watch.other_attention(layer, got))
        self.picture = picture

    def split(self, length: int) -> tuple[slice, slice, slice]:
        """The columns of the carried texts, of the prompt and of the picture, among `length`."""
        x, p = self.columns, self.prompt
        if self.first:
            return slice(0, x), slice(x, x + p), slice(x + p, length)
        return slice(length - x, length), slice(length - x - p, length - x), slice(0, length - x - p)
