"""EIUP in joint attention by its definition, on Chroma, FLUX.2 and Qwen-Image: masks, positions and templates.

As `joint_literal`: explicit softmax, one tensor per text, no code of the package. A text has columns, each with the
number of the encoder's columns that it stands for, its position, and whether its mask shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from joint_literal import Edit, on_text_alone
from torch import Tensor


class Beside(NamedTuple):
    """A text: columns [K, D], and for each how many it stands for, its position, and whether its mask shows it."""

    states: Tensor
    weight: Tensor
    position: Tensor
    seen: Tensor


class Stream(NamedTuple):
    """Queries, keys, values [B, heads, L, d], masks [B, L] and weights [L], and what the output needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    weight: Tensor
    rest: Any


class Literal:
    """Stands in for the denoiser's `forward`.

    Args:
        net: the denoiser.
        texts: nothing, the neutral texts, and the phrases.
        neutral: the number of neutral texts.
        edits: an edit for each row of a call, or None for a row that stays; from the text of the call.
    """

    mask = ""
    alone = False

    def __init__(
        self, net: Any, texts: Sequence[Beside], neutral: int, edits: Callable[[Tensor], list[Edit | None]]
    ) -> None:
        self.net, self.texts, self.neutral, self.edits = net, texts, neutral, edits

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **given: Any) -> Any:
        prompt, rows = encoder_hidden_states, len(encoder_hidden_states)
        edits, length = self.edits(prompt), prompt.shape[1]
        seen = (
            prompt.new_ones(rows, length) if given.get(self.mask) is None else given[self.mask][:, :length].to(prompt)
        )
        own = Beside(prompt, torch.ones(length), torch.arange(length), seen)
        each = [
            own,
            *(t._replace(states=t.states.expand(rows, -1, -1), seen=t.seen.expand(rows, -1)) for t in self.texts),
        ]
        picture, columns = self.start(hidden_states, given), [self.embed(text.states) for text in each]
        for block in self.blocks():
            image = self.stream(block, picture, None, text=False)
            first, *streams = (self.stream(block, x, text, text=True) for x, text in zip(columns, each, strict=True))
            out, *would = (self.over(image, text, image) for text in (first, *streams))
            own, *alone = (self.over(image, text) for text in (first, *streams))
            made = []
            for row, edit in enumerate(edits):
                if self.alone and edit is not None:
                    given = out[row], own[row], self.share(image, first)[row], [each[row] for each in alone]
                    made.append(on_text_alone(edit, *given, self.neutral))
                    continue
                nothing, *rest = (one[row] for one in would)
                made.append(
                    out[row] if edit is None else edit(out[row], nothing, rest[: self.neutral], rest[self.neutral :])
                )
            read = [self.over(one, one, image) for one in (first, *streams)]
            picture = self.leave(block, picture, torch.stack(made), image.rest, text=False)
            tokens = zip(columns, read, (first, *streams), strict=True)
            columns = [self.leave(block, x, o, one.rest, text=True) for x, o, one in tokens]
        return (self.net.proj_out(self.net.norm_out(picture, self.last)),)

    def weights(self, queries: Stream, *keys: Stream) -> Tensor:
        """One softmax over several sets of keys: [B, heads, L, K]."""
        scale = queries.q.shape[-1] ** -0.5
        logits = [
            queries.q @ each.k.mT * scale + each.weight.log().to(each.k) + self.added(queries.seen, each.seen)[:, None]
            for each in keys
        ]
        return torch.cat(logits, -1).softmax(-1)

    def over(self, queries: Stream, *keys: Stream) -> Tensor:
        """Attention to several sets of keys: [B, L, C]."""
        out = self.weights(queries, *keys) @ torch.cat([each.v for each in keys], 2)
        return out.transpose(1, 2).flatten(2)

    def share(self, image: Stream, text: Stream) -> Tensor:
        """Of a text in the softmax of the picture's queries: [B, L, heads]."""
        return self.weights(image, text, image)[..., : text.k.shape[2]].sum(-1).transpose(1, 2)

    def added(self, query: Tensor, key: Tensor) -> Tensor:
        """What masks [B, L] add to the logits [B, Lq, Lk]."""
        return torch.zeros(len(query), 1, 1)

    def stream(self, block: Any, x: Tensor, of: Beside | None, text: bool) -> Stream:
        (q, k, v), rest = self.enter(block, x, text)
        ones = torch.ones(x.shape[:2])
        where = self.picture_rotation if of is None else self.rotation(of.position)
        q, k = (self.rotate(each, where) for each in (q, k))
        return Stream(q, k, v, ones if of is None else of.seen, ones[0] if of is None else of.weight, rest)

    def heads(self, attn: Any, x: Tensor, text: bool) -> list[Tensor]:
        added = text and getattr(attn, "add_q_proj", None) is not None
        names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
        return self.normed(attn, [getattr(attn, name)(x) for name in names], added)

    def normed(self, attn: Any, projected: Sequence[Tensor], added: bool) -> list[Tensor]:
        q, k, v = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in projected)
        norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
        return [norms[0](q), norms[1](k), v]

    def rotate(self, x: Tensor, where: Any) -> Tensor:
        return apply_rotary_emb(x, where)

    def output(self, attn: Any, out: Tensor, text: bool) -> Tensor:
        return (attn.to_add_out if text else attn.to_out[0])(out)

    def blocks(self) -> Iterator[Any]:
        yield from self.net.transformer_blocks
        yield from self.net.single_transformer_blocks

    def embed(self, states: Tensor) -> Tensor:
        return self.net.context_embedder(states)


