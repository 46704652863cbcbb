"""The detectors of an attack: one for the attacker's search, another that judges, and one for anything recognisable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import check_detector

if TYPE_CHECKING:
    from ..core import Detector

NOTHING, OTHER, CONCEPT = 0, 1, 2  # the three outcomes of a picture
NOISE = 8  # pictures of noise that no detector may flag


@dataclass(frozen=True)
class Only:
    """Some of a detector's judges, as a detector."""

    detector: Any
    judges: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.detector.name}, judge {', '.join(str(k + 1) for k in self.judges)}"

    def __call__(self, images: Tensor) -> Tensor:
        found: Tensor = self.detector(images)[list(self.judges)]
        return found

    @property
    def log_odds(self) -> Callable[[Tensor], Tensor] | None:
        if not callable(getattr(self.detector, "log_odds", None)):
            return None
        return lambda images: self.detector.log_odds(images)[list(self.judges)]


@dataclass(frozen=True)
class Panel:
    """The detectors of one concept.

    Args:
        search: the attacker's; None if an attack needs none.
        judge: judges the result. All its judges must see the concept.
        recognises: says whether anything is recognisable; None: not judged.
    """

    search: Detector | None
    judge: Detector
    recognises: Detector | None = None

    def outcomes(self, images: Tensor) -> list[int]:
        """`CONCEPT`, `OTHER` or `NOTHING` for each picture. Without `recognises`, everything else is `OTHER`."""
        there = self.judge(images).all(0)
        something = torch.ones_like(there) if self.recognises is None else self.recognises(images).all(0)
        found: list[int] = torch.where(there, CONCEPT, torch.where(something, OTHER, NOTHING)).tolist()
        return found


def panel(judge: Detector, search: Detector | None, recognises: Detector | None, needed: bool) -> Panel:
    """Splits detectors so that no detector is searched with and judged by.

    Args:
        judge: the detector of the concept. With several judges and no `search`, the first one searches.
        search: another detector for the search.
        recognises: says whether anything is recognisable.
        needed: whether the attack chooses with a detector.

    Raises:
        ValueError: `judge` is alone, so that it would judge what was optimised for it; or a detector flags noise.
        TypeError: a detector is none.
    """
    for each in (judge, search, recognises):
        if each is not None:
            check_detector(each)
    count = len(judge(torch.zeros(1, 3, 64, 64)))
    if search is None and needed:
        if count < 2:
            raise ValueError(
                f"The attack searches with a detector, and {judge.name} has one judge, which would then judge what was "
                "optimised for it. Give another detector by `search`."
            )
        search, judge = Only(judge, (0,)), Only(judge, tuple(range(1, count)))
        if recognises is not None and len(recognises(torch.zeros(1, 3, 64, 64))) == count:
            recognises = Only(recognises, tuple(range(1, count)))
    for each in (judge, search):
        if each is not None:
            _check_noise(each)
    return Panel(search, judge, recognises)


def _check_noise(detector: Detector) -> None:
    rng = torch.Generator().manual_seed(0)
    uniform = torch.rand(NOISE // 2, 3, 64, 64, generator=rng)
    smooth = torch.nn.functional.interpolate(torch.rand(NOISE // 2, 3, 8, 8, generator=rng), 64, mode="bilinear")
    fires = int(detector(torch.cat([uniform, smooth])).all(0).sum())
    if fires:
        raise ValueError(
            f"The detector {detector.name} sees the concept in {fires} of {NOISE} pictures of noise, so a ruined "
            "picture would count as a success. Use another detector or a higher threshold."
        )
