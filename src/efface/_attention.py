"""What a method sees of one cross-attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """Erasure prompts that act together: `text` [N, L, D], the columns of the own tokens of each, and their batch rows.

    They act one after the other, in order; `rows` None means all rows, and `images` are the same numbers as integers,
    known without a look at the device. For erasers that ask for them: `joined`, each
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
    images: tuple[int, ...] | None = None

    def part(self, chosen: Sequence[int], images: Sequence[int]) -> Term:
        """Some of the erasure prompts, on some rows."""
        rows = torch.tensor(images, device=self.text.device)
        return Term(
            self.text[list(chosen)],
            tuple(self.own[k] for k in chosen),
            rows,
            None if self.joined is None else self.joined[list(chosen)][:, rows],
            None if self.lengths is None else self.lengths[rows],
            None if self.weights is None else tuple(self.weights[k][rows] for k in chosen),
            None if self.mask is None else self.mask[list(chosen)],
            None if self.pooled is None else self.pooled[list(chosen)],
            tuple(images),
        )


@dataclass(eq=False)
class Repelled:
    """Rows of a denoiser call that guidance pushes away from, and that erasers with `touches_uncond` edit.

    They are the unconditional rows with a negative prompt, and further predictions of `NegativePrompt`. `rows` are
    their places in the batch, `owners` the conditional rows that they are for; `at` and `of` are the same on the
    device.
    """

    rows: tuple[int, ...]
    owners: tuple[int, ...]
    at: Tensor
    of: Tensor
    places: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def rows_of(self, term: Term) -> Tensor | None:
        """Which of them a term acts on, counted from 0; None: all."""
        if term.images is None:
            return None
        if term.images in self.places:
            return self.places[term.images]
        found = [k for k, owner in enumerate(self.owners) if owner in term.images]
        places = torch.tensor(found, dtype=torch.long, device=self.at.device)
        if not torch.compiler.is_compiling():
            self.places[term.images] = places
        return places


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
    """What a method sees of one cross-attention call: conditional rows, or (`unconditional`) rows that guidance pushes
    away from.

    Args:
        attn: the layer, with its own projections.
        query: [B, Q, C].
        prompt: [B, L, D], what conditional rows read; None for unconditional ones.
        neutral: [R, L, D], texts that stand for "some picture", the empty prompt first.
        beside: for erasers with a twin.
        prompt_mask, neutral_mask, empty_mask: what the denoiser sees of a text, where it masks texts.
        empty: [B, L, D], or [1, L, D] if all rows share it: what unconditional rows read in a call without a negative
            prompt. None without guidance; the empty prompt takes its place.
        unconditional: whether guidance pushes away from these rows: the unconditional ones, and further predictions of
            `NegativePrompt`.
    """

    def __init__(
        self,
        attn: Attention,
        query: Tensor,
        prompt: Tensor | None = None,
        neutral: Tensor | None = None,
        beside: Beside | None = None,
        prompt_mask: Tensor | None = None,
        neutral_mask: Tensor | None = None,
        empty: Tensor | None = None,
        empty_mask: Tensor | None = None,
        unconditional: bool = False,
    ) -> None:
        self.prompt_mask, self.neutral_mask, self.empty_mask = prompt_mask, neutral_mask, empty_mask
        self.empty, self.unconditional = empty, unconditional
        self.attn, self.query, self.prompt, self.neutral, self.beside = attn, query, prompt, neutral, beside

    def at(self, rows: Tensor) -> CrossAttention:
        """The same call, on some rows."""
        of_rows = (self.prompt, self.prompt_mask, self.empty, self.empty_mask)
        prompt, mask, empty, empty_mask = (x if x is None or len(x) == 1 else x[rows] for x in of_rows)
        beside = None if self.beside is None else self.beside.at(rows)
        return CrossAttention(
            self.attn,
            self.query[rows],
            prompt,
            self.neutral,
            beside,
            mask,
            self.neutral_mask,
            empty,
            empty_mask,
            self.unconditional,
        )

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
        wide = torch.promote_types(self.query.dtype, torch.float32)
        cross = CrossAttention(self.attn, self.query.to(wide), None, self.neutral)
        width, most = value.shape[-1], max(own.stop - own.start for own in term.own)
        found = []
        for k in range(0, most, width):
            one_hot = torch.zeros_like(value, dtype=wide)
            for n, own in enumerate(term.own):
                for column in range(own.start + k, min(own.start + k + width, own.stop)):
                    one_hot[n, :, column, column - own.start - k] = 1.0
            out = cross.attend_texts(key.to(wide), one_hot, term.mask)
            found.append(out.unflatten(-1, (self.attn.heads, -1)).mean((2, 3)))
        masses = torch.cat(found, -1)
        return tuple(mass[:, : own.stop - own.start] for mass, own in zip(masses, term.own, strict=True))

    def would_be(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the layer would put out for other texts [N, L, D], masked by [N, L]: [N, B, Q, C]."""
        return self.attend_texts(*self.keys_values(text), mask)

    def with_empty(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the layer would put out for the empty text, the neutral and other texts: [R + N, B, Q, C].

        It never depends on the user's negative prompt.
        """
        texts = torch.cat([self.neutral, text])
        masks = None if mask is None else torch.cat([self.neutral_mask, mask])
        if self.empty is None:
            return self.would_be(texts, masks)
        if len(self.empty) == 1:
            masks = None if masks is None else torch.cat([self.empty_mask, masks[1:]])
            return self.would_be(torch.cat([self.empty, texts[1:]]), masks)
        nothing = self.attend(*self.keys_values(self.empty), self.empty_mask)
        return torch.cat([nothing[None], self.would_be(texts[1:], None if masks is None else masks[1:])])
