"""Semantic Surgery: subtracts the concept from the prompt's text states, by as much as the prompt points to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from .._text import encode, encoding_settings, fits
from ..core import Concept, Concepts, ConceptsField, RowsField
from ..families import family
from ..fields import Converted
from ..hooks import Memory, Method

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SemanticSurgery"]


@dataclass(frozen=True)
class SemanticSurgery(Method):
    """Estimates whether a prompt holds the concept, and subtracts the concept's text from the prompt's if it does.

    e_P, e_C, e_0 [L, D] are the states of the prompt, a phrase C and the empty text:

        s_C     = mean over the columns of cos(e_C - e_0, e_P)
        alpha_C = sigmoid((s_C - threshold) / gamma)
        e_P     = e_P - strength alpha (e_J - e_0)

    J is one text with all phrases whose alpha_C is at least 1/2, joined by ", "; alpha is the largest alpha_C. If no
    phrase reaches 1/2, the prompt stays unchanged, bitwise. With alpha = 1, a prompt that is the joined text becomes
    the empty text.

    Paper: L. Xiong, C. Liu, J. Ye, Y. Liu, Y. Xu, 2025, "Semantic Surgery: Zero-Shot Concept Erasure in Diffusion
    Models", NeurIPS, arXiv 2510.22851. The formulas are those of the authors' code, which has beta = -threshold; the
    equation numbers were not available.

    Differs: the feedback loop, which asks a detector about the finished picture and draws again, is omitted. In the
    code, it accepts any class of NudeNet, and its second picture starts from other noise. `strength` is Efface's; 1 is
    the paper's form. The code takes one prompt per call and SD 1.4 only. On PixArt, columns of padding, which
    the denoiser does not read, do not count. Pooled texts (SDXL, SD 3, FLUX) are not edited.

    Limits: gamma is small, so the test is nearly a step at `threshold`, which depends on the text encoder and the kind
    of concept. The padding of a text has most of its columns and dominates the mean. The method reads words: on `emoji`
    at its default, prompts that name alcohol are above the threshold, and prompts that only imply it are below. This
    implementation has not been measured on a large model.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them. Each
            phrase is compared with the prompt.
        strength: >= 0, the factor of the subtraction; 1 is the paper's. 0 is the base model bitwise.
        threshold: in [-1, 1], the mean cosine at which alpha is 1/2. The paper has 0.06 (nudity), 0.12 (objects), 0.28
            (celebrities) and 0.3 (styles). None: 0.42 on `emoji`, 0.12 elsewhere.
        gamma: > 0, in units of the cosine, how slowly alpha rises; the paper has 0.02.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: states [B, L, D]. It costs one pass of the text encoder per pipeline call, and nothing per step. It acts in
    pipeline calls (or after `encode_prompt`), not in direct denoiser calls. A change of `strength` or `rows` on the
    handle acts from the next pipeline call on.

    Raises:
        ValueError: a concept is unknown, a field is out of range, or there is no concept. On `apply`: the pipeline pads
            texts to different lengths (CogView4), the phrases of a concept list do not fit into one text, or a phrase
            has no tokens. During a call: the numbers of `rows` and prompts differ.
        RuntimeError: the denoiser is called directly, without the prompts' `encode_prompt`.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.SemanticSurgery("alcohol").apply(pipe):
        ...     image = pipe("a glass of wine", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    needs: ClassVar[tuple[str, ...]] = ("padded_text",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"threshold": 0.42},
        "SD 1.x/2.x": {"threshold": 0.12},  # the paper's for objects
        "": {"threshold": 0.12},
    }

    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    threshold: float | None = None
    gamma: float = 0.02
    rows: RowsField = Converted(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            object.__setattr__(self, "threshold", checks.number("threshold", self.threshold, -1, 1))
        object.__setattr__(self, "gamma", checks.number("gamma", self.gamma, 0, above=True))

    @classmethod
    def nudity(cls, concepts: Concepts, **fields: Any) -> SemanticSurgery:
        """Uses the paper's threshold for nudity, for CLIP's text encoder in SD 1.4."""
        return cls(concepts, **{"threshold": 0.06, **fields})

    @classmethod
    def objects(cls, concepts: Concepts, **fields: Any) -> SemanticSurgery:
        """Uses the paper's threshold for objects, for CLIP's text encoder in SD 1.4."""
        return cls(concepts, **{"threshold": 0.12, **fields})

    @classmethod
    def celebrities(cls, concepts: Concepts, **fields: Any) -> SemanticSurgery:
        """Uses the paper's threshold for celebrities, for CLIP's text encoder in SD 1.4."""
        return cls(concepts, **{"threshold": 0.28, **fields})

    @classmethod
    def styles(cls, concepts: Concepts, **fields: Any) -> SemanticSurgery:
        """Uses the paper's threshold for styles, for CLIP's text encoder in SD 1.4."""
        return cls(concepts, **{"threshold": 0.3, **fields})

    def check(self, pipe: DiffusionPipeline) -> None:
        super().check(pipe)
        for concepts in {self.concepts} if self.rows is None else set(self.rows):
            if concepts and not fits(pipe, joined := ", ".join(_phrases(concepts))):
                raise ValueError(
                    f"SemanticSurgery joins the phrases into one text, but {checks.shown(joined)} is over the text "
                    "encoder's limit. Give fewer phrases, or apply two erasers."
                )

    def rewrite(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: BoundArguments, memory: Memory
    ) -> tuple[Any, ...]:
        facts = family(pipe)
        place = facts.returns.index("text")
        states: Tensor = encoded[place]
        masks = encoded[facts.returns.index("mask")] if facts.masked else torch.ones(states.shape[:2])
        images, settings = call.arguments["num_images_per_prompt"], encoding_settings(call)
        rows = [self.concepts] * (len(states) // images) if self.rows is None else self.rows
        changed = [states[k * images : (k + 1) * images] for k in range(len(rows))]
        for k, concepts in enumerate(rows):
            if concepts and not self.is_off():
                changed[k] = self._operated(pipe, changed[k], masks[k * images], _phrases(concepts), settings)
        memory["rows"] = len(states)
        return (*encoded[:place], torch.cat(changed), *encoded[place + 1 :])

    def reread(self, text: Tensor, pooled: Tensor | None, time: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        if memory.get("rows") != len(text):  # the denoiser was called directly
            raise RuntimeError(
                f"SemanticSurgery edits prompts in `encode_prompt`, but edited {memory.get('rows', 0)} of the "
                f"{len(text)} in this denoiser call. Call the pipeline, or `pipe.encode_prompt` with these prompts "
                "before the denoiser."
            )
        return text, pooled

    def _operated(
        self, pipe: DiffusionPipeline, states: Tensor, mask: Tensor, phrases: Sequence[str], settings: dict[str, Any]
    ) -> Tensor:
        """The states [images, L, D] of one prompt without the phrases that it holds."""
        *found, empty = encode(pipe, [*phrases, ""], constant=True, **settings).text.to(states)
        read = mask.to(states.device).bool()
        differences = torch.stack(found) - empty
        presence = presences(states[0, read], differences[:, read], self.threshold or 0.0, self.gamma)
        held = [phrase for phrase, alpha in zip(phrases, presence.tolist(), strict=True) if alpha >= 0.5]
        if not held:
            return states
        joined = encode(pipe, [", ".join(held)], **settings).text[0].to(states)
        return states - self.strength * presence.max().to(states) * (joined - empty)


def presences(prompt: Tensor, concepts: Tensor, threshold: float, gamma: float) -> Tensor:
    """alpha_C [K] for a prompt [L, D] and the differences e_C - e_0 [K, L, D]. A column without difference counts 0."""
    wide = torch.promote_types(prompt.dtype, torch.float32)
    similar = torch.cosine_similarity(concepts.to(wide), prompt.to(wide), dim=-1).mean(-1)
    return torch.sigmoid((similar - threshold) / gamma)


def _phrases(concepts: Sequence[Concept]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(phrase for concept in concepts for phrase in concept.phrases))
