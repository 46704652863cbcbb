"""Reads the outputs of cross-attention layers while the pipeline draws, and gathers their moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from .._text import check_bare, check_phrases
from .._weights import layer_names
from ..core import Concept, Concepts, ConceptsField, as_concepts
from ..families import check, family
from ..fields import Converted, computed
from ..hooks import DenoiserCall, Memory, Method
from ._training import telling, unobserved

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SUBJECTS: tuple[str, ...] = (
    *("a dog", "a tree", "a house", "a car", "an apple"),
    *("a chair", "a bird", "a clock", "a flower", "a boat"),
)
See = Callable[[str, float, Tensor, Sequence[int]], None]
"""Receives a module, the time in the denoiser's unit, its output [B, Q, C], and the numbers of the B texts."""


@dataclass(frozen=True, eq=False)
class _Reading(Method):
    """Passes the outputs of modules on conditional rows to `see`, and changes nothing."""

    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    counts_steps: ClassVar[bool] = True
    steers: ClassVar[tuple[str, ...]] = computed(lambda self: tuple(self.modules))

    concepts: ConceptsField = Converted(())
    window: tuple[float, float] = (0.0, 1.0)
    modules: tuple[str, ...] = ()
    see: Callable[[str, float, Tensor], None] = field(default=lambda *_: None)

    def check(self, pipe: DiffusionPipeline) -> None:
        """Its concept is never encoded, so only the needs count."""
        check(self, pipe)

    def around(self, call: DenoiserCall, forward: Callable[[], Any]) -> Any:
        call.memory["timestep"] = float(call.timestep)
        return forward()

    def steer(self, out: Tensor, module: str, row_concepts: Sequence[tuple[Concept, ...]], memory: Memory) -> Tensor:
        self.see(module, memory["timestep"], out.detach())
        return out


def wanted(pipe: DiffusionPipeline, concepts: Concepts, *texts: str) -> tuple[Concept, ...]:
    """The concepts of a fit that reads outputs.

    Raises:
        ValueError: there is no concept, a run-time eraser is applied, or the encoder cannot read a text.
    """
    found = as_concepts(concepts)
    if not found:
        raise ValueError("Expected at least one concept to erase, got none. Name one.")
    check_bare(pipe)
    check_phrases(pipe, list(dict.fromkeys([*(p for concept in found for p in concept.phrases), *texts])))
    return found


@torch.no_grad()
def read(
    pipe: DiffusionPipeline,
    texts: Sequence[str],
    see: See,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    batch: int,
    window: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Draws one picture for each text and seed, and shows the outputs of all cross-attention layers to `see`.

    Args:
        pipe: the pipeline, which stays unchanged.
        texts, seeds: the prompt and the seed of each picture.
        see: receives the outputs.
        steps, guidance: of the drawing.
        batch: pictures per pipeline call, at most.
        window: the part of the steps that is shown.
    """
    shadow, modules, here = unobserved(pipe), layer_names(pipe), list[int]()
    call = {**family(pipe).guided(guidance), "num_inference_steps": steps, "output_type": "latent"}
    watching = _Reading(Concept("a picture"), window, modules, lambda m, t, out: see(m, t, out, here))
    with watching.apply(shadow), telling("drawing the model's pictures") as tell:
        for k in range(0, len(texts), batch):
            here[:] = range(k, min(k + batch, len(texts)))
            generators = [torch.Generator().manual_seed(seeds[i]) for i in here]
            shadow([texts[i] for i in here], generator=generators, **call)
            tell(here[-1] + 1, len(texts))


@dataclass
class Moments:
    """The sum, the number and, if asked for, the second moment of tokens."""

    second: bool = True
    n: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(1))
    square: Tensor = field(default_factory=lambda: torch.zeros(1))

    def add(self, x: Tensor) -> None:
        """Adds tokens [..., C]."""
        rows = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        self.n += len(rows)
        self.total = self.total + rows.sum(0).double().cpu()
        if self.second:
            self.square = self.square + (rows.T @ rows).double().cpu()

    @property
    def mean(self) -> Tensor:
        """[C], float64."""
        if not self.n or not bool(self.total.isfinite().all()):
            raise ValueError(
                "The layers' outputs are missing or not finite, so there is nothing to learn from. Use more "
                "`sampler_steps`, a wider `window`, or load the model in float32."
            )
        return self.total / self.n

    @property
    def covariance(self) -> Tensor:
        """[C, C], float64."""
        return self.square / self.n - torch.outer(self.mean, self.mean)


def moments(pipe: DiffusionPipeline, texts: Sequence[str], second: bool = True, **drawing: Any) -> dict[str, Moments]:
    """The moments of each cross-attention layer's output tokens, by its name. `drawing`: see `read`."""
    found: dict[str, Moments] = {}
    read(pipe, texts, lambda m, _, out, __: found.setdefault(m, Moments(second)).add(out), **drawing)
    return found


def check_drawing(editor: Any) -> None:
    """Checks the fields that describe a drawing: `sampler_steps`, `guidance` and `batch`."""
    checks.each(editor, checks.whole, "sampler_steps", "batch")
    checks.each(editor, checks.number, "guidance", least=1)


def turns(texts: Sequence[str], n: int) -> list[str]:
    """n texts, each in turn."""
    return [texts[k % len(texts)] for k in range(n)]


def surrogate(
    target: Moments, anchor: Moments, general: Moments, /, rank: int, surrogate_rank: int
) -> dict[str, Tensor]:
    """The parts of the form "surrogate" without `centre` and `slope`, in float64. See `efface.GLoCE`."""
    spread = target.covariance
    v_t, v_s = principal(spread, rank), principal(anchor.covariance, surrogate_rank)
    apart = target.mean - general.mean
    return {
        "toward": v_s.T,
        "read": v_s - v_s @ v_t.T @ v_t,
        "target": target.mean,
        "surrogate": anchor.mean,
        "general": general.mean,
        "gate": principal(spread + torch.outer(apart, apart), 1),
    }


def principal(covariance: Tensor, rank: int) -> Tensor:
    """The first principal components [R, D], orthonormal."""
    return torch.linalg.eigh(covariance).eigenvectors[:, -rank:].T
