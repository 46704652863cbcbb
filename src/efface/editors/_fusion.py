"""What MACE needs: the tokens beside a concept's, a denoiser with rank-1 changes, and the fusion of such changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from .._text import encode
from ..delta import Factors
from ._attention import attention, watched
from ._closed_form import Texts
from ._denoiser import Denoiser, Points, Weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Attending(Denoiser):
    """A denoiser with rank-1 changes of keys and values, which measures the attention to its texts' own tokens.

    Args:
        pipe, texts, sampler_steps, precision: as for `Denoiser`.
    """

    def __init__(self, pipe: DiffusionPipeline, texts: Sequence[str], sampler_steps: int, precision: str) -> None:
        super().__init__(pipe, texts, "x-strict", sampler_steps, precision, biases=False)
        self.start: Weights = self.base
        self.random = Generator()
        self.texts = {text: k + 1 for k, text in enumerate(texts)}
        self.columns = [slice(0, 0), *encode(pipe, list(texts)).own]

    def student(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, w in self.base.items():
            a = torch.randn(1, w.shape[1], generator=self.random) / w.shape[1] ** 0.5
            found[f"{name}:A"] = a.to(w.device, self.dtype).requires_grad_()
            found[f"{name}:B"] = torch.zeros(len(w), 1, device=w.device, dtype=self.dtype).requires_grad_()
        return found

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor, weights: Weights | None = None) -> Tensor:
        """The prediction [N, C, h, w] under `start` and the changes `weights`."""
        own = self.start
        if weights is not None:
            own = {n: w.to(self.dtype) + weights[f"{n}:B"] @ weights[f"{n}:A"] for n, w in own.items()}
        return super().__call__(x, t, prompt, own)

    def attended(self, points: Points, weights: Weights | None) -> Tensor:
        """The mean over layers and pictures of the squared attention to the own tokens of each picture's text."""
        with watched(self.module) as seen:
            self(points.x, points.t, points.prompt, weights)
        found = []
        for attn, (query, key) in seen.values():
            for q, k, row in zip(query, key, points.prompt.tolist(), strict=True):
                found.append(attention(attn, q[None], k[None], self.columns[row]).sum(-1).square().mean())
        return torch.stack(found).mean()


def divided(pipe: Any, texts: Texts, template: str, phrase: str, anchor: str) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens [n, D] of the phrase in a text that names it, the others [N, D], and those with the anchor instead.

    The others are the columns where both texts have the same word or padding. If phrase and anchor differ in length,
    words after them have moved to other columns and are left out.
    """
    named, plain = (template.format(each) for each in (phrase, anchor))
    before = template.partition("{}")[0].strip()
    with_, without, one, two, ahead = encode(pipe, [named, plain, phrase, anchor, before]).own
    start = with_.start + (ahead.stop - ahead.start if before else 0)
    end, same = start + one.stop - one.start, one.stop - one.start == two.stop - two.start and bool(anchor)
    rest = end if same else max(with_.stop, without.stop) + 1  # behind both end tokens
    rows = [texts.rows(each) for each in (named, plain)]
    kept = [torch.cat([each[:start], each[rest:]]) for each in rows]
    return rows[0][start:end], kept[0], kept[1]


def fused(learned: Sequence[tuple[Mapping[str, Factors], Tensor]], gram: Tensor, lam: float) -> dict[str, Factors]:
    """sum_i D_i G_i (sum_i G_i + `gram` + lam I)^-1 for changes D_i and G_i = E_i^T E_i [D, D]; see the class."""
    whole = torch.stack([each for _, each in learned]).sum(0) + gram
    whole.diagonal().add_(lam)
    root = torch.linalg.cholesky(whole)
    shares = [torch.cholesky_solve(each, root).T for _, each in learned]  # G_i K^-1, symmetric factors
    return {
        name: Factors(
            torch.cat([d[name].B.detach().cpu().float() for d, _ in learned], 1),
            torch.cat(
                [(d[name].A.detach().cpu().double() @ s).float() for (d, _), s in zip(learned, shares, strict=True)]
            ),
        )
        for name in learned[0][0]
    }
