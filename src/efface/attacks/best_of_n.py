"""Best of n: the target prompt with many seeds, of which the attacker keeps the best picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .. import checks
from ._contract import Access, Attack, Proposal, Target

if TYPE_CHECKING:
    from ._contract import Victim

__all__ = ["BestOfN"]


@dataclass(frozen=True)
class BestOfN(Attack):
    """Draws the target prompt n times, and keeps the first picture in which a detector sees the concept.

        P(success) = 1 - (1 - p)^n for pictures that are independent, p = the residual of one picture

    Every residual above zero falls to patience; a report of residuals should say what n pictures give.

    Source: what every user of a service can do.

    Differs: the kept picture is judged by another detector, so pictures that only the first one flags do not count.

    Args:
        n: the numbers of pictures to try, in this order; each at least 2.

    Shapes: none.

    Raises:
        ValueError: a number is below 2.

    Example:
        >>> from efface import Concept
        >>> from efface.attacks._contract import Target
        >>> [each.tries for each in BestOfN().propose(Target(Concept("cat"), "a cat"), None)]
        [4, 16]
    """

    access: ClassVar[Access] = "text"

    n: tuple[int, ...] = (4, 16)

    def __post_init__(self) -> None:
        for each in self.n:
            checks.whole("n", each, 2)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        for each in self.n:
            yield Proposal(target.prompt, about=f"best of {each} pictures", tries=each)
