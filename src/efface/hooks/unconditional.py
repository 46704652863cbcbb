"""Compares the text of unconditional rows with the empty text."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._text import encode, encode_empty, encoding_settings, places
from ..families import encode_parameters, family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Unconditional:
    """The empty text of a call, and the unconditional rows with another text.

    The empty text is that of unconditional rows without a negative prompt: the encoded "", or its replacement (SDXL
    base: zeros). `text` [B, L, D], or [1, L, D] if all rows share it; `mask` [B or 1, L] if the denoiser masks text;
    `others` are the rows that a negative prompt changes.
    """

    text: Tensor
    mask: Tensor | None
    others: tuple[int, ...]


SAME = 1e-4  # a text within this relative distance of the empty one counts as empty


@torch.no_grad()
def unconditional(
    pipe: DiffusionPipeline,
    call: inspect.BoundArguments,
    negative: Tensor,
    negative_mask: Tensor | None,
    untouched: bool,
) -> Unconditional:
    """The text of a call's unconditional rows without a negative prompt, and the rows with another text.

    Args:
        pipe: the pipeline.
        call: the arguments of its `encode_prompt`, with guidance on.
        negative: [B, L, D], the text of the unconditional rows, from any source.
        negative_mask: its mask [B, L], if the denoiser masks text.
        untouched: whether the pipeline itself made `negative` from these arguments.
    """
    given = [value for name, value in call.arguments.items() if name.startswith("negative")]
    nothing = untouched and all(_is_empty(value) for value in given)
    if getattr(pipe.config, "force_zeros_for_empty_prompt", False):  # SDXL base: "" is not the same as None
        nothing = untouched and all(value is None for value in given)
    mask = None if negative_mask is None else negative_mask.bool()
    settings = encoding_settings(call)
    length = max(columns.stop for columns, _ in places(pipe, **settings).values())
    if nothing and negative.shape[1] == length:
        empty, empty_mask = negative.detach(), mask
    else:  # encoded as in the pipeline, in a batch of the same size, so that it is bitwise equal
        defaults = {n: None if p.default is p.empty else p.default for n, p in encode_parameters(pipe).items()}
        texts = ("prompt", "pooled", "negative")  # texts, embeddings and masks
        arguments = {name: defaults[name] if name.startswith(texts) else v for name, v in call.arguments.items()}
        arguments["prompt"] = [""] * (len(negative) // call.arguments["num_images_per_prompt"])
        encoded = encode_empty(pipe, arguments, settings)
        parts = dict(zip(family(pipe).returns, encoded, strict=True))
        empty, empty_mask = parts["negative"], parts["negative_mask"].bool() if family(pipe).masked else None
    others = () if nothing else _other_rows(negative, mask, empty, empty_mask)
    if bool((empty == empty[:1]).all()) and (empty_mask is None or bool((empty_mask == empty_mask[:1]).all())):
        empty, empty_mask = empty[:1], None if empty_mask is None else empty_mask[:1]
    return Unconditional(empty, empty_mask, others)


@torch.no_grad()
def unconditional_alone(
    pipe: DiffusionPipeline, call: inspect.BoundArguments, negative: Tensor, negative_mask: Tensor | None
) -> Unconditional:
    """As `unconditional`, if the negative prompts [B, L, D] have a separate `encode_prompt` call."""
    written = [value for name, value in call.arguments.items() if name.startswith("prompt")]
    mask = None if negative_mask is None else negative_mask.bool()
    if all(_is_empty(value) for value in written):
        return Unconditional(negative.detach(), mask, ())
    made = encode(pipe, [""], constant=True, **encoding_settings(call))
    longer = family(pipe).lengthened(made.text, made.mask, negative.shape[1])
    if longer is None:
        return Unconditional(made.text, made.mask, tuple(range(len(negative))))
    text, empty_mask = longer
    if empty_mask is not None:  # padding of negative prompts without a mask is compared as tokens
        mask = torch.ones_like(negative[..., 0], dtype=torch.bool) if mask is None else mask
        empty_mask = empty_mask.expand_as(mask)
    return Unconditional(text, empty_mask, _other_rows(negative, mask, text.expand_as(negative), empty_mask))


def _is_empty(negative: Any) -> bool:
    """Whether a negative prompt is empty. Embeddings count as not empty."""
    if isinstance(negative, Tensor):
        return False
    return not negative or (not isinstance(negative, str) and not any(negative))


def _other_rows(text: Tensor, mask: Tensor | None, empty: Tensor, empty_mask: Tensor | None) -> tuple[int, ...]:
    """The rows [B, L, D] that differ from those of `empty` by more than rounding."""
    if text.shape != empty.shape:
        return tuple(range(len(text)))
    wide, wide_empty = text.float().flatten(1), empty.to(text.device).float().flatten(1)
    other = (wide - wide_empty).norm(dim=1) > SAME * wide_empty.norm(dim=1)
    if mask is not None and empty_mask is not None:
        other = other | (mask != empty_mask.to(mask.device)).any(1)
    return tuple(other.nonzero().flatten().tolist())
