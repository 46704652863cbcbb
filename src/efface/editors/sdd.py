"""SDD: the concept's prediction is trained to be the network's own unconditional one; its running average is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from .._text import pack
from .._weights import learning
from ..core import Concepts, Detector, config
from ..delta import Delta
from ._denoiser import Denoiser, Points, Weights, mse
from ._settings import Training, check_number, phrases
from ._training import look, run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SDD"]

Roles = Literal["readme", "code"]


@dataclass(frozen=True)
class SDD(Training):
    """Distils the denoiser into itself: under the removal prompt it learns to predict what it would without a prompt.

        L = || e_theta(z_t, c_s, t) - stopgrad(e_theta(z_t, "", t)) ||^2 / elements       c_s: removal prompt
        theta_bar = ema theta_bar + (1 - ema) theta                                         theta_bar: what is shipped
        z_t: guided trajectory of theta_bar with the sampling prompt c_p, up to a random step

    Gentler than ESD, whose target with eta = 0 this is, except that nothing is frozen: it aims at "as if nothing had
    been said", not away from the concept. Made for many concepts at once.

    Paper: S. Kim, S. Jung, B. Kim, M. Choi, J. Shin, J. Lee, 2023, "Towards Safe Self-Distillation of Internet-Scale
    Text-to-Image Diffusion Models", ICML 2023 workshop, arXiv 2307.05977. Equation numbers cannot be given: its body
    could not be read. Written from the abstract, the pseudo-code that its authors published and the settings of their
    training script, which `SDD.paper()` has.

    Differs: with several concepts the authors' pseudo-code and script disagree. In the pseudo-code ("readme") one
    concept after another is shown (c_p) and all are removed together (c_s); in the script ("code") it is the other way
    round. Both are here. The trajectories use the pipeline's own scheduler; the script's is DDIM, which you set with
    `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)` before `fit`. By default biases do not train,
    unlike in the script, so that every default fit exports as a LoRA. Joined concepts that do not fit the text
    encoder become several prompts that take turns, where the script cuts them off. A trajectory of 0 steps is pure
    noise; in the script it is a finished picture with the time of pure noise. The time step is exactly the one of the
    noise in z_t, not a random one near it. The average covers the trained tensors (the others do not move). The empty
    prompt is what inference uses: zeros on SDXL. One trajectory serves `reuse` updates. `weight_decay` is 0, the
    script's 1e-4 pulls the weights towards zero rather than towards the original.

    Args:
        prompt_roles: "readme" or "code", see above; the same for one phrase. None: what suits the family ("code" on
            `emoji`, on which "readme" leaves more of concepts with several phrases).
        ema: share that the average keeps in an update, in [0, 1]: 0 is the student, 1 the original. Keep it below
            1 - 3 / steps, or the average does not arrive. None: 0.999 from 1500 updates on (the script's), below that
            1 - 5 / steps.
        train: "x" (cross-attention, the script's), "x-strict", "u", "self" or "full".
        steps: updates, >= 0; script: 1500. None: what suits the family, as for `lr`, `batch`, `reuse`, `sampler_steps`.
        lr: of AdamW; script: 1e-5.
        batch: points in an update; script: 1.
        reuse: updates that one trajectory serves; script: 1.
        accumulate: parts in which a batch is computed, to save memory.
        sampler_steps: K, steps of a full trajectory; script: 50.
        guidance: of the trajectories, >= 1; script: 3.
        weight_decay: of AdamW; script: 1e-4.
        clip: largest norm of the gradient; script: 1.
        precision: "auto", "float32" or "bfloat16" (autocast; trained tensors stay float32).
        biases: whether biases and the scales of norms train too; script: True. Such a delta has no LoRA.

    Shapes: latents z_t and predictions [B, C, h, w]; text [B, L, D].

    Raises:
        ValueError: a field out of range; run-time erasers or a LoRA on the pipeline; a text over the encoder's limit; a
            checkpoint of another fit.
        TypeError: a pipeline of another family.
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
        if self.prompt_roles not in (None, *get_args(Roles)):
            raise ValueError(
                f"Expected `prompt_roles` to be one of {', '.join(get_args(Roles))}, but got {self.prompt_roles!r}."
            )
        if self.ema is not None:
            check_number("ema", self.ema, most=1)

    @classmethod
    def paper(cls, prompt_roles: Roles = "code") -> SDD:
        """The settings and the prompt roles of the published script, for Stable Diffusion 1.4.

        `SDD.paper("readme")` has the roles of the authors' pseudo-code. Which ones the paper's figures come from is not
        known.
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
        """The delta that erases `concepts`, the average's; `pipe` is left as found.

        Args:
            pipe: the pipeline; deltas that are on belong to the model that is trained.
            concepts: the phrases of all of them are erased together.
            seed: of everything random.
            checkpoint: a safetensors file from which the same call goes on after an interruption.
            stop: a detector; every 50 updates it looks at 16 pictures, and the fit ends once at most the share `below`
                of them shows the concept.
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
        """`reuse * batch` points of one trajectory, each with its removal prompt; both prompts take turns."""
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
