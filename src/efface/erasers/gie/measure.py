"""Measures the attention to erasure prompts without an edit, and computes their tokens' weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...hooks import CrossAttention, DenoiserCall, ErasurePrompts, SelfAttention

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
            masses[name] = mass(layer, prompts)

    call.plain(None, see)
    by_layer = zip(*masses.values(), strict=True)
    return tuple(weigh(torch.stack(of_one, -1), tuple(masses)) for of_one in by_layer)


def mass(layer: CrossAttention, prompts: ErasurePrompts) -> tuple[Tensor, ...]:
    """The softmax over each erasure prompt at its own tokens, averaged over heads and queries: N tensors [B, tokens].

    One-hot values make attention return its map, a few columns at a time, so the full map is never stored.
    """
    key, value = layer.keys_values(prompts.text.states)
    wide = torch.promote_types(layer.query.dtype, torch.float32)
    cross = CrossAttention(layer.attn, layer.query.to(wide))
    width, most = value.shape[-1], max(columns.stop - columns.start for columns in prompts.token_columns)
    found = []
    for k in range(0, most, width):
        one_hot = torch.zeros_like(value, dtype=wide)
        for n, columns in enumerate(prompts.token_columns):
            for column in range(columns.start + k, min(columns.start + k + width, columns.stop)):
                one_hot[n, :, column, column - columns.start - k] = 1.0
        out = cross.attend_texts(key.to(wide), one_hot, prompts.text.mask)
        found.append(out.unflatten(-1, (layer.attn.heads, -1)).mean((2, 3)))
    pairs = zip(torch.cat(found, -1), prompts.token_columns, strict=True)
    return tuple(mass[:, : columns.stop - columns.start] for mass, columns in pairs)
