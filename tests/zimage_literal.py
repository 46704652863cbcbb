"""EIUP on Z-Image by its definition: explicit softmax, one row and one text at a time, no code of the package.

The picture's positions begin behind the text's padded columns, so another text moves the picture. Here it is moved: for
each text, its queries and keys are rotated as that text would have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from joint_literal import Edit, over
from torch import Tensor

SEVERAL = 32


class Literal:
    """Stands in for the denoiser's `forward`.

    Args:
        net: the denoiser.
        texts: encoded texts [K, D] without padding: nothing, the neutral texts, and the phrases.
        neutral: the number of neutral texts.
        edits: an edit for each row of a call, or None for a row that stays; from the texts of the call.
    """

    def __init__(
        self,
        net: Any,
        texts: Sequence[Tensor],
        neutral: int,
        edits: Callable[[Sequence[Tensor]], list[Edit | None]],
    ) -> None:
        self.net, self.texts, self.neutral, self.edits = net, texts, neutral, edits

    @torch.no_grad()
    def __call__(self, x: Sequence[Tensor], t: Tensor, cap_feats: Sequence[Tensor], **_: Any) -> Any:
        rows = zip(x, t, cap_feats, self.edits(cap_feats), strict=True)
        return ([self.row(*row) for row in rows],)

    def rotation(self, ids: Tensor) -> Tensor:
        """[L, d / 2] of positions [L, 3], which may be negative."""
        angles = []
        for k, d in enumerate(self.net.axes_dims):
            frequency = 1 / self.net.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
            angles.append(ids[:, k, None].double() * frequency)
        return torch.polar(torch.ones(()).double(), torch.cat(angles, 1))

    def text(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """A text after the layers that it passes alone, padded by learned tokens; and its rotations."""
        net, more = self.net, -len(states) % SEVERAL
        columns = torch.cat([net.cap_embedder(states), net.cap_pad_token.expand(more, -1)])
        ids = torch.arange(1, len(columns) + 1)[:, None] * torch.tensor([1, 0, 0])
        where = self.rotation(ids)
        for layer in net.context_refiner:
            columns = layer(columns[None], None, where.to(torch.complex64)[None])[0]
        return columns, where

    def row(self, picture: Tensor, time: Tensor, caption: Tensor, edit: Edit | None) -> Tensor:
        net = self.net
        adaln = net.t_embedder(time[None] * net.t_scale).type_as(picture)
        patches, size, grid = net._patchify_image(picture, 2, 1)
        more = -len(patches) % SEVERAL
        image = torch.cat([net.all_x_embedder["2-1"](patches), net.x_pad_token.expand(more, -1)])
        counted = torch.cartesian_prod(*(torch.arange(k) for k in grid)).view(-1, 3)
        prompt = self.text(caption)
        begin = len(prompt[0]) + 1

        def at(length: int) -> Tensor:
            """The picture's rotations for a text of some length. Its padding, at 0 in the prompt's world, moves too."""
            moved = torch.tensor([length + 1 - begin, 0, 0])
            own = counted + torch.tensor([begin, 0, 0])
            return self.rotation(torch.cat([own, own.new_zeros(more, 3)]) + moved)

        for layer in net.noise_refiner:
            image = layer(image[None], None, at(begin - 1).to(torch.complex64)[None], adaln)[0]
        texts = [prompt, *(self.text(states) for states in self.texts)]
        columns = [states for states, _ in texts]
        for block in net.layers:
            image, columns = self.block(block, image, columns, [w for _, w in texts], at, adaln, edit)
        out = net.all_final_layer["2-1"](image[None], c=adaln)[0]
        return net.unpatchify([out], [size], 2, 1)[0]

    def block(
        self,
        block: Any,
        image: Tensor,
        columns: Sequence[Tensor],
        rotations: Sequence[Tensor],
        at: Callable[[int], Tensor],
        adaln: Tensor,
        edit: Edit | None,
    ) -> tuple[Tensor, list[Tensor]]:
        attn = block.attention
        scale, gate, scale2, gate2 = block.adaLN_modulation(adaln).chunk(4, 1)

        def enter(x: Tensor) -> list[Tensor]:
            normed = block.attention_norm1(x) * (1 + scale)
            q, k, v = (f(normed).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
            return [attn.norm_q(q), attn.norm_k(k), v]

        def turned(x: Tensor, where: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * where[:, None]
            return torch.view_as_real(pairs).flatten(2).to(x).transpose(0, 1)[None]

        def leave(x: Tensor, out: Tensor) -> Tensor:
            x = x + gate.tanh() * block.attention_norm2(attn.to_out[0](out))
            return x + gate2.tanh() * block.ffn_norm2(block.feed_forward(block.ffn_norm1(x) * (1 + scale2)))

        q, k, v = enter(image)
        of_image, of_texts = [], []
        for text, where in zip(columns, rotations, strict=True):
            moved, (tq, tk, tv) = at(len(text)), enter(text)
            keys = [(turned(k, moved), v.transpose(0, 1)[None], None)]
            keys.append((turned(tk, where), tv.transpose(0, 1)[None], None))
            of_image.append(over(turned(q, moved), *keys)[0])
            of_texts.append(over(turned(tq, where), *keys)[0])
        out, nothing, *rest = of_image
        if edit is not None:
            out = edit(out, nothing, rest[: self.neutral], rest[self.neutral :])
        return leave(image, out), [leave(text, o) for text, o in zip(columns, of_texts, strict=True)]
