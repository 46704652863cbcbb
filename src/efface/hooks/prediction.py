"""Predictions: further rows of denoiser calls for the concept, and the methods' use of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family
from .calls import Texts
from .contract import Contract, Prediction
from .prompts import Applied
from .texts import ErasurePrompts, Text

Guiding = Sequence[tuple[Applied, Tensor | float]]
"""The methods that change this prediction, with the weight of their windows."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Texts whose predictions a method needs, for some of the conditional rows.

    Args:
        prompts: N texts, each predicted for all of `rows`.
        rows: conditional rows, counted from 0, on the device: [R].
        owners: the same as numbers, if guidance pushes away from these predictions; otherwise empty.
    """

    prompts: ErasurePrompts
    rows: Tensor
    owners: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """The number of denoiser rows for the predictions."""
        return len(self.prompts.text) * len(self.rows)


def concepts_of(guiding: Guiding, every: Tensor) -> list[Asked]:
    """The needed predictions, in the order of the methods. `every`: all conditional rows, counted from 0."""
    found = []
    for applied, _ in guiding:
        for prompts in applied.acting:
            rows = every if prompts.at is None else prompts.at
            owners = range(len(every)) if prompts.batch_rows is None else prompts.batch_rows
            found.append(Asked(prompts, rows, tuple(owners) if applied.method.repels else ()))
    return found


def by_call(facts: Family, arguments: dict[str, Any], asked: Sequence[Asked]) -> list[list[int]]:
    """Groups texts that share a denoiser call: first those that fit into the current one, then the others by length.

    Texts of different lengths share a call if the family can lengthen them. In other families, padding changes the
    text.
    """
    given = Text(arguments[facts.text_argument], facts.text_mask(arguments))
    texts = [given, *(each.prompts.text for each in asked)]
    length = max(text.states.shape[1] for text in texts)
    if all(facts.lengthened(text.states, text.mask, length) is not None for text in texts):
        return [list(range(len(asked)))]
    found: dict[int, list[int]] = {given.states.shape[1]: []}
    for k, text in enumerate(texts[1:]):
        found.setdefault(text.states.shape[1], []).append(k)
    return list(found.values())


def negative_prompts(texts: Texts, conditional: int) -> list[ErasurePrompts]:
    """The negative prompt of each conditional row, if unconditional predictions have a separate call."""
    text, mask, pooled = texts.negative, texts.negative_mask, texts.negative_pooled
    if text is None:
        return []
    if conditional != len(text):
        raise ValueError(
            f"The call has {conditional} rows of prompts, but {len(text)} of negative prompts. Give one negative "
            "prompt per prompt."
        )
    rows = [slice(k, k + 1) for k in range(len(text))]
    return [ErasurePrompts(Text(text, mask)[row], (), pooled=None if pooled is None else pooled[row]) for row in rows]


def with_rows(
    facts: Family, arguments: dict[str, Any], asked: Sequence[Asked], first: int, *, alone: bool = False
) -> dict[str, Any]:
    """The denoiser's arguments with further rows: a copy of the rows for each needed text, with that text.

    Rows count from the `first` conditional row on. `alone` omits the current rows; all texts then have one length.
    """
    if not asked:
        return arguments
    text, mask, pooled = arguments[facts.text_argument], facts.text_mask(arguments), facts.pooled_text(arguments)
    texts = [*([] if alone else [Text(text, mask)]), *(each.prompts.text for each in asked)]
    length = max(each.states.shape[1] for each in texts)
    made = [facts.lengthened(each.states, each.mask, length) for each in texts]
    lengthened = [Text(*each) for each in made if each is not None]
    again = first + torch.cat([each.rows for each in asked for _ in range(len(each.prompts.text))])
    given, further = ([], lengthened) if alone else (lengthened[:1], lengthened[1:])

    def put(value: Tensor) -> Tensor:
        return value[again] if alone else torch.cat([value, value[again]])

    def each_row(values: Sequence[Tensor | None]) -> list[Tensor]:
        pairs = zip(values, asked, strict=True)
        return [value.repeat_interleave(len(each.rows), 0) for value, each in pairs if value is not None]

    own = {name: value for name, value in arguments.items() if name not in facts.shared_arguments}
    found = arguments | {name: in_rows(value, len(text), put) for name, value in own.items()}
    if any(each.mask is not None for each in lengthened):
        masks = [
            each.states.new_ones(each.states.shape[:2]).bool() if each.mask is None else each.mask
            for each in lengthened
        ]
        masks = [*masks[: len(given)], *each_row(masks[len(given) :])]
        found = facts.with_mask(found, torch.cat(masks) if mask is None else torch.cat(masks).to(mask))
    found[facts.text_argument] = torch.cat([*(t.states for t in given), *each_row([t.states for t in further])])
    if pooled is not None:
        pools = each_row([each.prompts.pooled for each in asked])
        found = facts.with_pooled(found, torch.cat(pools if alone else [pooled, *pools]))
    return found if length == text.shape[1] else facts.for_length(found, length)


def repelled_rows(asked: Sequence[Asked], first: int) -> dict[int, int]:
    """The further rows, from `first` on, that guidance pushes away from, and the conditional row of each."""
    found: dict[int, int] = {}
    for each in asked:
        for k in range(len(each.prompts.text)):
            found |= {first + k * len(each.rows) + n: owner for n, owner in enumerate(each.owners)}
        first += each.size
    return found


def guided(
    out: Tensor,
    negative: Tensor,
    concepts: Sequence[tuple[Asked, Tensor]],
    guiding: Guiding,
    guidance_scale: float,
    times: Sequence[Tensor],
) -> Tensor:
    """The prediction of the conditional rows `out` [B, ...] plus the change of each method.

    Args:
        out: the prediction of the conditional rows.
        negative: the unconditional prediction of the same rows.
        concepts: the result of `concepts_of`, each with its prediction [N * R, ...].
        guiding: the methods.
        guidance_scale: the guidance scale of the call.
        times: the time of each method.
    """
    dtype = torch.promote_types(out.dtype, torch.float32)
    prompt, negative, asked = out.to(dtype), negative.to(dtype), iter(concepts)
    changed = prompt
    for (applied, weight), time in zip(guiding, times, strict=True):
        concept, count = torch.zeros_like(prompt), prompt.new_zeros(len(prompt), *[1] * (prompt.ndim - 1))
        for _ in applied.acting:
            each, predicted = next(asked)
            for made in predicted.to(dtype).split(len(each.rows)):
                concept = concept.index_add(0, each.rows, made)
                count = count.index_add(0, each.rows, torch.ones_like(count[: len(made)]))
        seen = Prediction(prompt, negative, concept / count.clamp(min=1), guidance_scale, time, applied.memory)
        changed = changed + torch.where(count > 0, weight * applied.method.guide(seen), 0)
    return changed.to(out.dtype)


def in_rows(value: Any, rows: int, put: Callable[[Tensor], Tensor]) -> Any:
    """An argument of the denoiser for other rows. Arguments without rows stay."""
    if isinstance(value, Tensor):
        return put(value) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {name: in_rows(each, rows, put) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(in_rows(each, rows, put) for each in value)
    return value


def needs_guidance(method: Contract, denoiser: nn.Module | None, facts: Family) -> str:
    """The message for a call without unconditional rows."""
    needs, name, on = f"{type(method).__name__} needs guidance", f"`{facts.scale}`", facts.unguided
    if facts.guidance_in_two_calls:
        needs = f"{needs} with an unconditional prediction in each step of a pipeline call"
        if facts.returns_negative:
            return f"{needs}. Set {name} above {on}, or use a method without guidance."
        return (
            f'{needs}. Set {name} above {on} and give a `negative_prompt`, for example "" (a guidance-distilled model '
            "may draw worse with it), or use a method without guidance."
        )
    needs = f"{needs}, with conditional and unconditional rows in one batch of a call"
    if denoiser is not None and facts.distilled(denoiser):
        return f"{needs}, but this denoiser is guidance-distilled ({name} is its input). Use a method without guidance."
    return (
        f"{needs} of the pipeline. Set {name} above {on} (for direct denoiser calls, declare both kinds of rows in "
        "`efface.conditional_rows`), or use a method without guidance."
    )
