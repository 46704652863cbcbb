"""Follows a pipeline call from `check_inputs` to `maybe_free_model_hooks` by wrapping the pipeline's methods."""

from __future__ import annotations

import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .._text import cut_off, encoder_of, encoding_settings, readers
from ..families import Family
from . import watch
from .contract import Encoding
from .copies import Copies, Hidden, hide, show
from .prompts import Applied, Encoder
from .unconditional import Unconditional, unconditional, unconditional_alone
from .watch import Record

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class Opening:
    """A pipeline call, from `check_inputs` on."""

    thread: int
    prompts: bool = False  # whether they were encoded


@dataclass(frozen=True, eq=False)
class Call:
    """The facts on the coming batches from the latest `encode_prompt`.

    Args:
        positive: the text of the conditional rows.
        negative: the text of the unconditional rows; None without guidance.
        unconditional: if methods edit attention to text: the empty text, and the rows with another text.
        images_per_prompt: as in the call.
        encoding: the prompts and the settings.
        pipe: the pipeline.
        guidance_scale: the guidance scale of the call; NaN if the pipeline does not expose it.
        inside: whether it belongs to a pipeline call, not to a separate `encode_prompt`.
        blind: whether the text encoder was removed, so that the unconditional text cannot be compared with "".
        negative_mask, negative_pooled: mask and pooled text of `negative`, if there are any.
        apart: whether another loop than the pipeline's follows, with separate denoiser calls for unconditional rows.
    """

    positive: Tensor
    negative: Tensor | None
    unconditional: Unconditional | None
    images_per_prompt: int
    encoding: Encoding
    pipe: weakref.ref[DiffusionPipeline]
    guidance_scale: float
    inside: bool
    blind: bool = False
    negative_mask: Tensor | None = None
    negative_pooled: Tensor | None = None
    apart: bool = False
    thread: int = field(default_factory=threading.get_ident)


class Guarded(Protocol):
    """The interface of the denoiser whose pipelines are followed."""

    facts: Family
    applied: list[Applied]
    copies: Copies
    given: tuple[int, int] | None

    @property
    def edited_layers(self) -> int: ...

    def alone(self) -> Any: ...

    def check_pipeline(self, pipe: DiffusionPipeline | None) -> DiffusionPipeline: ...

    def refuse_without_guidance(self) -> None: ...

    def prepare(self, pipe: DiffusionPipeline, applied: Applied, encoder: Encoder, *, blind: bool = False) -> None: ...

    def check_no_rows_given(self) -> None: ...

    def refit(self) -> None: ...


