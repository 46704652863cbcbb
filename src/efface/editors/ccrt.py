"""CCRT: concepts are removed one after another, and what the last removal made the model forget is held in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from .._text import fits
from .._weights import learning
from ..core import Concepts
from ..delta import Delta, active, unedited
from ._misalignment import Misalignment
from ._round import Round
from ._search import ENTITIES, Broader, Calibration
from ._settings import Training, check_integer, check_number, phrases
from .esd import ESD

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["CCRT"]

Teacher = Literal["base", "previous"]


@dataclass(frozen=True)
class CCRT(Training):
    """Removes concepts in a sequence of rounds: ESD, plus a distillation on prompts that the removal disturbs most.

        L = L_ESD(c) + reg || e(x_t, p, t) - e*(x_t, p, t) ||^2 / elements        e: trained, e*: teacher, p in P
        P: composed from the fittest of a genetic search; fitness of p = MD(p) of a probe (plain ESD, thrown away)
        MD(p) = E_t || e_edited(x_t, p, t) - e_base(x_t, p, t) ||^2 / elements    the misalignment distance

    A round goes on from the weights of the one before; its delta is of use on top of the earlier ones.

    Paper: T. Han, W. Sun, Y. Hu, C. Fang, Y. Zhang, S. Ma, T. Zheng, Z. Chen, Z. Wang, 2024, "Continuous Concepts
    Removal in Text-to-image Diffusion Models", NeurIPS 2025, arXiv 2412.00580. Equation numbers cannot be given: its
    body could not be read. Written from the abstract and from what the published code does; `CCRT.paper()` has that
    code's settings.

    Differs: all calibration prompts are trained on, at random (the code draws one before training). Student and teacher
    see the same x_t, the teacher's (in the code, each its own). The teacher is the base model in every round (in the
    code, the round before, so that drift adds up). The fitness is a mean over times, with noise that all prompts share,
    and base trajectories are drawn once for all generations and rounds (in the code: one random time and two
    trajectories, each time anew). It is measured without guidance (in the code, on trajectories of guidance 3: see
    `search_guidance`). The trajectories use the pipeline's own scheduler, the code's is DDIM. By default biases do not
    train, unlike in the code, so that every default round exports as a LoRA. Entities that share a word with a
    removed concept, or are a kind of it, are left out. Prompts come from a template unless a composer is given (in the
    code, a language model), entities from a short list of ours (in the code, the 1,000 classes of ImageNet, with
    WordNet's hypernyms). Mutants join their originals.

    Args:
        train, steps, lr, batch, reuse, accumulate, sampler_steps, guidance, weight_decay, clip, precision, biases: as
            for `ESD`, of the probe and the fit; code: "x", 1000, 1e-5, 1, 1, 1, 50, 3, and biases train.
        eta: ESD's erase strength, >= -1; code: 1.
        reg: weight of the distillation, >= 0; 0 is ESD round by round, without probe and search; code: 0.01, of which
            little was to be seen on `emoji`.
        teacher: "base", or "previous" for the round before.
        keep: individuals that survive a generation, and calibration prompts in the end; code: 100.
        generations: of the search; code: 6.
        mutation: chance of a gene to be replaced, in a quarter of the population; code: 0.05.
        search_guidance: of the trajectories on which fitness is measured, >= 1; 1 is none and halves their cost; code:
            3.
        template: a text with {} for the entities.

    Shapes: latents x_t and predictions [B, C, h, w]; text [B, L, D].

    Raises:
        ValueError: a field out of range; fewer than two entities left; run-time erasers or a LoRA on the pipeline; a
            text over the encoder's limit; a checkpoint of another fit.
        TypeError: a pipeline of another family.
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
        bounds = {"eta": (-1, math.inf), "reg": (0, math.inf), "mutation": (0, 1), "search_guidance": (1, math.inf)}
        for name, (least, most) in bounds.items():
            check_number(name, getattr(self, name), least, most)
        for name, least in (("keep", 2), ("generations", 0)):
            check_integer(name, getattr(self, name), least)
        if self.teacher not in get_args(Teacher):
            raise ValueError(f"Expected `teacher` to be 'base' or 'previous', but got {self.teacher!r}.")
        if self.template is not None and "{}" not in self.template:
            raise ValueError(f"Expected `template` to hold {{}} for the entities, but got {self.template!r}.")

    @classmethod
    def paper(cls) -> CCRT:
        """The settings of the published code, for Stable Diffusion 1.4; its 1,000 entities have to be given."""
        given: dict[str, Any] = {"steps": 1000, "lr": 1e-5, "batch": 1, "reuse": 1, "sampler_steps": 50}
        given |= {"keep": 100, "generations": 6, "mutation": 0.05, "search_guidance": 3.0}
        return cls(reg=0.01, biases=True, **given)

    @learning()
    def fit(
        self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0, checkpoint: Any = None, **options: Any
    ) -> Delta:
        """The delta of all rounds together; arguments as for `sequence`."""
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
        """One delta per concept, each fitted on top of those before; `pipe` is left as found.

        Their `info` has the calibration prompts, and the mean misalignment distance before the round, of the probe and
        after, on these prompts and on all entities, at noise that was not searched with.

        Args:
            pipe: the pipeline. Deltas that are on are earlier rounds.
            concepts: what to remove, in this order.
            seed: of everything random.
            checkpoint: a folder from which the same call goes on after an interruption.
            entities: names of things, the first population of the search.
            broader: entity to its direct hypernyms, for crossover.
            composer: entities to the prompt that is trained on, such as a language model; None: the template.
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
