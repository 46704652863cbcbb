"""Follows a pipeline call from `check_inputs` to `maybe_free_model_hooks` by wrapping the pipeline's methods."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from .._encodings import Encodings, compared_once, held
from .._text import cut_off, encoder_of, encoding_settings, readers
from . import watch
from .calls import Call, Calls, Guarded, Texts
from .contract import Encoding
from .copies import Hidden, hide, show
from .prompts import Encoder
from .unconditional import unconditional, unconditional_alone
from .watch import Record

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NEGATIVE = ("negative", "negative_mask", "negative_pooled")
OF_PROMPTS = ("text", "mask", "pooled")  # the same parts of what `encode_prompt` returns for prompts


class Followed(NamedTuple):
    """A pipeline whose calls are followed: its wrapped methods, the tokenizers whose text encoders it had, and the
    encodings of constant texts, which it keeps alive."""

    pipe: weakref.ref[DiffusionPipeline]
    methods: list[Hidden]
    readers: tuple[str, ...]
    encodings: Encodings


class Pipelines:
    """The pipelines that share one denoiser.

    Args:
        site: the denoiser.
        calls: their calls.
    """

    def __init__(self, site: Guarded, calls: Calls) -> None:
        self.site, self.calls = site, calls
        self.followed: list[Followed] = []

    def follow(self, pipe: DiffusionPipeline, encodings: Encodings) -> None:
        """Wraps the methods of this pipeline object, and holds its encodings."""
        if any(each.pipe() is pipe for each in self.followed):
            return
        acts: dict[str, Callable[..., Any]] = {"check_inputs": self._begun, "encode_prompt": self._encoded}
        acts |= {"progress_bar": self._looped, "maybe_free_model_hooks": self._ended, "save_pretrained": self._saved}
        methods = hide(pipe, acts, self.site.copies)
        self.followed.append(Followed(weakref.ref(pipe), methods, readers(pipe), encodings))

    @staticmethod
    def held(pipe: DiffusionPipeline) -> Encodings:
        """The encodings of a pipeline that will be followed."""
        return held(pipe)

    def close(self) -> None:
        """Restores the pipelines' methods."""
        for each in self.followed:
            show(each.methods)
        self.followed.clear()
        self.calls.close()

    def _lacks_encoder(self, pipe: DiffusionPipeline) -> bool:
        """Whether a text encoder was removed since a method was applied, which saves memory."""
        had = next((each.readers for each in self.followed if each.pipe() is pipe), ())
        return any(encoder_of(pipe, name) is None for name in had)

    # ---- the pipeline's methods

    def _begun(self, pipe: DiffusionPipeline, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.site.check_pipeline(pipe)
        self.calls.open(entered=True)
        return original(*args, **kwargs)

    def _encoded(self, pipe: DiffusionPipeline, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.site.alone(), compared_once():
            self.site.check_pipeline(pipe)
            kind: Any = type(pipe)
            bound = inspect.signature(kind.encode_prompt.__get__(pipe)).bind(*args, **kwargs)
            bound.apply_defaults()
            # some pipelines write into the lists of a call, or repeat the texts afterwards
            bound.arguments |= {name: list(v) for name, v in bound.arguments.items() if isinstance(v, list)}
            bound.arguments.setdefault("num_images_per_prompt", 1)
            facts, call = self.site.facts, self.calls.here()
            if facts.returns_negative and not bound.arguments.get("do_classifier_free_guidance", False):
                self.site.refuse_without_guidance()
            made = facts.unlisted(original(*args, **kwargs), bound.arguments)
            if call is None or call.over:
                call = self.calls.open(entered=False)
            elif call.texts is not None and call.entered and not (facts.returns_negative or call.drawing):
                return self._negated(pipe, call, call.texts, made, bound)
            return facts.listed(self._encode(pipe, call, made, bound))

    def _looped(self, pipe: DiffusionPipeline, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _Loop(original(*args, **kwargs), self.calls)

    def _ended(self, pipe: DiffusionPipeline, original: Callable[..., Any]) -> Any:
        returned, call = original(), self.calls.here()
        if call is not None:
            self.calls.leave(call)
            if call.entered and call.texts is not None and not (call.guarded or call.done):
                raise RuntimeError(watch.not_entered(self.site.facts.denoiser))
        return returned

    def _saved(self, pipe: DiffusionPipeline, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names = ", ".join(type(applied.method).__name__ for applied in self.site.applied)
        warnings.warn(
            "`save_pretrained` does not save run-time erasers, so a pipeline loaded from this folder draws "
            f"without {names}. Apply the erasers again after loading.",
            stacklevel=3,
        )
        return original(*args, **kwargs)

    # ---- encode_prompt

    def _encode(self, pipe: DiffusionPipeline, call: Call, made: Any, bound: inspect.BoundArguments) -> Any:
        """Prepares the methods, and stores the facts on the coming rows."""
        facts, applied, arguments = self.site.facts, self.site.applied, bound.arguments
        settings, images = encoding_settings(bound), arguments["num_images_per_prompt"]
        before, guided = call.texts, arguments.get("do_classifier_free_guidance", False)
        self.calls.claim(call)
        call.texts = None
        prompts = _prompts(arguments)
        _warn_of_cut_prompts(pipe, prompts or (), arguments.get("negative_prompt") or (), settings)
        given, blind = made, prompts is None and self._lacks_encoder(pipe)
        encoding = Encoding(prompts, settings)
        encoder = Encoder(pipe, encoding)
        for each in applied:
            each.check_rows(images, len(made[0]))
            each.forget()
            if not call.drawing:  # a callback may encode another prompt for the next steps
                each.record = Record(len(self.site.layers.cross) if each.method.edits_attention else 0)
            made = each.method.rewrite(pipe, made, bound, each.memory)
            self.site.prepare(pipe, each, encoder, blind=blind)
        parts = dict(zip(facts.returns, made, strict=True))
        negatives: dict[str, Any] = {name: parts.get(name) if guided else None for name in NEGATIVE}
        empty, negative, scale = None, negatives["negative"], facts.scale_of(pipe)
        if negative is not None and self._reads_text() and not blind:
            untouched = negative is given[facts.returns.index("negative")]
            empty = unconditional(pipe, bound, negative, negatives["negative_mask"], untouched)
        if before is not None and call.drawing and not facts.returns_negative:  # the negative prompts stay
            empty, negatives = before.unconditional, {name: getattr(before, name) for name in NEGATIVE}
        owner = weakref.ref(pipe)
        call.texts = Texts(parts["text"], empty, images, encoding, owner, scale, blind, **negatives)
        self.site.refit()
        for each in applied:
            each.place(images, len(made[0]))
        return made

    def _reads_text(self) -> bool:
        """Whether methods may edit the unconditional rows' reading of their text."""
        return self.site.facts.cross_attention or any(each.method.edits_attention for each in self.site.applied)

    def _negated(
        self, pipe: DiffusionPipeline, call: Call, texts: Texts, encoded: Any, bound: inspect.BoundArguments
    ) -> Any:
        """Stores the negative prompts, which some pipelines encode after the prompts."""
        prompts = len(texts.positive) // bound.arguments["num_images_per_prompt"]
        for each in self.site.applied:
            encoded = each.method.negate(pipe, encoded, bound, prompts)
        parts = dict(zip(self.site.facts.returns, encoded, strict=True))
        if parts["text"] is texts.positive:  # given by the user; the calls are told apart by the object
            parts["text"] = parts["text"].clone()
        reads = self._reads_text() and not texts.blind
        empty = unconditional_alone(pipe, bound, parts["text"], parts.get("mask")) if reads else None
        negatives: dict[str, Any] = {name: parts.get(of) for name, of in zip(NEGATIVE, OF_PROMPTS, strict=True)}
        call.texts = replace(texts, unconditional=empty, **negatives)
        return tuple(parts.values())


class _Loop:
    """The pipeline's progress bar. While it is open, the pipeline draws, and each step has to pass the erasers."""

    def __init__(self, bar: Any, calls: Calls) -> None:
        self.bar, self.calls = bar, calls
        self.call: Call | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bar, name)

    def __enter__(self) -> _Loop:
        self.call = self.calls.start(self.bar.total)
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        if self.call is not None:
            (self.calls.stop if kind is None else self.calls.leave)(self.call)
        return self.bar.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Any]:
        call = self.calls.start()
        try:
            for each in self.bar:
                yield each
                self.calls.resume(call)
        finally:
            self.calls.stop(call)

    def update(self, n: float | None = 1) -> Any:
        if self.call is not None:
            self.calls.step(self.call)
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
