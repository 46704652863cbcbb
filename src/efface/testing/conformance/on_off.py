"""Promises about applying and removing a method."""

from __future__ import annotations

import inspect
import json
from typing import Any

from ... import registry
from ...core import Concept, Handle
from ...families import family as facts_of
from ...families import lacking
from ...fields import field_names
from ..drawing import PROMPTS, snapshot
from .refusals import names_what_is_missing
from .trial import DoesNotApply, Trial, changed


class _Stop(KeyboardInterrupt):
    """An interruption by the user during a call."""


def restores(trial: Trial) -> None:
    """Acts inside its `with` block, and restores weights, hooks and pictures bitwise."""
    before = snapshot(trial.pipe)
    with trial.method.apply(trial.pipe):
        erased = trial.latents()
    trial.require_effect(erased, trial.drawn())
    trial.require_equal(trial.latents(), trial.drawn(), "After `remove()` the base model draws another picture.")
    trial.require_restored(before)


def restores_after_an_exception(trial: Trial) -> None:
    """Restores everything when a pipeline call is interrupted."""

    def stop(*_: Any) -> None:
        raise _Stop

    before = snapshot(trial.pipe)
    called = inspect.signature(type(trial.pipe).__call__).parameters
    callback: dict[str, Any] = {"callback_on_step_end" if "callback_on_step_end" in called else "callback": stop}
    try:
        with trial.method.apply(trial.pipe):
            trial.latents(**callback)
    except _Stop:
        pass
    else:
        trial.require(
            False, "An exception during a call does not reach the caller. Catch only exceptions that you raise."
        )
    trial.require_restored(before)
    trial.require_equal(trial.latents(), trial.drawn(), "After an exception the base model draws another picture.")


def acts_until_removed(trial: Trial) -> None:
    """Acts from `apply` to `remove`. A second `remove` has no effect, and a removed handle cannot be changed."""
    handle: Handle = trial.method.apply(trial.pipe)
    trial.require_effect(trial.latents(), trial.drawn())
    handle.remove()
    handle.remove()
    trial.require_equal(trial.latents(), trial.drawn(), "After `remove()` the base model draws another picture.")
    try:
        handle.strength = 1.0
    except ValueError as error:
        trial.require("already removed" in str(error), f"A removed handle raises {str(error)!r}. Use `Handle`.")
    else:
        trial.require(False, "A removed handle can be changed. Return the handle of `Method.apply`.")


def off_is_the_base_model(trial: Trial) -> None:
    """With the field values of `off` it draws the base model's pictures, bitwise."""
    if trial.method.off is None:
        raise DoesNotApply("`off` is None, so no setting makes the method the identity.")
    with changed(trial.method, **trial.method.off).apply(trial.pipe):
        found = trial.latents(PROMPTS)
    trial.require_equal(
        found,
        trial.drawn(prompt=PROMPTS),
        f"With {trial.method.off} the picture is not the base model's. Name in `off` the values that change nothing.",
    )


def config_survives_json(trial: Trial) -> None:
    """Its configuration is JSON, and rebuilds an equal method."""
    method, cls = trial.method, type(trial.method)
    trial.require(cls.__hash__ is not None, "The method has no hash. Write `@dataclass(frozen=True)` above the class.")
    with method.apply(trial.pipe) as handle:
        config = handle.config()
    read = json.loads(json.dumps(config))
    trial.require(
        read == config, "The configuration changes in a round trip through JSON. Use numbers, texts, tuples and None."
    )
    name = read.pop("method")
    registered = ":" not in name
    trial.require(
        not registered or registry.resolve(name) is cls,
        f"The name {name!r} leads to another class. Choose a name for the entry point that no other package uses.",
    )
    fields, later = field_names(method), set(getattr(cls, "added", ()))
    trial.require(
        set(fields) - later <= read.keys() <= set(fields),
        f"The configuration has {sorted(read)}, but the fields are {sorted(fields)}. Let each setting be a field.",
    )
    concepts = [Concept(**each) for each in read.pop("concepts")]
    trial.require(
        concepts == list(method.concepts),
        f"The configuration has the concepts {concepts}, but the method has {list(method.concepts)}. Store `Concept` "
        "objects in `concepts`, as `Method.__post_init__` does.",
    )
    trial.require(
        cls(concepts, **read) == handle.eraser,
        f"{cls.__name__}(concepts, **config) is not equal to the method. Let `concepts` be the first field, and let "
        "`__post_init__` turn lists into tuples.",
    )


def strength_can_be_set(trial: Trial) -> None:
    """A strength set on the handle acts from the next call on. A strength below 0 raises ValueError."""
    method = trial.method
    if "strength" not in field_names(method):
        raise DoesNotApply("The method has no field `strength`.")
    cure = "Read the field `strength` in each call, and do not store its value."
    with method.apply(trial.pipe) as handle:
        try:
            handle.strength = 0.5
        except ValueError as error:
            lacks = lacking(changed(method, strength=0.5).needs, facts_of(trial.pipe).offers)
            trial.require(
                method.strength is None and bool(lacks) and names_what_is_missing(str(error), method, lacks),
                f"`handle.strength = 0.5` raises {str(error)!r}. Allow strengths from 0 to 1.",
            )
            raise DoesNotApply(str(error)) from None
        trial.require(
            handle.strength == handle.config()["strength"] == 0.5,
            f"The strength was set to 0.5, but the handle has {handle.strength}. Store it in the field `strength`.",
        )
        weaker = trial.latents()
        try:
            handle.strength = -1.0
        except ValueError as error:
            trial.require(
                "strength" in str(error),
                f"A strength of -1 raises {str(error)!r}. Name the field in the message.",
            )
        else:
            trial.require(
                False, "A strength of -1 is accepted. Call `super().__post_init__()`, which checks the field."
            )
    trial.require_equal(
        weaker,
        trial.drawn(changed(method, strength=0.5)),
        f"A strength set on the handle draws another picture than a method with that strength. {cure}",
    )
    own = f"A strength of 0.5 instead of {method.strength}"
    trial.require_effect(weaker, trial.drawn(method), own, cure)
