"""Quantisation: rounds the erased weights, which may undo an erasure made of small changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from .._weights import denoiser_of
from ._contract import Access, Attack, Proposal, Target
from ._words import random_text

if TYPE_CHECKING:
    from ._contract import Victim

__all__ = ["Quantisation"]


@dataclass(frozen=True)
class Quantisation(Attack):
    """Rounds a copy of the erased denoiser's matrices and convolutions to few bits, and draws the target prompt.

        w <- s * round(w / s),    s = max |w| / (2^(bits - 1) - 1) of each output channel

    No training and no picture is needed; people quantise models to save memory, without any wish to attack. An erasure
    whose changes are smaller than a step s may be rounded away.

    Source: observed for unlearned language models; here the same question for erased diffusion models.

    Differs: symmetric rounding per output channel with the weights kept in floating point, without calibration data.

    Args:
        bits: the numbers of bits to try, each from 2 to 16.

    Shapes: weights [out, ...].

    Raises:
        ValueError: a number of bits is out of range; an eraser acts at run time, so weights do not hold it.

    Example:
        >>> Quantisation((4,)).bits
        (4,)
    """

    access: ClassVar[Access] = "weights"
    steals: ClassVar[bool] = True

    bits: tuple[int, ...] = (8, 6, 5, 4)

    def __post_init__(self) -> None:
        for each in self.bits:
            checks.whole("bits", each, 2, 16)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        stolen = victim.stolen()
        denoiser = denoiser_of(stolen.pipe)
        whole = {name: weight.detach().clone() for name, weight in denoiser.named_parameters() if weight.ndim > 1}
        for bits in self.bits:

            def pipeline(_: Any, bits: int = bits) -> Any:
                denoiser.load_state_dict({name: rounded(w, bits) for name, w in whole.items()}, strict=False)
                return stolen.pipe

            yield Proposal(target.prompt, about=f"{bits} bits", pipeline=pipeline, guarded=False)

    def control(self, proposal: Proposal, target: Target, victim: Victim, rng: Random) -> Proposal:
        """The same weights with a random prompt."""
        prompt = random_text(victim.pipe, target.prompt, rng, target.concept.phrases)
        return replace(proposal, prompt=prompt, about="random text")


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weight [out, ...], rounded to so many bits per output channel."""
    most = 2 ** (bits - 1) - 1
    step = weight.abs().flatten(1).amax(1).clamp(min=1e-12) / most
    step = step.reshape(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / step) * step
