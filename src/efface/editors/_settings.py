"""The fields that ESD, SDD and CCRT share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

from .._text import check_phrases
from ..core import Concept, Concepts, as_concepts
from ..families import check, filled
from ._denoiser import Denoiser, Precision, Train

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Training:
    """The fields that ESD, SDD and CCRT share; None takes the value that suits the pipeline's family.

    Args:
        train: which weights: "x" all of cross-attention, "x-strict" its keys and values only, "u" all but
            cross-attention, time embedding and output layers, "self" self-attention, "full" everything.
        steps: updates; 0 learns nothing.
        lr: of AdamW, constant.
        batch: points in an update.
        reuse: updates that one trajectory serves.
        accumulate: parts in which an update's batch is computed; the same update with less memory.
        sampler_steps: steps of a full trajectory.
        guidance: of the trajectories; 1 is none.
        weight_decay: of AdamW, towards zero.
        clip: largest norm of a gradient; 0 does not clip.
        precision: "float32", "bfloat16" (autocast, trained tensors in float32), or "auto" by the pipeline's own.
        biases: whether biases and the scales of norms train too. A delta that changes them has no LoRA.
    """

    off: ClassVar[Mapping[str, Any] | None] = {"steps": 0}
    needs: ClassVar[tuple[str, ...]] = ("training",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Family -> the values that None stands for; "" for families not named."""

    train: Train = "x"
    steps: int | None = None
    lr: float | None = None
    batch: int | None = None
    reuse: int | None = None
    accumulate: int = 1
    sampler_steps: int | None = None
    guidance: float = 3.0
    weight_decay: float = 0.0
    clip: float = 0.0
    precision: Precision = "auto"
    biases: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("train", get_args(Train)), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Expected `{name}` to be one of {', '.join(choices)}, but got {getattr(self, name)!r}."
                )
        for name, least in (("steps", 0), ("batch", 1), ("reuse", 1), ("accumulate", 1), ("sampler_steps", 1)):
            if getattr(self, name) is not None or name == "accumulate":
                check_integer(name, getattr(self, name), least)
        for name in ("guidance", "weight_decay", "clip"):
            check_number(name, getattr(self, name))
        if type(self.biases) is not bool:
            raise ValueError(f"Expected `biases` to be True or False, but got {self.biases!r}. Give one of the two.")
        if self.lr is not None and not check_number("lr", self.lr) > 0:
            raise ValueError(f"Expected `lr` to be above 0, but got {self.lr!r}.")
        if self.guidance < 1:
            raise ValueError(f"Expected `guidance` to be at least 1 (no guidance), but got {self.guidance!r}.")

    def resolved(self, pipe: DiffusionPipeline) -> Self:
        """The same with the family's values where a field is None; `lr` is a third for "u" and "full".

        ValueError if the pipeline's denoiser cannot be trained.
        """
        check(self, pipe)
        method: Self = filled(self, pipe)
        if self.train in ("u", "full") and self.lr is None and method.lr is not None:
            return replace(method, lr=method.lr / 3)
        return method

    def denoiser(self, pipe: DiffusionPipeline, texts: Sequence[str]) -> Denoiser:
        """The pipeline's denoiser, for a fit with these settings, which have no None left."""
        return Denoiser(pipe, texts, self.train, self.sampler_steps or 1, self.precision, self.biases)


def check_integer(name: str, value: Any, least: int) -> None:
    """ValueError unless an integer >= least."""
    if type(value) is not int or value < least:
        raise ValueError(f"Expected `{name}` to be an integer >= {least}, but got {value!r}.")


def check_number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> float:
    """ValueError unless a finite number within the bounds."""
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"Expected `{name}` to be a number {bounds}, but got {value!r}.")
    return float(value)


def phrases(pipe: DiffusionPipeline, concepts: Concepts, *more: str) -> tuple[tuple[Concept, ...], list[str]]:
    """The concepts, and the texts that evoke them, each once; ValueError for what the pipeline cannot read.

    `more`: further texts that are checked as the phrases are.
    """
    found = as_concepts(concepts)
    if not found:
        raise ValueError("Expected at least one concept to erase, but got none.")
    texts = list(dict.fromkeys(phrase for concept in found for phrase in concept.phrases))
    check_phrases(pipe, [*texts, *more])
    return found, texts
