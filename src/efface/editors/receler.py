"""Receler: trains small adapters after cross-attention against texts that try to bring the concept back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor

from .. import checks
from .._weights import learning
from ..core import Concept, Concepts, config
from ..delta import Steering
from ._adapters import Adapted, attacked
from ._denoiser import Points, Precision, Weights, mse
from ._settings import FamilyDefaults, Training, phrases
from ._training import run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Receler"]


@dataclass(frozen=True)
class Receler(FamilyDefaults):
    """Trains an adapter after every cross-attention layer, with an inner attack on the text in each update.

    o [D] is a token of a layer's output, after `to_out`; U and D are [D, W] and [W, D], with U = 0 at first:

        o <- o + U GELU(D o + b) + c
        attack:  a = argmin_a |e(x_t, [c; a], t) - e*(x_t, c, t)|^2            `inner_steps` of Adam on text states
        L = |e(x_t, [c; a], t) - target|^2 + reg sum_l |adapter output outside the concept's mask|^2
        target = e*(x_t, "", t) - eta (e*(x_t, c, t) - e*(x_t, "", t))

    e* is the base model. [c; a] is the text of the concept with its last columns replaced by a. The mask of a layer
    holds the positions whose attention to the concept's tokens is above `mask` of the largest one.

    Paper: C.-P. Huang, K.-P. Chang, C.-T. Tsai, Y.-H. Lai, F.-E. Yang, Y.-C. F. Wang, 2023, "Receler: Reliable Concept
    Erasing of Text-to-Image Diffusion Models via Lightweight Erasers", ECCV 2024, arXiv 2311.17717. There are no
    equation numbers, because the source was a description of the authors' code.

    Differs: the mask is each layer's own attention map; the code has one map of 16 x 16. The attack starts at the
    states of the concept's text in every update. Only conditional rows are edited while drawing. The code has a start
    of the attack that it does not use, and trains nothing without inner steps; here 0 inner steps train on the plain
    text. One trajectory serves `reuse` updates. With several concepts each has adapters of its own, which add up.

    Limits: the result is not a LoRA, so it acts only where Efface runs. An attack of another kind than the trained one
    may succeed: test with `efface.attack`. Pooled text (SDXL) is neither attacked nor edited. This implementation has
    not been measured on a large model.

    Args:
        steps: updates per concept, >= 1; code: 500. None: the family's default, as for the next fields.
        lr: learning rate of AdamW; code: 3e-4.
        inner_steps: steps of the attack, >= 0; code: 50.
        inner_lr: learning rate of the attack, in units of text states; code: 0.1.
        slots: attacked columns of the text, at most half of them; code: 16.
        width: W, channels inside an adapter; code: 128.
        eta: erase strength, as in `ESD`; code: 1.
        reg: >= 0, weight of the adapters' output outside the mask; code: 0.1.
        mask: in [0, 1], the share of the largest attention above which a position belongs to the mask; code: 0.1.
        batch: points per update, >= 1.
        reuse: updates that one trajectory serves, >= 1.
        sampler_steps: steps of a full trajectory; code: 50.
        guidance: guidance scale of the trajectories, >= 1; code: 3.
        precision: "auto", "float32" or "bfloat16" (autocast; adapters stay float32).

    Shapes: o [B, Q, D]; text states [B, L, D]; predictions [B, C, h, w].

    Raises:
        ValueError: a field is out of range; the pipeline has run-time erasers or a LoRA; a text is over the encoder's
            limit; or the checkpoint belongs to another fit.
        TypeError: the family of the pipeline is unknown.
        RuntimeError: the loss is not finite.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> fit = efface.Receler(steps=1, inner_steps=1, width=8, batch=1, sampler_steps=2)
        >>> steering = fit.fit(pipe, "alcohol")
        >>> with steering.apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    needs: ClassVar[tuple[str, ...]] = ("cross_text", "training")
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"steps": 40, "lr": 2e-3, "inner_steps": 2, "slots": 4, "reuse": 4, "sampler_steps": 20, "eta": 0.5},
        "": {"steps": 500, "lr": 3e-4, "inner_steps": 50, "slots": 16, "reuse": 2, "sampler_steps": 25, "eta": 1.0},
    }

    steps: int | None = None
    lr: float | None = None
    inner_steps: int | None = None
    inner_lr: float = 0.1
    slots: int | None = None
    width: int = 128
    eta: float | None = None
    reg: float = 0.1
    mask: float = 0.1
    batch: int = 2
    reuse: int | None = None
    sampler_steps: int | None = None
    guidance: float = 3.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        checks.each(self, checks.whole, "steps", "slots", "width", "batch", "reuse", "sampler_steps")
        checks.each(self, checks.whole, "inner_steps", least=0)
        checks.each(self, checks.number, "lr", "inner_lr", least=0, above=True)
        checks.each(self, checks.number, "eta", least=-1)
        checks.each(self, checks.number, "reg", least=0)
        checks.each(self, checks.number, "guidance", least=1)
        checks.each(self, checks.share, "mask")

    @classmethod
    def paper(cls) -> Receler:
        """The published settings for Stable Diffusion 1.4: 500 updates with 50 steps of the attack in each."""
        fields: dict[str, Any] = {"steps": 500, "lr": 3e-4, "inner_steps": 50, "slots": 16, "eta": 1.0}
        return cls(**fields, batch=1, reuse=1, sampler_steps=50)

    @learning()
    def fit(
        self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0, checkpoint: str | Path | None = None
    ) -> Steering:
        """Returns the steering that erases `concepts`. Leaves `pipe` unchanged.

        Args:
            pipe: the pipeline. Its deltas are part of the trained model.
            concepts: each phrase of a concept is a text c, drawn at random.
            seed: seed of all random numbers.
            checkpoint: a folder with which the same call continues after an interruption.
        """
        found, _ = phrases(pipe, concepts)
        method = self.resolved(pipe)
        folder = None if checkpoint is None else Path(checkpoint)
        files = [folder and folder / f"fit-{k}.safetensors" for k in range(len(found))]
        learned = [method._learned(pipe, c, seed, file) for c, file in zip(found, files, strict=True)]
        vectors = {name: torch.stack([weights[name] for weights, _ in learned]) for name in learned[0][0]}
        info = {concept.name: facts for concept, (_, facts) in zip(found, learned, strict=True)}
        return Steering.fitted(method, pipe, vectors, found, seed=seed, info=info, form="adapter")

    def _learned(
        self, pipe: DiffusionPipeline, concept: Concept, seed: int, file: Path | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        random = Generator().manual_seed(seed)
        net = Adapted(pipe, concept.phrases, self.width, self.sampler_steps or 1, self.precision, random)
        fell: list[float] = []
        state = run(
            net,
            Training(steps=self.steps, lr=self.lr, batch=self.batch, reuse=self.reuse),
            lambda weights, _, rng: self._points(net, weights, rng),
            lambda weights, points, _: self.loss(net, weights, points, fell),
            seed=seed,
            name="Receler",
            identity={**config(self), "phrases": list(concept.phrases)},
            checkpoint=file,
        )
        info = state.info() | {"attack, last loss of first": sum(fell) / len(fell) if fell else None}
        return {name: w.detach() for name, w in state.shipped.items()}, info

    def _points(self, net: Adapted, weights: Weights, rng: Generator) -> Points:
        """`reuse * batch` points of one trajectory under the adapters, with random phrases."""
        reuse = self.reuse or 1
        prompt = torch.randint(1, len(net.texts), (self.batch,), generator=rng)
        stops = torch.randint(len(net.scheduler.timesteps), (reuse, self.batch), generator=rng)
        found: Points = net.trajectory(prompt, stops, weights, self.guidance, rng)
        return found

    def loss(self, net: Adapted, weights: Weights, points: Points, fell: list[float]) -> Tensor:
        """The loss L on some points, after an attack on their texts. Appends the attack's last loss over its first."""
        x, t, prompt = points.x, points.t, points.prompt
        concept, maps = net.concept_maps(x, t, prompt)
        with torch.no_grad():
            null = net(x, t, torch.zeros_like(prompt))
        target, text = null - (1.0 if self.eta is None else self.eta) * (concept - null), None
        if self.inner_steps:
            steps, slots = self.inner_steps, self.slots or 1
            text, losses = attacked(net, x, t, prompt, weights, concept, slots=slots, steps=steps, lr=self.inner_lr)
            fell.append(losses[-1] / losses[0] if losses[0] else 1.0)
        if text is None:
            made = mse(net(x, t, prompt, weights), target)
        else:
            with net.reading(text, prompt) as rows:
                made = mse(net(x, t, rows, weights), target)
        outside = [
            (out.square().mean(-1) * (maps[name] <= self.mask)).mean() for name, out in net.outputs.items() if self.reg
        ]
        return made + self.reg * torch.stack(outside).sum() if outside else made
