"""Encodings of constant texts, kept across calls of a pipeline while all that decides them stays the same.

Constant texts are those of erasers: phrases, neutral texts, anchors, and the empty text. Users' prompts are never kept.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._unchanged import Incomparable, Is, Weights, frozen, of_module, plain, setting
from .families import encoder_name, family, tokenizer_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MOST = 2**28
"""Bytes, in the computer's memory, that the kept encodings of a pipeline may have."""
_PRIVATE = ("_internal_dict", "_lora_scale")  # of a pipeline's private attributes; the others are of its loop of steps
_FOLLOWED = ("encode_prompt", "check_inputs", "progress_bar", "maybe_free_model_hooks", "save_pretrained")
_GUARD = threading.Lock()
_OF: weakref.WeakKeyDictionary[Any, weakref.ref[Encodings]] = weakref.WeakKeyDictionary()
_COMPARED: ContextVar[_Once | None] = ContextVar("efface_compared", default=None)

Parts = tuple[Any, ...]
"""What `encode_prompt` returns. Only tensors and None are kept."""


def held(pipe: DiffusionPipeline) -> Encodings:
    """The encodings of a pipeline. They exist while a caller holds them: a site with erasers, or a guard."""
    with _GUARD:
        reference = _OF.get(pipe)
        found = None if reference is None else reference()
        if found is None:
            found = Encodings()
            _OF[pipe] = weakref.ref(found)
        return found


@contextmanager
def compared_once() -> Iterator[None]:
    """Inside, the bits of the encoders' weights and all other facts are compared once; outside, at each use.

    Each use still compares the weights' identity, address, version and dtype.
    """
    token = _COMPARED.set(_Once())
    try:
        yield
    finally:
        _COMPARED.reset(token)


def kept(
    pipe: DiffusionPipeline,
    encode: Callable[..., Any],
    arguments: Mapping[str, Any],
    ids: Sequence[Sequence[int]],
    make: Callable[[], Parts],
) -> Parts:
    """The parts of an encoding, from earlier calls if nothing that decides them has changed. They are the caller's own.

    Args:
        pipe: the pipeline.
        encode: its original `encode_prompt`.
        arguments: all arguments of `encode`, of constant texts only.
        ids: the tokens of the texts, as each tokenizer reads them now.
        make: calls `encode`.
    """
    with _GUARD:
        reference = _OF.get(pipe)
    here = None if reference is None else reference()
    if here is None:
        return make()
    try:
        key = frozen(dict(arguments)), tuple(map(tuple, ids)), setting(pipe._execution_device)
        once = _COMPARED.get() or _Once()
        state = once.state(pipe, encode)
    except Incomparable:
        here.clear()
        return make()
    return here.of(key, state, lambda: once.state(pipe, encode, now=True), make)


@dataclass(frozen=True)
class State:
    """What decides the pipeline's encodings: comparable facts, and tensors."""

    facts: tuple[Any, ...]
    tensors: list[Tensor]


class _Once:
    """What was compared in a block of `compared_once`."""

    def __init__(self) -> None:
        self.weights: set[Weights] = set()
        self._found: tuple[Any, Any, State] | None = None

    def state(self, pipe: DiffusionPipeline, encode: Callable[..., Any], *, now: bool = False) -> State:
        """What decides the pipeline's encodings in this block, or `now`."""
        if now or self._found is None or self._found[0] is not pipe or self._found[1] != encode:
            self._found = pipe, encode, _state(pipe, encode)
        return self._found[2]


class Encodings:
    """Kept encodings of one pipeline. Threads may share them.

    They hold copies in the computer's memory, and give copies. If anything that decides them changes, all are dropped.
    The oldest are dropped first, if there are more than `MOST` bytes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Any, tuple[tuple[Tensor, torch.device] | None, ...]] = OrderedDict()
        self._facts: tuple[Any, ...] = ()
        self._weights: Weights | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(map(_size, self._entries.values()))

    def clear(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._entries.clear()
        self._facts, self._weights = (), None

    def of(self, key: Any, state: State, again: Callable[[], State], make: Callable[[], Parts]) -> Parts:
        """The kept parts of this key and state; otherwise new ones. `again` gives the state after making them."""
        with self._lock:
            if not self._holds(state):
                self._drop()
                self._facts, self._weights = state.facts, Weights(state.tensors)
                self._noted()
            weights = self._weights
            if key in self._entries:
                self._entries.move_to_end(key)
                return tuple(part and part[0].to(part[1], copy=True) for part in self._entries[key])
        made = make()
        try:
            after = again()
        except Incomparable:
            return made
        with self._lock:
            unchanged = weights is self._weights and weights is not None and weights.are(after.tensors)
            if unchanged and after.facts == state.facts and all(x is None or type(x) is Tensor for x in made):
                self._entries[key] = tuple(x if x is None else (x.to("cpu", copy=True), x.device) for x in made)
                while self._entries and self.size > MOST:
                    self._entries.popitem(last=False)
        return made

    def _holds(self, state: State) -> bool:
        """Whether the entries are of this state."""
        if self._weights is None or self._facts != state.facts or not self._weights.are(state.tensors):
            return False
        if (once := _COMPARED.get()) is not None and self._weights in once.weights:
            return True
        if not self._weights.have_bits_of(state.tensors):
            return False
        self._noted()
        return True

    def _noted(self) -> None:
        if (once := _COMPARED.get()) is not None and self._weights is not None:
            once.weights.add(self._weights)


def _size(entry: tuple[tuple[Tensor, torch.device] | None, ...]) -> int:
    return sum(part[0].nbytes for part in entry if part is not None)


def _state(pipe: DiffusionPipeline, encode: Callable[..., Any]) -> State:
    """What decides the pipeline's encodings now.

    Raises:
        Incomparable: the pipeline is not one of diffusers, its encoding was replaced, or a part cannot be compared.
    """
    kind: Any = type(pipe)
    facts, original = family(pipe), kind.encode_prompt
    own = isinstance(encode, MethodType) and encode.__func__ is original and encode.__self__ is pipe
    if not own or not all(each.__module__.startswith("diffusers.") for each in (kind, original)):
        raise Incomparable
    parts = vars(pipe)
    if any(callable(getattr(kind, name, None)) and name not in _FOLLOWED for name in parts):
        raise Incomparable
    tensors: list[Tensor] = []
    settings = {name: value for name, value in parts.items() if name in _PRIVATE or not name.startswith("_")}
    methods = tuple(each for base in kind.__mro__ for each in vars(base).values() if isinstance(each, FunctionType))
    found: list[Any] = [kind, methods, *_values(settings)]
    for name in facts.tokenizers:
        if (encoder := parts.get(encoder_name(name))) is not None:
            tokenizer = tokenizer_of(pipe, name)
            found += [of_module(encoder, tensors), len(tokenizer), tokenizer.pad_token_id]
            for each in {id(x): x for x in (tokenizer, getattr(pipe, name))}.values():  # the second may hold the first
                found += [Is(each), *_values({k: v for k, v in vars(each).items() if isinstance(v, (str, int))})]
    denoiser: Any = parts[facts.denoiser]
    found += [denoiser.dtype, denoiser.device, frozen(denoiser.config)]
    if not plain(tensors, False):
        raise Incomparable
    return State(tuple(found), tensors)


def _values(parts: Mapping[str, Any]) -> Iterator[Any]:
    """Those of an object's attributes that are plain values, such as numbers and texts, with their names."""
    for name, value in parts.items():
        try:
            yield name, frozen(value)
        except Incomparable:
            continue
