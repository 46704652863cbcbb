"""Draws with tiny pipelines, with and without methods, and compares pipeline states."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Concept
from ..families import denoiser_name
from .tiny import call_options, pipeline

STEPS = 3
PROMPT = "a night at the pub"
PROMPTS = (PROMPT, "a red cat")
ALCOHOL = Concept("alcohol", ("beer", "wine glass"))
CAT = Concept("cat")

State = tuple[dict[str, Tensor], dict[str, Any], dict[str, int]]
"""Weights, processors, and the identities of other attributes."""


def denoiser_of(pipe: Any) -> Any:
    """The UNet or transformer."""
    return getattr(pipe, denoiser_name(pipe))


def change(a: Tensor, b: Tensor) -> float:
    """The distance of `a` from `b`, relative to the size of `b`."""
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


def latents(pipe: Any, prompt: str | Sequence[str] | None = PROMPT, **options: Any) -> Tensor:
    """The latents of the pipeline's pictures.

    Args:
        pipe: a tiny pipeline.
        prompt: one prompt, or one per row of the batch.
        options: options of the pipeline call. Picture i of a call has seed i, shifted by `seed`. `guidance_scale` is
            the scale of true guidance for families with both kinds.

    Returns:
        Latents, one per picture: [N, C, h, w], or [N, L, C] for FLUX.
    """
    given = options.get("prompt_embeds")
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    prompts = len(given) if given is not None else 1 if prompt is None or isinstance(prompt, str) else len(prompt)
    seed, images = options.pop("seed", 0), prompts * options.get("num_images_per_prompt", 1)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(images)]
    options = call_options(pipe, options, prompts)
    options = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent", **options}
    found: Tensor = pipe(prompt=prompt, **options).images
    return found


untouched = functools.cache(lambda family: pipeline(family))
"""A shared pipeline of the family, for reading only."""


scratch = functools.cache(lambda family: pipeline(family))
"""A separate pipeline for testing whether a method refuses the family, so that traces on the main pipeline stay
visible."""


@functools.cache
def ready(family: str) -> tuple[Any, State]:
    """A pipeline for methods, after the additions of diffusers and transformers, and its snapshot."""
    pipe = pipeline(family)
    latents(pipe)
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part is not None:  # hooks of transformers' own
            part(torch.tensor([[0, 1]]), output_hidden_states=True)
    return pipe, snapshot(pipe)


def drawn(family: str = "sd1", *methods: Any, prompt: str | tuple[str, ...] = PROMPT, **options: Any) -> Tensor:
    """The latents with these methods only; without methods, those of the base model.

    Caches results, so methods and options must be hashable.
    """
    return _drawn(family, *methods, prompt=prompt, **{"num_inference_steps": STEPS, **options})


@functools.cache
def _drawn(family: str, *methods: Any, prompt: str | tuple[str, ...], **options: Any) -> Tensor:
    pipe = untouched(family)
    with contextlib.ExitStack() as on:
        for method in methods:
            on.enter_context(method.apply(pipe))
        return latents(pipe, prompt, **options)


def forget() -> None:
    """Drops all cached pipelines and results, which a broken method may have damaged."""
    for kept in (untouched, scratch, ready, _drawn):
        kept.cache_clear()


def snapshot(pipe: Any) -> State:
    """The state that a method could change: weights by value, processors and other attributes by identity."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    weights = {f"{p}.{n}": weight.clone() for p, part in parts.items() for n, weight in part.state_dict().items()}
    inside = {
        f"{p}.{n}.{attribute}": id(value)
        for p, part in parts.items()
        for n, module in part.named_modules()
        for attribute, value in vars(module).items()
    }
    outside = {name: id(value) for name, value in vars(pipe).items() if callable(value)}
    denoiser = denoiser_of(pipe).named_modules()
    processors = {name: module.processor for name, module in denoiser if hasattr(module, "processor")}
    return weights, processors, inside | outside


def differences(after: State, before: State) -> list[str]:
    """The names of the differences between two snapshots."""
    weights, processors, attributes = before
    found = [name for name, weight in weights.items() if not torch.equal(after[0][name], weight)]
    found += [name for name in processors.keys() | after[1].keys() if after[1].get(name) is not processors.get(name)]
    found += [name for name in attributes.keys() | after[2].keys() if after[2].get(name) != attributes.get(name)]
    return sorted(found)
