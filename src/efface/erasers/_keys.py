"""Keys and values of constant texts, kept across denoiser calls while the weights that made them stay the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .._text import SITES
from .._unchanged import Weights, plain
from .._weights import denoiser_of
from ..hooks import CrossAttention, Memory, Text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NAME, CALL = "keys", "keys of this call"  # in a method's memory: kept across pipeline calls, and for one of them
MOST = 2**29  # bytes that the kept keys and values of a method may have
AGE = 2  # texts that were not read since this many encodings are forgotten
PART = 2**24  # elements that the outputs of a layer for all texts may have at once


def outputs(cross: CrossAttention, text: Text) -> Iterator[tuple[slice, Tensor]]:
    """As `cross.with_empty(text)`, for a part of the queries at a time: [R + N, B, part, C], with the part.

    Parts bound the memory. A layer whose outputs are not large has one part.
    """
    neutral, empty = cross.neutral, cross.empty
    if type(cross) is not CrossAttention or neutral is None:
        yield slice(None), cross.with_empty(text)
        return
    alone = empty is not None and len(empty) > 1  # one empty text per row
    texts, sources = [neutral, text], [neutral.states, text.states]
    if empty is not None:
        texts = [neutral[1:], text] if alone else [empty, neutral[1:], text]
        sources = sources if alone else [empty.states, *sources]
    key, value = keys_values(cross, texts, sources)
    masks = [each.mask for each in texts if each.mask is not None]
    mask = torch.cat(masks) if len(masks) == len(texts) else None
    nothing = () if not alone or empty is None else (*keys_values(cross, [empty], [empty.states]), empty.mask)
    rows, queries, width = cross.query.shape
    size = max(1, PART // max(1, (len(key) + alone) * rows * width))
    for start in range(0, queries, size):
        part = slice(start, start + size)
        some = cross if size >= queries else replace(cross, query=cross.query[:, part], output=None)
        found = some.attend_texts(key, value, mask)
        yield part, torch.cat([some.attend(*nothing)[None], found]) if nothing else found


def would_be(cross: CrossAttention, text: Text) -> Tensor:
    """As `cross.would_be(text)`."""
    if type(cross) is not CrossAttention:
        return cross.would_be(text)
    return cross.attend_texts(*keys_values(cross, [text], [text.states]), text.mask)


def keys_values(cross: CrossAttention, texts: Sequence[Text], sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The keys and values of texts, from the method's memory if the layer made them before with the same weights.

    Args:
        cross: the layer.
        texts: the texts.
        sources: the tensors that decide their states. They are the same objects in all steps of a pipeline call.
    """
    kept = cross.memory.get(NAME)
    weights = () if kept is None or torch.compiler.is_compiling() else _weights(cross.attn)
    if not weights or not plain([*weights, *sources], torch.is_grad_enabled()):
        return cross.keys_values(_states(texts))
    return cast("Keys", kept).of(cross, texts, sources, weights)


def _states(texts: Sequence[Text]) -> Tensor:
    return texts[0].states if len(texts) == 1 else torch.cat([text.states for text in texts])


def remembered(pipe: DiffusionPipeline, memory: Memory) -> Memory:
    """What `Method.prepared` returns to keep keys and values. Forgets texts that have not been read for long."""
    kept = memory.get(NAME)
    if kept is None:
        kept = Keys()
    kept.grow_older()
    site = SITES.get(denoiser_of(pipe))
    call = None if site is None else site.calls.call  # not one that failed before it encoded
    if call is not None and call.entered and call.texts is None:
        memory[CALL] = _Call()  # emptied with the memory when the pipeline call ends
    return {NAME: kept}


@dataclass(eq=False)
class _Kept:
    """Keys and values that a layer made, the texts, and what their weights were."""

    key: Tensor
    value: Tensor
    sources: tuple[Tensor, ...]
    weights: Weights
    checked: _Call  # the pipeline call in which the sums were last compared
    age: int = 0

    @property
    def size(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.key, self.value))

    def holds(self, weights: Sequence[Tensor], call: _Call) -> bool:
        """Whether the weights are still the same."""
        if not self.weights.are(weights) or (self.checked is not call and not self.weights.have_bits_of(weights)):
            return False
        self.checked, self.age = call, 0
        return True


class Keys:
    """The keys and values of a method on one pipeline.

    An entry holds only for the same texts, bit by bit, and the same weights. Each use compares the weights' identity,
    address, version and dtype. The first use in a pipeline call, and each use outside of one, also compares sums of
    their bits.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Kept]] = weakref.WeakKeyDictionary()
        self._texts: list[Tensor] = []

    def __deepcopy__(self, memo: Any) -> Keys:
        return Keys()

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._kept.values())

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for entries in self._kept.values() for entry in entries.values())

    def of(
        self, cross: CrossAttention, texts: Sequence[Text], sources: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        call: _Call = cross.memory.get(CALL) or _Call()  # outside of a pipeline call, each use compares everything
        known = tuple(call.known(source, self._text) for source in sources)
        kind = sources[0].device.type
        cast_to = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        setting = (sum(map(len, texts)), *map(id, known), cast_to, torch.is_inference_mode_enabled())
        entries = self._kept.setdefault(cross.attn, {})
        entry = entries.get(setting)
        if entry is not None and entry.holds(weights, call):
            return entry.key, entry.value
        entries.pop(setting, None)
        made = _Kept(*cross.keys_values(_states(texts)), known, Weights(weights), call)
        if self.size + made.size <= MOST:
            entries[setting] = made
        return made.key, made.value

    def _text(self, source: Tensor) -> Tensor:
        """The known text with these states; a copy of them if there is none."""
        for text in self._texts:
            alike = (text.shape, text.dtype, text.device) == (source.shape, source.dtype, source.device)
            if alike and torch.equal(text, source):
                return text
        self._texts.append(source.detach().clone())
        return self._texts[-1]

    def grow_older(self) -> None:
        """Called when texts were encoded."""
        for entries in self._kept.values():
            for setting, entry in [*entries.items()]:
                entry.age += 1
                if entry.age > AGE:
                    del entries[setting]
        used = {id(text) for entries in self._kept.values() for entry in entries.values() for text in entry.sources}
        self._texts = [text for text in self._texts if id(text) in used]


class _Call:
    """The texts of a pipeline call, by the identity of their tensors."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[Tensor, int, Tensor]] = {}

    def known(self, source: Tensor, find: Callable[[Tensor], Tensor]) -> Tensor:
        found = self._texts.get(id(source))
        if found is None or found[0] is not source or found[1] != source._version:
            if len(self._texts) > 64:  # texts that are new in each step
                self._texts.clear()
            found = self._texts[id(source)] = source, source._version, find(source)
        return found[2]


def _weights(attn: Any) -> tuple[Tensor, ...]:
    """The weights that alone decide a layer's keys and values; none if modules with hooks or adapters take part."""
    if attn.norm_cross or attn.norm_k is not None:
        return ()
    found: list[Tensor] = []
    for module in (attn.to_k, attn.to_v):
        inside = vars(module)
        hooked = "forward" in inside or inside["_forward_hooks"] or inside["_forward_pre_hooks"]
        if type(module) is not nn.Linear or hooked:
            return ()
        found += [weight for weight in inside["_parameters"].values() if weight is not None]
    return tuple(found)
