"""Promises about several methods and several pipelines."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from ... import registry
from ..drawing import CAT, change, snapshot
from ..tiny import pipeline
from .refusals import refusal
from .trial import ROUNDING, Trial, changed


def comes_off_in_any_order(trial: Trial, other: Any = None) -> None:
    """With a second method, either can be removed first, and the remaining one draws as if alone.

    Args:
        trial: the trial of the first method.
        other: the second method. None: the same method for another concept.
    """
    a, b = trial.method, changed(trial.method, concepts=[CAT]) if other is None else other
    names = f"{type(a).__name__} and {type(b).__name__}"
    cure = "Keep no state outside of `memory`."
    on_a, on_b = a.apply(trial.pipe), b.apply(trial.pipe)
    both = trial.latents()
    on_a.remove()
    trial.require_equal(
        trial.latents(), trial.drawn(b), f"Of {names} the first was removed, and the second differs. {cure}"
    )
    on_a = a.apply(trial.pipe)  # now b, a
    on_b.remove()
    trial.require_equal(
        trial.latents(), trial.drawn(a), f"Of {names} the second was removed, and the first differs. {cure}"
    )
    on_b = b.apply(trial.pipe)
    trial.require_equal(trial.latents(), both, f"{names} were applied again and draw another picture. {cure}")
    on_b.remove()  # last in, first out
    trial.require_equal(
        trial.latents(), trial.drawn(a), f"Of {names} the last was removed, and the other differs. {cure}"
    )
    on_a.remove()
    trial.require_equal(
        trial.latents(), trial.drawn(), f"{names} were removed, and the base model draws another picture."
    )
    for alone in (a, b):
        trial.require_effect(both, trial.drawn(alone), f"With {type(alone).__name__} the other of {names}")


def goes_with_shipped_methods(trial: Trial) -> None:
    """Can be removed in any order together with each native method that works on the family.

    Leaves out native methods that draw the base picture, because they find no concept in random texts.
    """
    base = trial.drawn()
    for name in registry.methods("erasers"):
        other = registry.resolve(name)
        if other.__module__.startswith(f"{registry.__name__.partition('.')[0]}.") and other is not type(trial.method):
            beside = dataclasses.replace(trial, method=other([CAT]))
            if not refusal(beside) and change(trial.drawn(beside.method), base) > ROUNDING:
                comes_off_in_any_order(trial, beside.method)


def may_be_on_twice(trial: Trial) -> None:
    """The same object can be applied twice, and is removed one at a time."""
    first, second = trial.method.apply(trial.pipe), trial.method.apply(trial.pipe)
    trial.latents()
    second.remove()
    trial.require_equal(
        trial.latents(), trial.drawn(trial.method), "Applied twice and removed once, it draws another picture."
    )
    first.remove()
    trial.require_equal(
        trial.latents(), trial.drawn(), "Applied twice and removed twice, it changes the base model's picture."
    )


def come_off_shuffled(trials: Sequence[Trial], seed: int = 0) -> None:
    """Many methods on one pipeline can be removed in a random order. Skips methods that refuse the family."""
    trial = trials[0]
    before = snapshot(trial.pipe)
    handles = [each.method.apply(each.pipe) for each in trials if not refusal(each)]
    trial.require_effect(trial.latents(), trial.drawn(), "All methods together")
    random.Random(seed).shuffle(handles)
    last = handles.pop()
    for handle in handles:
        handle.remove()
    trial.require_equal(
        trial.latents(),
        trial.drawn(last.eraser),
        f"{type(last.eraser).__name__} remains and draws another picture than alone.",
    )
    last.remove()
    trial.require_equal(
        trial.latents(), trial.drawn(), "All methods were removed, and the base model draws another picture."
    )
    trial.require_restored(before)


def pipelines_are_apart(trial: Trial) -> None:
    """It acts only on its pipeline."""
    other, cat, family = pipeline(trial.family), changed(trial.method, concepts=[CAT]), trial.family
    there = dataclasses.replace(trial, pipe=other)
    with trial.method.apply(trial.pipe):
        trial.require_equal(there.latents(), trial.drawn(), f"It also acts on another {family} pipeline.")
        with cat.apply(other):
            said = f"On two {family} pipelines for two concepts, one changes what the other draws."
            trial.require_equal(trial.latents(), trial.drawn(trial.method), said)
            trial.require_equal(there.latents(), trial.drawn(cat), said)
        trial.require_equal(
            trial.latents(),
            trial.drawn(trial.method),
            f"After removal from another {family} pipeline, it draws another picture.",
        )
