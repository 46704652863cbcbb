"""Records the arguments of a denoiser call, to repeat it with other texts, latents and times."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..families import Family


def expanded(value: Any, rows: int) -> Any:
    """A recorded argument of one row, in more rows."""
    if isinstance(value, _Row):
        return value.expand(rows)
    return {name: expanded(each, rows) for name, each in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True, eq=False)
class _Row:
    """The last row of a recorded tensor."""

    row: Tensor

    def expand(self, rows: int) -> Tensor:
        return self.row.expand(rows, *self.row.shape[1:])


@contextlib.contextmanager
def recorded(denoiser: nn.Module, facts: Family) -> Iterator[dict[str, Any]]:
    """The arguments of the first denoiser call inside the block, sample first, with one row of each tensor."""
    found: dict[str, Any] = {}
    names = tuple(inspect.signature(type(denoiser).forward).parameters)[1:]

    def row(value: Any, rows: int) -> Any:
        if isinstance(value, dict):
            return {name: row(each, rows) for name, each in value.items()}
        return _Row(value[-1:].detach()) if isinstance(value, Tensor) and value.ndim and len(value) == rows else value

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not found:
            given = dict(zip(names, args, strict=False)) | kwargs
            given = {names[0]: given[names[0]]} | given
            rows = len(given[names[0]])
            found.update({k: v if k in facts.shared_arguments else row(v, rows) for k, v in given.items()})

    hook = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()
