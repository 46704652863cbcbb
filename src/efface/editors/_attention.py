"""How much the picture attends to some tokens, as a fit reads it from the denoiser's cross-attention layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


@contextmanager
def watched(denoiser: nn.Module) -> Iterator[dict[str, tuple[Any, list[Tensor]]]]:
    """Inside the block, denoiser calls fill a mapping: layer to the module, and its queries and keys.

    Each call replaces the tensors of the one before. Gradients pass through them.
    """
    found: dict[str, tuple[Any, list[Tensor]]] = {}
    hooks = []

    def keep(name: str, attn: Any, first: bool) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            if first:
                found[name] = (attn, [out])
            else:
                found[name][1].append(out)

        return hook

    try:
        for name, module in denoiser.named_modules():
            if isinstance(module, Attention) and module.is_cross_attention and module.to_k is not None:
                hooks.append(module.to_q.register_forward_hook(keep(name, module, True)))
                hooks.append(module.to_k.register_forward_hook(keep(name, module, False)))
        yield found
    finally:
        for each in hooks:
            each.remove()


def attention(attn: Any, query: Tensor, key: Tensor, columns: slice) -> Tensor:
    """The softmax [B, heads, Q, n] at some columns of the text, in float32 or wider.

    Args:
        attn: the layer, diffusers' `Attention`.
        query, key: [B, Q, C] and [B, L, C], as `to_q` and `to_k` return them.
        columns: n columns of the L.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = (x.to(wide).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key))
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1)[..., columns]
