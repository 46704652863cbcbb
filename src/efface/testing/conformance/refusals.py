"""Promises about refusals."""

from __future__ import annotations

import re
from typing import Any

from ...families import OFFERS, lacking
from ...families import family as facts_of
from .trial import DoesNotApply, Trial


def refuses_what_it_cannot_do(trial: Trial) -> None:
    """Refuses a family exactly if it lacks the method's needs, with a ValueError that names them."""
    refusal(trial)


def refusal(trial: Trial) -> str:
    """The method's refusal of the pipeline; "" if it does not refuse.

    Raises:
        ConformanceError: the method refuses a family that meets its needs, does not refuse one that lacks them, or
            names neither cause nor cure.
    """
    method, said = trial.method, ""
    lacks = lacking(method.needs, facts_of(trial.pipe).offers)
    try:
        method.apply(trial.pipe).remove()
    except ValueError as error:
        said = str(error)
    if not lacks:
        trial.require(
            not said, f"It refuses a family that meets its needs, with {said!r}. Name the missing offers in `needs`."
        )
        return ""
    trial.require(
        bool(said), f"The family lacks {', '.join(lacks)}, but `apply` works. Call `super().check(pipe)` in `check`."
    )
    trial.require(
        names_what_is_missing(said, method, lacks) and two_sentences(said),
        f"The refusal {said!r} lacks the need or the cure. Write two sentences: "
        f'"{type(method).__name__} needs ..., but ... Use ..."',
    )
    return said


def names_what_is_missing(said: str, method: Any, lacks: tuple[str, ...]) -> bool:
    words = [[OFFERS[name].words for name in need.split("|")] for need in lacks]
    return said.startswith(type(method).__name__) and all(word in said for each in words for word in each)


def two_sentences(said: str) -> bool:
    """Whether a message has at least two sentences: the cause, and the cure."""
    return len(re.findall(r"[.?!](?=\s|$)", said)) >= 2


def suits(trial: Trial) -> None:
    """Raises DoesNotApply if the method refuses the family for a good reason."""
    if said := refusal(trial):
        raise DoesNotApply(said)


def acts_without_guidance_or_refuses(trial: Trial) -> None:
    """Without guidance it acts, or raises a ValueError that names the need of guidance."""
    method, scale = trial.method, facts_of(trial.pipe).scale
    with method.apply(trial.pipe):
        try:
            erased = trial.latents(guidance_scale=1.0)
        except ValueError as error:
            trial.require(
                bool(method.touches_uncond or method.guides) and scale in str(error) and two_sentences(str(error)),
                f"Without guidance the call fails with {str(error)!r}. A method with `guides` or `touches_uncond` may "
                f"refuse it in two sentences that name `{scale}`.",
            )
            return
    trial.require_effect(erased, trial.drawn(guidance_scale=1.0), "Without guidance the method")
