"""Texts that a denoiser with joint attention carries beside the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families import Family
from . import watch
from .texts import Text

RUN = 32  # columns of padding that one column stands for, where their positions differ


def compressed(text: Text, padding: Tensor, facts: Family) -> Text:
    """Texts with one column for all padding of an encoder, which counts as often as the padding's columns.

    If columns have positions, a column stands for at most `RUN` of them, at their mean position.

    Args:
        text: states [N, L, D].
        padding: [N, L] on the CPU, as `Encoded.padding`.
        facts: the family. Masked padding is not there, unless the denoiser reads it.
    """
    seen = torch.ones_like(padding, dtype=torch.bool) if text.mask is None else text.mask.cpu()
    columns = torch.arange(padding.shape[1])
    if (n := facts.text_multiple) > 1:  # learned padding, which the denoiser adds
        there = columns < ((seen.sum(1, keepdim=True) + n - 1) // n * n)
        return Text(text.states, text.mask, there.double(), columns.double().expand_as(there))
    new = torch.ones_like(padding, dtype=torch.bool)
    new[:, 1:] = (padding[:, 1:] == 0) | (padding[:, 1:] != padding[:, :-1]) | (seen[:, 1:] != seen[:, :-1])
    if facts.positions:
        new |= columns % RUN == 0
    to = F.one_hot(new.cumsum(1) - 1).double()  # [N, L, K]: the column that each column joins
    repeats = to.sum(1)
    average = (to / repeats[:, None].clamp_min(1)).mT
    read = (to.mT @ seen[..., None].double())[..., 0] > 0
    states, positions = average.to(text.states) @ text.states, average @ columns.double()
    if facts.weighs_padding and text.mask is not None:
        return Text(states, read.to(states.device), repeats, positions)
    return Text(states, None, repeats * read, positions)


class Biases(NamedTuple):
    """What is added to the logits of T carried texts with K columns.

    Args:
        picture: of the picture's queries, relative to those of the picture's keys: [T, K].
        own: of each text's queries to its own columns: [T, K or 1, K].
        others: of each text's queries to the picture: [T, K, 1], or one value.
    """

    picture: Tensor
    own: Tensor
    others: Tensor


class Carried:
    """The texts that one denoiser call carries beside the prompt.

    Args:
        texts: texts with `repeats`, each with the positions in it of the texts that methods ask for, by their `id`.
        rows: the rows of the batch that need them; the others have their columns too, without use.
        prompt: the length of the prompt.
        facts: the family.

    Attributes:
        places: the `id` of a text to its positions among all T texts.
        bias: [T, K], the logarithm of `Text.repeats`; minus infinity where a text has fewer columns.
        present: the columns of texts that the denoiser carries, among all T * K.
        spread: [T * K], the carried column for each column.
        positions, seen: the position of each carried column in its text, and whether its mask shows it.
    """

    def __init__(
        self, texts: Sequence[tuple[Text, dict[int, list[int]]]], rows: slice, prompt: int, facts: Family
    ) -> None:
        self.rows, self.prompt, self.facts, self.first = rows, prompt, facts, facts.text_first
        width, start = max(text.states.shape[1] for text, _ in texts), 0
        states, repeats, positions, seen = [], [], [], []
        self.places: dict[int, list[int]] = {}
        for text, places in texts:
            more = width - text.states.shape[1]
            states.append(F.pad(text.states, (0, 0, 0, more)))
            once = torch.ones(text.states.shape[:2], dtype=torch.float64)
            repeats.append(F.pad(once if text.repeats is None else text.repeats, (0, more)))
            counted = once.cumsum(1) - 1 if text.positions is None else text.positions
            positions.append(F.pad(counted, (0, more)))
            seen.append(F.pad(once if text.mask is None else text.mask.cpu().double(), (0, more)))
            self.places |= {name: [start + k for k in at] for name, at in places.items()}
            start += len(text)
        together, counts, device = torch.cat(states), torch.cat(repeats), states[0].device
        there = counts.flatten() > 0
        self.present = there.nonzero()[:, 0].to(device)
        self.spread = (there.cumsum(0) - 1).clamp_min(0).to(device)
        self.states = together.flatten(0, 1)[self.present]
        self.positions, self.seen = (torch.cat(x).flatten()[there].to(device) for x in (positions, seen))
        self.bias = counts.log().to(torch.promote_types(self.states.dtype, torch.float32)).to(device)
        self.picture: int | None = None  # its length, which the first layer says

    @property
    def columns(self) -> int:
        """The number of further columns."""
        return len(self.states)

    def beside(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's arguments with these texts beside the prompt."""
        facts, text = self.facts, arguments[self.facts.text_argument]
        if facts.joins_late:
            return arguments
        if (mask := facts.text_mask(arguments)) is not None:
            seen = self.seen.to(mask).expand(len(mask), -1)
            arguments = facts.with_mask(arguments, torch.cat([seen, mask] if self.first else [mask, seen], 1))
        more = self.states.to(text).expand(len(text), -1, -1)
        longer = torch.cat([more, text] if self.first else [text, more], 1)
        return facts.with_positions({**arguments, facts.text_argument: longer}, self.positions, longer.shape[1])

    def check(self, layer: str, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
        """Raises RuntimeError unless a layer attends from all columns to all columns, as every layer before."""
        picture, got = query.shape[2] - self.columns - self.prompt, ""
        if given := [name for name in ("is_causal", "enable_gqa", "dropout_p") if options.get(name)]:
            got = f"`{given[0]}`"
        elif query.shape != key.shape or picture < 1 or picture != (self.picture or picture):
            got = f"{query.shape[2]} columns"
        elif options.get("attn_mask") is not None and not self.facts.masked:
            got = "`attn_mask`"
        if got:
            raise RuntimeError(watch.other_attention(layer, got))
        self.picture = picture

    def biases(self, layer: str, mask: Tensor | None, length: int) -> Biases:
        """What a mask [B or 1, heads or 1, L or 1, L], bool or added to the logits, adds for the carried texts.

        Raises:
            RuntimeError: it differs among the picture's columns, or among the rows of the carried texts.
        """
        if mask is None:
            return Biases(self.bias, self.bias[:, None], self.bias.new_zeros(()))
        texts, _, picture = self.split(length)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=self.bias.dtype).masked_fill(~mask, -torch.inf)
        added = mask.to(self.bias.dtype)
        single = mask.ndim == 4 and mask.shape[2] == 1
        if mask.ndim != 4 or mask.shape[3] != length or not (single or mask.shape[2] == length):
            raise RuntimeError(watch.other_attention(layer, "`attn_mask`"))
        here, own = (added if single else added[:, :, at] for at in (picture, texts))
        parts = [here[..., picture], here[..., texts], own[..., texts], own[..., picture]]
        one = [parts[0][:1, :1, :1, :1], parts[1][:1, :1, :1], parts[2][:1, :1], parts[3][:1, :1, :, :1]]
        alike = [((part == each) & each.isfinite()).all() for part, each in zip(parts, one, strict=True)]
        if not bool(torch.stack(alike).all()):
            raise RuntimeError(watch.other_attention(layer, "`attn_mask`"))
        level, to_picture, among, apart = (each[0, 0] for each in one)
        columns = self.spread.view(self.bias.shape)
        asked = torch.zeros_like(columns) if single else columns
        return Biases(
            self.bias + (to_picture[0] - level[0])[columns],
            self.bias[:, None] + among[asked[:, :, None], columns[:, None]],
            apart[asked, 0][..., None],
        )

    def split(self, length: int) -> tuple[slice, slice, slice]:
        """The columns of the carried texts, of the prompt and of the picture, among `length`."""
        x, p = self.columns, self.prompt
        if self.first:
            return slice(0, x), slice(x, x + p), slice(x + p, length)
        return slice(length - x, length), slice(length - x - p, length - x), slice(0, length - x - p)
