"""Promises about the rows of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import Concept
from ...families import family as facts_of
from ...fields import field_names
from ..drawing import ALCOHOL, CAT, PROMPT, PROMPTS, change, denoiser_of
from .trial import ROUNDING, DoesNotApply, Trial, changed


def first_prediction(trial: Trial) -> Tensor:
    """The denoiser's predictions in the first step: unconditional rows, then conditional rows."""
    seen: list[Tensor] = []
    watch = denoiser_of(trial.pipe).register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        # an empty negative prompt would hide edits, because some methods skip its rows
        trial.latents(PROMPTS, negative_prompt=["a big dog", "wine"])
    finally:
        watch.remove()
    return seen[0] if len(seen[0]) == 2 * len(PROMPTS) else torch.cat(seen[1::-1])  # two calls: FLUX


def touches_unconditional_rows_only_if_declared(trial: Trial) -> None:
    """Changes unconditional rows only if it declares `touches_uncond`."""
    method = trial.method
    if "guidance" not in facts_of(trial.pipe).offers:
        raise DoesNotApply("The pipelines of this family have no unconditional rows.")
    strong = {"strength": 16.0, "warmup": 0.0, "window": (0.0, 1.0)}  # it is the first step
    own = field_names(method)
    with contextlib.suppress(ValueError):  # a method with a smaller range is tried with its own strength
        method = changed(method, **{name: strong[name] for name in strong if name in own and getattr(method, name)})
    base = first_prediction(trial)
    with method.apply(trial.pipe):
        erased = first_prediction(trial)
    trial.require(
        len(base) == 2 * len(PROMPTS), "The denoiser was called with other rows than those of the call. Call it once."
    )
    n = len(PROMPTS)
    if method.touches_uncond:
        for after, before in zip(erased[:n], base[:n], strict=True):
            trial.require_effect(after, before, "`touches_uncond` is True, but on an unconditional row the method")
    else:
        trial.require_unchanged(
            erased[:n],
            base[:n],
            "Unconditional rows change. Change conditional rows only, or set `touches_uncond = True`.",
        )
        for after, before in zip(erased[n:], base[n:], strict=True):
            trial.require_effect(after, before, "On a conditional row the method")


def images_per_prompt_are_rows(trial: Trial) -> None:
    """With `num_images_per_prompt=2` it draws the same pictures as for each prompt given twice."""
    repeated = tuple(prompt for prompt in PROMPTS for _ in range(2))
    if change(trial.drawn(prompt=PROMPTS, num_images_per_prompt=2), trial.drawn(prompt=repeated)) > ROUNDING:
        raise DoesNotApply("The family's own pipeline draws images of a prompt with masks of another.")
    with trial.method.apply(trial.pipe):
        erased = trial.latents(PROMPTS, num_images_per_prompt=2)
    far = change(erased, trial.drawn(trial.method, prompt=repeated))
    trial.require(
        far < ROUNDING,
        f"Two images of a prompt differ from the prompt given twice, by {far:.1e} of their size. Treat each row of the "
        "batch separately.",
    )
    trial.require_effect(erased, trial.drawn(prompt=repeated))


def a_row_is_the_row_alone(trial: Trial) -> None:
    """Draws each row of a batch as if alone. With `rows`, draws a row without concepts like the base model."""
    method, prompts = trial.method, (*PROMPTS, "a dog")
    with method.apply(trial.pipe):
        together = trial.latents(prompts)
    _require_rows_alone(trial, together, prompts, [[method]] * len(prompts))
    if "rows" not in field_names(method):
        return
    rows: list[list[Concept]] = [[ALCOHOL], [CAT, ALCOHOL], []]
    with changed(method, concepts=(), rows=rows).apply(trial.pipe):
        together = trial.latents(prompts)
    base = trial.drawn(prompt=prompts)
    trial.require_unchanged(
        together[2], base[2], "A row without concepts changes. Change only the rows that you receive."
    )
    for k in (0, 1):
        trial.require_effect(together[k], base[k], f"In row {k} of a batch the method")
    _require_rows_alone(trial, together, prompts, [[changed(method, concepts=row)] if row else [] for row in rows])


def _require_rows_alone(
    trial: Trial, together: Tensor, prompts: Sequence[str], methods: Sequence[Sequence[Any]]
) -> None:
    """Raises ConformanceError unless each row equals the picture of its methods for its prompt alone."""
    for k, (prompt, on) in enumerate(zip(prompts, methods, strict=True)):
        far = float((together[k] - trial.drawn(*on, prompt=prompt, seed=k)[0]).abs().max())
        trial.require(
            far < 1e-4,
            f"Row {k} of a batch differs by {far:.1e} from the same row alone. Take no mean, sum or maximum over the "
            "rows of the batch. If the method has a threshold, which turns rounding into a difference, test it with "
            "values far from the threshold.",
        )


def rows_count_prompts(trial: Trial) -> None:
    """`rows` has one entry per prompt, for any number of images. Another number raises ValueError."""
    if "rows" not in field_names(trial.method):
        raise DoesNotApply("The method has no field `rows`.")
    with trial.method.apply(trial.pipe) as handle:
        handle.rows = [[], [ALCOHOL]]
        erased = trial.latents(PROMPTS, num_images_per_prompt=2)
        base = trial.drawn(prompt=PROMPTS, num_images_per_prompt=2)
        trial.require_unchanged(erased[:2], base[:2], "Images of a prompt without concepts change.")
        for k in (2, 3):
            trial.require_effect(erased[k], base[k], f"On image {k} the method")
        one_each = len(trial.latents(PROMPTS, num_images_per_prompt=1))
        trial.require(one_each == 2, f"Two prompts give {one_each} pictures. Return as many rows as you receive.")
        try:
            trial.latents([PROMPT] * 3)
        except ValueError as error:
            trial.require(
                "`rows` has 2 entries, but the call has 3 prompts" in str(error),
                f"Two rows for three prompts raise {str(error)!r}. Let `Method` place the rows.",
            )
        else:
            trial.require(False, "Two rows for three prompts are accepted. Let `Method` place the rows.")
        handle.rows = None
        trial.require_equal(
            trial.latents(), trial.drawn(trial.method), "After setting `rows` back to None the picture differs."
        )
