"""What an audit draws with: the audited model, its digest, another model as an eraser, and the controls."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__, api, checks, files
from ..core import Handle
from ..delta import Delta
from ..families import family
from ..pipelines import EMBEDDED
from ..records import Row, Sample

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SEED = 1_900_000
"""The seed of random weights and of ruined pictures."""
RUINS = ("noise", "one colour", "shuffled pixels")


def add_changes(pipe: DiffusionPipeline, delta: Sequence[str | Path], lora: Sequence[str | Path]) -> None:
    """Merges deltas and LoRA files into a pipeline's weights.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not safetensors, does not fit the pipeline, or changes no weight.
        ImportError: LoRA files need `peft`.
    """
    for place in delta:
        made = api.load_delta(place)
        if not isinstance(made, Delta):
            raise ValueError(
                f"Expected a delta of weights for an audit, got {type(made).__name__} in {place}, which stay outside "
                "the weights. Measure them with `efface bench --delta`."
            )
        before = digest(pipe)
        made.merge(pipe)
        if before and digest(pipe) == before:
            raise ValueError(
                f"Expected the delta {place} to change the model, got one that changes no weight. Give the delta that "
                "was fitted on this model."
            )
    for place in lora:
        path = checks.path("lora", place)
        if path.suffix != ".safetensors":
            cure = "Efface reads no pickles."
            raise ValueError(checks.refusal("a LoRA file that is named .safetensors", str(path), cure))
        files.read_tensors(path, "Export the LoRA again.")
        _fuse(pipe, path)


def _fuse(pipe: Any, path: Path) -> None:
    """Merges a LoRA. Raises ValueError if it does not fit, or changes nothing."""
    before, why = digest(pipe), "it changes no weight"
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True, use_safetensors=True)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        why = checks.short(str(error), 160)
    if not before or digest(pipe) == before or why != "it changes no weight":
        raise ValueError(f"The LoRA {path} does not fit this {type(pipe).__name__} ({why}). Give its own model.")


def digest(pipe: DiffusionPipeline) -> str:
    """SHA-256 over all weights of a pipeline: names, types, shapes and bytes. "" if weights are not in memory."""
    found = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        for key, tensor in sorted(module.state_dict().items()) if isinstance(module, nn.Module) else ():
            if tensor.is_meta:
                return ""
            found.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def weights_of(pipe: DiffusionPipeline, model: Any, more: Sequence[str | Path]) -> str:
    """SHA-256 that tells a model's weights from others: of the weights in memory, otherwise of the model's files.

    Raises:
        ValueError: neither is there, so that another model could take this one's place.
    """
    if found := digest(pipe):
        return found
    if not isinstance(model, (str, Path)):
        raise ValueError(
            "Expected a pipeline whose weights are in memory, got one that is offloaded. Give the model's name or "
            "folder instead."
        )
    facts = {"model": str(model), "efface": __version__, "files": file_digests(model, more)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def shape(pipe: Any) -> Any:
    """What two models of one kind have in common: the pipeline's class, and the denoiser's class and sizes."""
    part = getattr(pipe, family(pipe).denoiser)
    return type(pipe), type(part), {key: value for key, value in part.config.items() if not key.startswith("_")}


def file_digests(model: Any, more: Sequence[str | Path]) -> dict[str, str]:
    """SHA-256 of each file of a model's folder or checkpoint, and of deltas and LoRA files, by relative name."""
    found: dict[str, str] = {}
    root = Path(model) if isinstance(model, (str, Path)) and str(model) not in EMBEDDED else None
    if root is not None and root.is_dir():
        inner = sorted(path for path in root.rglob("*") if path.is_file())
        found = {f"{root.name}/{path.relative_to(root)}": _sha256(path) for path in inner}
    elif root is not None and root.is_file():
        found[root.name] = _sha256(root)
    return found | {Path(path).name: _sha256(Path(path)) for path in more}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def random_weights(pipe: Any) -> Any:
    """The pipeline with a denoiser of random weights, as its class initialises them. The original stays."""
    name = family(pipe).denoiser
    real = getattr(pipe, name)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        made = type(real).from_config(real.config)
    found = copy.copy(pipe)
    found.register_modules(**{name: made.to(device=pipe.device, dtype=real.dtype).eval()})
    return found


def ruined(samples: Sequence[Sample]) -> list[Sample]:
    """Ruined forms of the base model's pictures: noise, one colour, and shuffled pixels."""
    generator, found = torch.Generator().manual_seed(SEED), []
    for sample in samples:
        image = sample.image()
        for kind, pixels in zip(RUINS, _ruins(image, generator), strict=True):
            row = Row(f"{sample.row.id}.{kind.replace(' ', '-')}", sample.row.prompt, 0, concept=sample.row.concept)
            found.append(Sample(row, pixels=pixels))
    return found


def _ruins(image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.rand(image.shape, generator=generator)
    order = torch.randperm(image[0].numel(), generator=generator)
    colour = image.mean((1, 2), keepdim=True).expand_as(image)
    return noise, colour, image.flatten(1)[:, order].view_as(image)


@dataclass(frozen=True, eq=False)
class OtherModel:
    """Another model as an eraser: while it is on, the pipeline draws with the other one's parts.

    Args:
        pipe: the other model, of the same class of pipeline.
        facts: its name and digest, for records.
    """

    pipe: Any
    facts: Mapping[str, Any]
    concepts: tuple[Any, ...] = ()

    def config(self) -> dict[str, Any]:
        return {"method": "audited model", **self.facts}

    def apply(self, pipe: Any) -> Handle:
        if type(pipe) is not type(self.pipe):
            raise ValueError(
                f"Expected the audited model to be a {type(pipe).__name__} like the base model, got a "
                f"{type(self.pipe).__name__}. Attack models of one kind."
            )
        before = dict(pipe.components)
        pipe.register_modules(**self.pipe.components)
        return Handle(self, lambda other: None, functools.partial(pipe.register_modules, **before))
