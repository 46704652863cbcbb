"""Composes several prompts in one prediction, inside any pipeline with guidance and beside any eraser.

Two torch hooks on the denoiser do it: the pipeline, its scheduler and the erasers stay unchanged. After a denoiser
call the hook computes the predictions of further texts from the same latents, and replaces the conditional prediction
by one from which the pipeline's own guidance makes the composition.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .._weights import denoiser_of
from ..families import Family, family
from ..hooks.prediction import in_rows
from ..hooks.sites import rows_given
from ._texts import Memories, Texts, applied_to, check_calls, encoded

WITHOUT_GUIDANCE = (
    "The pipeline made no guided denoiser call for the first term, so nothing was composed. Set its guidance scale "
    "above 1, with a negative prompt on FLUX, call it with the first term's prompt, and give `settings` as in the call."
)


@dataclass(frozen=True)
class Term:
    """One prompt of a composition.

    Args:
        prompt: the text; "" is the empty prompt.
        weight: w of w * (e(prompt) - e(unconditional)); negative weights push away.
        window: the share of the trajectory in which it acts, by noise level: 0 is pure noise, 1 the picture.

    Raises:
        ValueError: the weight is not finite, or the window is not within [0, 1].

    Example:
        >>> from efface.attacks._compose import Term
        >>> Term("a cat", -7.5).window
        (0.0, 1.0)
    """

    prompt: str
    weight: float
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        checks.text("prompt", self.prompt, empty=True)
        object.__setattr__(self, "weight", checks.number("weight", self.weight))
        object.__setattr__(self, "window", checks.window("window", self.window))

    def __str__(self) -> str:
        start, stop = self.window
        when = "" if self.window == (0.0, 1.0) else f" from {start:g} to {stop:g}"
        return f"{self.weight:+g} ({self.prompt or 'empty prompt'}){when}"


@dataclass(eq=False)
class Seen:
    """A conditional denoiser call: its arguments by name, the number of unconditional rows in it, and its output.

    Args:
        arguments: the denoiser's arguments.
        first: the number of unconditional rows, which come first.
        sample: the predictions [rows, ...].
        unconditional: the unconditional prediction of the conditional rows [B, ...].
        time: 0 is pure noise, 1 the picture.
    """

    arguments: dict[str, Any]
    first: int
    sample: Tensor
    unconditional: Tensor
    time: float

    @property
    def conditional(self) -> Tensor:
        return self.sample[self.first :]


@dataclass(eq=False)
class Denoiser:
    """The denoiser of a pipeline, for predictions of further texts on the inputs of a call.

    Args:
        pipe: the pipeline.
        settings: arguments of the pipeline call that change how texts are encoded.
    """

    pipe: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Family = field(init=False)
    module: nn.Module = field(init=False)
    names: tuple[str, ...] = field(init=False)
    busy: bool = field(default=False, init=False)
    memories: Memories = field(init=False)

    def __post_init__(self) -> None:
        self.facts, self.module = family(self.pipe), denoiser_of(self.pipe)
        self.memories = Memories(self.pipe, self.settings)
        self.names = tuple(inspect.signature(type(self.module).forward).parameters)[1:]

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, the noisy sample first."""
        given = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        return {self.names[0]: given[self.names[0]]} | given

    def time(self, arguments: Mapping[str, Any]) -> float:
        now = torch.as_tensor(arguments[self.facts.time_argument]).flatten()[0]
        return 1 - float(now) / self.facts.train_timesteps(self.pipe)

    def with_texts(self, arguments: dict[str, Any], rows: Tensor, texts: Sequence[Texts]) -> dict[str, Any]:
        """The arguments for these rows of the call, with the texts in their place: as many rows as all texts have."""
        facts, text = self.facts, arguments[self.facts.text_argument]
        length = max(t.text.shape[1] for t in texts)
        own = {name: value for name, value in arguments.items() if name not in facts.shared_arguments}
        made = arguments | {
            name: in_rows(value, len(text), lambda v: v[rows.to(v.device)]) for name, value in own.items()
        }
        longer = [facts.lengthened(t.text, None if t.mask is None else t.mask.bool(), length) for t in texts]
        if any(each is None for each in longer):
            raise ValueError(
                "Expected texts that the pipeline encodes to one length, got several lengths. Use prompts with equally "
                "many tokens."
            )
        fitting = [each for each in longer if each is not None]
        if any(mask is not None for _, mask in fitting):
            masks = [text.new_ones(each.shape[:2]).bool() if mask is None else mask for each, mask in fitting]
            given, joined = facts.text_mask(arguments), torch.cat(masks)
            made = facts.with_mask(made, joined if given is None else joined.to(given))
        made[facts.text_argument] = torch.cat([each[0] for each in fitting]).to(text)
        if facts.pooled_text(arguments) is not None:
            made = facts.with_pooled(made, torch.cat([t.pooled for t in texts if t.pooled is not None]))
        return made if length == text.shape[1] else facts.for_length(made, length)

    def call(self, arguments: dict[str, Any], conditional: Sequence[bool]) -> Tensor:
        """The predictions of a direct denoiser call, on whose conditional rows erasers act."""
        outside, self.busy = self.busy, True
        try:
            with torch.no_grad(), rows_given(self.pipe, conditional):
                return _sample(self.module(**arguments))
        finally:
            self.busy = outside

    def unconditional_texts(self, arguments: dict[str, Any], first: int) -> Texts:
        facts = self.facts
        mask, pooled = facts.text_mask(arguments), facts.pooled_text(arguments)
        pooled, mask = (None if t is None else t[:first] for t in (pooled, mask))
        return Texts(arguments[facts.text_argument][:first], pooled, mask)

    def predict(self, seen: Seen, texts: Sequence[Texts]) -> list[Tensor]:
        """The predictions [B, ...] of further texts, each of one row, on the inputs of a call, with the erasers."""
        n = len(seen.conditional)
        if not texts or not self.memories.of(texts[0], n):
            return self._predict(seen, texts, n) if texts else []
        found = []
        for each in texts:  # erasers that remember have one prompt at a time
            with self.memories.acting(each, n):
                found += self._predict(seen, [each], n)
        return found

    def _predict(self, seen: Seen, texts: Sequence[Texts], n: int) -> list[Tensor]:
        own = torch.arange(seen.first, seen.first + n).repeat(len(texts))
        rows = [t.rows(n) for t in texts]
        if not applied_to(self.pipe) or not seen.first:  # weights alone, or guidance in two calls: the texts suffice
            out = self.call(self.with_texts(seen.arguments, own, rows), [True] * len(own))
        else:  # one unconditional row for each, which methods that guide compare with
            empty = [self.unconditional_texts(seen.arguments, seen.first)] * len(texts)
            both = torch.cat([torch.arange(seen.first).repeat(len(texts)), own])
            arguments = self.with_texts(seen.arguments, both, [*empty, *rows])
            out = self.call(arguments, [False] * len(own) + [True] * len(own))[len(own) :]
        return list(out.split(n))

    @contextlib.contextmanager
    def watched(self, act: Callable[[Seen], Tensor | None], prompt: Texts, negative: Texts) -> Iterator[None]:
        """Calls `act(seen)` after each conditional call inside the block; a tensor it returns replaces the conditional
        prediction.

        Args:
            act: receives `Seen`.
            prompt, negative: for guidance in two calls: the text of the conditional calls, and the empty one.
        """

        pairs = [0, 0]  # with guidance in two calls: those of the prompt, and the others

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            if self.busy:
                return None
            arguments = self.by_name(args, kwargs)
            sample, text = _sample(out), arguments[self.facts.text_argument]
            if self.facts.guidance_in_two_calls:
                if not _same(text, prompt.text):
                    pairs[1] += 1
                    return None
                first, n = 0, len(text)
                empty = self.with_texts(arguments, torch.arange(n), [negative.rows(n)])
                u = self.call(empty, [False] * n)
                pairs[0] += 1
            else:
                first = len(text) // 2
                if not first or not _same(text[first:], prompt.text) or _same(text[:first], prompt.text):
                    return None
                u = sample[:first]
            changed = act(Seen(arguments, first, sample, u, self.time(arguments)))
            if changed is None:
                return None
            return _replaced(out, torch.cat([sample[:first], changed.to(sample.dtype)]))

        hook = self.module.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
        if pairs[0] > pairs[1]:
            raise RuntimeError(WITHOUT_GUIDANCE)


