"""The negative prompt, as an eraser: the baseline everyone already has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._text import fits, own_encode
from ..core import Concept, ConceptsField, RowsField
from ..families import family
from ..fields import Converted
from ..hooks import Memory, Method, Prediction, computed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["NegativePrompt"]

NEGATIVE = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")


@dataclass(frozen=True)
class NegativePrompt(Method):
    """Guides away from the concept's phrases: in the user's negative prompt, or with a strength of their own.

        strength None:  e = e_n + s (e_p - e_n)                     e_n: the phrases, the negative prompt behind them
        a number s_n:   e = e_u + s (e_p - e_u) - s_n (e_n - e_u)   e_n: the phrases, e_u: the negative prompt

    e_p, e_u, e_n are predictions for texts, of noise or (SD 3, FLUX, CogView4) of velocity; s is the guidance scale.

    Source: Stable Diffusion tools made it common. It puts a text into the unconditional branch of classifier-free
    guidance (J. Ho, T. Salimans, 2022, arXiv 2207.12598, equation 6).

    Differs: None is diffusers' `negative_prompt`, costs nothing, and its strength is tied to the guidance scale. A
    number is the form with three predictions; with s_n = s it is e_u + s (e_p - e_n). There, phrases that do not fit
    into one text make several, whose predictions are averaged, and `guidance_rescale` takes its target from the
    changed prediction, e_p - s_n / s (e_n - e_u). On FLUX, None works with true guidance: `true_cfg_scale` above 1 and
    a negative prompt in the call, for which "" will do.

    If the prompt is the concept's own text, None draws it with guidance off (e = e_p), and a number with the guidance
    scale s - s_n: only s_n = s and above turns away from it.

    With EIUP's projected form on the same pipeline, what e_n or e_u shows of EIUP's concept is taken out of it, as of
    any negative prompt.

    Args:
        concepts: what to erase: names of shipped concepts, `Concept` objects, or a sequence of them.
        strength: None, or s_n >= 0 in units of the guidance scale (7.5 is diffusers' default); 0 is the plain pipeline,
            without rows of its own. Between None and a number it is changed between two calls of the pipeline.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: negative text embeddings [B, L, D]; with a number, predictions [B, C, h, w], one row more per conditional
    row, so a step costs 1.5 times as much (CogView4: two rows, twice as much). With None, where L depends on the
    longest text of a call (CogView4), every row's negative prompt is padded to it, as in diffusers.

    Raises:
        ValueError: no concept, a strength below 0; on `apply`: a text encoder of another model, or a phrase with
            characters that a tokenizer does not know; for None: phrases that do not fit into one text; with a number: a
            pipeline that does not tell its guidance scale (PixArt, FLUX);
            during a call: guidance off (`guidance_scale <= 1`, FLUX without true guidance, or a model that is distilled
            to do without), or `rows` that are not as many as the prompts; for None, `negative_prompt_embeds` given;
            with a number, SD 3's `skip_guidance_layers`, or a denoiser called by itself, when no call has set a
            guidance scale.
        TypeError: a pipeline of another family; `rows` or concepts that are no lists of concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.NegativePrompt("alcohol").apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = {"strength": 0.0}
    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {"a strength of its own": {"strength": 1.0}}
    needs: ClassVar[tuple[str, ...]] = computed(
        lambda self: ("guidance", "guidance_scale") if self.strength else ("guidance",)
    )
    guides: ClassVar[bool] = computed(lambda self: self.strength is not None)
    repels: ClassVar[bool] = computed(lambda self: self.strength is not None)
    touches_uncond: ClassVar[bool] = computed(lambda self: self.strength is None)
    negates: ClassVar[bool] = computed(lambda self: self.strength is None)

    concepts: ConceptsField = Converted(())
    strength: float | None = None
    rows: RowsField = Converted(None)

    @property
    def wants_guidance(self) -> bool:
        return not self.is_off()

    def check(self, pipe: DiffusionPipeline) -> None:
        for concepts in {self.concepts} if self.rows is None else set(self.rows):
            if self.strength is None and not fits(pipe, words(concepts)):
                raise ValueError(
                    f"The phrases do not fit into one negative prompt, and what is over the limit would be cut: "
                    f"{words(concepts)!r}. Give fewer, or a `strength`, which takes several texts."
                )
        super().check(pipe)

    def guide(self, seen: Prediction) -> Tensor:
        if not torch.compiler.is_compiling() and not math.isfinite(seen.guidance_scale):
            raise ValueError(
                "NegativePrompt with a strength of its own needs the guidance scale of a pipeline's call, but the "
                "denoiser was called by itself or by a copy of the pipeline. Call the pipeline that it was applied to, "
                "or use SLD."
            )
        return -(self.strength or 0.0) / seen.guidance_scale * (seen.concept - seen.negative)

    def rewrite(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: BoundArguments, memory: Memory
    ) -> tuple[Any, ...]:
        if self.strength is not None:
            return encoded
        facts = family(pipe)
        if not facts.returns_negative:
            return encoded
        arguments = call.arguments
        # SDXL and SD 3: no second or third one stands for the first
        names = [n for n in NEGATIVE if n == NEGATIVE[0] or arguments.get(n)]
        if isinstance(arguments["prompt"], str):
            arguments["prompt"] = [arguments["prompt"]]
        prompts = len(encoded[0]) // arguments["num_images_per_prompt"]
        places = [k for k, part in enumerate(facts.returns) if part.startswith("negative")]
        return self._added(pipe, encoded, arguments, names, prompts, places)

    def negate(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: BoundArguments, prompts: int
    ) -> tuple[Any, ...]:
        if self.strength is not None:
            return encoded
        names = [n for n in ("prompt", "prompt_2") if n == "prompt" or call.arguments.get(n)]
        places = [k for k, part in enumerate(family(pipe).returns) if part in ("text", "mask", "pooled")]
        return self._added(pipe, encoded, call.arguments, names, prompts, places)

    def _added(
        self,
        pipe: DiffusionPipeline,
        encoded: tuple[Any, ...],
        arguments: dict[str, Any],
        names: list[str],
        prompts: int,
        places: list[int],
    ) -> tuple[Any, ...]:
        """What was `encoded`, with the phrases added to the `arguments` of these names, which shows in these places."""
        embeds = "negative_prompt_embeds" if "negative_prompt_embeds" in arguments else "prompt_embeds"
        if arguments.get(embeds) is not None:
            raise ValueError(
                "NegativePrompt adds to `negative_prompt`, but the call gives `negative_prompt_embeds`. Give the text."
            )
        ours = [words(concepts) for concepts in ([self.concepts] * prompts if self.rows is None else self.rows)]
        # The call's own arguments are changed, so that a second negative prompt on the pipeline adds to the first.
        for name in names:
            given = arguments.get(name) or ""
            texts = [given] * prompts if isinstance(given, str) else given
            arguments[name] = [", ".join(filter(None, pair)) for pair in zip(ours, texts, strict=True)]
        changed, found = own_encode(pipe)(**arguments), list(encoded)
        ours_at = torch.tensor([bool(text) for text in ours]).repeat_interleave(arguments["num_images_per_prompt"])
        for k in places:
            if changed[k].shape != encoded[k].shape:  # all rows are padded to the longest negative prompt
                found[k] = changed[k]
                continue
            mine = ours_at.to(encoded[k].device).reshape(-1, *[1] * (encoded[k].ndim - 1))
            found[k] = torch.where(mine, changed[k], encoded[k])  # SDXL: no negative prompt is not an empty one
        return tuple(found)


def words(concepts: Sequence[Concept]) -> str:
    """The phrases as one text."""
    return ", ".join(phrase for concept in concepts for phrase in concept.phrases)
