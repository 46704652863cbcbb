"""Drawings as users make them, with and without EIUP: the later steps of a drawing, and a drawing as a whole.

The keys and values of constant texts are computed in the first step of the first drawing. So a step is the median of
those after the first, and a whole drawing holds what is done once: encoding the texts, and comparing the weights.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import efface
from efface.core import Concept, shipped_concepts

from .random_model import UNETS, random_pipeline

PROMPT, SEED, GUIDANCE = "a beer mug", 1_000_000, 7.5
GROUPS = ("alcohol", "weapon", "death", "medical", "gambling", "smoking", "vehicle", "object")
TENANTS = ("alcohol", "weapon", "death", "gambling")


@dataclass(frozen=True)
class Scene:
    """A pipeline, the number of pictures, and the steps of a drawing."""

    pipe: Any
    batch: int
    steps: int
    whole: bool = False

    def draw(self) -> tuple[list[float], Tensor]:
        """Seconds of the whole drawing and of each later step, and the latents."""
        ends = []

        def ended(pipe: Any, step: int, when: Any, given: dict[str, Any]) -> dict[str, Any]:
            ends.append(time.perf_counter())
            return given

        options = {"num_inference_steps": self.steps, "guidance_scale": GUIDANCE, "output_type": "latent"}
        generators = [torch.Generator().manual_seed(SEED + k) for k in range(self.batch)]
        began = time.perf_counter()
        prompts = [PROMPT] * self.batch
        made = self.pipe(prompts, generator=generators, callback_on_step_end=ended, **options).images
        return [time.perf_counter() - began, *(b - a for a, b in itertools.pairwise(ends))], made


def scene(model: str, batch: int, steps: int, whole: bool = False) -> Scene:
    pipe = random_pipeline(UNETS[model]) if model in UNETS else efface.load(model)
    pipe.set_progress_bar_config(disable=True)
    return Scene(pipe, batch, steps, whole)


def phrases(count: int) -> Concept:
    """The first phrases of several shipped concepts, as one concept."""
    every = itertools.chain(*(shipped_concepts()[name].phrases for name in GROUPS))
    return Concept("alcohol", tuple(itertools.islice(every, count)))


def tenants(scene: Scene) -> dict[str, Any]:
    """Another concept for each picture."""
    return {"rows": [[TENANTS[k % len(TENANTS)]] for k in range(scene.batch)]}


@torch.no_grad()
def seconds(make: Callable[[Scene], Any], scene: Scene) -> tuple[float, Tensor]:
    """Of a later step, or of a whole drawing, in the second of two drawings."""
    with efface.stack(scene.pipe, *make(scene)):
        scene.draw()
        (whole, *later), made = scene.draw()
    return whole if scene.whole else statistics.median(later), made


def eiup(count: int, form: str = "projected") -> Callable[[Scene], Any]:
    return lambda scene: (efface.EIUP(phrases(count), normalization=form),)


VARIANTS: dict[str, Callable[[Any], tuple[float, Tensor]]] = {
    "plain": partial(seconds, lambda scene: ()),
    "1 phrase": partial(seconds, eiup(1)),
    "7 phrases": partial(seconds, eiup(7)),
    "35 phrases": partial(seconds, eiup(35)),
    "7 phrases, swap": partial(seconds, eiup(7, "swap")),
    "7 phrases, separate": partial(seconds, eiup(7, "separate")),
    "a concept per row": partial(seconds, lambda scene: (efface.EIUP(**tenants(scene)),)),
}
