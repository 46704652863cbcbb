"""Tiny random pipelines of all families, whole and real: tokenizers, text models, denoiser, VAE and scheduler.

Random weights alone test little: attention would be uniform and all text alike. Here the token embeddings and the
query, key and value projections are scaled so that what a prompt says changes the picture. A family is a file of this
package, which is found by walking.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import efface
from efface import Concept
from efface._weights import text_hash
from efface.erasers.gie.adapter import Adapter, network

from .parts import LIMIT, WORDS, denoiser, picture_model, stable_diffusion, t5, tokenizer

__all__ = ["LIMIT", "WORDS", "denoiser", "picture_model", "stable_diffusion", "t5", "tokenizer"]

# A family's file has BUILDERS, by name, and EACH, the names of those that all methods are tried on. If its pipelines
# need further arguments in a call, it has PIPELINES, their classes, and `options`, which adds the arguments.
_FILES = [
    import_module(f"{__name__}.{found.name}")
    for found in sorted(iter_modules(__path__), key=lambda each: each.name)
    if found.name != "parts"
]
BUILDERS: dict[str, Callable[[], Any]] = {name: make for file in _FILES for name, make in file.BUILDERS.items()}
EACH = tuple(name for file in _FILES for name in file.EACH)
FAMILIES = ("sd1", "sd2", "sdxl")  # with a UNet and CLIP
STEPS = 3
PROMPT = "a night at the pub"
PROMPTS = (PROMPT, "a red cat")
ALCOHOL = Concept("alcohol", ("beer", "wine glass"))
CAT = Concept("cat")


def pipeline(family: str = "sd1") -> Any:
    """A new pipeline; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = BUILDERS[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: DiffusionPipeline, prompt: str | Sequence[str] | None = PROMPT, **options: Any) -> Tensor:
    """What the pipeline draws, before decoding. Picture i of a call has seed i; `seed` shifts them.

    FLUX draws with true guidance, of which `guidance_scale` is the scale.
    """
    given = options.get("prompt_embeds")
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    prompts = len(given) if given is not None else 1 if isinstance(prompt, str) else len(prompt)
    seed, images = options.pop("seed", 0), prompts * options.get("num_images_per_prompt", 1)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(images)]
    for file in _FILES:
        if isinstance(pipe, getattr(file, "PIPELINES", ())):
            options = file.options(pipe, options, prompts)
    options = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent", **options}
    return pipe(prompt, **options).images


untouched = functools.cache(lambda family: pipeline(family))


def drawn(family: str = "sd1", *erasers: Any, prompt: str | tuple[str, ...] = PROMPT, **options: Any) -> Tensor:
    """What a pipeline draws with these erasers on, and nothing else; the plain picture without one."""
    return _drawn(family, *erasers, prompt=prompt, **{"num_inference_steps": STEPS, **options})


@functools.cache
def _drawn(family: str, *erasers: Any, prompt: str | tuple[str, ...], **options: Any) -> Tensor:
    pipe = untouched(family)
    with contextlib.ExitStack() as on:
        for eraser in erasers:
            on.enter_context(eraser.apply(pipe))
        return latents(pipe, prompt, **options)


def add_lora(pipe: Any) -> None:
    """A random LoRA on the attention of the denoiser."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        pipe.unet.add_adapter(config)


def denoiser_of(pipe: Any) -> Any:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def change(a: Tensor, b: Tensor) -> float:
    """How far `a` is from `b`, relative to the size of `b`."""
    return float((a - b).norm() / b.norm())


@functools.cache
def batch(family: str = "sd1", rows: int = 2) -> dict[str, Any]:
    """Arguments of a bare denoiser call with random text."""
    unet = pipeline(family).unet
    random = torch.Generator().manual_seed(1)
    made: dict[str, Any] = {
        "sample": torch.randn(rows, 4, 8, 8, generator=random),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(rows, LIMIT, unet.config.cross_attention_dim, generator=random),
    }
    if family == "sdxl":
        made["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 24, generator=random),
            "time_ids": torch.zeros(rows, 6),
        }
    return made


def bare(pipe: Any, family: str = "sd1", rows: int = 2, **arguments: Any) -> Tensor:
    """The denoiser called by itself; all rows are conditional."""
    call = {**batch(family, rows), **arguments}
    with torch.no_grad(), efface.conditional_rows(pipe, [True] * len(call["sample"])):
        return pipe.unet(**call).sample


# ---------------------------------------------------------------- GIE's adapter


def execution_order(pipe: Any) -> tuple[str, ...]:
    """Names of the cross-attention layers, as they run."""
    names, order = {m: n for n, m in denoiser_of(pipe).named_modules() if n.endswith("attn2")}, []
    watches = [m.register_forward_pre_hook(lambda module, args: order.append(names[module])) for m in names]
    latents(pipe, num_inference_steps=1)
    for watch in watches:
        watch.remove()
    return tuple(dict.fromkeys(order))


def adapter(pipe: Any, **changes: Any) -> Adapter:
    """One whose answers are well apart; the layers as they run: down, middle, up."""
    layers = execution_order(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = network(len(layers))
        torch.nn.init.constant_(net[4].bias, 1.0)
        mean, std = torch.rand(len(layers)) / 10, 0.02 + torch.rand(len(layers)) / 100
    given = {
        "net": net,
        "mean": mean,
        "std": std,
        "layers": layers,
        "model": text_hash(pipe, {}),
        "text_encoder": "CLIP",
    }
    return Adapter(**(given | changes))


_files = tempfile.TemporaryDirectory()


def adapter_file(pipe: Any) -> str:
    """Of the adapter for this pipeline's model."""
    file = Path(_files.name) / f"{text_hash(pipe, {})}.safetensors"
    return str(file if file.exists() else adapter(pipe).save(file))


def steps_for(monkeypatch: pytest.MonkeyPatch, *erasers: Any) -> None:
    """More steps where SAFREE's filter is on, which acts in the first fifth of the trajectory only."""
    if any(getattr(eraser, "validation", None) for eraser in erasers):
        monkeypatch.setattr(sys.modules[__name__], "STEPS", 5)


def fitted(eraser: Any, pipe: Any) -> Any:
    """The eraser; if it has an adapter, with the one for this pipeline's model."""
    adapted = getattr(eraser, "adapter", None) is not None
    return dataclasses.replace(eraser, adapter=adapter_file(pipe)) if adapted else eraser