@dataclass(frozen=True)
class Composition:
    """Draws with `e0 + sum_i w_i (e(c_i) - e0)` in place of the pipeline's guidance, as a context around its calls.

    Args:
        terms: the prompts with their weights. The prompt of the pipeline call must be that of the first term.
        guidance: the guidance scale of the pipeline call, which cancels; above 1, because guidance must be on.
        most: the largest norm of the sum, as a multiple of guidance times the norm of the first term; None: no limit.
        settings: arguments of the pipeline call that change how texts are encoded, such as `max_sequence_length`.

    Raises:
        ValueError: there are no terms, or the guidance is not above 1.
        RuntimeError: a call was not composed, because the pipeline made no guided call.
    """

    terms: tuple[Term, ...]
    guidance: float = 7.5
    most: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        if not self.terms:
            raise ValueError("A composition needs at least one term, got none. Give `terms`.")
        object.__setattr__(self, "guidance", checks.number("guidance", self.guidance, 1, above=True))
        if self.most is not None:
            object.__setattr__(self, "most", checks.number("most", self.most, 0, above=True))

    @contextlib.contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        """Composes the calls of this pipeline inside the block."""
        check(pipe)
        denoiser, prompts = Denoiser(pipe, self.settings), [term.prompt for term in self.terms]
        if denoiser.facts.guidance_in_two_calls and not prompts[0]:
            raise ValueError(
                "Expected the first term to have a prompt, because this pipeline calls its denoiser apart for the "
                "prompt and the empty one, got the empty one. Put another term first."
            )
        each = encoded(pipe, [*prompts, ""], self.settings)
        count = 0

        def act(seen: Seen) -> Tensor:
            nonlocal count
            count += 1
            _check_rescale(pipe)
            acting = [k for k, term in enumerate(self.terms) if term.window[0] <= seen.time <= term.window[1]]
            further = [k for k in acting if k]
            found = dict(zip(further, denoiser.predict(seen, [each[k] for k in further]), strict=True))
            return self.composed(seen, {**found, **({0: seen.conditional} if 0 in acting else {})})

        with denoiser.watched(act, each[0], each[-1]):
            yield
        if not count:
            raise RuntimeError(WITHOUT_GUIDANCE)

    def composed(self, seen: Seen, predictions: Mapping[int, Tensor]) -> Tensor:
        """The conditional prediction from which guidance makes the composition."""
        wide = torch.promote_types(seen.sample.dtype, torch.float32)
        u = seen.unconditional.to(wide)
        total = torch.zeros_like(u)
        for k, predicted in predictions.items():
            total = total + self.terms[k].weight * (predicted.to(wide) - u)
        if self.most is not None:
            limit = self.most * self.guidance * _norm(seen.conditional.to(wide) - u)
            total = total * (limit / _norm(total).clamp(min=1e-12)).clamp(max=1)
        return u + total / self.guidance


