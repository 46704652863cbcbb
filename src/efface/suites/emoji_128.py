"""The suite of the embedded models of 128 pixels, `emoji-128` and `emoji-flux`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .emoji import Emoji

__all__ = ["Emoji128"]


@dataclasses.dataclass(frozen=True)
class Emoji128(Emoji):
    """Prompts for `emoji-128` and `emoji-flux`, of the kinds that `efface.suites.emoji.Emoji` has, from their
    vocabulary: a fixed set of 320 per concept.

    Paraphrases were held out of the training, and written before any concept was erased. No metric compares pictures
    with sentences (`clip_score`), because the detectors of these models are not aligned with texts.

    Args:
        pictures, first_seed, fairness: as for `Emoji`.

    Raises:
        ValueError: see `Emoji`.

    Example:
        >>> from efface import Concept
        >>> from efface.suites.emoji_128 import Emoji128
        >>> suite = Emoji128(pictures=40).load((Concept("alcohol"),))
        >>> suite.name, len(suite.rows), suite.rows[1].prompt
        ('emoji_128', 40, 'a night at the pub')
    """

    model: ClassVar[str] = "emoji-128"
    categories: ClassVar[tuple[str, ...]] = ("alcohol", "weapon", "smoking", "death", "gambling")
    side: ClassVar[int] = 128
    aligned: ClassVar[bool] = False

    def _themes(self) -> dict[str, str]:
        return {}  # each paraphrase is of its concept, and a cluster of its own
