"""LatentDirections: learns vectors at the denoiser's bottleneck from the model's own pictures; no weight changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Generator

from .. import checks
from .._text import check_phrases
from .._weights import learning
from ..core import Concepts, Detector, as_concepts, config
from ..delta import Directions
from ..delta.table import shares_of
from ..families import family
from ..fields import Converted, computed
from ._denoiser import Points, Precision
from ._directions import Steered, Task, latents, loss
from ._settings import FamilyDefaults, Training
from ._training import check_drawn, run, telling

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["LatentDirections"]

Shares = Literal["equal"] | Sequence[float] | None


@dataclass(frozen=True)
class LatentDirections(FamilyDefaults):
    """Learns one additive vector per concept for a module of the denoiser, from pictures that the model draws itself.

        c = argmin_c E || e - e_theta(x_t, t, y-; h <- h + c) ||^2,    x_0 ~ model(y+)

    y+ names the concept ("a woman"), y- leaves it out ("a person"), so the vector c supplies what y- lacks. h is the
    output of the UNet's mid block. All weights are frozen. Models that predict the velocity train on the velocity. In
    flow matching x_t = (1 - t) x_0 + t e, and e - x_0 replaces e as the target.

    Paper: H. Li, C. Shen, P. Torr, V. Tresp, J. Gu, 2024, "Self-Discovering Interpretable Diffusion Latent Directions
    for Responsible Text-to-Image Generation", CVPR 2024, arXiv 2311.17216. Its equations were not available, so there
    are no equation numbers: formula and defaults are those of its abstract and of the authors' code.

    Differs: vectors start at zero. The authors start at random values in [-0.1, 0.1], which stay wherever the loss does
    not reach. Pictures stay latents; the authors decode them and encode them again. Texts are padded as in a pipeline
    call; the authors pad to the longest text of a batch. Several concepts train in one run, each for `steps` updates on
    average. `at` with other modules than the mid block, `spatial=False`, and blocks of transformers (PixArt, Sana, SD
    3/3.5, FLUX.1), which have no bottleneck, are extensions that the paper did not test. The prompts of the authors'
    safety vector were not published; `anti` follows their code. Equal pictures of y+ and y- would teach nothing: pass a
    `detector` to be sure that the model draws the concept.

    Args:
        steps: updates per concept, >= 1; code: 2500. None: the family's default, as for `lr`, `pictures` and
            `sampler_steps`.
        lr: learning rate of Adam, constant; code: 0.1.
        batch: points per update, and pictures per pipeline call, >= 1; code: 8.
        pictures: pictures per concept, >= 2, a tenth of which judges the vectors; code: 1000, all of which train.
        sampler_steps: denoising steps of each picture; code: 30.
        guidance: guidance scale of the pictures; code: 7.5.
        clip: largest norm of the gradient; code: 0, no clipping.
        precision: "auto", "float32" or "bfloat16" (autocast; vectors stay float32).
        at: names of the denoiser's modules, such as "mid_block" or "transformer_blocks.4". (): the bottleneck.
        spatial: whether a vector has a number per position, as in the paper. It then fits one picture size only.
        anti: whether to learn what is left if the concept is the negative prompt: x_0 ~ model(y-, negative = y+). Such
            vectors are added for safety.
        neutral: the texts y-, for all concepts, paired with the phrases in turn. (): the anchor of each concept.
        shares: the use of the result: None adds all vectors to each picture. "equal", or a share per concept, draws one
            concept per picture. `Directions.fair` sets it later.
        window: the part of the trajectory with the edit, (start, end): 0 is pure noise, 1 the picture; code: (0, 1).

    Shapes: latents x_t [B, C, h, w]; vectors [K, C, s, s], or [K, C, 1, 1] with `spatial=False`. For modules that
        return Q tokens: [K, Q, C] or [K, 1, C].

    Raises:
        ValueError: a field is out of range; a phrase equals a neutral text; `anti` meets a guidance of 1; the pipeline
            has run-time erasers or a LoRA; the denoiser lacks a module of `at`, or is a transformer and `at` is empty;
            a text is over the encoder's limit; the detector sees a concept in less than 30 % of its pictures; or the
            checkpoint belongs to another fit.
        TypeError: the family of the pipeline is unknown.
        RuntimeError: the loss is not finite.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> people = [efface.Concept(f"{sex} doctor", anchor="a doctor") for sex in ("male", "female")]
        >>> fit = efface.LatentDirections(pictures=2, steps=2, batch=2, sampler_steps=2)
        >>> fair = fit.fit(pipe, people).fair()
        >>> with fair.apply(pipe):
        ...     image = pipe("a doctor", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    needs: ClassVar[tuple[str, ...]] = computed(
        lambda self: ("training|flow_training",) if self.at else ("training", "bottleneck"), ("training", "bottleneck")
    )
    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {"blocks in `at`": {"at": ("transformer_blocks.0",)}}
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"steps": 50, "lr": 0.02, "pictures": 32, "sampler_steps": 20},
        "": {"steps": 2500, "lr": 0.1, "pictures": 1000, "sampler_steps": 30},
    }

    steps: int | None = None
    lr: float | None = None
    batch: int = 8
    pictures: int | None = None
    sampler_steps: int | None = None
    guidance: float = 7.5
    clip: float = 0.0
    precision: Precision = "auto"
    at: Converted[str | Sequence[str], tuple[str, ...]] = Converted(())
    spatial: bool = True
    anti: bool = False
    neutral: Converted[str | Sequence[str], tuple[str, ...]] = Converted(())
    shares: Shares = None
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        checks.choice("precision", self.precision, get_args(Precision))
        checks.each(self, checks.whole, "steps", "batch", "sampler_steps")
        checks.each(self, checks.whole, "pictures", least=2)
        checks.each(self, checks.number, "guidance", least=1)
        checks.each(self, checks.number, "clip", least=0)
        checks.each(self, checks.number, "lr", least=0, above=True)
        checks.each(self, checks.choice, "spatial", "anti", choices=(True, False))
        checks.each(self, checks.window, "window")
        for name in ("at", "neutral"):
            given = getattr(self, name)
            object.__setattr__(self, name, checks.texts(name, [given] if isinstance(given, str) else given))
        if self.shares is not None and self.shares != "equal":
            names = [f"concept {k + 1}" for k in range(len(self.shares))]
            object.__setattr__(self, "shares", shares_of(self.shares, names))
        if self.anti and self.guidance == 1:
            raise ValueError(
                "`anti` uses negative prompts, which need `guidance` above 1, got 1. Give more, such as 7.5."
            )

    @learning()
    def fit(
        self,
        pipe: DiffusionPipeline,
        concepts: Concepts,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        detector: Detector | Mapping[str, Detector] | None = None,
    ) -> Directions:
        """Returns the directions of `concepts`. Leaves `pipe` unchanged.

        Args:
            pipe: the pipeline. Its deltas are part of the model.
            concepts: the phrases of each are the texts y+; its anchor is y-, unless `neutral` has the texts.
            seed: seed of all random numbers.
            checkpoint: a folder with which the same call continues after an interruption.
            detector: a detector of the concept, or one per concept by name. It judges 16 pictures per concept first,
                and the fit ends with an error if it sees the concept in less than 30 % of them.
        """
        method, found = self.resolved(pipe), as_concepts(concepts)
        if not found:
            raise ValueError("Expected at least one concept, got none. Name one.")
        tasks = [Task.of(concept, self.neutral or (concept.anchor,), self.anti) for concept in found]
        neutral = list(dict.fromkeys(text for task in tasks for text in task.neutral if text))
        check_phrases(pipe, [*(phrase for concept in found for phrase in concept.phrases), *neutral])
        shares = (
            None
            if self.shares is None
            else shares_of(None if self.shares == "equal" else self.shares, [concept.name for concept in found])
        )
        modules = self.at or tuple(filter(None, [family(pipe).bottleneck]))
        net = Steered(pipe, neutral, modules, len(found), spatial=self.spatial, precision=self.precision)
        if detector is not None:
            check_drawn(pipe, found, detector)
        folder = None if checkpoint is None else Path(checkpoint)
        call = {**family(pipe).guided(self.guidance), "num_inference_steps": method.sampler_steps}
        with telling("drawing the model's pictures") as tell:
            pictures = latents(
                pipe,
                tasks,
                method.pictures or 2,
                shape=net.shape,
                batch=self.batch,
                seed=seed,
                call=call,
                cache=folder and folder / "latents.safetensors",
                tell=tell,
            )
        return method._trained(net, tasks, pictures.to(net.device, net.dtype), seed, folder, shares)

    def _trained(
        self, net: Steered, tasks: Sequence[Task], pictures: Any, seed: int, folder: Path | None, shares: Any
    ) -> Directions:
        """The directions from pictures [K, n, C, h, w]."""
        n = pictures.shape[1]
        training = n - max(1, n // 10)
        texts = torch.tensor([[net.texts[task.row(k)[2]] for k in range(n)] for task in tasks])
        rows = net.numbers(torch.arange(len(tasks))[:, None], texts).to(net.device)
        times = net.scheduler.config.num_train_timesteps

        def draw(_: Any, __: int, rng: Generator) -> Points:
            k, i = (torch.randint(most, (self.batch,), generator=rng) for most in (len(tasks), training))
            t = torch.randint(times, (self.batch,), generator=rng).to(net.device)
            x = pictures[k, i]
            return net.noised(x, t, torch.randn(x.shape, generator=rng).to(x), rows[k, i])

        total = (self.steps or 1) * len(tasks)
        settings = Training(steps=total, lr=self.lr, batch=self.batch, reuse=1, clip=self.clip)
        state = run(
            net,
            settings,
            draw,
            lambda vectors, points, _: loss(net, vectors, points),
            seed=seed,
            name="LatentDirections",
            identity={**config(self), "pictures of": [task.row(k) for task in tasks for k in range(n)]},
            checkpoint=folder and folder / "fit.safetensors",
        )
        held = pictures[:, training:], rows[:, training:]
        judged = {
            task.concept.name: net.held_out(state.shipped, held[0][k], held[1][k], seed) for k, task in enumerate(tasks)
        }
        info = {**state.info(), "held out": judged}
        found = tuple(task.concept for task in tasks)
        return Directions.fitted(
            self, net.pipe, state.shipped, found, seed=seed, info=info, shares=shares, window=self.window
        )
