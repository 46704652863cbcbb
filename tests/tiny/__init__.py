"""The tiny pipelines of `efface.testing`, and what only the tests of this repository need beside them.

`tiny.flux` is `efface.testing.tiny.flux`, and so on. A family's file that stands in this folder counts as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import efface
from efface._weights import text_hash
from efface.erasers.gie.adapter import Adapter, network
from efface.testing import drawing
from efface.testing import tiny as builders
from efface.testing.drawing import (
    ALCOHOL,
    CAT,
    PROMPT,
    PROMPTS,
    STEPS,
    change,
    denoiser_of,
    drawn,
    latents,
    pipeline,
    untouched,
)
from efface.testing.tiny import BUILDERS
from efface.testing.tiny.parts import LIMIT, WORDS, denoiser, picture_model, stable_diffusion, t5, tokenizer

__all__ = [
    "ALCOHOL",
    "BUILDERS",
    "CAT",
    "LIMIT",
    "PROMPT",
    "PROMPTS",
    "STEPS",
    "WORDS",
    "change",
    "denoiser",
    "denoiser_of",
    "drawn",
    "latents",
    "picture_model",
    "pipeline",
    "stable_diffusion",
    "t5",
    "tokenizer",
    "untouched",
]

for _name in [found.name for found in iter_modules(builders.__path__)]:  # `from tiny.flux import flux`
    _file = import_module(f"{builders.__name__}.{_name}")
    sys.modules[f"{__name__}.{_name}"] = _file
    globals().setdefault(_name, _file)
for _found in iter_modules(__path__):
    _file = import_module(f"{__name__}.{_found.name}")
    builders.FILES.append(_file)
    builders.BUILDERS.update(_file.BUILDERS)
EACH = tuple(name for file in builders.FILES for name in file.EACH)
FAMILIES = ("sd1", "sd2", "sdxl")  # with a UNet and CLIP
ALIKE = ("chroma", "flux2", "qwenimage", "sana")  # whose promises `test_families_2026` tests, in less time


@contextlib.contextmanager
def of_its_size(pipe: Any) -> Iterator[None]:
    """Calls of this pipeline's class draw at the tiny pipeline's size by default, as real ones do at theirs."""
    kind = type(pipe)
    sized = functools.partialmethod(kind.__call__, **builders.call_options(pipe, {}, 1))
    with mock.patch.object(kind, "__call__", sized):
        yield


def add_lora(pipe: Any) -> None:
    """A random LoRA on the attention of the denoiser."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        pipe.unet.add_adapter(config)


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
        for module in (drawing, sys.modules[__name__]):
            monkeypatch.setattr(module, "STEPS", 5)


def fitted(eraser: Any, pipe: Any) -> Any:
    """The eraser; if it has an adapter, with the one for this pipeline's model."""
    adapted = getattr(eraser, "adapter", None) is not None
    return dataclasses.replace(eraser, adapter=adapter_file(pipe)) if adapted else eraser
