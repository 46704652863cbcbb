"""Predicted noise: further rows of a denoiser call that show the concept, and what methods make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family
from .attention import ErasurePrompts, Text
from .contract import Contract, Prediction
from .prompts import Applied

Guiding = Sequence[tuple[Applied, Tensor | float]]
"""The methods that change this prediction, each with the weight of its window."""


def with_concepts(
    facts: Family, arguments: dict[str, Any], asked: Sequence[ErasurePrompts], rows: Sequence[Tensor], first: int
) -> dict[str, Any]:
    """The denoiser's arguments with further rows: for each text that is asked for, its rows once more with that text.

    Rows are counted from the `first` conditional one on.
    """
    text, mask, pooled = arguments[facts.text_argument], facts.text_mask(arguments), facts.pooled_text(arguments)
    length = max(text.shape[1], *(prompts.text.states.shape[1] for prompts in asked))
    made = [facts.lengthened(each.states, each.mask, length) for each in (Text(text, mask), *(p.text for p in asked))]
    given, *texts = [Text(*each) for each in made if each is not None]
    if len(texts) < len(asked):
        other = next(n for p in asked if (n := p.text.states.shape[1]) != text.shape[1])
        raise ValueError(
            f"The call's text has {text.shape[1]} tokens, but a concept's {other}, so they do not fit into one batch. "
            "Give a prompt of the ordinary length, or use method 'eiup' where it works."
        )
    again = first + torch.cat([r for prompts, r in zip(asked, rows, strict=True) for _ in range(len(prompts.text))])
    own = {name: value for name, value in arguments.items() if name not in facts.shared_arguments}
    found = arguments | {name: _with_rows(value, len(text), again) for name, value in own.items()}

    def each(values: Sequence[Tensor | None]) -> list[Tensor]:
        pairs = zip(values, rows, strict=True)
        return [value.repeat_interleave(len(r), 0) for value, r in pairs if value is not None]

    found[facts.text_argument] = torch.cat([given.states, *each([more.states for more in texts])])
    if pooled is not None:
        found = facts.with_pooled(found, torch.cat([pooled, *each([prompts.pooled for prompts in asked])]))
    if mask is not None:
        masks = [given.mask, *each([more.mask for more in texts])]
        found[facts.mask_argument] = torch.cat([seen.to(mask) for seen in masks if seen is not None])
    return found


def repelled_rows(guiding: Guiding, conditional: int, first: int) -> dict[int, int]:
    """The further rows, from `first` on, that guidance pushes away from, and the conditional row that each is for."""
    found: dict[int, int] = {}
    for applied, _ in guiding:
        for prompts in applied.acting:
            owners = range(conditional) if prompts.batch_rows is None else prompts.batch_rows
            for _ in range(len(prompts.text)):
                found |= {first + k: owner for k, owner in enumerate(owners) if applied.method.repels}
                first += len(owners)
    return found


def guided(
    out: Tensor,
    guiding: Guiding,
    rows: Sequence[Tensor],
    first: int,
    last: int,
    guidance_scale: float,
    time: Tensor,
) -> Tensor:
    """The prediction of the user's rows; the conditional ones, `first` to `last`, changed by what each method adds.

    `rows`: those of each of the methods' erasure prompts, as `with_concepts` had them. If all of the user's rows are
    conditional, as many unconditional ones stand right behind them.
    """
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    negative, prompt, further = wide[:first], wide[first:last], wide[last:]
    if not first:
        negative, further = further[:last], further[last:]
    places, changed = iter(rows), prompt
    for applied, weight in guiding:
        concept, count = torch.zeros_like(prompt), prompt.new_zeros(len(prompt), *[1] * (prompt.ndim - 1))
        for prompts in applied.acting:
            place = next(places)
            for _ in range(len(prompts.text)):
                concept = concept.index_add(0, place, further[: len(place)])
                count = count.index_add(0, place, torch.ones_like(count[: len(place)]))
                further = further[len(place) :]
        seen = Prediction(prompt, negative, concept / count.clamp(min=1), guidance_scale, time, applied.memory)
        changed = changed + torch.where(count > 0, weight * applied.method.guide(seen), 0)
    return torch.cat([out[:first], changed.to(out.dtype)])


def _with_rows(value: Any, rows: int, again: Tensor) -> Any:
    """An argument of the denoiser with some of its `rows` once more behind; what is not per row stays."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[again]]) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {name: _with_rows(each, rows, again) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_rows(each, rows, again) for each in value)
    return value


def needs_guidance(method: Contract, denoiser: nn.Module | None, facts: Family) -> str:
    """What is wrong with a call without unconditional rows, and what to do."""
    needs, name = f"{type(method).__name__} needs guidance", f"`{facts.scale}`"
    if facts.guidance_in_two_calls:
        return (
            f"{needs} with an unconditional prediction in each step of a pipeline's call. Set {name} above 1 and give "
            'a `negative_prompt`, for which "" will do (a model that is distilled to do without may draw worse with '
            "it), or use method 'safree'."
        )
    needs = f"{needs}, with conditional and unconditional rows in one batch of a call"
    other = "eiup" if facts.cross_attention else "safree"
    if denoiser is not None and facts.distilled(denoiser):
        return f"{needs}, but this denoiser is distilled to do without ({name} is its input). Use {other!r}."
    return (
        f"{needs} of the pipeline. Set {name} above 1 (a denoiser that is called by itself needs both kinds of rows in "
        f"`efface.conditional_rows`), or use method {other!r}."
    )
