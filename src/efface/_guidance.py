"""Predicted noise: further rows of a denoiser call that show the concept, and what methods make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._attention import Term
from ._method import Method, Prediction
from ._prompts import Entry
from .families import Family

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
    arguments: dict[str, Any], terms: Sequence[Term], rows: Sequence[Tensor], first: int, masked: bool
) -> dict[str, Any]:
    """The denoiser's arguments with further rows: for each text of each term, its rows once more, with that as text.

    Rows are counted from the `first` conditional one on.
    """
    text, pooled = arguments["encoder_hidden_states"], pooled_text(arguments)
    for term in terms:
        if term.text.shape[1:] != text.shape[1:]:
            raise ValueError(
                f"The call's text has {text.shape[1]} tokens, but a concept's {term.text.shape[1]}, so they do "
                "not fit into one batch. Give a prompt of the ordinary length, or use method 'eiup' where it works."
            )
    again = first + torch.cat([r for term, r in zip(terms, rows, strict=True) for _ in term.text])
    own = {name: value for name, value in arguments.items() if name not in SHARED}
    longer = arguments | {name: _with_rows(value, len(text), again) for name, value in own.items()}

    def asked(part: str) -> list[Tensor]:
        found = ((getattr(term, part), len(r)) for term, r in zip(terms, rows, strict=True))
        return [values.repeat_interleave(n, 0) for values, n in found]

    longer["encoder_hidden_states"] = torch.cat([text, *asked("text")])
    if pooled is not None:
        longer = with_pooled(longer, torch.cat([pooled, *asked("pooled")]))
    if masked:
        mask = arguments["encoder_attention_mask"]
        longer["encoder_attention_mask"] = torch.cat([mask, *(each.to(mask) for each in asked("mask"))])
    return longer


def repelled_rows(guiding: Sequence[tuple[Entry, Tensor | float]], prompts: int, first: int) -> dict[int, int]:
    """The further rows, from `first` on, that guidance pushes away from, and the conditional row that each is for."""
    found: dict[int, int] = {}
    for entry, _ in guiding:
        for term in entry.acting:
            owners = range(prompts) if term.images is None else term.images
            for _ in term.text:
                found |= {first + k: owner for k, owner in enumerate(owners) if entry.eraser.repels}
                first += len(owners)
    return found


def guided(
    out: Tensor,
    guiding: Sequence[tuple[Entry, Tensor | float]],
    rows: Sequence[Tensor],
    first: int,
    last: int,
    guidance_scale: float,
    time: Tensor,
) -> Tensor:
    """The prediction of the user's rows; the conditional ones, `first` to `last`, changed by what each method adds.

    `guiding`: the methods with the weight of their window; `rows`: those of each of their terms, as `with_concepts` had
    them. If all of the user's rows are conditional, as many unconditional ones stand right behind them.
    """
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    negative, prompt, further = wide[:first], wide[first:last], wide[last:]
    if not first:
        negative, further = further[:last], further[last:]
    places, changed = iter(rows), prompt
    for entry, weight in guiding:
        concept, count = torch.zeros_like(prompt), prompt.new_zeros(len(prompt), *[1] * (prompt.ndim - 1))
        for term in entry.acting:
            place = next(places)
            for _ in term.text:
                concept = concept.index_add(0, place, further[: len(place)])
                count = count.index_add(0, place, torch.ones_like(count[: len(place)]))
                further = further[len(place) :]
        seen = Prediction(prompt, negative, concept / count.clamp(min=1), guidance_scale, time, entry.memory)
        changed = changed + torch.where(count > 0, weight * entry.eraser.guide(seen), 0)
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


def needs_guidance(eraser: Method, denoiser: nn.Module | None, facts: Family) -> str:
    """What is wrong with a call without unconditional rows, and what to do."""
    needs, name = f"{type(eraser).__name__} needs guidance", f"`{facts.scale}`"
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
