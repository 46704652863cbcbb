"""The two detectors ("eyes") of the `emoji` model: small CNNs for icons, style, gender and watermark.

They judge the `emoji` model's pictures. The eyes differ in seed, width and training noise and are **never merged**:
every answer has one row per eye. Compute a rate for each row, and report the worse one.

Pictures are float [N, 3, H, W] in [0, 1], 64 x 64 in training. A method of `Eyes` takes pictures, or the result of
`Eyes.see`, so that several questions need one evaluation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .._emoji_eyes import WIDTHS, AnyEye, AnyEyes, Block, Seen, Vocabulary
from .concepts import truth, vocabulary
from .weights import CURE, FOLDER

__all__ = [
    "FEMALE",
    "GENDERED",
    "ICONS",
    "INDEX",
    "MALE",
    "STYLES",
    "WIDTHS",
    "Block",
    "ConceptEyes",
    "Eye",
    "Eyes",
    "Seen",
    "load_eyes",
]

GENDERED: tuple[str, ...] = tuple(p[g] for p in vocabulary()["professions"].values() for g in ("male", "female"))
ICONS: tuple[str, ...] = tuple(icon for group in vocabulary()["groups"].values() for icon in group) + GENDERED
STYLES: tuple[str, ...] = tuple(vocabulary()["style_shares"])
KNOWN = Vocabulary("emoji", ICONS, STYLES, GENDERED[0::2], GENDERED[1::2], truth, least=16)
INDEX: dict[str, int] = KNOWN.index
MALE = [INDEX[name] for name in KNOWN.male]
FEMALE = [INDEX[name] for name in KNOWN.female]


class Eye(AnyEye):
    """One of the two detectors; width 128 makes 0.9 M parameters.

    Example:
        >>> import torch
        >>> from efface.models.emoji.eyes import Eye
        >>> seen = Eye(width=16).eval()(torch.rand(2, 3, 64, 64))
        >>> seen.icons.shape, seen.styles.shape, seen.watermark.shape
        (torch.Size([2, 149]), torch.Size([2, 5]), torch.Size([2]))
    """

    vocabulary = KNOWN
    halvings = 3


class Eyes(AnyEyes):
    """Both eyes of `emoji` with their frozen thresholds."""

    vocabulary = KNOWN
    eye = Eye


class ConceptEyes:
    """Both eyes as the detector of one concept.

    Args:
        concept: a name that `Eyes.concept` knows.
        eyes: the eyes. Default: those of `emoji`.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> import torch
        >>> ConceptEyes("alcohol")(torch.rand(3, 3, 64, 64)).shape
        torch.Size([2, 3])
    """

    def __init__(self, concept: str, eyes: AnyEyes | None = None) -> None:
        self.eyes = eyes or load_eyes()
        known = self.eyes.vocabulary
        what = known.what(concept)
        self.name, self.concept = f"{known.model} eyes: {concept}", concept
        others = [k for k in range(len(known.icons)) if isinstance(what, str) or k not in what]
        self._others = torch.tensor(others)

    def __call__(self, images: Tensor) -> Tensor:
        """Whether the pictures show the concept: bool [2, N]."""
        return self.eyes.concept(images, self.concept)

    def log_odds(self, images: Tensor) -> Tensor:
        """The log-odds less those of the thresholds, [2, N], with gradients."""
        return self.eyes.log_odds(images, self.concept)

    def kept(self, erased: Tensor, plain: Tensor) -> Tensor:
        """Retention of other icons: int8 [2, N]. 1 if the erased picture shows another icon of the base model's
        picture, 0 if it lost all of them, -1 if there were none."""
        before, after = (self.eyes.icons(images)[..., self._others] for images in (plain, erased))
        found = (before & after).any(-1).to(torch.int8)
        return torch.where(before.any(-1), found, torch.full_like(found, -1))

    def faithful(self, erased: Tensor, plain: Tensor) -> Tensor:
        """The share of the base model's other icons that the erased picture still shows, [N], by the eye with the lower
        share; 1 if there were none."""
        before, after = (self.eyes.icons(images)[..., self._others] for images in (plain, erased))
        there = before.sum(-1)
        share = (before & after).sum(-1) / there.clamp_min(1)
        return torch.where(there > 0, share, torch.ones_like(share)).amin(0)


def load_eyes(folder: Path | None = None) -> Eyes:
    """Loads both eyes from `eyes.safetensors` (fp16) and `eyes.json` in `folder`. Default: the shipped files.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file is damaged, or was made for another vocabulary.
    """
    return Eyes.load(FOLDER if folder is None else Path(folder), CURE)