class Calls:
    """Follows the calls of all pipelines that share one denoiser. One of them draws at a time.

    Attributes:
        opening: a call that started.
        call: the facts on its rows.
        drawing: the thread that is running steps.
        guarded: whether the denoiser was called in this step.
        stepped: whether there was a step before.
        counted: whether the number of steps of the call is known.
        progress: the middle of the current step, as a share of all steps. A step may need several denoiser calls.
    """

    def __init__(self, site: Guarded) -> None:
        self.site = site
        self.pipes: list[tuple[weakref.ref[DiffusionPipeline], dict[str, Hidden]]] = []  # with what hides their methods
        self.encoders: list[tuple[weakref.ref[DiffusionPipeline], tuple[str, ...]]] = []  # those it had, by tokenizer
        self.opening: Opening | None = None
        self.call: Call | None = None
        self.drawing: int | None = None
        self.guarded = self.stepped = self.counted = False
        self.progress = torch.zeros(())  # one tensor for all calls, which a compiled denoiser reads
        self._done, self._steps = 0, 0

    def follow(self, pipe: DiffusionPipeline) -> None:
        """Wraps the methods of this pipeline object."""
        if any(ref() is pipe for ref, _ in self.pipes):
            return
        owner, site = weakref.ref(pipe), self.site
        kind: Any = type(pipe)
        signature = inspect.signature(kind.encode_prompt.__get__(pipe))

        def begun(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            site.check_pipeline(owner())
            self.opening = Opening(threading.get_ident())
            return original(*args, **kwargs)

        def encoded(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with site.alone():
                present = site.check_pipeline(owner())
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                return self._encode(present, lambda: original(*args, **kwargs), bound)

        def looped(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return _Loop(original(*args, **kwargs), self)

        def ended(original: Callable[..., Any]) -> Any:
            call = self.call
            self.end()
            if call is None or call.thread != threading.get_ident():
                return original()
            self.opening = self.call = None
            for applied in site.applied:
                applied.forget()
            returned = original()
            site.refit()  # offloading has put its own hooks on anew
            if call.inside and not (self.guarded or self.stepped):
                raise RuntimeError(watch.not_entered(site.facts.denoiser))
            return returned

        def saved(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            names = ", ".join(type(applied.method).__name__ for applied in site.applied)
            warnings.warn(
                "`save_pretrained` does not save run-time erasers, so a pipeline loaded from this folder draws "
                f"without {names}. Apply the erasers again after loading.",
                stacklevel=3,
            )
            return original(*args, **kwargs)

        self.encoders.append((owner, readers(pipe)))
        acts = {"check_inputs": begun, "encode_prompt": encoded, "progress_bar": looped}
        acts |= {"maybe_free_model_hooks": ended, "save_pretrained": saved}
        self.pipes.append((owner, hide(pipe, acts, site.copies)))

    def close(self) -> None:
        """Restores the pipelines' methods."""
        for _, methods in self.pipes:
            show(methods)
        self.pipes.clear()
        self.encoders.clear()
        self.call = self.opening = None
        self.end()

    def lacks_encoder(self, pipe: DiffusionPipeline) -> bool:
        """Whether a text encoder was removed since a method was applied, which saves memory."""
        had = next((names for ref, names in self.encoders if ref() is pipe), ())
        return any(encoder_of(pipe, name) is None for name in had)

    def check_thread(self) -> None:
        """Raises RuntimeError during another thread's pipeline call."""
        if self.call is not None and self.call.thread != threading.get_ident():
            raise RuntimeError(watch.TWO_THREADS)

    def start(self, steps: int | None = None) -> None:
        """Called at the start of a pipeline call's steps."""
        self.check_thread()
        self.site.check_no_rows_given()
        self.drawing, self.counted = threading.get_ident(), bool(steps)
        self._done, self._steps = 0, steps or 1
        self._measure()

    def end(self) -> None:
        """Called after the last step."""
        self.drawing, self.counted = None, False

    def at(self, step: int, steps: int) -> None:
        """Called before each step of a loop that is not the pipeline's."""
        self.counted, self._done, self._steps = True, step, steps
        self._measure()

    @property
    def apart(self) -> bool:
        """Whether unconditional predictions come from separate denoiser calls."""
        return self.site.facts.guidance_in_two_calls or (
            self.site.given is None and self.call is not None and self.call.apart
        )

    def _measure(self) -> None:
        self.progress.fill_((self._done + 0.5) / self._steps)

    def step(self) -> None:
        """Called after each step."""
        if self.site.applied and self.call is not None and not self.guarded:
            raise RuntimeError(watch.not_entered(self.site.facts.denoiser))
        self.guarded, self.stepped = False, True
        self._done += 1
        self._measure()

    # ---- encode_prompt

    def _encode(self, pipe: DiffusionPipeline, encode_prompt: Callable[[], Any], bound: inspect.BoundArguments) -> Any:
        """Runs `encode_prompt`, and stores its facts on the coming rows."""
        facts, applied = self.site.facts, self.site.applied
        settings, images = encoding_settings(bound), bound.arguments["num_images_per_prompt"]
        guided = bound.arguments.get("do_classifier_free_guidance", False)
        if not guided and facts.returns_negative:
            self.site.refuse_without_guidance()
        made = encode_prompt()
        opening = self.opening if self.opening and self.opening.thread == threading.get_ident() else None
        if not facts.returns_negative and opening is not None and opening.prompts:
            return self._negated(pipe, made, bound)
        self.call, self.guarded, self.stepped = None, False, False
        prompts = _prompts(bound.arguments)
        _warn_of_cut_prompts(pipe, prompts or (), bound.arguments.get("negative_prompt") or (), settings)
        given, blind = made, prompts is None and self.lacks_encoder(pipe)
        encoding = Encoding(prompts, settings)
        encoder = Encoder(pipe, encoding)
        for each in applied:
            each.check_rows(images, len(made[0]))
            each.forget()
            each.record = Record(layers=self.site.edited_layers if each.method.edits_attention else 0)
            made = each.method.rewrite(pipe, made, bound, each.memory)
            self.site.prepare(pipe, each, encoder, blind=blind)
        parts = dict(zip(facts.returns, made, strict=True))
        negative, mask = (parts.get(name) if guided else None for name in ("negative", "negative_mask"))
        empty = None
        if negative is not None and self._reads_text() and not blind:
            untouched = negative is given[facts.returns.index("negative")]
            empty = unconditional(pipe, bound, negative, mask, untouched)
        scale, inside = getattr(pipe, facts.scale, math.nan), opening is not None
        pooled = parts.get("negative_pooled") if guided else None
        self.call = Call(
            *(parts["text"], negative, empty, images, encoding, weakref.ref(pipe), scale, inside, blind, mask, pooled)
        )
        if opening is not None:
            opening.prompts = True
        self.site.refit()
        for each in applied:
            each.place(images, len(made[0]))
        return made

    def _reads_text(self) -> bool:
        """Whether methods may edit the unconditional rows' reading of their text."""
        return self.site.facts.cross_attention or any(each.method.edits_attention for each in self.site.applied)

    def _negated(self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], bound: inspect.BoundArguments) -> Any:
        """Stores the negative prompts, which some pipelines encode after the prompts."""
        call = self.call
        if call is None:
            return encoded
        prompts = len(call.positive) // bound.arguments["num_images_per_prompt"]
        for each in self.site.applied:
            encoded = each.method.negate(pipe, encoded, bound, prompts)
        parts = dict(zip(self.site.facts.returns, encoded, strict=True))
        if parts["text"] is call.positive:  # given by the user; the calls are told apart by the object
            parts["text"] = parts["text"].clone()
        mask, pooled = parts.get("mask"), parts.get("pooled")
        reads = self._reads_text() and not call.blind
        empty = unconditional_alone(pipe, bound, parts["text"], mask) if reads else None
        self.call = replace(
            call, negative=parts["text"], unconditional=empty, negative_mask=mask, negative_pooled=pooled
        )
        return tuple(parts.values())


class _Loop:
    """The pipeline's progress bar. While it is open, the pipeline draws, and each step has to pass the erasers."""

    def __init__(self, bar: Any, calls: Calls) -> None:
        self.bar, self.calls = bar, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bar, name)

    def __enter__(self) -> _Loop:
        self.calls.start(self.bar.total)
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        self.calls.end()
        return self.bar.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Any]:
        self.calls.start()
        try:
            yield from self.bar
        finally:
            self.calls.end()

    def update(self, n: float | None = 1) -> Any:
        self.calls.step()
        return self.bar.update(n)


def _prompts(arguments: dict[str, Any]) -> list[str] | None:
    """The texts of a call's prompts, one per conditional row; None for embeddings."""
    prompt, others = arguments["prompt"], [arguments.get("prompt_2"), arguments.get("prompt_3")]
    if prompt is None or arguments.get("prompt_embeds") is not None or any(o not in (None, prompt) for o in others):
        return None
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return [text for text in prompts for _ in range(arguments["num_images_per_prompt"])]


def _warn_of_cut_prompts(
    pipe: DiffusionPipeline, prompts: Sequence[str], negatives: str | Sequence[str], settings: dict[str, Any]
) -> None:
    texts = [*prompts, *([negatives] if isinstance(negatives, str) else negatives)]
    for text in dict.fromkeys(texts):
        if lost := cut_off(pipe, text, **settings):  # Python says the same thing once
            warnings.warn(
                f"A prompt is longer than the text encoder's limit, which ignores {lost!r}. Shorten it.", stacklevel=6
            )
