"""Relearning: fine-tunes the erased weights on a few pictures, of the concept or of something else."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from .. import checks
from .._latents import latents_of
from .._weights import denoiser_of
from ..families import family
from ._contract import Access, Attack, Proposal, Target
from ._whitebox import WhiteBox, check_white
from ._words import random_text

if TYPE_CHECKING:
    from ._contract import Victim

__all__ = ["Relearning"]


@dataclass(frozen=True)
class Relearning(Attack):
    """Trains the layers that read text, of a copy of the erased weights, on k pictures, and draws the target prompt.

        min_W E || target(z, e, t) - e_W(z_t, t, c) ||^2,    W = the keys and values of the text, z = k pictures

    With pictures of the concept this says how few examples undo the erasure; any model learns a concept in the end, so
    compare with what a never-trained model needs. With pictures of something else (`unrelated`), no picture and no word
    of the concept is trained on: if it returns all the same, it was hidden and not gone.

    Source: the fine-tuning attack that is usual on unlearned language models, here for erased diffusion models.

    Differs: only the keys and values of the text are trained, which is cheap and strong. The pictures are the base
    model's.

    Args:
        pictures: k, the number of pictures.
        unrelated: the prompt of unrelated pictures to train on; "" = pictures of the concept.
        steps: after how many steps in all to try the weights.
        batch: pictures per step.
        lr: learning rate of Adam.

    Shapes: latents [k, C, h, w]; FLUX [k, L, C].

    Raises:
        ValueError: a field is out of range; an eraser acts at run time, so weights do not hold it; or the denoiser
            cannot be called outside of the pipeline.

    Example:
        >>> Relearning(unrelated="a house").unrelated
        'a house'
    """

    access: ClassVar[Access] = "weights"
    steals: ClassVar[bool] = True

    pictures: int = 8
    unrelated: str = ""
    steps: tuple[int, ...] = (20, 50, 100)
    batch: int = 4
    lr: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("pictures", "batch"):
            checks.whole(name, getattr(self, name))
        for each in self.steps:
            checks.whole("steps", each)
        checks.text("unrelated", self.unrelated, empty=True)
        object.__setattr__(self, "steps", tuple(sorted(self.steps)))
        object.__setattr__(self, "lr", checks.number("lr", self.lr, 0, above=True))

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        check_white(pipe)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        for done, stolen, state in self._trained(self.unrelated or target.prompt, target, victim):
            yield self._proposal(target.prompt, stolen, state, f"after {done} steps on {self._what(target)}")

    def control(self, proposal: Proposal, target: Target, victim: Victim, rng: Random) -> Proposal:
        """The same weights with a random prompt."""
        prompt = random_text(victim.pipe, target.prompt, rng, target.concept.phrases)
        return replace(proposal, prompt=prompt, about="random text")

    def _what(self, target: Target) -> str:
        return f"{self.pictures} pictures of {self.unrelated or target.prompt!r}"

    def _proposal(self, prompt: str, stolen: Victim, state: dict[str, Tensor], about: str) -> Proposal:
        def pipeline(_: Any) -> Any:
            denoiser_of(stolen.pipe).load_state_dict(state, strict=False)
            return stolen.pipe

        return Proposal(prompt, about=about, pipeline=pipeline, guarded=False)

    def _trained(self, prompt: str, target: Target, victim: Victim) -> Iterator[tuple[int, Victim, dict[str, Tensor]]]:
        seeds = [(target.seed + 5_000 + k) % 10_000 for k in range(self.pictures)]
        latents = latents_of(victim.pipe, victim.draw_original(prompt, seeds))
        stolen = victim.stolen()
        box = replace(WhiteBox.of(victim, target.prompt), victim=stolen, prompt=prompt, latents=latents)
        denoiser, rng = denoiser_of(stolen.pipe), torch.Generator().manual_seed(target.seed)
        readers = family(stolen.pipe).text_readers(denoiser)
        weights = {f"{name}.weight": cast("Tensor", module.weight) for name, module in readers.items()}
        denoiser.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        optimiser = torch.optim.Adam(list(weights.values()), lr=self.lr)
        noises = torch.rand(self.steps[-1], generator=rng).clamp(0.01, 0.99).tolist()
        points = iter(box.points(noises, self.batch, rng))
        done = 0
        for stop in self.steps:
            for point in itertools.islice(points, stop - done):
                with torch.no_grad():
                    parts = box.encode(prompt, self.batch)
                loss = torch.nn.functional.mse_loss(box.predict(parts, point.noisy, point.time), point.goal)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            done = stop
            yield done, stolen, {name: copy.deepcopy(weight.detach()) for name, weight in weights.items()}
