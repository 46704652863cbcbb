"""Promises about several methods, and several pipelines."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from ... import registry
from ..drawing import CAT, snapshot
from ..tiny import pipeline
from .refusals import refusal
from .trial import Trial, changed


def comes_off_in_any_order(trial: Trial, other: Any = None) -> None:
    """With a second method on, either can come off first, and what stays draws what it draws alone.

    Args:
        trial: of the first method.
        other: the second method; None: the same one for another concept.
    """
    a, b = trial.method, changed(trial.method, concepts=[CAT]) if other is None else other
    names = f"{type(a).__name__} and {type(b).__name__}"
    cure = "Keep no state outside of `memory`."
    on_a, on_b = a.apply(trial.pipe), b.apply(trial.pipe)
    both = trial.latents()
    on_a.remove()
    trial.require_equal(
        trial.latents(), trial.drawn(b), f"Of {names} the first came off, and the second differs. {cure}"
    )
    on_a = a.apply(trial.pipe)  # now b, a
    on_b.remove()
    trial.require_equal(
        trial.latents(), trial.drawn(a), f"Of {names} the second came off, and the first differs. {cure}"
    )
    on_b = b.apply(trial.pipe)
    trial.require_equal(trial.latents(), both, f"{names} were put on again and draw another picture. {cure}")
    on_b.remove()  # last in, first out
    trial.require_equal(trial.latents(), trial.drawn(a), f"Of {names} the last came off, and the other differs. {cure}")
    on_a.remove()
    trial.require_equal(trial.latents(), trial.drawn(), f"{names} are off, and the base model draws another picture.")
    for alone in (a, b):
        trial.require_effect(both, trial.drawn(alone), f"Beside {type(alone).__name__} the other of {names}")


def goes_with_shipped_methods(trial: Trial) -> None:
    """Comes off in any order beside each of Efface's own methods that works on the family."""
    for name in registry.methods("erasers"):
        other = registry.resolve(name)
        if other.__module__.startswith(f"{registry.__name__.partition('.')[0]}.") and other is not type(trial.method):
            beside = dataclasses.replace(trial, method=other([CAT]))
            if not refusal(beside):
                comes_off_in_any_order(trial, beside.method)


def may_be_on_twice(trial: Trial) -> None:
    """The same object may be on a pipeline twice, and comes off one at a time."""
    first, second = trial.method.apply(trial.pipe), trial.method.apply(trial.pipe)
    trial.latents()
    second.remove()
    trial.require_equal(trial.latents(), trial.drawn(trial.method), "On twice and off once, it draws another picture.")
    first.remove()
    trial.require_equal(trial.latents(), trial.drawn(), "On twice and off twice, the base model draws another picture.")


def come_off_shuffled(trials: Sequence[Trial], seed: int = 0) -> None:
    """Many methods on one pipeline come off in a random order; those that refuse the family are left out."""
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
        f"{type(last.eraser).__name__} is left alone and draws another picture.",
    )
    last.remove()
    trial.require_equal(
        trial.latents(), trial.drawn(), "All methods are off, and the base model draws another picture."
    )
    trial.require_restored(before)


def pipelines_are_apart(trial: Trial) -> None:
    """It acts on the pipeline that it was applied to, and on no other."""
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
            f"Taken off another {family} pipeline, it draws another picture.",
        )