def check(pipe: Any) -> None:
    """Raises ValueError if predictions of this pipeline cannot be composed."""
    facts = family(pipe)
    check_calls(pipe)
    if "guidance" not in facts.offered(pipe):
        raise ValueError(
            f"Composition needs an unconditional prediction in each step, but this {type(pipe).__name__} "
            f"({facts.name}) has no guidance. Attack it by text."
        )
    if facts.adds_rows(pipe):
        raise ValueError(
            f"{type(pipe).__name__} adds rows to each denoiser call (perturbed attention guidance), which a "
            "composition cannot tell apart. Use the pipeline without PAG."
        )


def _check_rescale(pipe: Any) -> None:
    if getattr(pipe, "guidance_rescale", 0) or getattr(pipe, "_guidance_rescale", 0):
        raise ValueError(
            "`guidance_rescale` would take the deviation of a composed row for that of a prediction. Leave it at 0."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all rows of a call [B, L, D] have this text [1, L, D], but for rounding in batches of another size."""
    if a.shape[1:] != b.shape[1:]:
        return False
    b = b.to(a)
    return bool((a - b).norm() <= 1e-3 * b.norm() * len(a) ** 0.5)


def _norm(x: Tensor) -> Tensor:
    """The norm of each picture, shaped to broadcast over it."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))


def _sample(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out.sample
    return found


def _replaced(out: Any, sample: Tensor) -> Any:
    return (sample, *out[1:]) if isinstance(out, tuple) else type(out)(sample=sample)
