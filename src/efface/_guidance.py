"""Predicted noise: further rows of a denoiser call that show the concept, and what methods make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._attention import Term
from ._method import Method, Prediction
from ._prompts import Entry


def with_concepts(
    arguments: dict[str, Any], terms: Sequence[Term], rows: Sequence[Tensor], first: int, masked: bool
) -> dict[str, Any]:
    """The denoiser's arguments with further rows: for each text of each term, its rows once more, with that as text.

    Rows are counted from the `first` conditional one on.
    """
    text, more = arguments["encoder_hidden_states"], arguments.get("added_cond_kwargs") or {}
    for term in terms:
        if term.text.shape[1:] != text.shape[1:]:
            raise ValueError(
                f"The call's text has {text.shape[1]} tokens, but a concept's {term.text.shape[1]}, so they do "
                "not fit into one batch: give a prompt of the ordinary length, or use method 'eiup'."
            )
    again = first + torch.cat([r for term, r in zip(terms, rows, strict=True) for _ in term.text])
    longer = {name: _with_rows(value, len(text), again) for name, value in arguments.items()}

    def asked(part: str) -> list[Tensor]:
        found = ((getattr(term, part), len(r)) for term, r in zip(terms, rows, strict=True))
        return [values.repeat_interleave(n, 0) for values, n in found]

    longer["encoder_hidden_states"] = torch.cat([text, *asked("text")])
    if "text_embeds" in more:
        longer["added_cond_kwargs"]["text_embeds"] = torch.cat([more["text_embeds"], *asked("pooled")])
    if masked:
        mask = arguments["encoder_attention_mask"]
        longer["encoder_attention_mask"] = torch.cat([mask, *(each.to(mask) for each in asked("mask"))])
    return longer


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
    them.
    """
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    negative, prompt, further = wide[:first], wide[first:last], wide[last:]
    places, changed = iter(rows), prompt
    for entry, weight in guiding:
        concept, count = torch.zeros_like(prompt), torch.zeros_like(prompt[:, :1, :1, :1])
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


def needs_guidance(eraser: Method, denoiser: nn.Module | None) -> str:
    """What is wrong with a call without unconditional rows, and what to do."""
    needs = f"{type(eraser).__name__} needs guidance, with conditional and unconditional rows in one batch of a call"
    if getattr(getattr(denoiser, "config", None), "time_cond_proj_dim", None) is not None:
        return f"{needs}, but this denoiser is distilled to do without (`guidance_scale` is its input): use 'eiup'."
    return (
        f"{needs} of the pipeline: set `guidance_scale` above 1 (a denoiser called by itself does not do), or use "
        "method 'eiup'."
    )
