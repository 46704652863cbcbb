"""The negative prompt as an eraser: the baseline that every pipeline already has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from .._text import encode_call, fits
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
    """Guides away from the concept's phrases, in the user's negative prompt or with a separate strength.

        strength None:  e = e_n + s (e_p - e_n)                     e_n: the phrases, then the negative prompt
        a number s_n:   e = e_u + s (e_p - e_u) - s_n (e_n - e_u)   e_n: the phrases, e_u: the negative prompt

    e_p, e_u, e_n are predictions for texts, of noise or (SD 3, FLUX, CogView4) of velocity; s is the guidance scale.

    Source: common in Stable Diffusion tools. It replaces the unconditional text of classifier-free guidance (J. Ho, T.
    Salimans, 2022, arXiv 2207.12598, equation 6).

    Differs: None uses diffusers' `negative_prompt`, at no cost, with a strength that the guidance scale fixes. A number
    uses three predictions; with s_n = s it is e_u + s (e_p - e_n). In this form, phrases that do not fit into one text
    are split into several texts, whose predictions are averaged. `guidance_rescale` takes its target from the changed
    prediction, e_p - s_n / s (e_n - e_u). On FLUX, None needs true guidance: `true_cfg_scale` above 1 and a negative
    prompt in the call, for example "".

    If the prompt equals the concept's text, None has the effect of no guidance (e = e_p), and a number that of the
    guidance scale s - s_n. Only s_n >= s then removes the concept.

    EIUP's projected form on the same pipeline edits e_n and e_u like any negative prompt.

    Args:
        concepts: the concepts to erase: names of shipped concepts, `Concept` objects, or a sequence of them.
        strength: None, or s_n >= 0 in units of the guidance scale (7.5 is diffusers' default); 0 is the base model,
            without further rows. Change between None and a number only between pipeline calls.
        rows: one list of concepts per prompt of the batch, instead of `concepts` for all.

    Shapes: negative text embeddings [B, L, D]; with a number, predictions [B, C, h, w]. A number adds one denoiser row
    per conditional row: a step costs 1.5 times a base step (CogView4: two rows, 2 times). With None, if L depends on
    the longest text of a call (CogView4), every row's negative prompt is padded to it, as in diffusers.

    Raises:
        ValueError: there is no concept, or `strength` is below 0. On `apply`: the text encoder belongs to another
            model, or a tokenizer does not know characters of a phrase; for None, the phrases do not fit into one text;
            with a number, the pipeline does not expose its guidance scale (PixArt, FLUX). During a call: guidance is
            off (`guidance_scale <= 1`, FLUX without true guidance, or a guidance-distilled model), or the numbers of
            `rows` and prompts differ; for None, the call has `negative_prompt_embeds`; with a number, it has SD 3's
            `skip_guidance_layers`, or the denoiser is called without the pipeline before any call set a guidance scale.
        TypeError: the family of the pipeline is unknown, or `rows` or `concepts` are not lists of concepts.

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
        lambda self: ("guidance", "guidance_scale") if self.strength else ("guidance",), ("guidance",)
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
                    f"The phrases do not fit into one negative prompt: {checks.shown(words(concepts))}. Give fewer, or "
                    "a "
                    "`strength`, which takes several texts."
                )
        super().check(pipe)

    def guide(self, seen: Prediction) -> Tensor:
        if not torch.compiler.is_compiling() and not math.isfinite(seen.guidance_scale):
            raise ValueError(
                "NegativePrompt with a strength needs the guidance scale of a pipeline call, but the denoiser was "
                "called directly or by a copy of the pipeline. Call the pipeline that it was applied to, or use SLD."
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
        # SDXL and SD 3: a missing second or third one means the first
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
        """Encodes the call again, with the phrases added to its negative prompts, and returns the changed places."""
        embeds = "negative_prompt_embeds" if "negative_prompt_embeds" in arguments else "prompt_embeds"
        if arguments.get(embeds) is not None:
            raise ValueError(
                "NegativePrompt adds to `negative_prompt`, but the call gives `negative_prompt_embeds`. Give the text "
                "instead."
            )
        ours = [words(concepts) for concepts in ([self.concepts] * prompts if self.rows is None else self.rows)]
        # Changes the call's arguments, so that a second NegativePrompt on the pipeline adds to the first.
        for name in names:
            given = arguments.get(name) or ""
            texts = [given] * prompts if isinstance(given, str) else given
            arguments[name] = [", ".join(filter(None, pair)) for pair in zip(ours, texts, strict=True)]
        changed, found = encode_call(pipe, arguments), list(encoded)
        ours_at = torch.tensor([bool(text) for text in ours]).repeat_interleave(arguments["num_images_per_prompt"])
        for k in places:
            if encoded[k] is None or changed[k] is None or changed[k].shape != encoded[k].shape:
                # all rows are padded to the longest negative prompt, without a mask if all have its length
                found[k] = changed[k]
                continue
            mine = ours_at.to(encoded[k].device).reshape(-1, *[1] * (encoded[k].ndim - 1))
            found[k] = torch.where(mine, changed[k], encoded[k])  # SDXL: no negative prompt differs from an empty one
        return tuple(found)


def words(concepts: Sequence[Concept]) -> str:
    """The phrases as one text."""
    return ", ".join(phrase for concept in concepts for phrase in concept.phrases)
