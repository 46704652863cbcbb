"""Predicted noise: further rows of a denoiser call that show the concept, and what methods make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family
from .attention import ErasurePrompts
from .contract import Contract, Prediction
from .prompts import Applied

Guiding = Sequence[tuple[Applied, Tensor | float]]
"""The methods that change this prediction, each with the weight of its window."""

SHARED = ("img_ids", "txt_ids")  # arguments of a denoiser: positions, the same for all rows


def pooled_text(arguments: dict[str, Any]) -> Tensor | None:
    """The pooled text [B, P] among a denoiser's arguments."""
    pooled = (arguments.get("added_cond_kwargs") or {}).get("text_embeds")
    return arguments.get("pooled_projections") if pooled is None else pooled


def with_pooled(arguments: dict[str, Any], pooled: Tensor) -> dict[str, Any]:
    """The arguments with another pooled text."""
    if "pooled_projections" in arguments:
        return arguments | {"pooled_projections": pooled}
    return arguments | {"added_cond_kwargs": {**arguments["added_cond_kwargs"], "text_embeds": pooled}}


def with_concepts(
    arguments: dict[str, Any], asked: Sequence[ErasurePrompts], rows: Sequence[Tensor], first: int
) -> dict[str, Any]:
    """The denoiser's arguments with further rows: for each text that is asked for, its rows once more with that text.

    Rows are counted from the `first` conditional one on.
    """
    text, pooled = arguments["encoder_hidden_states"], pooled_text(arguments)
    for prompts in asked:
        if prompts.text.states.shape[1:] != text.shape[1:]:
            raise ValueError(
                f"The call's text has {text.shape[1]} tokens, but a concept's {prompts.text.states.shape[1]}, so they "
                "do not fit into one batch. Give a prompt of the ordinary length, or use method 'eiup' where it works."
            )
    again = first + torch.cat([r for prompts, r in zip(asked, rows, strict=True) for _ in range(len(prompts.text))])
    own = {name: value for name, value in arguments.items() if name not in SHARED}
    longer = arguments | {name: _with_rows(value, len(text), again) for name, value in own.items()}

    def each(values: Sequence[Tensor | None]) -> list[Tensor]:
        pairs = zip(values, rows, strict=True)
        return [value.repeat_interleave(len(r), 0) for value, r in pairs if value is not None]

    longer["encoder_hidden_states"] = torch.cat([text, *each([prompts.text.states for prompts in asked])])
    if pooled is not None:
        longer = with_pooled(longer, torch.cat([pooled, *each([prompts.pooled for prompts in asked])]))
    mask = arguments.get("encoder_attention_mask")
    if mask is not None and mask.ndim == 2:
        masks = each([prompts.text.mask for prompts in asked])
        longer["encoder_attention_mask"] = torch.cat([mask, *(each.to(mask) for each in masks)])
    return longer


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
    if facts.apart:
        return (
            f"{needs} with an unconditional prediction in each step of a pipeline's call. Set {name} above 1 and give "
            'a `negative_prompt`, for which "" will do (a model that is distilled to do without may draw worse with '
            "it), or use method 'safree'."
        )
    needs = f"{needs}, with conditional and unconditional rows in one batch of a call"
    other = "eiup" if facts.cross_attention else "safree"
    if getattr(getattr(denoiser, "config", None), "time_cond_proj_dim", None) is not None:
        return f"{needs}, but this denoiser is distilled to do without ({name} is its input). Use {other!r}."
    return (
        f"{needs} of the pipeline. Set {name} above 1 (a denoiser that is called by itself needs both kinds of rows in "
        f"`efface.conditional_rows`), or use method {other!r}."
    )
