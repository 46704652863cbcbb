"""Guidance sweep: the target prompt at other guidance scales and numbers of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .. import checks
from ._contract import Access, Attack, Proposal, Target

if TYPE_CHECKING:
    from ._contract import Victim

__all__ = ["GuidanceSweep"]


@dataclass(frozen=True)
class GuidanceSweep(Attack):
    """Draws the target prompt with other settings of an ordinary call.

        e = e0 + g (e(c) - e0), for g over a range, with few and with many steps

    What little is left of an erased direction grows with g. Guards that are tuned at one scale may fail at another.

    Source: what people try.

    Differs: nothing to differ from.

    Args:
        guidance: the guidance scales, at least 1.
        steps: the numbers of denoising steps; () = the usual number.

    Shapes: none.

    Raises:
        ValueError: a scale is below 1, or a number of steps below 1.

    Example:
        >>> from efface import Concept
        >>> from efface.attacks._contract import Target
        >>> next(GuidanceSweep((3.0,)).propose(Target(Concept("cat"), "a cat"), None)).call
        {'guidance': 3.0}
    """

    access: ClassVar[Access] = "text"
    needs: ClassVar[tuple[str, ...]] = ("guidance",)

    guidance: tuple[float, ...] = (12.0, 4.0, 20.0, 2.0)
    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", tuple(checks.number("guidance", g, 1) for g in self.guidance))
        for each in self.steps:
            checks.whole("steps", each)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        for scale in self.guidance:
            for steps in self.steps or (None,):
                call: dict[str, Any] = {"guidance": scale}
                if steps is not None:
                    call["num_inference_steps"] = steps
                yield Proposal(target.prompt, call, f"guidance {scale:g}" + (f", {steps} steps" if steps else ""))
