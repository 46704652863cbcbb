"""Efface's methods on cross-attention as patches of a ComfyUI model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from efface.hooks import CrossAttention, ErasurePrompts, Method, Text

from .texts import Encoder

CONDITIONAL, UNCONDITIONAL, LEAVE = 0, 1, 2
AS = "efface_rows"  # an entry of transformer_options: what rows of a further prediction count as

Block = tuple[str, int, int]


class Layer(NamedTuple):
    """A cross-attention layer of ComfyUI, as `CrossAttention` reads it."""

    heads: int
    to_k: Any
    to_v: Any
    norm_q: None = None
    norm_k: None = None
    norm_cross: None = None


def layers(model: Any) -> dict[Block, Any]:
    """The cross-attention layers of a UNet, by the names that ComfyUI gives their blocks."""
    unet = model.model.diffusion_model
    parts = {name: getattr(unet, name, None) for name in ("input_blocks", "middle_block", "output_blocks")}
    found: dict[Block, Any] = {}
    if all(part is not None for part in parts.values()):
        rows = {"input": parts["input_blocks"], "middle": [parts["middle_block"]], "output": parts["output_blocks"]}
        for name, blocks in rows.items():
            for number, block in enumerate(blocks):
                for module in block:
                    for index, transformer in enumerate(getattr(module, "transformer_blocks", ())):
                        found[name, number, index] = transformer.attn2
    if not found or any(layer is None for layer in found.values()):
        raise ValueError(
            f"Expected a UNet with cross-attention (SD 1.x, SD 2.x, SDXL), got a {type(unet).__name__}. Use the node "
            "for guidance."
        )
    return found


class Erasure:
    """One method on all cross-attention layers of a model.

    Args:
        model: the ModelPatcher that is patched.
        clip: encodes the concept.
        method: edits cross-attention, such as `efface.EIUP`.
    """

    def __init__(self, model: Any, clip: Any, method: Method) -> None:
        encoder = Encoder(clip)
        self.method, self.layers, self.sampling = method, layers(model), model.get_model_object("model_sampling")
        self.texts = encoder.states(encoder.erasure_prompts(method, " "))
        self.neutral = torch.cat([encoder.states(list(group)).mean(0, keepdim=True) for group in method.references])
        self.seen: set[Block] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Erasure:
        return self  # ComfyUI copies the options of a model

    def patch(self, model: Any) -> None:
        """Patches a model. Raises ValueError if another node has replaced its cross-attention."""
        taken = model.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn2")
        if taken:
            raise ValueError(
                "Expected a model whose cross-attention no other node replaces, got one with such a node (IP-Adapter, "
                "or this node). Leave the other node out, or give all concepts to one node."
            )
        for block in self.layers:
            model.set_model_attn2_replace(self.at(block), *block)
        watch(model, self.watched)

    def at(self, block: Block) -> Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
            self.seen.add(block)
            out = optimized_attention(query, key, value, options["n_heads"])
            if not self.method.weight(time(self.sampling, options["sigmas"])):
                return out
            layer = Layer(options["n_heads"], self.layers[block].to_k, self.layers[block].to_v)
            kinds = options["cond_or_uncond"]
            edited = []
            for kind, x, y in zip(kinds, query.chunk(len(kinds)), out.chunk(len(kinds)), strict=True):
                edited.append(self.edited(layer, x, y, options.get(AS, kind)))
            return torch.cat(edited)

        return attend

    def edited(self, layer: Layer, query: Tensor, out: Tensor, kind: int) -> Tensor:
        """The output [B, Q, C] of rows of one kind."""
        if kind == LEAVE or (kind == UNCONDITIONAL and not self.method.touches_uncond):
            return out
        neutral, text = Text(self.neutral.to(query)), Text(self.texts.to(query))
        positive = kind == CONDITIONAL
        cross = CrossAttention(layer, query, out if positive else None, neutral=neutral, unconditional=not positive)
        return self.method.edit(out, cross, ErasurePrompts(text, ()))

    def watched(self, run: Callable[[], Tensor], sigma: float) -> Tensor:
        """One call of the denoiser. Raises RuntimeError if a layer ran without the patch."""
        self.seen.clear()
        out = run()
        if missed := sorted(self.layers.keys() - self.seen):
            raise RuntimeError(
                f"{len(missed)} of {len(self.layers)} cross-attention layers ran without Efface, first {missed[0]}. "
                "Another node replaces them. Put Efface's node behind it, or leave it out."
            )
        return out


def time(sampling: Any, sigma: Tensor) -> Tensor:
    """0 is pure noise, 1 the picture, from a noise level."""
    found: Tensor = 1 - sampling.timestep(sigma.flatten()[0]) / sampling.timestep(sampling.sigma_max)
    return found


def watch(model: Any, act: Callable[[Callable[[], Tensor], float], Tensor]) -> None:
    """Runs `act` around each call of the denoiser, inside what another node has put there."""
    before = model.model_options.get("model_function_wrapper")

    def wrapped(apply_model: Any, given: dict[str, Any]) -> Tensor:
        def inner(x: Tensor, timestep: Tensor, **c: Any) -> Tensor:
            return act(lambda: apply_model(x, timestep, **c), float(timestep.flatten()[0]))

        if before is None:
            return inner(given["input"], given["timestep"], **given["c"])
        found: Tensor = before(inner, given)
        return found

    model.set_model_unet_function_wrapper(wrapped)
