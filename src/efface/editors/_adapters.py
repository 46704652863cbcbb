"""What Receler trains: a denoiser with small adapters after its cross-attention, and attacks on its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from .._text import encode
from .._weights import layer_names
from ..delta.gates import adapter
from ._attention import attention, watched
from ._denoiser import Denoiser, Precision, Weights, mse
from ._directions import Steered

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PARTS = ("down", "down_bias", "up", "up_bias")


class Adapted(Steered):
    """A denoiser with one adapter per cross-attention layer, whose output is added to the layer's.

    Args:
        pipe, texts, precision: as for `Denoiser`. Row k of the condition is text k - 1.
        width: W, channels inside an adapter.
        sampler_steps: steps of a full trajectory.
        random: makes the first weights.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        texts: Sequence[str],
        width: int,
        sampler_steps: int,
        precision: Precision,
        random: Generator,
    ) -> None:
        super().__init__(pipe, texts, layer_names(pipe), 1, spatial=True, precision=precision)
        self.set_steps(sampler_steps)
        self.columns = [slice(0, 0), *encode(pipe, list(texts)).own]
        self.width, self.random = width, random
        self.outputs: dict[str, Tensor] = {}  # of the adapters, in the latest call

    def student(self) -> dict[str, Tensor]:
        """The adapters in float32, by "module:part". They add nothing yet, because `up` is zero."""
        found: dict[str, Tensor] = {}
        for name, (_, _, channels) in self.shapes.items():
            down = torch.randn(self.width, channels, generator=self.random) / channels**0.5
            first = {"down": down, "down_bias": torch.zeros(self.width), "up": torch.zeros(channels, self.width)}
            first["up_bias"] = torch.zeros(channels)
            found |= {f"{name}:{part}": each.to(self.device).requires_grad_() for part, each in first.items()}
        return found

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor, weights: Weights | None = None) -> Tensor:
        """The prediction [N, C, h, w], with the adapters `weights`, which alone receive gradients."""
        if weights is None:
            return Denoiser.__call__(self, x, t, prompt)
        self.outputs = {}

        def add(name: str, out: Tensor) -> Tensor:
            part = {each: weights[f"{self.prefix}{name}:{each}"] for each in PARTS}
            self.outputs[name] = adapter(out.float(), part)
            return out + self.outputs[name].to(out.dtype)

        with self._hooked(add):
            return Denoiser.__call__(self, x, t, prompt)

    @contextmanager
    def reading(self, text: Tensor, prompt: Tensor) -> Iterator[Tensor]:
        """Inside the block, rows of the condition for these text states [N, L, D]; pooled text is that of `prompt`."""
        before, first = self.condition, len(self.condition.text)
        pooled = {name: torch.cat([each, each[prompt.to(each.device)]]) for name, each in before.added.items()}
        self.condition = replace(before, text=torch.cat([before.text, text]), added=pooled)
        try:
            yield torch.arange(first, first + len(text), device=self.device)
        finally:
            self.condition = before

    @torch.no_grad()
    def concept_maps(self, x: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The base model's prediction, and per layer the attention [N, Q] to each text's own tokens, largest 1."""
        with watched(self.module) as seen:
            out = Denoiser.__call__(self, x, t, prompt)
        maps: dict[str, Tensor] = {}
        for name, (attn, (query, key)) in seen.items():
            rows = zip(query, key, prompt.tolist(), strict=True)
            found = torch.cat([attention(attn, q[None], k[None], self.columns[r]).sum(-1).mean(1) for q, k, r in rows])
            maps[name] = found / found.amax(1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
        return out, maps


def attacked(
    net: Adapted,
    x: Tensor,
    t: Tensor,
    prompt: Tensor,
    weights: Weights,
    aim: Tensor,
    *,
    slots: int,
    steps: int,
    lr: float,
) -> tuple[Tensor, list[float]]:
    """Text states [N, L, D] whose last columns were trained to make the adapted model predict `aim`.

    Args:
        net: the adapted denoiser.
        x, t, prompt: points, and the texts at which the attack starts.
        weights: the adapters, which do not learn here.
        aim: the prediction that the attack wants back.
        slots: the number of trained columns, at most half of the text.
        steps, lr: of Adam.

    Returns:
        The states, and the loss of each step.
    """
    fixed = {name: w.detach() for name, w in weights.items()}
    start = net.condition.text[prompt.to(net.condition.text.device)].detach()
    n = min(slots, start.shape[1] // 2)
    ends = start[:, -n:].clone().float().requires_grad_()
    adam, losses = torch.optim.Adam([ends], lr=lr), list[float]()

    def whole(slots_: Tensor) -> Any:
        return torch.cat([start[:, :-n], slots_.to(start.dtype)], 1)

    for _ in range(steps):
        with net.reading(whole(ends), prompt) as rows:
            loss = mse(net(x, t, rows, fixed), aim)
        (ends.grad,) = torch.autograd.grad(loss, [ends])
        adam.step()
        losses.append(float(loss.detach()))
    return whole(ends.detach()), losses
