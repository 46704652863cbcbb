"""A guarded pipeline with meters: applies and removes the erasers, draws, and counts what an attack costs."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import api
from .._text import encoder_of, readers
from .._weights import denoiser_of
from ..attacks._contract import BudgetSpent, Cost, Proposal
from ..delta import Delta
from ..families import family
from ..pipelines import draw

if TYPE_CHECKING:
    from ..core import Detector, Eraser, Handles


TEXTS = 50  # rows of text encoders that a budget covers, per row of the denoiser


@dataclass(eq=False)
class GuardedModel:
    """The victim of an attempt; see `attacks._contract.Victim`.

    Args:
        pipe: the pipeline, without erasers.
        erasers: the erasers to attack.
        search: the detector of the search, of whose judges all must agree; None if the attack needs none.
        seeds: the attacker's own seeds.
        steps: denoising steps.
        guidance: the guidance scale; None keeps the pipeline's default.
        budget: denoiser rows that an attempt may compute, forward and backward together, and 50 times as many rows of
            text encoders; None: no limit.
        batch: pictures per pipeline call.
        memory: pictures without an attack, which several victims on one pipeline object may share.
        identity: what tells the guards of this memory apart.
    """

    pipe: Any
    erasers: Sequence[Eraser]
    search: Detector | None
    seeds: tuple[int, ...]
    steps: int = 25
    guidance: float | None = None
    budget: int | None = None
    batch: int = 32
    memory: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    identity: str = ""
    spent: Cost = field(default_factory=Cost)
    _on: Handles | None = field(default=None, repr=False)
    _counting: bool = field(default=False, repr=False)

    # ---- the guard

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Any]:
        if self._on is not None:
            yield self.pipe
            return
        self._on = api.stack(self.pipe, *self.erasers)
        try:
            yield self.pipe
        finally:
            on, self._on = self._on, None
            on.remove()

    @contextlib.contextmanager
    def original(self) -> Iterator[Any]:
        on, self._on = self._on, None
        if on is None:
            yield self.pipe
            return
        on.remove()
        try:
            yield self.pipe
        finally:
            self._on = api.stack(self.pipe, *self.erasers)

    # ---- pictures

    def draw(self, proposal: Proposal, seeds: Sequence[int] | None = None) -> Tensor:
        seeds = self.seeds if seeds is None else tuple(seeds)
        images = self._drawn(proposal, seeds)
        for k in range(1, proposal.tries):
            missed = (~self.found(images)).nonzero().flatten().tolist()
            if not missed:
                break
            again = [(seeds[i] + k * 7_919_003) % 2**32 for i in missed]
            images = images.clone()
            images[missed] = self._drawn(replace(proposal, tries=1), again)
        return images

    def _drawn(self, proposal: Proposal, seeds: Sequence[int]) -> Tensor:
        call = dict(proposal.call)
        guidance = call.pop("guidance", self.guidance)
        steps = call.pop("num_inference_steps", self.steps)
        prompts = [proposal.prompt] * len(seeds)
        with contextlib.ExitStack() as stack:
            if proposal.pipeline is None:
                pipe = stack.enter_context(self.guarded())
            else:
                stack.enter_context(self.original())  # the new pipeline may share the models: apply the erasers once
                pipe = proposal.pipeline(self.pipe)
                pipe.set_progress_bar_config(disable=True)
                stack.enter_context(api.stack(pipe, *(self.erasers if proposal.guarded else ())))
            if proposal.inside is not None:
                stack.enter_context(proposal.inside(pipe))
            images = draw(pipe, prompts, seeds, self.batch, guidance, num_inference_steps=steps, **call)
        if self._counting:
            self.spent.pictures += len(images)
        return images

    def draw_original(self, prompt: str, seeds: Sequence[int] | None = None) -> Tensor:
        seeds = self.seeds if seeds is None else tuple(seeds)
        with self.original():
            images = draw(
                self.pipe, [prompt] * len(seeds), seeds, self.batch, self.guidance, num_inference_steps=self.steps
            )
        if self._counting:
            self.spent.pictures += len(images)
        return images

    def plain(self, prompt: str, seeds: Sequence[int], guarded: bool) -> Tensor:
        """Pictures of a prompt without an attack, guarded or of the base model. Each is drawn once per `memory`."""
        key = (self.identity if guarded else None, prompt, tuple(seeds), self.steps, self.guidance, self.batch)
        if key not in self.memory:
            self.memory[key] = self.draw(Proposal(prompt), seeds) if guarded else self.draw_original(prompt, seeds)
        return self.memory[key]

    def check_stolen(self) -> None:
        """See `stolen`."""
        others = ", ".join(type(each).__name__ for each in self.erasers if not isinstance(each, Delta))
        if others:
            raise ValueError(
                f"{others} acts at run time, so whoever has the weights leaves it out. Attack deltas this way, or the "
                "base model."
            )

    def stolen(self) -> GuardedModel:
        self.check_stolen()
        deltas = [each for each in self.erasers if isinstance(each, Delta)]
        with self.original():
            denoiser, pipe = denoiser_of(self.pipe), copy.copy(self.pipe)
            module = copy.deepcopy(denoiser)
            for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
                hooks.clear()  # the meter of the original
            pipe.register_modules(**{family(pipe).denoiser: module})
            if deltas:
                functools.reduce(operator.add, deltas).merge(pipe)
        if self._counting:
            module.register_forward_pre_hook(self._count, with_kwargs=True)
        return replace(self, pipe=pipe, erasers=(), spent=self.spent, _on=None, _counting=False)

    def found(self, images: Tensor) -> Tensor:
        if self.search is None:
            raise ValueError("This attack needs a detector for its search. Give one by `search`.")
        return self.search(images).all(0)

    def log_odds(self, images: Tensor) -> Tensor:
        search: Any = self.search
        if not callable(getattr(search, "log_odds", None)):
            raise ValueError(
                f"This attack follows the gradient of the search's detector, and {getattr(search, 'name', None)} "
                "has no function `log_odds`. Give another one by `search`, such as those of `emoji`."
            )
        odds: Tensor = search.log_odds(images)
        return odds.amin(0)

    # ---- meters

    @contextlib.contextmanager
    def metered(self) -> Iterator[None]:
        """Counts denoiser and text-encoder rows inside the block, and raises `BudgetSpent` before a call over the
        budget."""
        encoders = {id(e): e for e in (encoder_of(self.pipe, name) for name in readers(self.pipe)) if e is not None}
        denoiser: nn.Module = denoiser_of(self.pipe)
        hooks = [
            denoiser.register_forward_pre_hook(self._count, with_kwargs=True),
            *(each.register_forward_pre_hook(self._count_texts, with_kwargs=True) for each in encoders.values()),
        ]
        self.spent, self._counting = Cost(), True
        try:
            yield
        finally:
            self._counting = False
            for hook in hooks:
                hook.remove()

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else next(iter(kwargs.values()))
        rows = len(sample)
        backward = rows if torch.is_grad_enabled() else 0
        if self.budget is not None and self.spent.rows + rows + backward > self.budget:
            raise BudgetSpent
        self.spent.forward += rows
        self.spent.backward += backward

    def _count_texts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        rows = 0 if ids is None else len(ids)
        if self.budget is not None and self.spent.texts + rows > TEXTS * self.budget:
            raise BudgetSpent
        self.spent.texts += rows
