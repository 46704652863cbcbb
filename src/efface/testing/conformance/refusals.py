"""Promises about refusals."""

from __future__ import annotations

import re
from typing import Any

from ...families import OFFERS, lacking
from ...families import family as facts_of
from .trial import DoesNotApply, Trial


def refuses_what_it_cannot_do(trial: Trial) -> None:
    """Refuses a family exactly if the family lacks what the method needs, by a ValueError that says what is missing."""
    refusal(trial)


def refusal(trial: Trial) -> str:
    """The message by which the method refuses the pipeline; "" if it does not.

    Raises:
        ConformanceError: it refuses a family that offers what it needs, does not refuse one that lacks it, or does not
            say what is missing and what to do.
    """
    method, said = trial.method, ""
    lacks = lacking(method.needs, facts_of(trial.pipe).offers)
    try:
        method.apply(trial.pipe).remove()
    except ValueError as error:
        said = str(error)
    if not lacks:
        trial.require(
            not said, f"It refuses a family that offers what it needs: {said!r}. Name in `needs` what the family lacks."
        )
        return ""
    trial.require(
        bool(said), f"The family lacks {', '.join(lacks)}, but `apply` works. Call `super().check(pipe)` in `check`."
    )
    trial.require(
        names_what_is_missing(said, method, lacks) and two_sentences(said),
        f"The refusal {said!r} does not say who needs what, and what to do. Write two sentences: "
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
    """DoesNotApply if the method refuses the family for a good reason."""
    if said := refusal(trial):
        raise DoesNotApply(said)


def acts_without_guidance_or_refuses(trial: Trial) -> None:
    """Without guidance it acts, or a method that needs guidance raises a ValueError that names it."""
    method, scale = trial.method, facts_of(trial.pipe).scale
    with method.apply(trial.pipe):
        try:
            erased = trial.latents(guidance_scale=1.0)
        except ValueError as error:
            trial.require(
                bool(method.touches_uncond or method.guides) and scale in str(error) and two_sentences(str(error)),
                f"Without guidance the call fails: {str(error)!r}. A method with `guides` or `touches_uncond` may "
                f"refuse it in two sentences that name `{scale}`.",
            )
            return
    trial.require_effect(erased, trial.drawn(guidance_scale=1.0), "Without guidance the method")
