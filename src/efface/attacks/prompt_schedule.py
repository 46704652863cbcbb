"""Prompt schedule: a harmless prompt first, and the target prompt from a later step on, or the reverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from .. import checks
from ._compose import Composition, Term, check
from ._contract import Access, Attack, Proposal, Target
from ._words import random_text

if TYPE_CHECKING:
    from ._contract import Victim

__all__ = ["PromptSchedule"]


@dataclass(frozen=True)
class PromptSchedule(Attack):
    """Changes the prompt during sampling: a cover text up to time s, the target prompt after it, or the reverse.

        e(t) = e0 + g (e(c(t)) - e0),    c(t) = cover before s, target after it

    A guard with a window, or one that judges the whole prompt at the start, acts on the cover only.

    Source: prompt editing, as user interfaces offer it.

    Differs: steps are given as shares of the trajectory by noise level, as windows of erasers are.

    Args:
        covers: harmless texts for the other part of the trajectory.
        switches: the times s, from 0 (pure noise) to 1 (the picture).
        guidance: the guidance scale g, above 1.

    Shapes: predictions [B, C, h, w]; FLUX [B, L, C].

    Raises:
        ValueError: a time is outside of (0, 1), or the pipeline has no guidance.

    Example:
        >>> from efface import Concept
        >>> from efface.attacks._contract import Target
        >>> attack = PromptSchedule(covers=("a table",), switches=(0.3,))
        >>> [made.about for made in attack.propose(Target(Concept("cat"), "a cat"), None)]
        ["'a table' to 0.3, then 'a cat'", "'a cat' to 0.3, then 'a table'"]
    """

    access: ClassVar[Access] = "sampler"
    needs: ClassVar[tuple[str, ...]] = ("guidance",)

    covers: tuple[str, ...] = ("a picture", "a table")
    switches: tuple[float, ...] = (0.2, 0.4, 0.6)
    guidance: float = 7.5

    def __post_init__(self) -> None:
        for each in checks.texts("covers", self.covers):
            checks.text("covers", each)
        times = tuple(checks.number("switches", s, 0, 1, above=True, below=True) for s in self.switches)
        object.__setattr__(self, "switches", times)
        object.__setattr__(self, "guidance", checks.number("guidance", self.guidance, 1, above=True))

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        check(pipe)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        for switch in self.switches:
            for cover in self.covers:
                for texts in ((cover, target.prompt), (target.prompt, cover)):
                    yield self._proposal(*texts, switch)

    def control(self, proposal: Proposal, target: Target, victim: Victim, rng: Random) -> Proposal:
        """The same schedule with a random text in place of the target prompt."""
        composition = proposal.inside
        if not isinstance(composition, Composition):
            raise TypeError(f"Expected a proposal of {type(self).__name__}, got another one. Give its own.")
        text = random_text(victim.pipe, target.prompt, rng, target.concept.phrases)
        first, second = (text if t.prompt == target.prompt else t.prompt for t in composition.terms)
        return dataclasses.replace(self._proposal(first, second, composition.terms[0].window[1]), about="random text")

    def _proposal(self, first: str, second: str, switch: float) -> Proposal:
        g = self.guidance
        terms = (Term(first, g, (0.0, switch)), Term(second, g, (switch, 1.0)))
        about = f"{first!r} to {switch:g}, then {second!r}"
        return Proposal(first, {"guidance": g}, about, Composition(terms, g))
