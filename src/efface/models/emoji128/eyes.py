"""The two detectors ("eyes") of the 128-pixel models: small CNNs for icons, style and watermark.

The eyes differ in seed, width and training noise and are **never merged**: every answer has one row per eye. Compute a
rate for each row, and report the worse one. Pictures are float [N, 3, 128, 128] in [0, 1].
"""

from __future__ import annotations

from pathlib import Path

from efface.models._emoji_eyes import WIDTHS, AnyEye, AnyEyes, Vocabulary

from . import CURE, FOLDER
from .concepts import ICONS, PEOPLE, STYLES, truth

__all__ = ["ICONS", "INDEX", "PEOPLE", "STYLES", "WIDTHS", "Eye", "Eyes", "load_eyes"]

KNOWN = Vocabulary("emoji-128", ICONS, STYLES, PEOPLE[0::2], PEOPLE[1::2], truth, least=32)
INDEX: dict[str, int] = KNOWN.index


class Eye(AnyEye):
    """One of the two detectors."""

    vocabulary = KNOWN
    halvings = 4


class Eyes(AnyEyes):
    """Both eyes of the 128-pixel models with their frozen thresholds."""

    vocabulary = KNOWN
    eye = Eye


def load_eyes(folder: Path | None = None) -> Eyes:
    """Loads both eyes from eyes.safetensors (fp16) and eyes.json in `folder`. Default: the shipped files.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is damaged, or was made for another vocabulary.
    """
    return Eyes.load(FOLDER if folder is None else Path(folder), CURE)
