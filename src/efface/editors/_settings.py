"""The fields that ESD, SDD and CCRT share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

from .. import checks
from .._text import check_phrases
from ..core import Concept, Concepts, as_concepts
from ..families import check, filled
from ._denoiser import Denoiser, Precision, Train

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class FamilyDefaults:
    """An editor with fields that may be None, which means the default of the pipeline's family."""

    def resolved(self, pipe: DiffusionPipeline) -> Self:
        """Replaces fields that are None by the family's values.

        Raises ValueError if the pipeline lacks what the editor needs.
        """
        check(self, pipe)
        method: Self = filled(self, pipe)
        return method


@dataclass(frozen=True)
class Training(FamilyDefaults):
    """The fields that ESD, SDD and CCRT share. None means the default of the pipeline's family.

    Args:
        train: the trained weights: "x" all of cross-attention, "x-strict" its keys and values only, "u" all but
            cross-attention, time embedding and output layers, "self" self-attention, "full" everything. In joint
            attention, "x" is the queries, keys and values of the text (add_q_proj, add_k_proj, add_v_proj). There
            "x-strict" is its keys and values. The mode "joint" adds to_q, to_k and to_v to "x"; text and picture share
            these in the single blocks of FLUX. There "u" is all but "x" and the layers around the blocks, and "self" is
            attention of the picture alone (SD 3.5 Medium).
        steps: updates; 0 learns nothing.
        lr: of AdamW, constant.
        batch: points per update.
        reuse: updates that one trajectory serves.
        accumulate: number of parts of an update's batch. More parts give the same update with less memory.
        sampler_steps: steps of a full trajectory.
        guidance: guidance scale of the trajectories; 1 means no guidance.
        weight_decay: weight decay of AdamW, towards zero.
        clip: largest norm of a gradient; 0 means no clipping.
        precision: "float32", "bfloat16" (autocast, trained tensors in float32), or "auto", which follows the pipeline.
        biases: whether biases and the scales of norms also train. A delta with these changes cannot be exported as a
            LoRA.
    """

    off: ClassVar[Mapping[str, Any] | None] = {"steps": 0}
    needs: ClassVar[tuple[str, ...]] = ("training|flow_training",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Family -> the default values; "" for all other families."""

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
        checks.choice("train", self.train, get_args(Train))
        checks.choice("precision", self.precision, get_args(Precision))
        checks.choice("biases", self.biases, (True, False))
        checks.each(self, checks.whole, "steps", least=0)
        checks.each(self, checks.whole, "batch", "reuse", "accumulate", "sampler_steps")
        checks.each(self, checks.number, "weight_decay", "clip", least=0)
        checks.each(self, checks.number, "guidance", least=1)
        checks.each(self, checks.number, "lr", least=0, above=True)

    def resolved(self, pipe: DiffusionPipeline) -> Self:
        """Replaces fields that are None by the family's values. `lr` is a third for "u" and "full".

        Raises ValueError if the pipeline's denoiser cannot be trained.
        """
        method = super().resolved(pipe)
        if self.train in ("u", "full") and self.lr is None and method.lr is not None:
            return replace(method, lr=method.lr / 3)
        return method

    def denoiser(self, pipe: DiffusionPipeline, texts: Sequence[str]) -> Denoiser:
        """The pipeline's denoiser for a fit with these resolved settings."""
        return Denoiser(pipe, texts, self.train, self.sampler_steps or 1, self.precision, self.biases)


def phrases(pipe: DiffusionPipeline, concepts: Concepts, *more: str) -> tuple[tuple[Concept, ...], list[str]]:
    """The concepts and their phrases, each once. Raises ValueError for texts that the pipeline cannot read.

    `more`: further texts for the same checks.
    """
    found = as_concepts(concepts)
    if not found:
        raise ValueError("Expected at least one concept to erase, got none. Name one.")
    texts = list(dict.fromkeys(phrase for concept in found for phrase in concept.phrases))
    check_phrases(pipe, [*texts, *more])
    return found, texts
