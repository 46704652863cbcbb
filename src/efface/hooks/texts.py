"""Encoded texts, erasure prompts, and rows that guidance pushes away from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded texts, as a layer reads them.

    `len(text)` is the number of texts. `text[rows]` selects some of them by a slice, a list or a tensor.

    Args:
        states: the text encoder's state of each token.
        mask: the columns that the denoiser reads. None: all.
        repeats: how often each column counts in attention. None: once. In texts that joint attention carries, one
            column stands for all padding of an encoder, and 0 is a column that is not there. On the CPU.
        positions: of each column in its text, where the family has rotary positions for text. None: there are none.

    Shapes: `states` [N, L, D], `mask` bool [N, L], `repeats` and `positions` [N, L].

    Raises:
        IndexError: `text[rows]` with rows out of range.

    Example:
        >>> import torch
        >>> from efface.hooks import Text
        >>> two = Text(torch.zeros(2, 16, 8))
        >>> Text.cat([two, two[:1]]).states.shape
        torch.Size([3, 16, 8])
    """

    states: Tensor
    mask: Tensor | None = None
    repeats: Tensor | None = None
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> Text:
        """Selects texts by a slice, a list or a tensor."""
        others = (None if x is None else x[rows] for x in (self.mask, self.repeats, self.positions))
        return Text(self.states[rows], *others)

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        """Concatenates texts without `repeats` and `positions`. The result is masked if each text is.

        Args:
            texts: texts with the same L and D.
        """
        masks = [text.mask for text in texts if text.mask is not None]
        return Text(torch.cat([text.states for text in texts]), torch.cat(masks) if len(masks) == len(texts) else None)


@dataclass(frozen=True, eq=False)
class ErasurePrompts:
    """The erasure prompts of some rows of the batch. A method receives one such object per set of rows.

    Args:
        text: the N encoded erasure prompts.
        token_columns: per erasure prompt, the columns of the phrase's own tokens.
        batch_rows: their conditional rows, counted from 0. None: all.
        at: the same on the device.
        which: their positions among all erasure prompts of the method.
        pooled: the pooled texts for guided predictions, if the denoiser reads them.

    Shapes: `text.states` [N, L, D], `at` [rows], `pooled` [N, P].

    Raises:
        IndexError: `of` with a position out of range.

    Example:
        >>> import torch
        >>> from efface.hooks import ErasurePrompts, Text
        >>> prompts = ErasurePrompts(Text(torch.zeros(1, 5, 8)), (slice(1, 3),))
        >>> prompts.weights(2.0).flatten().tolist()
        [0.0, -2.0, -2.0, 0.0, 0.0]
    """

    text: Text
    token_columns: tuple[slice, ...]
    batch_rows: tuple[int, ...] | None = None
    at: Tensor | None = None
    which: tuple[int, ...] = ()
    pooled: Tensor | None = None

    def of(self, which: Sequence[int], batch_rows: Sequence[int]) -> ErasurePrompts:
        """Selects erasure prompts for some rows.

        Args:
            which: the positions of the erasure prompts.
            batch_rows: their conditional rows, counted from 0.
        """
        chosen = list(which)
        return ErasurePrompts(
            self.text[chosen],
            tuple(self.token_columns[k] for k in chosen),
            tuple(batch_rows),
            torch.tensor(batch_rows, device=self.text.states.device),
            tuple(self.which[k] for k in chosen),
            None if self.pooled is None else self.pooled[chosen],
        )

    def on_rows(self, values: Tensor) -> Tensor:
        """Selects the values of the rows of these erasure prompts.

        Args:
            values: [B, ...], one per conditional row.
        """
        return values if self.at is None else values[self.at]

    def weights(self, strength: float) -> Tensor:
        """Weights for values: `-strength` at the columns of the own tokens, 0 elsewhere.

        Args:
            strength: the method's strength.

        Returns:
            [N, 1, L, 1], which broadcasts over values in heads [N, heads, L, d].
        """
        states = self.text.states
        found = states.new_zeros(len(states), 1, states.shape[1], 1)
        for n, columns in enumerate(self.token_columns):
            found[n, :, columns] = -strength
        return found


@dataclass(eq=False)
class Repelled:
    """Rows of a denoiser call that guidance pushes away from. Methods with `touches_uncond` edit them.

    They are the unconditional rows with a negative prompt, and further predictions of methods that `repel`.

    Args:
        rows: their positions in the batch.
        owners: the conditional row of each.
        at, of: the same on the device.
    """

    rows: tuple[int, ...]
    owners: tuple[int, ...]
    at: Tensor
    of: Tensor
    places: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def rows_of(self, prompts: ErasurePrompts) -> Tensor | None:
        """The rows among them on which erasure prompts act, counted from 0. None: all."""
        if prompts.batch_rows is None:
            return None
        if prompts.batch_rows in self.places:
            return self.places[prompts.batch_rows]
        found = [k for k, owner in enumerate(self.owners) if owner in prompts.batch_rows]
        places = torch.tensor(found, dtype=torch.long, device=self.at.device)
        if not torch.compiler.is_compiling():
            self.places[prompts.batch_rows] = places
        return places
