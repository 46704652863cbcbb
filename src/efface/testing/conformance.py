"""What every run-time method promises, as functions that raise where a method breaks a promise.

Each promise is a function of a `Trial`: a method on a tiny pipeline of one family. It first shows that the method has
an effect, because a dead hook would keep most promises. Then it compares pictures to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import random
import re
import unittest
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from .. import registry
from ..core import Concept, Handle
from ..families import OFFERS, lacking
from ..families import family as facts_of
from ..fields import field_names
from . import drawing
from .drawing import ALCOHOL, CAT, PROMPT, PROMPTS, change, denoiser_of, differences, drawn, latents, snapshot
from .tiny import pipeline

EFFECT = 1e-3
"""A method changes a picture by more than this share of its size; less means that a hook is dead."""

ROUNDING = 1e-5
"""Further rows in a batch change other rows by less than this share of their size."""


class ConformanceError(AssertionError):
    """A method breaks a promise. The message says which, on which family, and what to look at."""


class DoesNotApply(unittest.SkipTest):
    """A promise is not about this method on this family; pytest and unittest report the test as skipped."""


class _Stop(KeyboardInterrupt):
    """What a user does in the middle of a call."""


def changed(method: Any, **fields: Any) -> Any:
    """The same method with other values in some fields."""
    return type(method)(**{name: getattr(method, name) for name in field_names(method)} | fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A method on a tiny pipeline.

    Args:
        method: what is tried, with concepts whose words the tiny tokenizers know.
        family: a name of `efface.testing.FAMILIES`.
        pipe: the pipeline of that family, with nothing on.
        steps: of each call; None is the kit's default, 3.
    """

    method: Any
    family: str
    pipe: Any
    steps: int | None = None

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return options if self.steps is None else {"num_inference_steps": self.steps, **options}

    def latents(self, prompt: str | Sequence[str] = PROMPT, **options: Any) -> Tensor:
        """What this pipeline draws now."""
        return latents(self.pipe, prompt, **self._options(options))

    def drawn(self, *methods: Any, prompt: str | tuple[str, ...] = PROMPT, **options: Any) -> Tensor:
        """What another pipeline with the same weights draws with these methods on; without one, the base picture."""
        return drawn(self.family, *methods, prompt=prompt, **self._options(options))

    def having(self, **fields: Any) -> Self:
        """The same trial of the method with other values in some fields."""
        return dataclasses.replace(self, method=changed(self.method, **fields))

    def require(self, kept: bool, said: str) -> None:
        """ConformanceError unless the promise is kept."""
        if not kept:
            raise ConformanceError(f"{type(self.method).__name__} on {self.family}: {said}")

    def require_effect(self, picture: Tensor, than: Tensor, what: str = "The method", cure: str = "") -> None:
        found = change(picture, than)
        cure = cure or (
            "Check that it overrides `edit`, `guide` or `rewrite`, and that `edits_attention` or `guides` is True."
        )
        self.require(
            found > EFFECT,
            f"{what} changes the picture by {found:.1e} of its size, and a method that acts changes more than "
            f"{EFFECT:g}. {cure}",
        )

    def require_equal(self, picture: Tensor, other: Tensor, said: str) -> None:
        if not torch.equal(picture, other):
            self.require(False, f"{said} The pictures differ by {change(picture, other):.1e} of their size.")

    def require_unchanged(self, rows: Tensor, base: Tensor, said: str) -> None:
        """To the bit, or up to rounding if the method adds rows to the batch."""
        if not torch.equal(rows, base):
            far = change(rows, base)
            self.require(bool(self.method.guides) and far < ROUNDING, f"{said} They differ by {far:.1e} of their size.")

    def require_restored(self, before: drawing.State) -> None:
        found = differences(snapshot(self.pipe), before)
        self.require(
            not found,
            f"The pipeline is not as it was: {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}. Change nothing "
            "on the pipeline yourself: keep values from step to step in `memory`, and let `apply` place the hooks.",
        )


# ---------------------------------------------------------------- on and off


def restores(trial: Trial) -> None:
    """Acts inside its `with` block, and leaves weights, hooks and pictures as they were, to the bit."""
    before = snapshot(trial.pipe)
    with trial.method.apply(trial.pipe):
        erased = trial.latents()
    trial.require_effect(erased, trial.drawn())
    trial.require_equal(trial.latents(), trial.drawn(), "After `remove()` the base model draws another picture.")
    trial.require_restored(before)


def restores_after_an_exception(trial: Trial) -> None:
    """Leaves everything as it was when a call of the pipeline is interrupted."""

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
            False, "An exception in the middle of a call does not reach the caller. Catch only what you raise."
        )
    trial.require_restored(before)
    trial.require_equal(trial.latents(), trial.drawn(), "After an exception the base model draws another picture.")


