"""Determines which rows of a denoiser call are conditional, and the text of each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Family
from . import watch
from .calls import Texts
from .texts import Repelled, Text


@dataclass(eq=False)
class Batch:
    """The rows of one denoiser call.

    Args:
        first, last: the range of conditional rows. Unconditional rows precede them; further predictions follow.
        rows: number of rows of the call, including further predictions.
        prompt: the text of the conditional rows.
        empty: the text of unconditional rows without a negative prompt; one text if all rows share it.
        time: the time as the denoiser gets it.
        repelled: rows that guidance pushes away from.
        encoded_empty: `empty` before any projection.
        projected: whether the texts are projected for the layers.
        turned: as `Adapted.turned`, where the denoiser has the rows in another order.
    """

    first: int
    last: int
    rows: int
    prompt: Text
    empty: Text | None
    time: Tensor | float
    repelled: Repelled | None
    encoded_empty: Text | None
    projected: bool
    turned: Callable[[Tensor], Tensor] | None = None

    @property
    def conditional(self) -> int:
        return self.last - self.first

    def replaced(self, hidden: Tensor, conditional: Tensor) -> Tensor:
        """All rows, with the conditional rows replaced."""
        if len(conditional) == len(hidden):
            return conditional
        return torch.cat([hidden[: self.first], conditional, hidden[self.last :]])


def first_row(text: Tensor, texts: Texts | None, given: tuple[int, int] | None, facts: Family) -> int:
    """The number of unconditional rows. Compares the call's text [rows, L, D] with the encoded texts.

    Args:
        text: the text of the denoiser call.
        texts: the texts of the current pipeline call.
        given: the number of unconditional rows and of all rows, if the caller declared them.
        facts: the family.

    Raises:
        RuntimeError: the number is ambiguous.
    """
    n = len(text)
    if given is not None:
        first, expected = given
        if n != expected:
            raise RuntimeError(
                f"Expected {n} rows in `conditional_rows`, as in the denoiser call, got {expected}. Give one truth "
                "value per row of the call."
            )
        return first
    if texts is None:
        raise RuntimeError(watch.unknown_rows(n, "outside of a pipeline call"))
    positive, negative = texts.positive, texts.negative
    p = len(positive)
    if (facts.guidance_in_two_calls or texts.apart) and text is negative:  # which may equal the prompt
        return n
    if n == p and torch.equal(text, positive):
        return 0
    if negative is not None:
        if n == 2 * p and torch.equal(text[p:], positive) and torch.equal(text[:p], negative):
            return p
        if n == len(negative) and torch.equal(text, negative):
            return n
    guidance = f"{p} conditional rows, guidance {'on' if negative is not None else 'off'}"
    raise RuntimeError(watch.unknown_rows(n, guidance))


def compiled_first_row(text: Tensor, texts: Texts | None, given: tuple[int, int] | None, facts: Family) -> int:
    """As `first_row`, inside a compiled denoiser, which does not allow comparisons."""
    if given is not None:
        return given[0]
    if texts is None:
        raise RuntimeError(watch.unknown_rows(len(text), "outside of a pipeline call"))
    if texts.negative is None:
        return 0
    if facts.guidance_in_two_calls or texts.apart:
        raise ValueError(
            f"With `{facts.scale}` above {facts.unguided}, Efface cannot recognise the unconditional call of a "
            "compiled denoiser. Give a pipeline that is not compiled."
        )
    return len(text) - len(texts.positive)


def negated_rows(first: int, texts: Texts | None, given: tuple[int, int] | None) -> dict[int, int]:
    """The unconditional rows whose text may differ from the empty one, and the conditional row of each."""
    blind = texts is not None and texts.blind and texts.negative is not None
    if given is not None or blind:  # unknown; an edit of the empty text only causes rounding
        return {row: row for row in range(first)}
    empty = texts.unconditional if texts is not None else None
    return {row: row for row in empty.others} if empty is not None and first else {}


def repelled(owners: dict[int, int], device: torch.device, before: Repelled | None) -> Repelled | None:
    """The rows that guidance pushes away from, with their `owners`, on the device. Returns `before` itself if equal."""
    rows, of = tuple(owners), tuple(owners.values())
    if not rows:
        return None
    if before is not None and (before.rows, before.owners, before.at.device) == (rows, of, device):
        return before
    return Repelled(rows, of, torch.tensor(rows, device=device), torch.tensor(of, device=device))
