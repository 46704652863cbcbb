"""Reads, edits and hashes the pipeline's parts and weights by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .families import denoiser_name, family, refusal

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class Elsewhere(ValueError):
    """A weight is in effect but cannot be read, because it is fused with others or offloaded."""


@contextmanager
def learning() -> Iterator[None]:
    """Enables gradients, also inside code that disabled them. Also a decorator."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def part(pipe: DiffusionPipeline, name: str) -> nn.Module:
    """A component of the pipeline, such as "unet", without the wrapper of `torch.compile`."""
    module = getattr(pipe, name, None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"Expected a pipeline with a {name!r}, got a {type(pipe).__name__} without one. Use a pipeline of the "
            "delta's family."
        )
    return getattr(module, "_orig_mod", module)


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """The denoiser, without the wrapper of `torch.compile`. Text encoders may be missing."""
    module = getattr(pipe, denoiser_name(pipe) or family(pipe).denoiser)
    return getattr(module, "_orig_mod", module)


def weight(root: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path. Inside a LoRA (PEFT) it is the base layer's.

    Raises:
        ValueError: the tensor does not exist, or cannot be edited because it is quantised, offloaded to disk, or fused.
    """
    found = stored(root, path)
    if found.element_size() < 2:
        raise _quantised(found, path)
    return found


def stored(root: nn.Module, path: str) -> Tensor:
    """As `weight`, also if layerwise casting stores the tensor in 8 bits."""
    found: Any = root
    for name in path.split("."):
        if _on_disk(found):
            raise Elsewhere(
                f"{path!r} is offloaded to disk (`offload_to_disk_path`) and cannot be edited there. Load the model "
                "without this offload, or apply the delta before enabling it."
            )
        if name in PROJECTIONS:
            check_unfused(found, "unet" if type(root).__name__.startswith("UNet") else "transformer")
        while name != "base_layer" and isinstance(getattr(found, "base_layer", None), nn.Module):
            found = found.base_layer
        found = getattr(found, name, None)
    if not isinstance(found, Tensor):
        raise ValueError(f"{type(root).__name__} has no weight {path!r}. Load a model with the delta's architecture.")
    if type(found) not in (Tensor, nn.Parameter) or not found.is_floating_point():
        raise _quantised(found, path)
    if found.is_meta:
        raise Elsewhere(
            f"{path!r} is not in memory. Load the model without sequential or disk offload, or remove the offload with "
            "`pipe.remove_all_hooks()`."
        )
    return found


def _on_disk(module: Any) -> bool:
    """Whether diffusers stores the module's weights in a file between calls."""
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return getattr(getattr(hook, "config", None), "offload_to_disk_path", None) is not None


def _quantised(tensor: Tensor, path: str) -> ValueError:
    return ValueError(
        f"{path!r} is quantised ({type(tensor).__name__}, {tensor.dtype}), and cannot be edited. Load the model in "
        "float32, float16 or bfloat16."
    )


def fused(root: nn.Module, path: str) -> tuple[Any, tuple[str, ...]]:
    """The LoRA layer (PEFT) around a tensor, None if there is none, and the names of the LoRAs fused into it."""
    found: Any = root
    for name in path.split(".")[:-1]:
        while name != "base_layer" and isinstance(getattr(found, "base_layer", None), nn.Module):
            found = found.base_layer
        found = getattr(found, name, None)
    names = getattr(found, "merged_adapters", None)
    return (None, ()) if names is None else (found, tuple(names))


def fused_change(layer: Any, names: Iterable[str], path: str) -> Tensor | None:
    """The change of a layer's weight by fusing these LoRAs; None if unknown."""
    total: Tensor | None = None
    for name in names:
        known = name in getattr(layer, "lora_A", {}) and name not in getattr(layer, "lora_variant", {})
        if layer is None or not known or not path.endswith(".weight"):
            return None
        with torch.no_grad():
            change = layer.get_delta_weight(name)
        total = change if total is None else total + change
    return total


def keys_values(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The weights that read the text: `to_k` and `to_v` [C, D] of every cross-attention layer, by canonical name."""
    root, facts = denoiser_of(pipe), family(pipe)
    if not layer_names(pipe):
        raise ValueError(refusal("An edit of keys and values in closed form", ("cross_text",), pipe))
    return {f"{facts.denoiser}.{name}.weight": weight(root, f"{name}.weight") for name in facts.text_readers(root)}


def text_inputs(pipe: DiffusionPipeline, *, pooled: bool = False) -> dict[str, Tensor]:
    """The weights [C, D] of the linear layers that read the encoded text, or the pooled one, before all others."""
    root, facts = denoiser_of(pipe), family(pipe)
    names = facts.pooled_inputs if pooled else facts.text_inputs
    return {f"{facts.denoiser}.{name}.weight": weight(root, f"{name}.weight") for name in names}


def check_unfused(attn: Any, denoiser: str = "unet") -> None:
    """Raises Elsewhere if the layer computes its queries, keys and values with one fused projection."""
    if isinstance(attn, Attention):  # whose `fused_projections` stays set after unfusing
        fused = type(attn.processor).__name__.startswith("Fused")
    else:
        fused = getattr(attn, "fused_projections", False)
    if fused:
        raise Elsewhere(f"The attention projections are fused. Call `pipe.{denoiser}.unfuse_qkv_projections()` first.")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted names, shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def text_hash(pipe: DiffusionPipeline, unedited: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted (name, shape, dtype, bytes) of the denoiser's weights that read the text.

    These weights make keys and values from the text. `unedited`: the original values of weights that deltas change, by
    canonical name.
    """
    denoiser, facts = denoiser_of(pipe), family(pipe)
    present: dict[str, Any] = {name: reader.weight for name, reader in facts.text_readers(denoiser).items()}
    return digest({name: unedited.get(f"{facts.denoiser}.{name}.weight", w) for name, w in present.items()})


def adapters(pipe: DiffusionPipeline) -> dict[str, str]:
    """The active LoRAs (PEFT) by name, each as a SHA-256 of its weights and scales."""
    found: dict[str, dict[str, Tensor]] = {}
    for part_name, root in pipe.components.items():
        modules: Any = root.named_modules() if isinstance(root, nn.Module) else ()
        for path, module in modules:
            on = hasattr(module, "lora_A") and not module.disable_adapters
            for name in module.active_adapters if on else ():
                if name in module.lora_A:
                    at, own = f"{part_name}.{path}", found.setdefault(name, {})
                    own[f"{at}.scale"] = torch.tensor(float(module.scaling[name]))
                    own |= {f"{at}.A": module.lora_A[name].weight, f"{at}.B": module.lora_B[name].weight}
    return {name: digest(found[name]) for name in sorted(found)}


def layer_names(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The names of the denoiser's cross-attention layers, in registration order."""
    named = denoiser_of(pipe).named_modules()
    return tuple(name for name, module in named if isinstance(module, Attention) and module.is_cross_attention)
