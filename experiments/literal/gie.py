"""Literal attention processors for GIE, the published second version of EIUP: cost baselines, and a check of the maths.

Written from a description of the method, not from its code. Every map of a literal layer is written out, by diffusers'
own explicit softmax. Shapes: rows R, heads h, queries Q, text [R, L, D]; in all texts the start token stands at column
0, the own tokens behind it, then the end token and the padding. All rows have the same prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

SELF_QUERIES = 256


def explicit_maps(attn: Attention, query: Tensor, text: Tensor) -> Tensor:
    """Softmax of a query [R * h, Q, d] over all columns of a text [R, L, D]: [R * h, Q, L]."""
    return attn.get_attention_scores(query, attn.head_to_batch_dim(attn.to_k(text)))


def project_out(attn: Attention, out: Tensor) -> Tensor:
    """`to_out` of what attention gives, [R * h, Q, d]."""
    return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(out)))


@dataclass(frozen=True)
class OneTrajectory:
    """E1 in one cross-attention layer as the paper writes it, with rows [uncond, cond].

    `O = [A_P ... w A_E,k ... A_P,end ...] [V_P ... V_E,k ... V_P,end ...]`: two explicit softmaxes for the conditional
    rows, over all columns of the prompt P and of the concept's text E. The columns of E's own tokens, times w, and
    their values are inserted before the prompt's end token. One product of maps and values follows. All of the
    prompt's columns stay, so it equals EIUP's `separate`. Each call computes keys and values of E. Self-attention
    stays unchanged.

    Args:
        concept: the encoded text of the concept, [1, L, D].
        n, m: tokens of the prompt and of the concept, start and end not counted.
        weight: w.
    """

    concept: Tensor
    n: int
    m: int
    weight: float = -1.0

    def erasure(self, attn: Attention, query: Tensor) -> Tensor:
        """`w A_E,k` of the concept's own tokens: [R * h, Q, m]."""
        concept = self.concept.expand(len(query) // attn.heads, -1, -1)
        return self.weight * explicit_maps(attn, query, concept)[..., 1 : self.m + 1]

    def insert(self, text: Tensor, dropped: int = 0) -> Tensor:
        """The text with the concept's own tokens in front of the end token, and without `dropped` columns behind it."""
        end, concept = self.n + 1, self.concept[:, 1 : self.m + 1].expand(len(text), -1, -1)
        return torch.cat([text[:, :end], concept, text[:, end : end + 1], text[:, end + 1 + dropped :]], 1)

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        query, end = attn.head_to_batch_dim(attn.to_q(hidden_states)), self.n + 1
        uncond, cond = encoder_hidden_states.chunk(2)
        uncond_maps, maps = explicit_maps(attn, query, encoder_hidden_states).chunk(2)
        maps = torch.cat([maps[..., :end], self.erasure(attn, query.chunk(2)[1]), maps[..., end:]], -1)
        out = maps @ attn.head_to_batch_dim(attn.to_v(self.insert(cond)))
        uncond_out = uncond_maps @ attn.head_to_batch_dim(attn.to_v(uncond))
        return project_out(attn, torch.cat([uncond_out, out]))


@dataclass(frozen=True)
class TwoTrajectories(OneTrajectory):
    """One cross-attention layer as the published code computes it, with rows [uncond, uncond, base, edit].

    The base rows draw the plain prompt. In the edit rows, the prompt's maps are those of the base rows; the concept's
    maps come from the edit rows' own queries; the first m padding columns are dropped, so L columns stay. The text of
    the edit rows is `insert(prompt, dropped=m)`. Their own maps are computed and overwritten, as prompt-to-prompt does.

    With `CopiedSelfAttention` and twice the rows this is the whole of a denoiser call inside both windows of the code.
    Left out, in its favour: running sums of all maps, an unused erasure softmax in self-attention, explicit maps in
    self-attention with many queries, the adapter. Left out as well: taking the end token from the text of prompt and
    concept joined, which changes values and no cost.
    """

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        query, end = attn.head_to_batch_dim(attn.to_q(hidden_states)), self.n + 1
        maps = explicit_maps(attn, query, encoder_hidden_states)
        base, edit = maps.chunk(4)[2:]
        edit[..., :end] = base[..., :end]
        edit[..., end : end + self.m] = self.erasure(attn, query.chunk(4)[3])
        edit[..., end + self.m] = base[..., end]
        edit[..., end + self.m + 1 :] = base[..., end + 1 + self.m :]
        return project_out(attn, maps @ attn.head_to_batch_dim(attn.to_v(encoder_hidden_states)))


@dataclass(frozen=True)
class CopiedSelfAttention:
    """Self-attention of `TwoTrajectories`: up to 256 queries the edit rows take the base rows' maps, else `stock`."""

    stock: Any

    def __call__(self, attn: Attention, hidden_states: Tensor, **_: Any) -> Tensor:
        if hidden_states.shape[1] > SELF_QUERIES:
            return self.stock(attn, hidden_states)
        maps = explicit_maps(attn, attn.head_to_batch_dim(attn.to_q(hidden_states)), hidden_states)
        base, edit = maps.chunk(4)[2:]
        edit.copy_(base)
        return project_out(attn, maps @ attn.head_to_batch_dim(attn.to_v(hidden_states)))
