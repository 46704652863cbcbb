"""One denoiser call with guidance: of the base model, of each run-time method, and of two literal baselines.

Texts are encoded outside the measured time. All variants have window (0, 1) and act in every layer. `projected` treats
each phrase on its own, so it is timed with all phrases and with one. The scene was picked so that every variant changes
the prediction by more than 10 %; the effect is no measure of erasure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

import efface
from efface._text import SITES
from efface.hooks import CrossAttention, ErasurePrompts
from efface.hooks.sites import site

from .gie import CopiedSelfAttention, OneTrajectory, TwoTrajectories
from .random_model import UNETS, random_pipeline

PROMPT, SEED, STEPS, GUIDANCE = "a beer mug", 1_000_000, 25, 7.5
WARM = {"emoji": 22}  # base steps before the measured call
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Scene:
    """A moment in the drawing of B pictures of one prompt: latents [B, C, h, w] and the time."""

    pipe: Any
    concept: efface.Concept
    latents: Tensor
    time: Tensor

    def texts(self) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional text, each [B, L, D], asked for as in a pipeline's call."""
        pipe, prompts = self.pipe, [PROMPT] * len(self.latents)
        return pipe.encode_prompt(prompts, pipe._execution_device, 1, do_classifier_free_guidance=True)[::-1]

    def call(self, *texts: Tensor) -> Call:
        """The denoiser call that has the latents once for each text [B, L, D]."""
        text, latents = torch.cat(texts), torch.cat([self.latents] * len(texts))
        return lambda: self.pipe.unet(latents, self.time, encoder_hidden_states=text, return_dict=False)[0]


@torch.no_grad()
def scene(model: str, batch: int) -> Scene:
    pipe = random_pipeline(UNETS[model]) if model in UNETS else efface.load(model)
    config, concept = pipe.unet.config, efface.concept("alcohol")
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    pipe.scheduler.set_timesteps(STEPS)
    warm = WARM.get(model, 0)
    for step in pipe.scheduler.timesteps[:warm]:
        now = Scene(pipe, concept, latents, step)
        uncond, cond = now.call(*now.texts())().chunk(2)
        latents = pipe.scheduler.step(uncond + GUIDANCE * (cond - uncond), step, latents).prev_sample
    return Scene(pipe, concept, latents, pipe.scheduler.timesteps[warm])


@contextmanager
def base(scene: Scene) -> Iterator[Call]:
    yield scene.call(*scene.texts())


@contextmanager
def applied(method: Callable[..., Any], scene: Scene, phrases: int | None = None) -> Iterator[Call]:
    """A run-time method; those that guide ask the pipeline for its guidance scale, set here as a call does.

    As in the later steps of a drawing: methods have computed before what they keep for all steps.
    """
    scene.pipe._guidance_scale = GUIDANCE
    with method(replace(scene.concept, phrases=scene.concept.phrases[:phrases])).apply(scene.pipe):
        if (here := SITES.get(scene.pipe.unet)) is not None:
            here.calls.open(entered=True)
        call = scene.call(*scene.texts())
        call()
        yield call


@contextmanager
def literal(kind: type[OneTrajectory], scene: Scene) -> Iterator[Call]:
    """A literal baseline on the pipeline's UNet, with as many phrases as fit. Restores the processors."""
    pipe, phrases = scene.pipe, list(scene.concept.phrases)

    def tokens(text: str) -> int:
        return len(pipe.tokenizer(text, add_special_tokens=False).input_ids)

    while tokens(PROMPT) + tokens(" ".join(phrases)) + 2 > pipe.tokenizer.model_max_length:
        phrases.pop()
    concept, n, m = " ".join(phrases), tokens(PROMPT), tokens(" ".join(phrases))
    cross = kind(pipe.encode_prompt(concept, pipe._execution_device, 1, False)[0], n, m)
    uncond, cond = scene.texts()
    two = isinstance(cross, TwoTrajectories)
    call = scene.call(uncond, uncond, cond, cross.insert(cond, dropped=m)) if two else scene.call(uncond, cond)
    stock = {a: a.processor for a in pipe.unet.modules() if isinstance(a, Attention)}
    try:
        for attn, processor in stock.items():
            if attn.is_cross_attention:
                attn.set_processor(cross)
            elif two:
                attn.set_processor(CopiedSelfAttention(processor))
        yield call
    finally:
        for attn, processor in stock.items():
            attn.set_processor(processor)


def eiup(form: Any) -> Callable[..., Any]:
    return partial(efface.EIUP, strength=1.0, window=(0.0, 1.0), normalization=form)


THREE_ROWS = partial(efface.NegativePrompt, strength=GUIDANCE)
CALLS: dict[str, Callable[[Scene], AbstractContextManager[Call]]] = {
    "plain": base,
    "eiup projected": partial(applied, eiup("projected")),
    "projected, 1 phrase": partial(applied, eiup("projected"), phrases=1),
    "eiup separate": partial(applied, eiup("separate")),
    "eiup gated": partial(applied, eiup("gated")),
    "gie": partial(applied, efface.GIE),
    "safree": partial(applied, efface.SAFREE),
    "sld": partial(applied, efface.SLD.max),
    "sld, 1 phrase": partial(applied, efface.SLD.max, phrases=1),
    "negative, own strength": partial(applied, THREE_ROWS),
    "negative, own strength, 1 phrase": partial(applied, THREE_ROWS, phrases=1),
    "one trajectory": partial(literal, OneTrajectory),
    "two trajectories": partial(literal, TwoTrajectories),
}


@torch.no_grad()
def seconds(variant: Callable[[Scene], AbstractContextManager[Call]], scene: Scene) -> tuple[float, Tensor]:
    """Of one call; and the conditional prediction, which is in the last rows of every variant."""
    with variant(scene) as call:
        start = time.perf_counter()
        out = call()
        return time.perf_counter() - start, out[-len(scene.latents) :]


# ---------------------------------------------------------------- the hooks alone


class Nothing(efface.EIUP):
    """An eraser that is asked in every layer and changes nothing."""

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        return out


@torch.no_grad()
def hooks_alone(scene: Scene, calls: int = 200) -> tuple[float, None]:
    """Seconds of the hooks in one call: an eraser that changes nothing, with every module below the hooks replaced by
    one that returns immediately, minus the same calls without hooks."""
    pipe, hidden = scene.pipe, torch.zeros(2, 1, 8)
    with Nothing("alcohol").apply(pipe):
        call, here = scene.call(*scene.texts()), site(pipe)
        inner = [module for layer in here.layers.cross for module in (layer.attn.to_q, layer.attn.to_out[0])]
        hooked = {module: module.forward for module in inner}
        rows = torch.cat([scene.latents] * 2)

        def below(*_: Any, **__: Any) -> tuple[Tensor]:
            for module in inner:
                module(hidden)
            return (rows,)

        hooks = [hook for layer in here.layers.cross for hook in layer.hooks]
        saved = {each: each.below for each in (*hooks, here.hook)}
        try:
            for hook in hooks:
                hook.below = lambda x, *_: x
            here.hook.below = below
            guarded = _median(call, calls)
            for module in inner:
                module.forward = lambda x, *_: x
            return guarded - _median(below, calls), None
        finally:
            for module, forward in hooked.items():
                module.forward = forward
            for each, below_it in saved.items():
                each.below = below_it


def _median(call: Callable[[], Any], times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
