"""The negative prompt, as an eraser: the baseline everyone already has."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any, ClassVar

from .._hooks import Hooked, site
from ..core import Concepts, as_concepts
from ..families import family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["NegativePrompt"]


@dataclass(frozen=True)
class NegativePrompt(Hooked):
    """Puts the concept's phrases into the negative prompt, behind the user's own.

        e = e_n + s (e_p - e_n)        e_n: prediction for the negative prompt, s: guidance scale

    Paper: none of its own; the use of the unconditional branch of classifier-free guidance (J. Ho, T. Salimans, 2022,
    arXiv 2207.12598, equation 6) that Stable Diffusion tools made common.

    Differs: nothing; this is diffusers' `negative_prompt`. Its strength is tied to the guidance scale.

    Args:
        concepts: what to erase: names of shipped concepts, `Concept` objects, or a sequence of them.

    Shapes: negative text embeddings [B, L, D].

    Raises:
        ValueError: no concept; during a call: guidance off (`guidance_scale <= 1`), or `negative_prompt_embeds` given.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.NegativePrompt("alcohol").apply(pipe):
        ...     image = pipe("a night at the pub", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    off: ClassVar[dict[str, Any] | None] = None
    touches_uncond: ClassVar[bool] = True

    concepts: Concepts = ()  # type: ignore[assignment]

    def rewrite(self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: BoundArguments) -> tuple[Any, ...]:
        arguments = call.arguments
        if not arguments["do_classifier_free_guidance"]:
            raise ValueError("NegativePrompt needs guidance: set `guidance_scale` above 1, or use method 'eiup'.")
        if arguments.get("negative_prompt_embeds") is not None:
            raise ValueError(
                "NegativePrompt adds to `negative_prompt`, but the call gives `negative_prompt_embeds`: give the text."
            )
        words = ", ".join(phrase for concept in as_concepts(self.concepts) for phrase in concept.phrases)
        prompts = len(encoded[0]) // arguments["num_images_per_prompt"]
        # The call's own arguments are changed, so that a second negative prompt on the pipeline adds to the first.
        for name in ("negative_prompt", "negative_prompt_2"):  # SDXL's second: None stands for the first
            if name == "negative_prompt" or arguments.get(name) is not None:
                given = arguments.get(name) or ""
                texts = [given] * prompts if isinstance(given, str) else given
                arguments[name] = [f"{text}, {words}" if text else words for text in texts]
        if isinstance(arguments["prompt"], str):
            arguments["prompt"] = [arguments["prompt"]]
        negative = site(pipe).original_encode(pipe)(**arguments)
        if family(pipe).masked:
            return (encoded[0], encoded[1], negative[2], negative[3])
        return (encoded[0], negative[1], *((encoded[2], negative[3]) if len(encoded) > 2 else ()))
