"""Follows loops over the steps that are not the pipeline's, such as those of modular pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .._text import SITES
from .._weights import denoiser_of
from ..families import encode_parameters, family
from . import watch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .denoiser import Site

GIVEN = {
    "text": "prompt_embeds",
    "pooled": "pooled_prompt_embeds",
    "negative": "negative_prompt_embeds",
    "negative_pooled": "negative_pooled_prompt_embeds",
}


class Loop:
    """A loop with separate denoiser calls for the conditional and for the unconditional rows.

    Args:
        pipe: the pipeline to which methods are applied. Its `encode_prompt` returns positive and negative prompts.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe, self.facts = pipe, family(pipe)

    @property
    def _site(self) -> Site | None:
        """The state of the methods; None without methods."""
        found: Site | None = SITES.get(denoiser_of(self.pipe))
        return found if found is not None and found.applied else None

    def begin(self, encoded: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Starts a call with encoded prompts, by the names of `Family.returns`, and returns them as methods changed
        them."""
        text = encoded["text"]
        taken = {n: p for n, p in encode_parameters(self.pipe).items() if n != "self"}
        arguments: dict[str, Any] = {n: None for n, p in taken.items() if p.default is p.empty}
        arguments |= {GIVEN[part]: value for part, value in encoded.items()}
        arguments |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": encoded["negative"] is not None}
        made = self.pipe.encode_prompt(**arguments, device=None if text is None else text.device)
        call = None if (found := self._site) is None else found.calls.call
        if call is not None and call.texts is not None:
            call.texts = replace(call.texts, apart=True)
        return dict(zip(self.facts.returns, made, strict=True))

    def step(self, step: int, steps: int, guidance_scale: float) -> None:
        """Called before the denoiser calls of each step."""
        if (found := self._site) is not None:
            call = found.calls.call
            if call is None or call.texts is None or not call.texts.apart:
                raise RuntimeError(watch.NOT_BEGUN)
            found.calls.at(call, step, steps)
            call.texts = replace(call.texts, guidance_scale=guidance_scale)

    def enter(self, denoiser: nn.Module) -> None:
        """Called before each denoiser call. Raises RuntimeError if the denoiser is not the pipeline's."""
        if getattr(denoiser, "_orig_mod", denoiser) is not denoiser_of(self.pipe):
            raise RuntimeError(watch.other_denoiser(self.facts.denoiser, type(self.pipe).__name__))
        if (found := self._site) is not None and found.calls.call is not None:
            found.calls.call.guarded = False

    def leave(self) -> None:
        """Called after each denoiser call. Raises RuntimeError if it did not pass the methods."""
        if (found := self._site) is not None and not (found.calls.call and found.calls.call.guarded):
            raise RuntimeError(watch.not_entered(self.facts.denoiser))
