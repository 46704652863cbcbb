"""The three-chain step of the published fine-tuning code, written from its description, beside the package's.

For each update and picture it draws a trajectory, with a call of the denoiser for each row and each branch of the loss.
The package batches rows and branches, and lets `reuse` updates share a trajectory. Both train the same weights with
AdamW, at the same batch, sampler and guidance.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import functional_call

import efface
from efface import CCRT, ESD, SDD, Concept
from efface.core import config
from efface.editors import _round, _search
from efface.editors._denoiser import Denoiser

CONCEPT = Concept("cat", ("a cat",))
K, GUIDANCE, BATCH, LR = 20, 3.0, 2, 1e-5


class Naive:
    """Three chains: a trajectory for each update and picture, a call for each row and each branch."""

    def __init__(self, pipe: Any, method: str) -> None:
        self.pipe, self.method = pipe, method
        net = Denoiser(pipe, CONCEPT.phrases, "x", K)
        self.texts = net.condition.text
        self.student = {n.removeprefix("unet."): w for n, w in net.student().items()}
        self.average = {n: w.detach().clone() for n, w in self.student.items()}
        self.adam = torch.optim.AdamW(self.student.values(), lr=LR, weight_decay=0)
        self.frozen = {n: p.detach() for n, p in pipe.unet.named_parameters()}
        self.rng, self.rows = Generator().manual_seed(0), 0

    def predict(self, x: Tensor, t: Tensor, row: int, weights: dict[str, Tensor]) -> Tensor:
        self.rows += 1
        text = self.texts[row : row + 1]
        return functional_call(self.pipe.unet, self.frozen | weights, (x, t, text), {"return_dict": False})[0]

    @torch.no_grad()
    def point(self, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(K)
        stop = int(torch.randint(K, (1,), generator=self.rng))
        shape = (1, self.pipe.unet.config.in_channels, *[self.pipe.unet.config.sample_size] * 2)
        x = torch.randn(shape, generator=self.rng)
        for t in scheduler.timesteps[:stop]:
            null, own = self.predict(x, t, 0, weights), self.predict(x, t, 1, weights)
            x = scheduler.step(null + GUIDANCE * (own - null), t, x).prev_sample
        return x, scheduler.timesteps[stop]

    def update(self) -> None:
        self.adam.zero_grad()
        for _ in range(BATCH):
            x, t = self.point(self.student if self.method == "esd" else self.average)
            with torch.no_grad():
                if self.method == "esd":
                    null, own = self.predict(x, t, 0, {}), self.predict(x, t, 1, {})
                    target = null - (own - null)
                else:
                    target = self.predict(x, t, 0, self.student)
            ((self.predict(x, t, 1, self.student) - target).square().mean() / BATCH).backward()
        self.adam.step()
        if self.method == "sdd":
            with torch.no_grad():
                for name, average in self.average.items():
                    average.lerp_(self.student[name], 0.01)


# ---------------------------------------------------------------- timing


Scene = tuple[Any, str]
"""A pipeline and the method."""


def scene(method: str, pipe: Any = None) -> Scene:
    return pipe or efface.load("emoji"), method


def naive(scene: Scene, updates: int) -> None:
    step = Naive(*scene)
    for _ in range(updates):
        step.update()


def ours(scene: Scene, updates: int, reuse: int) -> None:
    pipe, method = scene
    fields = {"steps": updates, "lr": LR, "batch": BATCH, "reuse": reuse, "sampler_steps": K, "guidance": GUIDANCE}
    {"esd": ESD, "sdd": SDD}[method](**fields).fit(pipe, CONCEPT)


def variants(updates: int = 8) -> dict[str, Callable[[Scene], tuple[float, None]]]:
    """Name to seconds of an update; `updates` are timed together."""

    def seconds(call: Callable[[Scene, int], None], scene: Scene) -> tuple[float, None]:
        began = time.perf_counter()
        call(scene, updates)
        return (time.perf_counter() - began) / updates, None

    calls = {"naive": naive} | {f"efface, reuse {reuse}": partial(ours, reuse=reuse) for reuse in (1, 4)}
    return {name: partial(seconds, call) for name, call in calls.items()}


def rows_per_update(pipe: Any, updates: int = 8) -> dict[str, float]:
    """Denoiser rows of each variant of both methods."""
    found: dict[str, float] = {}
    for method in ("esd", "sdd"):
        for name, call in variants(updates).items():
            seen: list[int] = []
            watch = pipe.unet.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
            try:
                call(scene(method, pipe))
            finally:
                watch.remove()
            found[f"{method}: {name}"] = sum(seen) / updates
    return found


# ---------------------------------------------------------------- CCRT


def counted(pipe: Any, steps: int) -> dict[str, Any]:
    """Denoiser rows of one round of CCRT. And what they would be if no trajectory were shared: every individual scored
    in every generation on two guided trajectories, and three drawn for every update of the fit."""
    individuals, nets = 0, []
    search, fit = _search.search, _round.Round.fit

    def see_search(entities: Any, fitness: Any, **options: Any) -> Any:
        def see(new: Any) -> Any:
            nonlocal individuals
            individuals += len(new)
            return fitness(new)

        return search(entities, see, **options)

    def see_fit(self: Any, *args: Any) -> Any:
        nets.append(self.net)
        return fit(self, *args)

    method = CCRT(steps=steps).resolved(pipe)
    _search.search, _round.Round.fit = see_search, see_fit  # type: ignore[method-assign]
    began = time.perf_counter()
    try:
        method.sequence(pipe, CONCEPT)
    finally:
        _search.search, _round.Round.fit = search, fit  # type: ignore[method-assign]
    seconds = time.perf_counter() - began
    batch, k = method.batch or 1, method.sampler_steps or 1
    evaluations = individuals + method.generations * method.keep  # survivors are scored again
    chain = k  # rows of a guided trajectory up to a random step, on average
    unshared = {
        "search": evaluations * 2 * (chain + 1),
        "probe": steps * batch * (chain + 3),
        "fit": steps * batch * (3 * chain + 5),
    }
    return {
        "rows": nets[0].rows,
        "rows_unshared": unshared,
        "saved": 1 - nets[0].rows / sum(unshared.values()),
        "individuals": individuals,
        "seconds": seconds,
        "method": config(method),
    }
