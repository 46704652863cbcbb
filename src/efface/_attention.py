"""What a method sees of one cross-attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """Erasure prompts that act together: `text` [N, L, D], the columns of the own tokens of each, and their batch rows.

    They act one after the other, in order; `rows` None means all rows. For erasers that ask for them: `joined`, each
    prompt of those rows with the erasure prompt behind it, [N, B, L, D], and `lengths` [B], the number of tokens of
    those prompts alone; `weights` of the own tokens, measured at the start of the picture, N times [B, tokens]. For
    guided predictions: `pooled` [N, P]. Where text is masked: `mask` [N, L].
    """

    text: Tensor
    own: tuple[slice, ...]
    rows: Tensor | None = None
    joined: Tensor | None = None
    lengths: Tensor | None = None
    weights: tuple[Tensor, ...] | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None

    def part(self, chosen: Sequence[int], rows: Tensor) -> Term:
        """Some of the erasure prompts, on some rows."""
        return Term(
            self.text[list(chosen)],
            tuple(self.own[k] for k in chosen),
            rows,
            None if self.joined is None else self.joined[list(chosen)][:, rows],
            None if self.lengths is None else self.lengths[rows],
            None if self.weights is None else tuple(self.weights[k][rows] for k in chosen),
            None if self.mask is None else self.mask[list(chosen)],
            None if self.pooled is None else self.pooled[list(chosen)],
        )


@dataclass(frozen=True)
class Beside:
    """A layer in the plain picture that is drawn beside the erased one, from the same noise; conditional rows only.

    `query` [B, Q, C]; `shift` [B, Q, C], what the layer puts out there less what it puts out here before any eraser;
    `step`, the number of this denoiser call from 0 on, and `steps`, the number of steps asked for.
    """

    query: Tensor
    shift: Tensor
    step: int
    steps: int

    def at(self, rows: Tensor) -> Beside:
        return replace(self, query=self.query[rows], shift=self.shift[rows])


class CrossAttention:
    """One cross-attention call, conditional rows only: `query` [B, Q, C] and `prompt` [B, L, D], the layer's own
    projections, and texts that stand for "some picture", `neutral` [R, L, D], the empty prompt first; `beside` for
    erasers with a twin; `negative` [B, L, D], or [1, L, D] if all rows share it, what the unconditional rows read; None
    without guidance. Where the denoiser masks text, `prompt_mask`, `neutral_mask`, `negative_mask` say what it sees."""

    def __init__(
        self,
        attn: Attention,
        query: Tensor,
        prompt: Tensor | None,
        neutral: Tensor | None = None,
        beside: Beside | None = None,
        prompt_mask: Tensor | None = None,
        neutral_mask: Tensor | None = None,
        negative: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> None:
        self.prompt_mask, self.neutral_mask, self.negative_mask = prompt_mask, neutral_mask, negative_mask
        self.negative = negative
        self.attn, self.query, self.prompt, self.neutral, self.beside = attn, query, prompt, neutral, beside

    def at(self, rows: Tensor) -> CrossAttention:
        """The same call, on some rows."""
        of_rows = (self.prompt, self.prompt_mask, self.negative, self.negative_mask)
        prompt, mask, negative, negative_mask = (x if x is None or len(x) == 1 else x[rows] for x in of_rows)
        beside = None if self.beside is None else self.beside.at(rows)
        masks = {"prompt_mask": mask, "neutral_mask": self.neutral_mask, "negative_mask": negative_mask}
        return CrossAttention(self.attn, self.query[rows], prompt, self.neutral, beside, negative=negative, **masks)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, C] to [B, heads, L, C / heads], without a copy."""
        return x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """`to_k` and `to_v` of a text [B, L, D], in heads [B, heads, L, d]."""
        if self.attn.norm_cross:
            text = self.attn.norm_encoder_hidden_states(text)
        key, value = self._heads(self.attn.to_k(text)), self._heads(self.attn.to_v(text))
        return (key if self.attn.norm_k is None else self.attn.norm_k(key)), value

    def attend(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax attention of the query to `key`, `value` [B, heads, L, d] where `mask` [B, L] allows: [B, Q, C]."""
        return self._attend(self.query, key, value, mask)

    def attend_texts(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax attention of every row to each of N key sets [N, heads, L, d], masked by [N, L]: [N, B, Q, C].

        The batch is folded into the queries: one fused call for all texts and rows, no copy of the keys.
        """
        query = self.query.flatten(0, 1).expand(len(key), -1, -1)
        return self._attend(query, key, value, mask).unflatten(1, self.query.shape[:2])

    @staticmethod
    def copied(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Self-attention from projections [B, Q, C] of different pictures: [B, Q, C]."""
        layer = CrossAttention(attn, query, None, query)
        key = layer._heads(key)
        return layer.attend(key if attn.norm_k is None else attn.norm_k(key), layer._heads(value))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query = self._heads(query)
        query = query if self.attn.norm_q is None else self.attn.norm_q(query)
        mask = None if mask is None else mask[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)

    def mass(self, term: Term) -> tuple[Tensor, ...]:
        """The softmax over each text at its own tokens, mean over heads and queries: N times [B, tokens].

        One-hot values make attention return its own map, a few columns at a time; no map is written out.
        """
        key, value = self.keys_values(term.text)
        cross = CrossAttention(self.attn, self.query.float(), None, self.neutral)
        width, most = value.shape[-1], max(own.stop - own.start for own in term.own)
        found = []
        for k in range(0, most, width):
            one_hot = torch.zeros_like(value, dtype=torch.float32)
            for n, own in enumerate(term.own):
                for column in range(own.start + k, min(own.start + k + width, own.stop)):
                    one_hot[n, :, column, column - own.start - k] = 1.0
            out = cross.attend_texts(key.float(), one_hot, term.mask)
            found.append(out.unflatten(-1, (self.attn.heads, -1)).mean((2, 3)))
        masses = torch.cat(found, -1)
        return tuple(mass[:, : own.stop - own.start] for mass, own in zip(masses, term.own, strict=True))

    def would_be(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the layer would put out for other texts [N, L, D], masked by [N, L]: [N, B, Q, C]."""
        return self.attend_texts(*self.keys_values(text), mask)

    def beside_nothing(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the layer would put out for the unconditional text, the neutral and other texts: [R + N, B, Q, C].

        Without guidance the unconditional text is the empty prompt, the first of the neutral ones.
        """
        texts = torch.cat([self.neutral, text])
        masks = None if mask is None else torch.cat([self.neutral_mask, mask])
        if self.negative is None:
            return self.would_be(texts, masks)
        if len(self.negative) == 1:
            masks = None if masks is None else torch.cat([self.negative_mask, masks[1:]])
            return self.would_be(torch.cat([self.negative, texts[1:]]), masks)
        nothing = self.attend(*self.keys_values(self.negative), self.negative_mask)
        return torch.cat([nothing[None], self.would_be(texts[1:], None if masks is None else masks[1:])])
