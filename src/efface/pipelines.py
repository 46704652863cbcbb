"""Draws pictures with pipelines. `load` comes from `_loading`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import checks
from ._loading import EMBEDDED, Offload, load
from .core import Detector

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from .core import Pipeline

__all__ = ["EMBEDDED", "Offload", "cut_off", "draw", "effectiveness", "guided", "load", "model_hash", "scales"]


def cut_off(pipe: DiffusionPipeline, prompt: str) -> str:
    """The end of a prompt that the pipeline's text encoders cut off; "" if they read the whole prompt."""
    from ._text import cut_off

    return cut_off(pipe, prompt)


def guided(pipe: DiffusionPipeline, guidance: float | None) -> dict[str, Any]:
    """The call arguments that set a pipeline's guidance scale.

    Args:
        pipe: a diffusers text-to-image pipeline.
        guidance: w in u + w (c - u), with the conditional prediction c and the unconditional prediction u; 1 means no
            guidance. None keeps the pipeline's default.

    Returns:
        `guidance_scale` for most families. For FLUX, `true_cfg_scale` with a negative prompt: FLUX is
        guidance-distilled, and its `guidance_scale` is an input of the denoiser.

    Raises:
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> from efface.pipelines import guided
        >>> guided(efface.load("emoji"), 4.0)
        {'guidance_scale': 4.0}
    """
    from .families import family

    return {} if guidance is None else family(pipe).guided(guidance)


def scales(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> dict[str, Any]:
    """The guidance arguments of a pipeline call, including its defaults, for records."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    names = [name for name in ("guidance_scale", "true_cfg_scale") if name in parameters]
    return {name: call.get(name, parameters[name].default) for name in names}


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch: int = 32,
    guidance: float | None = None,
    **call: Any,
) -> torch.Tensor:
    """Draws one picture per prompt and seed: float [N, 3, H, W] in [0, 1].

    Args:
        pipe: the pipeline.
        prompts: N prompts.
        seeds: N seeds. A picture depends only on its prompt and seed, not on the rest of its batch (except for float
            rounding).
        batch: pictures per pipeline call.
        guidance: the guidance scale, as `guided` takes it. None keeps the pipeline's default.
        call: further arguments of the pipeline. `num_inference_steps` is 25 by default. A single `negative_prompt`
            applies to all prompts, as does a picture [1, C, H, W] as `image`.

    Raises:
        ValueError: the numbers of seeds and prompts differ, or pictures became NaN, for example by too much strength or
            guidance.
    """
    import torch

    if len(prompts) != len(seeds):
        raise ValueError(
            f"Expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds. Give as many seeds as "
            "prompts."
        )
    pictures, call = [], {"num_inference_steps": 25, **guided(pipe, guidance), **call}
    negative = call.pop("negative_prompt", None)
    inputs = {name: call.pop(name) for name in ("image",) if name in call}
    for k in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(s) for s in seeds[k : k + batch]]
        if negative is not None:  # pipelines take one negative prompt per prompt
            every = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
            call["negative_prompt"] = every[k : k + batch]
        for name, picture in inputs.items():  # of pipelines that take one picture per prompt
            call[name] = picture.expand(len(prompts[k : k + batch]), *picture.shape[1:])
        some = list(prompts[k : k + batch])
        out = cast("Pipeline", pipe)(prompt=some, generator=generators, output_type="pt", **call)
        pictures.append(out.images.float().cpu())
        broken = [s for s, x in zip(seeds[k : k + batch], pictures[-1], strict=False) if not x.isfinite().all()]
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(pictures[-1])} pictures became NaN (seed {broken[0]}). Lower the strength or "
                "the guidance scale, or load the model in float32."
            )
    return torch.cat(pictures)


def effectiveness(
    prompts: Sequence[str],
    model: DiffusionPipeline | str | Path,
    detector: Detector,
    n: int = 5,
    seed: int = 1_000_000,
    batch: int = 32,
    guidance: float | None = None,
    **call: Any,
) -> list[float]:
    """The share of each prompt's base-model pictures in which a detector sees the concept.

    A prompt that rarely draws the concept is no evidence about an eraser. Prompts that were chosen on another model can
    be of this kind. Six-CD keeps prompts that show the concept in at least 4 of 5 pictures.

    Args:
        prompts: the prompts to draw.
        model: a pipeline, or what `load` takes.
        detector: maps pictures to bool [J, N], such as `efface.detector("eyes", "alcohol")`. A picture counts if all
            judges see the concept.
        n: pictures per prompt, with the seeds `seed` ... `seed + n - 1`.
        seed: the first seed.
        batch: pictures per pipeline call.
        guidance: the guidance scale. None keeps the pipeline's default.
        call: further arguments of the pipeline.

    Raises:
        ValueError: `n` is below 1, or a seed reaches 2**32.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> efface.effectiveness(["a cat"], pipe, efface.detector("eyes", "cat"), n=1, num_inference_steps=1)
        [0.0]
    """
    checks.seed("seed", seed, checks.whole("n", n))
    pipe = load(model) if isinstance(model, (str, Path)) else model
    texts = [p for p in prompts for _ in range(n)]
    hits: list[bool] = []
    for k in range(0, len(texts), batch):
        some = texts[k : k + batch]
        seeds = [seed + (k + j) % n for j in range(len(some))]
        hits += detector(draw(pipe, some, seeds, batch, guidance, **call)).all(0).tolist()
    return [sum(hits[k : k + n]) / n for k in range(0, len(hits), n)]


def model_hash(pipe: DiffusionPipeline) -> str:
    """SHA-256 over the denoiser's text-facing weights: sorted names, shapes, dtypes and bytes.

    Two models with the same hash treat text alike. Records identify the base model by it. Applied deltas do not change
    the hash.
    """
    from ._weights import text_hash
    from .delta import unedited

    return text_hash(pipe, unedited(pipe))
