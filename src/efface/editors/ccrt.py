"""CCRT: removes concepts one after another, and preserves the prompts that each removal disturbs most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from .. import checks
from .._text import fits
from .._weights import learning
from ..core import Concepts
from ..delta import Delta, active, unedited
from ._misalignment import Misalignment
from ._round import Round
from ._search import ENTITIES, Broader, Calibration
from ._settings import Training, phrases
from .esd import ESD

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["CCRT"]

Teacher = Literal["base", "previous"]


@dataclass(frozen=True)
class CCRT(Training):
    """Removes concepts in rounds: ESD plus a distillation on the prompts that the removal disturbs most.

        L = L_ESD(c) + reg || e(x_t, p, t) - e*(x_t, p, t) ||^2 / elements        e: trained, e*: teacher, p in P
        P: composed from the fittest of a genetic search; fitness of p = MD(p) of a probe (ESD alone, discarded)
        MD(p) = E_t || e_edited(x_t, p, t) - e_base(x_t, p, t) ||^2 / elements    the misalignment distance

    A round continues from the weights of the previous round. Its delta works only on top of the earlier deltas.

    Paper: T. Han, W. Sun, Y. Hu, C. Fang, Y. Zhang, S. Ma, T. Zheng, Z. Chen, Z. Wang, 2024, "Continuous Concepts
    Removal in Text-to-image Diffusion Models", NeurIPS 2025, arXiv 2412.00580. There are no equation numbers, because
    only the abstract and the published code were available. `CCRT.paper()` has that code's settings.

    Differs: training draws from all calibration prompts at random (code: one prompt, drawn before training). Student
    and teacher see the teacher's x_t (code: each its own). The teacher is the base model in every round (code: the
    previous round, so that drift accumulates). The fitness is a mean over times with shared noise, and base
    trajectories are drawn once for all generations and rounds (code: one random time and two new trajectories each). It
    is measured without guidance (code: guidance 3, see `search_guidance`). The trajectories use the pipeline's
    scheduler (code: DDIM). By default biases do not train, unlike in the code, so that every default round exports as a
    LoRA. Entities that share a word with a removed concept, or are a kind of it, are left out. Prompts come from a
    template unless a composer is given (code: a language model). Entities come from a short list (code: the 1,000
    classes of ImageNet, with WordNet's hypernyms). Mutants join their originals.

    Args:
        train, steps, lr, batch, reuse, accumulate, sampler_steps, guidance, weight_decay, clip, precision, biases: as
        for `ESD`, for the probe and the fit; code: "x", 1000, 1e-5, 1, 1, 1, 50, 3, and biases train.
        eta: ESD's erase strength, >= -1; code: 1.
        reg: weight of the distillation, >= 0; 0 is ESD in rounds, without probe and search; code: 0.01, which has
            little effect on `emoji`.
        teacher: "base", or "previous" for the previous round.
        keep: selected individuals per generation, and the number of calibration prompts; code: 100.
        generations: generations of the search; code: 6.
        mutation: probability of replacing a gene, in a quarter of the population; code: 0.05.
        search_guidance: guidance scale of the trajectories for the fitness, >= 1. 1 means no guidance, at half the
            cost; code: 3.
        template: a text with {} for the entities.

    Shapes: latents x_t and predictions [B, C, h, w]; text [B, L, D].

    Raises:
        ValueError: a field is out of range; fewer than two entities remain; the pipeline has run-time erasers or a
            LoRA; a text is over the encoder's limit; or the checkpoint belongs to another fit.
        TypeError: the family of the pipeline is unknown.
        RuntimeError: the loss is not finite.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> quick = efface.CCRT(steps=2, batch=1, sampler_steps=3, keep=2, generations=1)
        >>> alcohol, cat = quick.sequence(pipe, ["alcohol", "cat"], entities=["dog", "house", "tree"])
        >>> list(cat.after) == [alcohol.hash]
        True
    """

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {**ESD.defaults["emoji"], "lr": 1e-4, "template": "{}"},
        "": {**ESD.defaults[""], "template": "a photo of {}"},
    }

    eta: float = 1.0
    reg: float = 1.0
    teacher: Teacher = "base"
    keep: int = 20
    generations: int = 3
    mutation: float = 0.25
    search_guidance: float = 1.0
    template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("teacher", self.teacher, get_args(Teacher))
        checks.each(self, checks.number, "eta", least=-1)
        checks.each(self, checks.number, "reg", least=0)
        checks.each(self, checks.number, "search_guidance", least=1)
        checks.each(self, checks.share, "mutation")
        checks.each(self, checks.whole, "keep", least=2)
        checks.each(self, checks.whole, "generations", least=0)
        if self.template is not None and "{}" not in self.template:
            raise ValueError(
                f"Expected `template` to hold {{}} for the entities, got {checks.shown(self.template)}. Add it."
            )

    @classmethod
    def paper(cls) -> CCRT:
        """The settings of the published code for Stable Diffusion 1.4. You have to give its 1,000 entities."""
        given: dict[str, Any] = {"steps": 1000, "lr": 1e-5, "batch": 1, "reuse": 1, "sampler_steps": 50}
        given |= {"keep": 100, "generations": 6, "mutation": 0.05, "search_guidance": 3.0}
        return cls(reg=0.01, biases=True, **given)

    @learning()
    def fit(
        self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0, checkpoint: Any = None, **options: Any
    ) -> Delta:
        """Returns the sum of all rounds as one delta. Takes the arguments of `sequence`."""
        first, *later = self.sequence(pipe, concepts, seed=seed, checkpoint=checkpoint, **options)
        return sum(later, start=first)

    @learning()
    def sequence(
        self,
        pipe: DiffusionPipeline,
        concepts: Concepts,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        entities: Sequence[str] = ENTITIES,
        broader: Broader | None = None,
        composer: Callable[[Sequence[str]], str] | None = None,
    ) -> list[Delta]:
        """Returns one delta per concept, each fitted on top of the earlier ones. Leaves `pipe` unchanged.

        Their `info` has the calibration prompts, and the mean misalignment distance before the round, after the probe
        and after the round. The distances cover these prompts and all entities, with noise that the search did not use.

        Args:
            pipe: the pipeline. Its deltas count as earlier rounds.
            concepts: the concepts to remove, in this order.
            seed: seed of all random numbers.
            checkpoint: a folder with which the same call continues after an interruption.
            entities: names of things, the initial population of the search.
            broader: entity to its direct hypernyms, for crossover.
            composer: makes training prompts from entities, such as a language model. None: the template.
        """
        found, _ = phrases(pipe, concepts)
        method = self.resolved(pipe)
        earlier = [concept for delta in active(pipe) for concept in delta.concepts]
        removed = [phrase for concept in (*earlier, *found) for phrase in concept.phrases]
        source = Calibration(entities, removed, method.template or "{}", composer, broader, partial(fits, pipe))
        net = method.denoiser(pipe, phrases(pipe, found[0])[1])
        own = {name: weight for name, weight in unedited(pipe).items() if name.startswith(net.prefix)}
        base = {name: weight.clone() for name, weight in (net.base | own).items()}
        fitness, judge = (Misalignment(net, base, seed + k, method.search_guidance) for k in range(2))
        deltas: list[Delta] = []
        with ExitStack() as on:
            for k, concept in enumerate(found):
                rows = torch.arange(1, len(net.condition.text)) if k == 0 else net.add(phrases(pipe, concept)[1])
                folder = None if checkpoint is None else Path(checkpoint) / str(k + 1)
                search = {name: getattr(method, name) for name in ("keep", "generations", "mutation")}
                settings = (method.eta, method.teacher, method.reg, search)
                one = Round(method, *settings, net, base, concept.name, rows, seed + 10 * k, folder)
                state, info = one.run(source, fitness, judge) if method.reg else (one.fit("fit"), {})
                info = state.info() | info
                deltas.append(Delta.fitted(method, pipe, net.change(state.shipped), concept, seed=one.seed, info=info))
                on.enter_context(deltas[-1].apply(pipe))
        return deltas