def acts_until_removed(trial: Trial) -> None:
    """Acts from `apply` to `remove`; a second `remove` does nothing, and a handle that is off cannot be changed."""
    handle: Handle = trial.method.apply(trial.pipe)
    trial.require_effect(trial.latents(), trial.drawn())
    handle.remove()
    handle.remove()
    trial.require_equal(trial.latents(), trial.drawn(), "After `remove()` the base model draws another picture.")
    try:
        handle.strength = 1.0
    except ValueError as error:
        trial.require("already removed" in str(error), f"A handle that is off answers {str(error)!r}. Use `Handle`.")
    else:
        trial.require(False, "A handle that is off can be changed. Return the handle of `Method.apply`.")


def off_is_the_base_model(trial: Trial) -> None:
    """With the field values of `off` it draws what the base model draws, to the bit."""
    if trial.method.off is None:
        raise DoesNotApply("`off` is None: no setting makes the method the identity.")
    with changed(trial.method, **trial.method.off).apply(trial.pipe):
        found = trial.latents(PROMPTS)
    trial.require_equal(
        found,
        trial.drawn(prompt=PROMPTS),
        f"With {trial.method.off} the picture is not the base model's. Name in `off` the values that change nothing.",
    )


def config_survives_json(trial: Trial) -> None:
    """Its configuration is JSON, and makes an equal method again."""
    method, cls = trial.method, type(trial.method)
    trial.require(cls.__hash__ is not None, "The method has no hash. Write `@dataclass(frozen=True)` above the class.")
    with method.apply(trial.pipe) as handle:
        config = handle.config()
    read = json.loads(json.dumps(config))
    trial.require(read == config, "The configuration is another one after JSON. Use numbers, texts, tuples and None.")
    name = read.pop("method")
    registered = ":" not in name
    trial.require(
        not registered or registry.resolve(name) is cls,
        f"The name {name!r} leads to another class. Choose a name for the entry point that no other package uses.",
    )
    fields = field_names(method)
    trial.require(
        read.keys() == set(fields),
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
    """A strength that is set on the handle acts from the next call on; one below 0 is a ValueError."""
    method = trial.method
    if "strength" not in field_names(method):
        raise DoesNotApply("The method has no field `strength`.")
    cure = "Read the field `strength` in each call, and keep no value of it."
    with method.apply(trial.pipe) as handle:
        try:
            handle.strength = 0.5
        except ValueError as error:
            lacks = lacking(changed(method, strength=0.5).needs, facts_of(trial.pipe).offers)
            trial.require(
                method.strength is None and bool(lacks) and _names_what_is_missing(str(error), method, lacks),
                f"`handle.strength = 0.5` is refused with {str(error)!r}. Let strengths from 0 to 1 be set.",
            )
            raise DoesNotApply(str(error)) from None
        trial.require(
            handle.strength == handle.config()["strength"] == 0.5,
            f"The strength was set to 0.5, but the handle says {handle.strength}. Keep it in the field `strength`.",
        )
        weaker = trial.latents()
        try:
            handle.strength = -1.0
        except ValueError as error:
            trial.require(
                "strength" in str(error),
                f"A strength of -1 is refused with {str(error)!r}. Name the field in the message.",
            )
        else:
            trial.require(False, "A strength of -1 is taken. Call `super().__post_init__()`, which checks the field.")
    trial.require_equal(
        weaker,
        trial.drawn(changed(method, strength=0.5)),
        f"A strength that is set on the handle draws another picture than a method with that strength. {cure}",
    )
    own = f"A strength of 0.5 instead of {method.strength}"
    trial.require_effect(weaker, trial.drawn(method), own, cure)


# ---------------------------------------------------------------- refusals


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
        _names_what_is_missing(said, method, lacks) and two_sentences(said),
        f"The refusal {said!r} does not say who needs what, and what to do. Write two sentences: "
        f'"{type(method).__name__} needs ..., but ... Use ..."',
    )
    return said


def _names_what_is_missing(said: str, method: Any, lacks: tuple[str, ...]) -> bool:
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


# ---------------------------------------------------------------- rows


def first_prediction(trial: Trial) -> Tensor:
    """What the denoiser predicts in the first step: unconditional rows, then conditional ones."""
    seen: list[Tensor] = []
    watch = denoiser_of(trial.pipe).register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        # an empty negative prompt would hide a touch, because some methods leave its rows alone
        trial.latents(PROMPTS, negative_prompt=["a big dog", "wine"])
    finally:
        watch.remove()
    return seen[0] if len(seen[0]) == 2 * len(PROMPTS) else torch.cat(seen[1::-1])  # two calls: FLUX


