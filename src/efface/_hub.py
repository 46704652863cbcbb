"""Whether the models that judge pictures may be downloaded from the Hugging Face hub. By default they may not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_ALLOWED: ContextVar[bool] = ContextVar("allow_hub", default=False)


def allowed() -> bool:
    """Whether downloads are allowed here. A new thread starts without the permission."""
    return _ALLOWED.get()


@contextlib.contextmanager
def allowing(yes: bool) -> Iterator[None]:
    """Allows downloads inside the block, or forbids them."""
    before = _ALLOWED.set(yes)
    try:
        yield
    finally:
        _ALLOWED.reset(before)
