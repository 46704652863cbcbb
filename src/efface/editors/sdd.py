"""SDD: trains the concept's prediction towards the network's unconditional one, and ships a running average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from .. import checks
from .._text import pack
from .._weights import learning
from ..core import Concepts, Detector, config
from ..delta import Delta
from ._denoiser import Denoiser, Points, Weights, mse
from ._settings import Training, phrases
from ._training import look, run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SDD"]

Roles = Literal["readme", "code"]


@dataclass(frozen=True)
class SDD(Training):
    """Distils the denoiser into itself: for the removal prompt it learns its unconditional prediction.

        L = || e_theta(z_t, c_s, t) - stopgrad(e_theta(z_t, "", t)) ||^2 / elements       c_s: removal prompt
        theta_bar = ema theta_bar + (1 - ema) theta                                         theta_bar: what is shipped
        z_t: guided trajectory of theta_bar with the sampling prompt c_p, up to a random step

    The target is ESD's with eta = 0, without a frozen network. It moves the concept to the unconditional prediction,
    not away from the concept, so it is gentler than ESD. Intended for many concepts together.

    Paper: S. Kim, S. Jung, B. Kim, M. Choi, J. Shin, J. Lee, 2023, "Towards Safe Self-Distillation of Internet-Scale
    Text-to-Image Diffusion Models", ICML 2023 workshop, arXiv 2307.05977. There are no equation numbers, because only
    the abstract, the authors' pseudo-code and their training script were available. `SDD.paper()` has the script's
    settings.

    Differs: with several concepts the authors' pseudo-code and script disagree. The pseudo-code ("readme") samples one
    concept at a time (c_p) and removes all together (c_s). The script ("code") does the opposite. Both are available.
    The trajectories use the pipeline's scheduler. The script uses DDIM, which you set with `pipe.scheduler =
    DDIMScheduler.from_config(pipe.scheduler.config)` before `fit`. By default biases do not train, unlike in the
    script, so that every default fit exports as a LoRA. Joined concepts that exceed the text encoder's limit become
    several alternating prompts, whereas the script cuts them. A trajectory of 0 steps is pure noise; in the script it
    is a finished picture with the time of pure noise. The time step matches the noise in z_t exactly, and is not a
    random one near it. The average covers only the trained tensors. The empty prompt is that of inference: zeros on
    SDXL. One trajectory serves `reuse` updates. `weight_decay` is 0, because the script's 1e-4 pulls the weights
    towards zero, not towards the original.

    Args:
        prompt_roles: "readme" or "code", see above; the same for one phrase. None: the family's default ("code" on
            `emoji`, where "readme" has a higher residual rate for concepts with several phrases).
        ema: decay of the average per update, in [0, 1]: 0 is the student, 1 the original. Above 1 - 3 / steps, the
            average lags too far behind. None: 0.999 from 1500 updates on (the script's), below that 1 - 5 / steps.
        train: "x" (cross-attention, the script's), "x-strict", "joint", "u", "self" or "full", as for `ESD`.
        steps: updates, >= 0; script: 1500. None: the family's default, as for `lr`, `batch`, `reuse`, `sampler_steps`.
        lr: learning rate of AdamW; script: 1e-5.
        batch: points per update; script: 1.
        reuse: updates that one trajectory serves; script: 1.
        accumulate: number of parts of a batch, to save memory.
        sampler_steps: K, steps of a full trajectory; script: 50.
        guidance: guidance scale of the trajectories, >= 1; script: 3.
        weight_decay: weight decay of AdamW; script: 1e-4.
        clip: largest norm of the gradient; script: 1.
        precision: "auto", "float32" or "bfloat16" (autocast; trained tensors stay float32).
        biases: whether biases and the scales of norms also train; script: True. Such a delta cannot be exported as a
            LoRA.

    Shapes: latents z_t and predictions [B, C, h, w]; text [B, L, D].

    Raises:
        ValueError: a field is out of range; the pipeline has run-time erasers or a LoRA; a text is over the encoder's
            limit; or the checkpoint belongs to another fit.
        TypeError: the family of the pipeline is unknown.
        RuntimeError: the loss is not finite.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> delta = efface.SDD(steps=2, batch=1, sampler_steps=3).fit(pipe, ["alcohol", "weapon"])
        >>> delta.info["steps"]
        2
    """

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"steps": 200, "lr": 1e-3, "batch": 2, "reuse": 4, "sampler_steps": 20, "prompt_roles": "code"},
        "": {"steps": 300, "lr": 1e-5, "batch": 1, "reuse": 2, "sampler_steps": 25, "prompt_roles": "readme"},
    }

    clip: float = 1.0
    prompt_roles: Roles | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.each(self, checks.choice, "prompt_roles", choices=get_args(Roles))
        checks.each(self, checks.share, "ema")

    @classmethod
    def paper(cls, prompt_roles: Roles = "code") -> SDD:
        """The settings and prompt roles of the published script for Stable Diffusion 1.4.

        `SDD.paper("readme")` has the roles of the authors' pseudo-code. It is unknown which of them produced the
        paper's figures.
        """
        fields: dict[str, Any] = {"steps": 1500, "lr": 1e-5, "batch": 1, "reuse": 1, "sampler_steps": 50}
        fields |= {"biases": True}
        return cls(prompt_roles=prompt_roles, ema=0.999, weight_decay=1e-4, **fields)

    def resolved(self, pipe: DiffusionPipeline) -> SDD:
        method = super().resolved(pipe)
        steps = method.steps or 0
        ema = 0.999 if steps >= 1500 else max(0.0, 1 - 5 / max(1, steps))
        return method if method.ema is not None else replace(method, ema=ema)

    @learning()
    def fit(
        self,
        pipe: DiffusionPipeline,
        concepts: Concepts,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        stop: Detector | None = None,
        below: float = 0.05,
    ) -> Delta:
        """Returns the delta that erases `concepts`, from the running average. Leaves `pipe` unchanged.

        Args:
            pipe: the pipeline. Its deltas are part of the trained model.
            concepts: the concepts to erase together, with all their phrases.
            seed: seed of all random numbers.
            checkpoint: a safetensors file with which the same call continues after an interruption.
            stop: a detector, which judges 16 pictures every 50 updates. The fit ends once at most the share `below` of
                them shows the concept.
            below: see `stop`.
        """
        found, words = phrases(pipe, concepts)
        method = self.resolved(pipe)
        joined = pack(pipe, words, ", ")
        net = method.denoiser(pipe, [*words, *joined])
        state = run(
            net,
            method,
            lambda weights, step, rng: method.points(net, len(words), len(joined), weights, step, rng),
            lambda weights, points, _: method.loss(net, weights, points),
            seed=seed,
            name="SDD",
            identity={**config(method), "phrases": words},
            ema=method.ema,
            checkpoint=checkpoint,
            look=look(pipe, net, stop, words) if stop else None,
            below=below,
        )
        return Delta.fitted(method, pipe, net.change(state.shipped), found, seed=seed, info=state.info())

    def points(self, net: Denoiser, words: int, joined: int, weights: Weights, step: int, rng: Generator) -> Points:
        """`reuse * batch` points of one trajectory, each with its removal prompt. Both kinds of prompts alternate."""
        reuse, batch = self.reuse or 1, self.batch or 1
        shown, removed = (1, words), (1 + words, joined)  # first row, number of rows
        if self.prompt_roles == "code":
            shown, removed = removed, shown
        sampling = shown[0] + (step // reuse * batch + torch.arange(batch)) % shown[1]
        removal = removed[0] + (step * batch + torch.arange(reuse * batch)) % removed[1]
        stops = torch.randint(len(net.scheduler.timesteps), (reuse, batch), generator=rng)
        found = net.trajectory(sampling, stops, weights, self.guidance, rng)
        return Points(found.x, found.t, removal.to(net.device))

    def loss(self, net: Denoiser, weights: Weights, points: Points) -> Tensor:
        """The loss of the student on some points."""
        with torch.no_grad():
            target = net(points.x, points.t, torch.zeros_like(points.prompt), weights)
        return mse(net(points.x, points.t, points.prompt, weights), target)
