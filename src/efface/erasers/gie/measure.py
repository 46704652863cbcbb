"""Measures the attention to erasure prompts without an edit, and computes their tokens' weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...hooks import CrossAttention, DenoiserCall, SelfAttention

Weigh = Callable[[Tensor, tuple[str, ...]], Tensor]


def measured(call: DenoiserCall, weigh: Weigh) -> tuple[Tensor, ...]:
    """The weights of each erasure prompt's tokens, N times [B, tokens], from one denoiser call without any method.

    Args:
        call: the first denoiser call of a picture.
        weigh: computes weights from features [B, tokens, layers] and the layers in execution order.
    """
    masses: dict[str, tuple[Tensor, ...]] = {}

    def see(name: str, layer: CrossAttention | SelfAttention) -> None:
        prompts = call.erasure_prompts()
        if isinstance(layer, CrossAttention) and prompts is not None:
            masses[name] = layer.mass(prompts)

    call.plain(None, see)
    by_layer = zip(*masses.values(), strict=True)
    return tuple(weigh(torch.stack(of_one, -1), tuple(masses)) for of_one in by_layer)
