"""Attention layers as methods see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .texts import Text


@dataclass(eq=False)
class _Layer:
    """The common base of both kinds of layers. All tensors hold only the edited rows.

    Args:
        attn: the layer, diffusers' `Attention`, with its own projections.
        query: [B, Q, C].
        output: [B, Q, C], the layer's output before `to_out`, before any method.
        name: the layer's name in the denoiser.
        memory: the method's memory, which is empty at the start of a pipeline call.
    """

    attn: Any
    query: Tensor
    output: Tensor | None = None
    name: str = ""
    memory: Mapping[str, Any] = field(default_factory=dict)

    def at(self, rows: Any, **others: Any) -> Self:
        """The same layer on some of the rows.

        Args:
            rows: a slice or a tensor.
            others: values of other fields.
        """
        return replace(self, **(self._on(rows) | others))

    def _on(self, rows: Any) -> dict[str, Any]:
        """The values of the fields that differ between rows."""
        return {"query": self.query[rows], "output": None if self.output is None else self.output[rows]}

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, C] to [B, heads, L, C / heads], without a copy."""
        return x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def _normed(self, x: Tensor, norm: Any) -> Tensor:
        """`_heads`, after a norm across all heads, or before a norm of each head."""
        if norm is None:
            return self._heads(x)
        across = getattr(norm, "weight", None) is not None and norm.weight.shape[-1] == x.shape[-1]
        return self._heads(norm(x)) if across else norm(self._heads(x))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query = self._normed(query, self.attn.norm_q)
        mask = None if mask is None else mask[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


@dataclass(eq=False)
class SelfAttention(_Layer):
    """A self-attention layer, on the conditional rows that a method edits.

    Args:
        attn: the layer, diffusers' `Attention`, with its own projections.
        query: the layer's query projection of the picture.
        output: the layer's output before `to_out`, before any method.
        name: the layer's name in the denoiser.
        memory: the method's memory, which is empty at the start of a pipeline call.
        key: the layer's key projection of the picture.
        value: the layer's value projection of the picture.

    Shapes: `query`, `key`, `value` and `output` [B, Q, C].

    Raises:
        RuntimeError: `attend` gets tensors whose shapes do not match the layer.

    Example:
        >>> import torch
        >>> from diffusers.models.attention_processor import Attention
        >>> from efface.hooks import SelfAttention
        >>> x = torch.randn(2, 16, 8)
        >>> layer = SelfAttention(Attention(query_dim=8, heads=2, dim_head=4), x, key=x, value=x)
        >>> layer.attend(layer.query, layer.key, layer.value.flip(0)).shape
        torch.Size([2, 16, 8])
    """

    key: Tensor | None = None
    value: Tensor | None = None

    def _on(self, rows: Any) -> dict[str, Any]:
        own = {"key": self.key, "value": self.value}
        return super()._on(rows) | {name: None if x is None else x[rows] for name, x in own.items()}

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention of projections, which may come from different pictures.

        Args:
            query, key, value: [B, Q, C].

        Returns:
            [B, Q, C], as `output`.
        """
        return self._attend(query, self._normed(key, self.attn.norm_k), self._heads(value), None)


@dataclass(eq=False)
class CrossAttention(_Layer):
    """A cross-attention layer on the rows that a method edits: conditional rows, or others if `unconditional`.

    Args:
        attn: the layer, diffusers' `Attention`, with its own projections.
        query: the layer's query projection of the picture.
        output: the layer's output before `to_out`, before any method; None for unconditional rows.
        name: the layer's name in the denoiser.
        memory: the method's memory, which is empty at the start of a pipeline call.
        prompt: the text of the conditional rows; None for unconditional rows.
        neutral: R neutral texts, the empty prompt first.
        empty: the text of unconditional rows in a call without a negative prompt, one per row or one for all. None
            without guidance; then the empty prompt replaces it.
        unconditional: whether guidance pushes away from these rows: the unconditional ones, and further predictions of
            methods that `repel`.

    Shapes: `query` and `output` [B, Q, C]; keys and values in heads [B, heads, L, d].

    Raises:
        ValueError: `with_empty` is called on a layer without neutral texts.

    Example:
        >>> import torch
        >>> from diffusers.models.attention_processor import Attention
        >>> from efface.hooks import CrossAttention, Text
        >>> attn = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
        >>> cross = CrossAttention(attn, torch.randn(1, 16, 8), neutral=Text(torch.randn(1, 5, 6)))
        >>> cross.with_empty(Text(torch.randn(3, 5, 6))).shape  # the empty text, and three others
        torch.Size([4, 1, 16, 8])
    """

    prompt: Text | None = None
    neutral: Text | None = None
    empty: Text | None = None
    unconditional: bool = False

    def _on(self, rows: Any) -> dict[str, Any]:
        texts = {"prompt": self.prompt, "empty": self.empty}
        return super()._on(rows) | {n: x if x is None or len(x) == 1 else x[rows] for n, x in texts.items()}

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a text, from the layer's `to_k` and `to_v`.

        Args:
            states: [B, L, D].

        Returns:
            Keys and values in heads, [B, heads, L, d] each.
        """
        if self.attn.norm_cross:
            states = self.attn.norm_encoder_hidden_states(states)
        return self._normed(self.attn.to_k(states), self.attn.norm_k), self._heads(self.attn.to_v(states))

    def attend(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax attention of the query to one text per row.

        Args:
            key, value: [B, heads, L, d], as `keys_values` returns them.
            mask: bool [B, L], the columns to read; None: all.

        Returns:
            [B, Q, C], as `output`.
        """
        return self._attend(self.query, key, value, mask)

    def attend_texts(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax attention of every row to each of N texts.

        Folds the batch into the queries: one fused call for all texts and rows, without copies of the keys.

        Args:
            key, value: [N, heads, L, d].
            mask: bool [N, L], the columns to read; None: all.

        Returns:
            [N, B, Q, C].
        """
        query = self.query.flatten(0, 1).expand(len(key), -1, -1)
        return self._attend(query, key, value, mask).unflatten(1, self.query.shape[:2])

    def would_be(self, text: Text) -> Tensor:
        """The layer's output for N other texts.

        Args:
            text: states [N, L, D].

        Returns:
            [N, B, Q, C].
        """
        return self.attend_texts(*self.keys_values(text.states), text.mask)

    def with_empty(self, text: Text) -> Tensor:
        """The layer's output for the R neutral texts, the empty one first, and for N other texts.

        The output never depends on the user's negative prompt.

        Args:
            text: states [N, L, D].

        Returns:
            [R + N, B, Q, C].

        Raises:
            ValueError: the layer has no neutral texts.
        """
        if self.neutral is None:
            raise ValueError(
                f"Layer {self.name!r} has no neutral texts. Give `CrossAttention` neutral texts, the empty one first."
            )
        empty, others = self.empty or self.neutral[:1], Text.cat([self.neutral[1:], text])
        if len(empty) == 1:
            return self.would_be(Text.cat([empty, others]))
        nothing = self.attend(*self.keys_values(empty.states), empty.mask)
        return torch.cat([nothing[None], self.would_be(others)])