class Chroma(Literal):
    mask = "attention_mask"

    def start(self, hidden_states: Tensor, given: Any) -> Tensor:
        net = self.net
        self.temb = net.distilled_guidance_layer(net.time_text_embed(given["timestep"] * 1000))
        self.last, self.picture_rotation = self.temb[:, -2:], net.pos_embed(given["img_ids"])
        return net.x_embedder(hidden_states)

    def added(self, query: Tensor, key: Tensor) -> Tensor:
        return query[:, :, None] * key[:, None]

    def rotation(self, position: Tensor) -> Any:
        return self.net.pos_embed(torch.zeros(len(position), 3))

    def modulation(self, block: Any, text: bool) -> Tensor:
        doubles, singles = list(self.net.transformer_blocks), list(self.net.single_transformer_blocks)
        if block in singles:
            return self.temb[:, 3 * singles.index(block) :][:, :3]
        first = 3 * len(singles) + 6 * doubles.index(block) + (6 * len(doubles) if text else 0)
        return self.temb[:, first : first + 6]

    def enter(self, block: Any, x: Tensor, text: bool) -> Any:
        emb = self.modulation(block, text)
        norm = block.norm if hasattr(block, "norm") else block.norm1_context if text else block.norm1
        m = norm(x, emb=emb)
        return self.heads(block.attn, m[0], text), m

    def leave(self, block: Any, x: Tensor, out: Tensor, m: Any, text: bool) -> Tensor:
        if hasattr(block, "norm"):
            hidden = block.act_mlp(block.proj_mlp(m[0]))
            return x + m[1][:, None] * block.proj_out(torch.cat([out, hidden], 2))
        x = x + m[1][:, None] * self.output(block.attn, out, text)
        norm, forward = (block.norm2_context, block.ff_context) if text else (block.norm2, block.ff)
        return x + m[4][:, None] * forward(norm(x) * (1 + m[3][:, None]) + m[2][:, None])


