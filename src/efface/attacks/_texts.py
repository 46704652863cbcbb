"""Texts as a pipeline call gives them to its denoiser, with the erasers, and the pipelines for which that is known."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._condition import call_settings
from .._text import SITES
from .._weights import denoiser_of
from ..families import Family, encode_parameters, family

Parts = dict[str, Tensor]
"""What `encode_prompt` returned, by the names of `Family.returns`."""


@dataclass(frozen=True, eq=False)
class Texts:
    """An encoded text in equal rows: [n, L, D], pooled [n, P] and mask [n, L] if the family has them; and its words."""

    text: Tensor
    pooled: Tensor | None
    mask: Tensor | None
    prompt: str = ""

    def rows(self, n: int) -> Texts:
        """The first row, n times."""
        pooled, mask = (None if t is None else t[:1].repeat_interleave(n, 0) for t in (self.pooled, self.mask))
        return Texts(self.text[:1].repeat_interleave(n, 0), pooled, mask, self.prompt)


def encoded_parts(pipe: Any, texts: Sequence[str], guided: bool, settings: Mapping[str, Any] | None = None) -> Parts:
    """Texts through the pipeline's current `encode_prompt`, so that erasers that rewrite texts act on them.

    Args:
        pipe: the pipeline.
        texts: one per row.
        guided: whether the call has guidance.
        settings: arguments of the pipeline call that change how texts are encoded. Others have the call's defaults.
    """
    facts, call = family(pipe), encoding_call(pipe, texts, guided, settings)
    made = facts.unlisted(pipe.encode_prompt(**call), call)
    return {name: part for name, part in zip(facts.returns, made, strict=True) if part is not None}


def encoding_call(
    pipe: Any, texts: Sequence[str], guided: bool, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of `encode_prompt` in a call with these prompts; see `encoded_parts`."""
    call = family(pipe).encoding_arguments(pipe, texts, {**call_settings(pipe), **(settings or {})})
    if "do_classifier_free_guidance" in encode_parameters(pipe):
        call["do_classifier_free_guidance"] = guided
    return call


def encoded(pipe: Any, texts: Sequence[str], settings: Mapping[str, Any] | None = None) -> list[Texts]:
    """Each text as a guided call of the pipeline with this prompt alone encodes it, in one row."""
    together = (
        [list(texts)] if family(pipe).padded_to_limit else [[text] for text in texts]
    )  # or as long as the longest
    found = []
    for some in together:
        with torch.no_grad():
            made = encoded_parts(pipe, some, True, settings)
        columns = (made.get("pooled"), made.get("mask"))
        for k in range(len(some)):
            pooled, mask = (None if each is None else each[k : k + 1] for each in columns)
            found.append(Texts(made["text"][k : k + 1], pooled, mask, some[k]))
    return found


def applied_to(pipe: Any) -> list[Any]:
    """The erasers on a pipeline's denoiser."""
    return list(getattr(SITES.get(denoiser_of(pipe)), "applied", []))


def reading(pipe: Any, prompt: str, n: int, settings: Mapping[str, Any] | None = None) -> list[tuple[Any, Any]]:
    """The erasers that remember a prompt, each with its memory of a new call with this prompt in n rows.

    A denoiser call with another prompt than the pipeline's needs them. The pipeline's own call goes on as before.
    """
    applied = applied_to(pipe)
    if not any(each.reads_words for each in applied):
        return [(each, dict(each.prepared)) for each in applied if each.remembers]
    facts, kind = family(pipe), type(pipe)
    call = encoding_call(pipe, [prompt] * n, True, settings)
    bound = inspect.signature(kind.encode_prompt.__get__(pipe)).bind(**call)
    bound.apply_defaults()
    bound.arguments.setdefault("num_images_per_prompt", 1)
    found = []
    with torch.no_grad():
        made = facts.unlisted(kind.encode_prompt(pipe, **call), call)
        for each in applied:
            memory = dict(each.prepared)
            made = each.method.rewrite(pipe, made, bound, memory)
            if each.remembers:
                found.append((each, memory))
    return found


class Memories:
    """What erasers remember of texts that are predicted beside the pipeline's own, in one call of the pipeline.

    Args:
        pipe: the pipeline.
        settings: arguments of the pipeline call that change how texts are encoded.
    """

    def __init__(self, pipe: Any, settings: Mapping[str, Any]) -> None:
        self._pipe, self._settings = pipe, settings
        self._found: dict[tuple[Texts, int], list[tuple[Any, Any]]] = {}
        self._call: list[Any] = []  # the erasers' memories of the pipeline's own text

    def of(self, text: Texts, n: int) -> list[tuple[Any, Any]]:
        """The erasers that remember, each with its memory of this text in n rows."""
        call = [each.memory for each in applied_to(self._pipe)]
        if len(call) != len(self._call) or any(a is not b for a, b in zip(call, self._call, strict=True)):
            self._call = call
            self._found.clear()
        if (text, n) not in self._found:
            self._found[text, n] = reading(self._pipe, text.prompt, n, self._settings)
        return self._found[text, n]

    @contextlib.contextmanager
    def acting(self, text: Texts, n: int) -> Iterator[None]:
        """Gives the erasers their memories of this text inside the block."""
        found = self.of(text, n)
        outside = [applied.memory for applied, _ in found]
        try:
            for applied, memory in found:
                applied.memory = memory
            yield
        finally:
            for (applied, _), memory in zip(found, outside, strict=True):
                applied.memory = memory


def check_calls(pipe: Any) -> None:
    """Raises ValueError if an attack cannot call the denoiser by itself, with texts and latents as tensors."""
    facts = family(pipe)
    if type(facts).adapted is not Family.adapted:
        raise ValueError(
            f"Expected a denoiser that takes texts and latents as tensors, got that of a {type(pipe).__name__} "
            f"({facts.name}), which takes lists of rows. Use an attack that only calls the pipeline, such as "
            "best_of_n or image_to_image."
        )
