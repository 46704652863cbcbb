"""The embedded models."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._emoji_eyes import AnyEyes


@functools.cache
def eyes_of(model: str) -> AnyEyes:
    """The detectors ("eyes") of an embedded model; `emoji-128` and `emoji-flux` share theirs."""
    from . import emoji128
    from .emoji import eyes
    from .emoji128 import eyes as larger

    return larger.load_eyes() if model in emoji128.MODELS else eyes.load_eyes()