class Flux2(Literal):
    def start(self, hidden_states: Tensor, given: Any) -> Tensor:
        net, guidance = self.net, given.get("guidance")
        guidance = None if guidance is None else guidance.to(hidden_states) * 1000
        self.last = net.time_guidance_embed(given["timestep"] * 1000, guidance)
        self.picture_rotation = net.pos_embed(given["img_ids"][0])
        return net.x_embedder(hidden_states)

    def rotation(self, position: Tensor) -> Any:
        return self.net.pos_embed(torch.cat([torch.zeros(len(position), 3), position[:, None]], 1))

    def enter(self, block: Any, x: Tensor, text: bool) -> Any:
        net = self.net
        if hasattr(block, "norm"):
            ((shift, scale, gate),) = Flux2Modulation.split(net.single_stream_modulation(self.last), 1)
            both = block.attn.to_qkv_mlp_proj(block.norm(x) * (1 + scale) + shift)
            width = block.attn.inner_dim
            return self.normed(block.attn, both[..., : 3 * width].chunk(3, -1), False), (gate, both[..., 3 * width :])
        made = net.double_stream_modulation_txt if text else net.double_stream_modulation_img
        (shift, scale, gate), after = Flux2Modulation.split(made(self.last), 2)
        norm = block.norm1_context if text else block.norm1
        return self.heads(block.attn, norm(x) * (1 + scale) + shift, text), (gate, after)

    def leave(self, block: Any, x: Tensor, out: Tensor, m: Any, text: bool) -> Tensor:
        if hasattr(block, "norm"):
            return x + m[0] * block.attn.to_out(torch.cat([out, block.attn.mlp_act_fn(m[1])], -1))
        x = x + m[0] * self.output(block.attn, out, text)
        shift, scale, gate = m[1]
        norm, forward = (block.norm2_context, block.ff_context) if text else (block.norm2, block.ff)
        return x + gate * forward(norm(x) * (1 + scale) + shift)


class QwenImage(Literal):
    mask = "encoder_hidden_states_mask"

    def start(self, hidden_states: Tensor, given: Any) -> Tensor:
        net, shapes, time = self.net, list(given["img_shapes"][0]), given["timestep"]
        self.after = max(max(h // 2, w // 2) for _, h, w in shapes)
        self.picture_rotation, _ = net.pos_embed([shapes], max_txt_seq_len=1)
        picture, self.index = net.img_in(hidden_states), None
        if net.zero_cond_t:  # reference pictures are modulated as at time 0
            time, (first, *others) = torch.cat([time, 0 * time]), (h * w for _, h, w in shapes)
            self.index = torch.tensor([[0] * first + [1] * sum(others)])
        self.times = net.time_text_embed(time, picture)
        self.last = self.times[: len(picture)]
        return picture

    def blocks(self) -> Iterator[Any]:
        yield from self.net.transformer_blocks

    def embed(self, states: Tensor) -> Tensor:
        return self.net.txt_in(self.net.txt_norm(states))

    def added(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(key[:, None] > 0, 0.0, -torch.inf)

    def rotation(self, position: Tensor) -> Any:
        return self.net.pos_embed.pos_freqs[self.after + position.long()]

    def rotate(self, x: Tensor, where: Any) -> Tensor:
        return apply_rotary_emb_qwen(x.transpose(1, 2), where, use_real=False).transpose(1, 2)

    def enter(self, block: Any, x: Tensor, text: bool) -> Any:
        first, second = (block.txt_mod(self.last) if text else block.img_mod(self.times)).chunk(2, -1)
        m, gate = block._modulate(
            (block.txt_norm1 if text else block.img_norm1)(x), first, None if text else self.index
        )
        return self.heads(block.attn, m, text), (gate, second)

    def leave(self, block: Any, x: Tensor, out: Tensor, m: Any, text: bool) -> Tensor:
        x = x + m[0] * self.output(block.attn, out, text)
        norm, forward = (block.txt_norm2, block.txt_mlp) if text else (block.img_norm2, block.img_mlp)
        after, gate = block._modulate(norm(x), m[1], None if text else self.index)
        return x + gate * forward(after)


KINDS = {
    "chroma": Chroma,
    "flux2": Flux2,
    "klein": Flux2,
    "qwenimage": QwenImage,
    "qwenimage_edit": QwenImage,
    "qwenimage_edit_plus": QwenImage,
}