def touches_unconditional_rows_only_if_declared(trial: Trial) -> None:
    """Leaves the unconditional rows alone, unless `touches_uncond` says that it changes them."""
    method = trial.method
    strong = {"strength": 16.0, "warmup": 0.0, "window": (0.0, 1.0)}  # it is the first step
    own = field_names(method)
    with contextlib.suppress(ValueError):  # a method with a smaller range is tried with its own strength
        method = changed(method, **{name: strong[name] for name in strong if name in own and getattr(method, name)})
    base = first_prediction(trial)
    with method.apply(trial.pipe):
        erased = first_prediction(trial)
    trial.require(
        len(base) == 2 * len(PROMPTS), "The denoiser was called with other rows than the call has. Call it once."
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
    """With `num_images_per_prompt=2` it draws what it draws for each prompt given twice."""
    repeated = tuple(prompt for prompt in PROMPTS for _ in range(2))
    with trial.method.apply(trial.pipe):
        erased = trial.latents(PROMPTS, num_images_per_prompt=2)
    far = change(erased, trial.drawn(trial.method, prompt=repeated))
    trial.require(
        far < ROUNDING,
        f"Two images of a prompt differ from the prompt given twice, by {far:.1e} of their size. Treat each row of the "
        "batch by itself.",
    )
    trial.require_effect(erased, trial.drawn(prompt=repeated))


def a_row_is_the_row_alone(trial: Trial) -> None:
    """Draws a row of a batch as if it were alone; with `rows`, a row without concepts as the base model draws it."""
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
        together[2], base[2], "A row without concepts changes. Change no other rows than those you get."
    )
    for k in (0, 1):
        trial.require_effect(together[k], base[k], f"In row {k} of a batch the method")
    _require_rows_alone(trial, together, prompts, [[changed(method, concepts=row)] if row else [] for row in rows])


def _require_rows_alone(
    trial: Trial, together: Tensor, prompts: Sequence[str], methods: Sequence[Sequence[Any]]
) -> None:
    """ConformanceError unless each row is what its own methods draw for its prompt."""
    for k, (prompt, on) in enumerate(zip(prompts, methods, strict=True)):
        far = float((together[k] - trial.drawn(*on, prompt=prompt, seed=k)[0]).abs().max())
        trial.require(
            far < 1e-4,
            f"Row {k} of a batch differs by {far:.1e} from the same row alone. Take no mean, sum or maximum over the "
            "rows of the batch. If the method has a threshold, which turns rounding into a difference, try it with "
            "values that no number is near.",
        )


def rows_count_prompts(trial: Trial) -> None:
    """`rows` has one entry for each prompt, however many images it gets; another number is a ValueError."""
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
        trial.require(one_each == 2, f"Two prompts give {one_each} pictures. Return as many rows as came in.")
        try:
            trial.latents([PROMPT] * 3)
        except ValueError as error:
            trial.require(
                "`rows` has 2 entries, but the call has 3 prompts" in str(error),
                f"Two rows for three prompts are refused with {str(error)!r}. Let `Method` place the rows.",
            )
        else:
            trial.require(False, "Two rows for three prompts are taken. Let `Method` place the rows.")
        handle.rows = None
        trial.require_equal(
            trial.latents(), trial.drawn(trial.method), "With `rows` set back to None the picture is another one."
        )


# ---------------------------------------------------------------- several


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


# ---------------------------------------------------------------- what it says of itself


def origin(cls: type) -> str:
    """Where a method comes from: its paper, or its source if there is none; "" if it tells neither.

    Args:
        cls: a class whose docstring has a paragraph `Paper:` with an arXiv id, or `Source:`; or with an attribute
            `source`.
    """
    doc = inspect.getdoc(cls) or ""
    paper, source = (doc.partition(f"\n{heading}: ")[2].partition("\n\n")[0] for heading in ("Paper", "Source"))
    if re.search(r"arXiv[ \n]+\d{4}\.\d{5}", paper):
        return paper
    return (source or str(getattr(cls, "source", ""))).strip()


def says_where_it_comes_from(trial: Trial) -> None:
    """Its docstring names the paper with an arXiv id, or another source."""
    trial.require(
        bool(origin(type(trial.method))),
        "The docstring names neither paper nor source. Write a paragraph that begins with `Paper:` and has an arXiv "
        "id, or one that begins with `Source:`.",
    )


HEADINGS = ("Differs: ", "Args:\n", "Shapes: ", "Raises:\n", "Example:\n    >>> ")


def undocumented(cls: type) -> list[str]:
    """What is missing in a docstring by the rules for Efface's own methods: headings, origin, and fields in `Args:`."""
    doc = inspect.getdoc(cls) or ""
    found = [heading.partition(":")[0] for heading in HEADINGS if f"\n{heading}" not in doc]
    found += [] if origin(cls) else ["Paper or Source"]
    arguments = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    described = {n for line in re.findall(r"(?m)^    (\w[\w, ]*):", arguments) for n in line.split(", ")}
    return found + [name for name in field_names(cls) if name not in described]


# ---------------------------------------------------------------- all of them


Promise = Callable[[Trial], None]

ON_EACH_FAMILY: tuple[Promise, ...] = (
    restores,
    restores_after_an_exception,
    off_is_the_base_model,
    strength_can_be_set,
    touches_unconditional_rows_only_if_declared,
    acts_without_guidance_or_refuses,
    images_per_prompt_are_rows,
    a_row_is_the_row_alone,
)
"""Promises that are tried on every family, behind `refuses_what_it_cannot_do`."""

ONCE: tuple[Promise, ...] = (
    says_where_it_comes_from,
    config_survives_json,
    acts_until_removed,
    rows_count_prompts,
    comes_off_in_any_order,
    goes_with_shipped_methods,
    may_be_on_twice,
    pipelines_are_apart,
)
"""Promises that are tried on the first family that the method works on."""
