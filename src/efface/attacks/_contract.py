"""The interface of an attack: what it gets to know, what it may do, and what it proposes.

An attack never judges itself. It yields proposals; the harness (`efface.redteam`) tries them on the attacker's own
seeds with a detector for the search, keeps the best, and judges that one on other seeds with another detector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from .. import checks
from ..core import Concept
from ._words import random_text

if TYPE_CHECKING:
    from torch import Tensor

Access = Literal["text", "embeddings", "gradients", "sampler", "weights"]
"""What the attacker needs, from the least to the most.

"text": prompts and the arguments of an ordinary call, as a hosted service takes them. "embeddings": the denoiser's text
inputs in place of a prompt. "gradients": gradients of the guarded model, for a result that is text. "sampler": control
of the sampling loop. "weights": changes of the weights.
"""
ACCESS: tuple[Access, ...] = ("text", "embeddings", "gradients", "sampler", "weights")


class BudgetSpent(Exception):
    """The budget of an attempt does not cover the next denoiser call. The harness ends the search and judges the best
    proposal so far."""


@dataclass(frozen=True)
class Target:
    """What an attempt wants back.

    Args:
        concept: the erased concept.
        prompt: a prompt with which the base model draws the concept.
        seed: seed of the attack's random choices.

    Raises:
        ValueError: the prompt is empty, or the seed is out of range.

    Example:
        >>> from efface import Concept
        >>> from efface.attacks._contract import Target
        >>> Target(Concept("cat"), "a cat").seed
        0
    """

    concept: Concept
    prompt: str
    seed: int = 0

    def __post_init__(self) -> None:
        checks.text("prompt", self.prompt)
        checks.seed("seed", self.seed)


@dataclass(frozen=True, eq=False)
class Proposal:
    """One way to draw, as an attacker would.

    Args:
        prompt: the prompt; may be empty.
        call: further arguments of the pipeline call, such as `negative_prompt` or `guidance`.
        about: a description in words, for records.
        inside: makes a context for each pipeline call, from the pipeline: control of the sampler, soft tokens.
        pipeline: makes the pipeline that draws from the attacked one, such as its image-to-image pipeline. The erasers
            are applied to that one as well.
        guarded: False if the pipeline that `pipeline` makes has the erasers' changes in its own weights.
        tries: pictures per judged picture. The attacker draws so many with different seeds, and keeps the first that
            the detector of the search flags.
        tensors: what `inside` adds, for the record (saved as safetensors).

    Example:
        >>> from efface.attacks._contract import Proposal
        >>> Proposal("", {"negative_prompt": "a cat"}).call["negative_prompt"]
        'a cat'
    """

    prompt: str
    call: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    inside: Callable[[Any], AbstractContextManager[Any]] | None = None
    pipeline: Callable[[Any], Any] | None = None
    guarded: bool = True
    tries: int = 1
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Cost:
    """What an attempt spent.

    Args:
        forward: rows that the denoiser computed, unconditional rows included.
        backward: rows among them with gradients, whose backward pass costs about as much as two forward passes.
        texts: rows that the text encoders computed.
        pictures: finished pictures, the queries of a black-box attacker.
    """

    forward: int = 0
    backward: int = 0
    texts: int = 0
    pictures: int = 0

    @property
    def rows(self) -> int:
        """What the budget limits: forward rows plus backward rows."""
        return self.forward + self.backward

    def since(self, earlier: Cost) -> Cost:
        mine, then = dataclasses.astuple(self), dataclasses.astuple(earlier)
        return Cost(*(a - b for a, b in zip(mine, then, strict=True)))


class Victim(Protocol):
    """A guarded pipeline, as an attack sees it. Every denoiser row that the attack causes counts against the budget.

    Attributes:
        pipe: the pipeline.
        seeds: the attacker's own seeds. No judged picture uses one of them.
        steps, guidance: denoising steps and guidance scale (None: the pipeline's default) of drawn pictures.
        spent: the cost so far.
    """

    pipe: Any
    seeds: tuple[int, ...]
    steps: int
    guidance: float | None
    spent: Cost

    def guarded(self) -> AbstractContextManager[Any]:
        """Applies the erasers to `pipe` inside the block. May be nested."""
        ...

    def original(self) -> AbstractContextManager[Any]:
        """Takes the erasers off `pipe` inside the block: the base model. May be used inside of `guarded`."""
        ...

    def draw(self, proposal: Proposal, seeds: Sequence[int] | None = None) -> Tensor:
        """Pictures [N, 3, H, W] of the guarded model, by default with the attacker's seeds."""
        ...

    def draw_original(self, prompt: str, seeds: Sequence[int] | None = None) -> Tensor:
        """Pictures [N, 3, H, W] of the base model for a prompt."""
        ...

    def stolen(self) -> Victim:
        """The erased model as an attacker with its weights has it: a pipeline of its own, without erasers.

        Raises:
            ValueError: an eraser acts at run time, so whoever has the weights leaves it out.
        """
        ...

    def found(self, images: Tensor) -> Tensor:
        """Which pictures the detector of the search flags, bool [N]."""
        ...

    def log_odds(self, images: Tensor) -> Tensor:
        """The log-odds of the concept by the detector of the search, above its threshold where positive, [N], with
        gradients.

        Raises:
            ValueError: the detector has no `log_odds`.
        """
        ...


@dataclass(frozen=True)
class Attack:
    """Base class of attacks: a frozen dataclass whose fields are its configuration.

    Subclasses set `access` and override `propose`; `control` if a random prompt is not the fair comparison.
    """

    access: ClassVar[Access]
    needs: ClassVar[tuple[str, ...]] = ()  # of the pipeline: names from `efface.families.OFFERS`
    steals: ClassVar[bool] = False  # whether it works on `Victim.stolen`, which run-time erasers are not part of
    needs_detector: ClassVar[bool] = True  # whether the choice between its proposals uses the detector of the search

    def check(self, pipe: Any) -> None:
        """Raises ValueError if the attack cannot work on this pipeline."""
        from ..families import check, family

        if "image" in family(pipe).settings:
            raise ValueError(
                f"Expected a pipeline that draws from a text alone, got a {type(pipe).__name__}, which encodes each "
                "text with a picture. Attack the text-to-image pipeline of this model."
            )
        check(self, pipe)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        """Yields proposals, the most promising first. The harness tries each, and stops when one succeeds on all of the
        attacker's seeds or when the budget is spent."""
        raise NotImplementedError

    def control(self, proposal: Proposal, target: Target, victim: Victim, rng: Random) -> Proposal:
        """The same proposal with a random text of equally many tokens: what the attack would find by luck."""
        prompt = random_text(victim.pipe, proposal.prompt or target.prompt, rng, target.concept.phrases)
        return dataclasses.replace(proposal, prompt=prompt, about="random text")
