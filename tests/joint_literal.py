"""EIUP in joint attention by its definition: explicit softmax, one tensor per text, one picture row at a time.

Slow and plain on purpose. It takes the denoiser's own projections, norms and feed-forward parts, and no code of the
package. Every further text has tokens of its own in every block: they attend to themselves and to the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from test_eiup import cleared, projected
from torch import Tensor

Edit = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""The edited output [Q, C], from the output, those for nothing, for the neutral texts and for the phrases."""


class Beside(NamedTuple):
    """A text: its columns [K, D], and how many of the encoder's columns each one stands for."""

    states: Tensor
    weight: Tensor


class Tokens(NamedTuple):
    """A stream in one block: queries, keys, values [B, heads, L, d], and what its output needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    rest: Any


def over(q: Tensor, *sets: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    """One softmax over several sets of keys, values and weights: [B, L, C]."""
    logits = torch.cat([q @ k.mT / q.shape[-1] ** 0.5 + (0.0 if w is None else w.to(q).log()) for k, _, w in sets], -1)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    out = (weights / weights.sum(-1, keepdim=True)) @ torch.cat([v for _, v, _ in sets], 2)
    return out.transpose(1, 2).flatten(2)


def share(q: Tensor, first: Tensor, others: Tensor) -> Tensor:
    """Of the first keys in one softmax: [B, L, heads]."""
    weights = (q @ torch.cat([first, others], 2).mT / q.shape[-1] ** 0.5).softmax(-1)
    return weights[..., : first.shape[2]].sum(-1).transpose(1, 2)


def on_text_alone(edit: Edit, out: Tensor, own: Tensor, share: Tensor, texts: Sequence[Tensor], neutral: int) -> Tensor:
    """The text-only form: what is read of the texts alone is edited, and the difference counts as the prompt does."""
    nothing, *rest = texts
    difference = edit(own, nothing, rest[:neutral], rest[neutral:]) - own
    return out + (difference.unflatten(-1, (share.shape[-1], -1)) * share[..., None]).flatten(-2)


class Literal:
    """Stands in for the denoiser's `forward`. With `alone`, edits the text-only outputs.

    Args:
        net: the denoiser.
        texts: nothing, the neutral texts, and the phrases.
        neutral: the number of neutral texts.
        edits: an edit for each row of a call, or None for a row that stays; from the text of the call.
    """

    alone = False

    def __init__(
        self, net: Any, texts: Sequence[Beside], neutral: int, edits: Callable[[Tensor], list[Edit | None]]
    ) -> None:
        self.net, self.texts, self.neutral, self.edits = net, texts, neutral, edits
        self.kind = type(net).__name__

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **given: Any) -> Any:
        net, rows = self.net, len(encoder_hidden_states)
        edits = self.edits(encoder_hidden_states)
        states = [encoder_hidden_states, *(text.states.expand(rows, -1, -1) for text in self.texts)]
        rope = None
        if self.kind.startswith("Flux"):
            time = (timestep * 1000, *(() if given.get("guidance") is None else (given["guidance"] * 1000,)))
            temb = net.time_text_embed(*time, given["pooled_projections"])
            picture, embed = net.x_embedder(hidden_states), net.context_embedder
            rope = net.pos_embed(given["img_ids"])
        elif self.kind.startswith("SD3"):
            temb = net.time_text_embed(timestep, given["pooled_projections"])
            picture, embed = net.pos_embed(hidden_states), net.context_embedder
        else:
            picture = net.patch_embed(hidden_states, encoder_hidden_states)[0]
            sizes = given["original_size"], given["target_size"], given["crop_coords"]
            temb = torch.nn.functional.silu(net.time_condition_embed(timestep, *sizes, picture.dtype))
            embed, rope = net.patch_embed.text_proj, net.rope(hidden_states)
        texts = [embed(each) for each in states]
        for block in [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ())]:
            picture, texts = self.block(block, picture, texts, temb, rope, edits)
        out = net.proj_out(net.norm_out(picture, temb))
        if self.kind.startswith("Flux"):
            return (out,)
        p, (h, w) = net.config.patch_size, hidden_states.shape[-2:]
        parts = {"h": h // p, "w": w // p}
        if self.kind.startswith("SD3"):
            out = out.unflatten(-1, (p, p, -1)).unflatten(1, (parts["h"], parts["w"]))
            return (out.permute(0, 5, 1, 3, 2, 4).reshape(rows, -1, h, w),)
        out = out.unflatten(-1, (-1, p, p)).unflatten(1, (parts["h"], parts["w"]))
        return (out.permute(0, 3, 1, 4, 2, 5).reshape(rows, -1, h, w),)

    def block(self, block: Any, picture: Tensor, texts: list[Tensor], temb: Tensor, rope: Any, edits: Any) -> Any:
        image = self.enter(block, picture, temb, text=False)
        if rope is not None:
            turned = [
                apply_rotary_emb(x, rope, **({} if "Flux" in self.kind else {"use_real_unbind_dim": -2}))
                for x in image[:2]
            ]
            image = image._replace(q=turned[0], k=turned[1])
        prompt, *others = (self.enter(block, text, temb, text=True) for text in texts)
        at_picture = (image.k, image.v, None)
        out = over(image.q, (prompt.k, prompt.v, None), at_picture)
        would = [
            over(image.q, (each.k, each.v, text.weight), at_picture)
            for each, text in zip(others, self.texts, strict=True)
        ]
        own, part = over(image.q, (prompt.k, prompt.v, None)), share(image.q, prompt.k, image.k)
        alone = [over(image.q, (each.k, each.v, text.weight)) for each, text in zip(others, self.texts, strict=True)]
        made = []
        for row, edit in enumerate(edits):
            if self.alone and edit is not None:
                given = out[row], own[row], part[row], [each[row] for each in alone]
                made.append(on_text_alone(edit, *given, self.neutral))
                continue
            nothing, *rest = (each[row] for each in would)
            made.append(
                out[row] if edit is None else edit(out[row], nothing, rest[: self.neutral], rest[self.neutral :])
            )
        read = [over(prompt.q, (prompt.k, prompt.v, None), at_picture)]
        for each, text in zip(others, self.texts, strict=True):
            read.append(over(each.q, (each.k, each.v, text.weight), at_picture))
        picture = self.leave(block, picture, torch.stack(made), image.rest, text=False)
        if getattr(block, "context_pre_only", False):
            return picture, texts
        tokens = zip(texts, read, (prompt, *others), strict=True)
        return picture, [self.leave(block, x, o, each.rest, text=True) for x, o, each in tokens]

    def enter(self, block: Any, x: Tensor, temb: Tensor, text: bool) -> Tokens:
        single = not hasattr(block, "norm1")
        attn = block.attn if hasattr(block, "attn") else block.attn1
        added = text and getattr(attn, "add_q_proj", None) is not None
        if single:
            m = block.norm(x, emb=temb)
        elif self.kind.startswith("CogView4"):
            m = block.norm1(x, x, temb)
            m = m[5:] if text else m[:5]
        elif text and getattr(block, "context_pre_only", False):
            m = (block.norm1_context(x, temb),)
        else:
            m = (block.norm1_context if text else block.norm1)(x, emb=temb)
        names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
        q, k, v = (getattr(attn, name)(m[0]).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for name in names)
        norms = [
            getattr(attn, name, None) for name in (("norm_added_q", "norm_added_k") if added else ("norm_q", "norm_k"))
        ]
        q, k = (each if norm is None else norm(each) for each, norm in zip((q, k), norms, strict=True))
        return Tokens(q, k, v, m)

    def leave(self, block: Any, x: Tensor, out: Tensor, m: Any, text: bool) -> Tensor:
        if not hasattr(block, "norm1"):  # FLUX's single blocks
            hidden = block.act_mlp(block.proj_mlp(m[0]))
            return x + m[1].unsqueeze(1) * block.proj_out(torch.cat([out, hidden], 2))
        attn = block.attn if hasattr(block, "attn") else block.attn1
        added = text and getattr(attn, "to_add_out", None) is not None
        x = x + m[1].unsqueeze(1) * (attn.to_add_out if added else attn.to_out[0])(out)
        if not text and getattr(block, "use_dual_attention", False):
            other = block.attn2
            q, k, v = (
                getattr(other, name)(m[5]).unflatten(-1, (other.heads, -1)).transpose(1, 2)
                for name in ("to_q", "to_k", "to_v")
            )
            x = x + m[6].unsqueeze(1) * other.to_out[0](over(other.norm_q(q), (other.norm_k(k), v, None)))
        norm = block.norm2_context if text else block.norm2
        forward = block.ff_context if text and hasattr(block, "ff_context") else block.ff
        return x + m[4].unsqueeze(1) * forward(norm(x) * (1 + m[3][:, None]) + m[2][:, None])


def conditional(strength: float, moved: list[Tensor]) -> Edit:
    """The projected form on conditional rows, one phrase after the other. Puts into `moved` by how much of each query's
    output a phrase changes it: [Q]."""

    def edit(out: Tensor, nothing: Tensor, neutral: Sequence[Tensor], erased: Sequence[Tensor]) -> Tensor:
        for phrase in erased:
            before, out = out, projected(strength, out, nothing, phrase, neutral)
            moved.append((out - before).norm(dim=-1) / before.norm(dim=-1))
        return out

    return edit


def unconditional(strength: float) -> Edit:
    """The projected form on rows with a negative prompt."""

    def edit(out: Tensor, nothing: Tensor, neutral: Sequence[Tensor], erased: Sequence[Tensor]) -> Tensor:
        return cleared(min(strength, 1.0), out, nothing, erased, neutral)

    return edit
