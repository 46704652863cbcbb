"""The denoiser's inputs besides latents and time, outside of a pipeline's call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._text import check_bare, check_whole, encode
from .families import Family, encode_parameters, family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Condition:
    """The denoiser's inputs besides latents and time, one row per text. Row 0 is unconditional."""

    text: Tensor
    added: dict[str, Tensor]
    facts: Family

    def at(self, rows: Tensor) -> dict[str, Any]:
        """The keyword arguments of a denoiser call for these rows."""
        rows = rows.to(self.text.device)
        return self.facts.training_arguments(self.text[rows], {name: v[rows] for name, v in self.added.items()})


def call_settings(pipe: Any) -> dict[str, Any]:
    """The pipeline call's values of the arguments that change how texts are encoded, where `encode_prompt` differs."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    call, taken = inspect.signature(type(pipe).__call__).parameters, encode_parameters(pipe)
    both = [name for name in family(pipe).settings if name in call and name in taken]
    if not (is_bs4_available() and is_ftfy_available()):
        both = [name for name in both if name != "clean_caption"]  # the pipeline then leaves it out, with a warning
    return {name: call[name].default for name in both if call[name].default != taken[name].default}


def condition(pipe: DiffusionPipeline, texts: Sequence[str]) -> Condition:
    """Texts as the denoiser gets them in a pipeline call, after the unconditional row of such a call.

    The pipeline's family must offer `training`.

    Raises:
        ValueError: run-time erasers are applied, or a text has no tokens or is over the encoder's limit.
    """
    check_bare(pipe)
    facts, settings = family(pipe), call_settings(pipe)
    check_whole(pipe, texts, settings)
    call = facts.encoding_arguments(pipe, list(texts) if facts.returns_negative else ["", *texts], settings)
    if "do_classifier_free_guidance" in call:
        call["do_classifier_free_guidance"] = True
    with torch.no_grad():
        made = dict(zip(facts.returns, pipe.encode_prompt(**call), strict=True))
    pairs = {"text": "negative", "pooled": "negative_pooled", "mask": "negative_mask"}.items()
    if facts.returns_negative:
        parts = {name: torch.cat([made[negative][:1], made[name]]) for name, negative in pairs if name in made}
    else:
        parts = {name: made[name] for name, _ in pairs if name in made}
    return Condition(parts["text"], facts.training_added(pipe, parts), facts)


def learned_condition(pipe: DiffusionPipeline, texts: Sequence[str]) -> Condition:
    """As `condition`, of these texts alone, with gradients for learned words in them."""
    made, facts = encode(pipe, texts, differentiable=True, **call_settings(pipe)), family(pipe)
    named = {"text": made.text, "pooled": made.pooled, "mask": made.mask}
    parts = {name: value for name, value in named.items() if value is not None}
    return Condition(made.text, facts.training_added(pipe, parts), facts)
