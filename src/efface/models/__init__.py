"""The embedded models."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._emoji_eyes import AnyEyes


AUTOENCODERS = {"efface.models.emoji.vae": "emoji", "efface.models.emoji128.vae": "emoji-128"}
SUITES = {"emoji": "emoji", "emoji_128": "emoji-128"}
"""Suite to the embedded model that draws it by default."""


@functools.cache
def eyes_of(model: str) -> AnyEyes:
    """The detectors ("eyes") of an embedded model; `emoji-128` and `emoji-flux` share theirs."""
    from . import emoji128
    from .emoji import eyes
    from .emoji128 import eyes as larger

    return larger.load_eyes() if model in emoji128.MODELS else eyes.load_eyes()


def embedded(pipe: Any) -> str | None:
    """The embedded model whose vocabulary and detectors a pipeline has; None for other models."""
    return AUTOENCODERS.get(type(getattr(pipe, "vae", None)).__module__)


def vocabulary_of(model: str) -> Any:
    """The module with the vocabulary of an embedded model: `truth`, `prompts`, `vocabulary`."""
    from .emoji import concepts
    from .emoji128 import MODELS
    from .emoji128 import concepts as larger

    return larger if model in MODELS else concepts


def suite_of(model: str) -> str:
    """The suite with the prompts of an embedded model; that of `emoji` for other models."""
    from .emoji128 import MODELS

    return "emoji_128" if model in MODELS else "emoji"
