"""ESD: trains the concept's prediction towards the negatively guided one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from .. import checks
from .._weights import learning
from ..core import Concepts, Detector, config
from ..delta import Delta
from ._denoiser import Denoiser, Points, Weights, mse
from ._settings import Training, phrases
from ._training import look, run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["ESD"]

Drawer = Literal["student", "frozen"]


@dataclass(frozen=True)
class ESD(Training):
    """Fine-tunes the denoiser so that its prediction for a concept points away from it. Needs only the concept's name.

        L = || e(x_t, c, t) - target ||^2 / elements
        target = e*(x_t, t) - eta (e*(x_t, c, t) - e*(x_t, t))                        e*: frozen, e: trained, c: concept
        target = e*(x_t, f, t) - eta (e*(x_t, c, t) - e*(x_t, t)),  L on e(x_t, f, t)   to erase c from f only

    The student draws x_t, guided with the prompt c (or f), up to a random step of the pipeline's scheduler. The
    coefficients of the target sum to one, so the formula also holds for v-prediction, and for the velocity of flow
    matching (SD 3/3.5, FLUX.1, Sana).

    Paper: R. Gandikota, J. Materzynska, J. Fiotto-Kaufman, D. Bau, 2023, "Erasing Concepts from Diffusion Models", ICCV
    2023, arXiv 2303.07345, equation 6. `ESD.paper()` has its settings, `ESD.code_2025()` those of the authors' current
    code, which added `erase_from`.

    Differs: `eta` is the paper's. The authors' current code has a `negative_guidance` instead. Without `erase_from` it
    is eta + 1: their 2 is eta 1, and their 1 maps the concept onto the empty prompt. With `erase_from` it is eta. The
    time step matches the noise in x_t exactly, and latents are scaled for the scheduler. The authors sample with DDIM
    (in 2025 PNDM): set `pipe.scheduler` before `fit` for theirs. The empty prompt is that of inference: zeros on SDXL.
    One trajectory serves `reuse` updates at different steps. "u" excludes the time embedding and the output layers, as
    the paper's code did. Joint attention is not in the paper, and nothing is calibrated there. FLUX.1 dev has its
    guidance distilled in: it trains at an embedded guidance of 1, with the empty prompt as the unconditional one. A
    model that is distilled to few steps (schnell) is refused. By default biases do not train, unlike in the authors'
    code, so that every default fit exports as a LoRA.

    Args:
        train: "x" (ESD-x: cross-attention; for names and styles), "u" (ESD-u: all but cross-attention; for implied
            concepts), "x-strict" (keys and values of cross-attention), "self" or "full". In joint attention, "x": the
            text's add_q_proj, add_k_proj and add_v_proj; "x-strict": its add_k_proj and add_v_proj; "joint": these
            three, and to_q, to_k and to_v of all blocks; "u": all but those of "x", and not the layers around the
            blocks.
        steps: updates, >= 0; paper: 1000. None: the family's default, as for `lr`, `batch`, `reuse`, `sampler_steps`.
        lr: learning rate of AdamW; paper: 1e-5. The family's default is a third for "u" and "full".
        batch: points per update; paper: 1.
        reuse: updates that one trajectory serves; paper: 1.
        accumulate: number of parts of a batch, to save memory.
        sampler_steps: K, steps of a full trajectory; paper: 50.
        guidance: guidance scale of the trajectories, >= 1; paper: 3.
        weight_decay, clip: weight decay of AdamW, largest norm of the gradient; paper: 0, none.
        precision: "auto", "float32" or "bfloat16" (autocast; trained tensors stay float32).
        eta: erase strength, >= -1; -1 is no change; paper: 1, also 3 and 10. None: the family's default (1; on `emoji`
            0.5, because 1 draws black shapes there).
        erase_from: the text f, to erase an attribute from one thing only ("cowboy hat" from "cowboy").
        drawn_by: the weights that draw x_t. "student": those in training (the paper). "frozen": those before the fit
            (the code of 2025).
        biases: whether biases and the scales of norms also train, as in the authors' code. Such a delta cannot be
            exported as a LoRA.

    Shapes: latents x_t and predictions [B, C, h, w]; text [B, L, D].

    Raises:
        ValueError: a field is out of range; the pipeline has run-time erasers or a LoRA; a text is over the encoder's
            limit; or the checkpoint belongs to another fit.
        TypeError: the family of the pipeline is unknown.
        RuntimeError: the loss is not finite.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> delta = efface.ESD(steps=2, batch=1, sampler_steps=3).fit(pipe, "alcohol")
        >>> with delta.apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"steps": 200, "lr": 2e-4, "batch": 2, "reuse": 4, "sampler_steps": 20, "eta": 0.5},
        "": {"steps": 200, "lr": 2e-5, "batch": 1, "reuse": 2, "sampler_steps": 25, "eta": 1.0},
    }

    eta: float | None = None
    erase_from: str = ""
    drawn_by: Drawer = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("drawn_by", self.drawn_by, get_args(Drawer))
        checks.each(self, checks.number, "eta", least=-1)

    @classmethod
    def paper(cls, train: Any = "x", eta: float = 1.0) -> ESD:
        """The paper's settings for Stable Diffusion 1.4. The student draws, and biases train."""
        fields: dict[str, Any] = {"steps": 1000, "lr": 1e-5, "batch": 1, "reuse": 1, "sampler_steps": 50}
        return cls(train=train, eta=eta, drawn_by="student", biases=True, **fields)

    @classmethod
    def code_2025(cls, train: Any = "x", eta: float = 1.0) -> ESD:
        """The settings of the authors' code of 2025 for Stable Diffusion 1.4. The frozen model draws, and biases train.

        `eta` is the paper's; their default `negative_guidance` of 2 is eta 1 without `erase_from`.
        """
        fields: dict[str, Any] = {"steps": 200, "lr": 5e-5, "batch": 1, "reuse": 1, "sampler_steps": 50}
        return cls(train=train, eta=eta, drawn_by="frozen", biases=True, **fields)

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
        """Returns the delta that erases `concepts`. Leaves `pipe` unchanged.

        Args:
            pipe: the pipeline. Its deltas are part of the trained model.
            concepts: each phrase of each concept is a prompt c, drawn at random.
            seed: seed of all random numbers.
            checkpoint: a safetensors file with which the same call continues after an interruption.
            stop: a detector, which judges 16 pictures every 50 updates. The fit ends once at most the share `below` of
                them shows the concept.
            below: see `stop`.
        """
        found, texts = phrases(pipe, concepts, *filter(None, [self.erase_from]))
        method = self.resolved(pipe)
        net = method.denoiser(pipe, [*texts, *filter(None, [self.erase_from])])
        state = run(
            net,
            method,
            lambda weights, _, rng: method.points(net, torch.arange(1, len(texts) + 1), weights, rng),
            lambda weights, points, _: method.loss(net, weights, points),
            seed=seed,
            name="ESD",
            identity={**config(method), "phrases": texts},
            checkpoint=checkpoint,
            look=look(pipe, net, stop, texts) if stop else None,
            below=below,
        )
        return Delta.fitted(method, pipe, net.change(state.shipped), found, seed=seed, info=state.info())

    def points(self, net: Denoiser, prompts: Tensor, weights: Weights, rng: Generator) -> Points:
        """`reuse * batch` points of one trajectory, with random prompts (rows of the condition)."""
        reuse, batch = self.reuse or 1, self.batch or 1
        prompt = prompts[torch.randint(len(prompts), (batch,), generator=rng)]
        stops = torch.randint(len(net.scheduler.timesteps), (reuse, batch), generator=rng)
        drawn = torch.full_like(prompt, len(net.condition.text) - 1) if self.erase_from else prompt
        found = net.trajectory(drawn, stops, weights if self.drawn_by == "student" else None, self.guidance, rng)
        return Points(found.x, found.t, prompt.to(net.device).repeat(reuse))

    def loss(self, net: Denoiser, weights: Weights, points: Points) -> Tensor:
        """The loss of the student on some points."""
        rows, target = self.target(net, points)
        return mse(net(points.x, points.t, rows, weights), target)

    @torch.no_grad()
    def target(self, net: Denoiser, points: Points, teacher: Weights | None = None) -> tuple[Tensor, Tensor]:
        """The student's prompts and targets, from the pipeline's weights or a teacher's."""
        rows = [torch.zeros_like(points.prompt), points.prompt]
        if self.erase_from:
            rows.append(torch.full_like(points.prompt, len(net.condition.text) - 1))
        x, t = (torch.cat([v] * len(rows)) for v in (points.x, points.t))
        null, concept, *rest = net(x, t, torch.cat(rows), teacher).chunk(len(rows))
        return rows[-1], (rest[0] if rest else null) - (1.0 if self.eta is None else self.eta) * (concept - null)
