"""One applied method: its encoded erasure prompts, and their rows of the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._text import Encoded, encode, pack
from ..core import Concept, Handle
from ..families import family
from .carried import compressed
from .contract import Contract, Encoding, Memory
from .texts import ErasurePrompts, Text
from .watch import Record

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Encoder:
    """Encodes texts in one pipeline call. Encodes equal texts once for all methods.

    Args:
        pipe: the pipeline.
        call: the prompts of the pipeline call; None outside of a call.
    """

    def __init__(self, pipe: DiffusionPipeline, call: Encoding | None) -> None:
        self.pipe, self.call = pipe, call
        self.known: dict[tuple[str, ...], Encoded] = {}

    def __call__(self, texts: list[str]) -> Encoded:
        key, settings = tuple(texts), self.call.settings if self.call else {}
        if key not in self.known:
            self.known[key] = encode(self.pipe, texts, constant=True, **settings)
        return self.known[key]

    def each(self, groups: Sequence[Sequence[str]]) -> Encoded:
        """The texts of several groups, in order.

        Each group is encoded alone, unless the longest text of all would change the others: so its encoding is found
        again in later calls, whatever other groups these have.
        """
        some = [list(group) for group in groups if group]
        if len(some) == 1 or not family(self.pipe).padded_to_limit:
            return self([*itertools.chain(*some)])
        return _joined([self(group) for group in some])


@dataclass(eq=False)  # compared by identity: the same method may be applied twice
class Applied:
    """An applied method and its erasure prompts.

    Args:
        method: the method.
        of: the concepts of each erasure prompt.
        sets: all erasure prompts, grouped by length. Only methods that guide have several sets.
        neutral: the mean of each group of neutral texts.
        acting: the erasure prompts with their rows of the current batch.
        memory: the memory of the current pipeline call.
        prepared: what `Method.prepared` returned.
        record: the record of its edits.
        handle: the user's handle.
        encoded: the encoded texts before any projection.
    """

    method: Contract
    of: tuple[tuple[Concept, ...], ...] = ()
    sets: tuple[ErasurePrompts, ...] = ()
    neutral: Text | None = None
    acting: tuple[ErasurePrompts, ...] = ()
    memory: Memory = field(default_factory=dict)
    prepared: Memory = field(default_factory=dict)
    record: Record = field(default_factory=Record)
    handle: Handle | None = None
    encoded: Tensor | None = None
    _unprojected: tuple[Text, list[int]] | None = None
    _images_per_prompt: int = 1

    @property
    def reads_words(self) -> bool:
        """Whether its change of a text follows from the words, which `encode_prompt` has."""
        return type(self.method).reread is not Contract.reread and type(self.method).rewrite is not Contract.rewrite

    @property
    def remembers(self) -> bool:
        """Whether a prediction follows from the prompt's words, or from its own predictions of earlier steps."""
        return self.reads_words or self.method.guides

    @property
    def prompts(self) -> ErasurePrompts | None:
        """All erasure prompts of a method that edits attention; for a method that guides, the first set."""
        return self.sets[0] if self.sets else None

    def become(self, other: Applied) -> None:
        """Takes the method and the state of `other`."""
        vars(self).update(vars(other))

    def drop(self) -> None:
        """Drops everything but the record. A removed eraser is in cycles, which the garbage collector finds late."""
        self.become(Applied(self.method, record=self.record, handle=self.handle))

    def carried(self) -> list[tuple[Text, dict[int, list[int]]]]:
        """The texts that joint attention carries, each with the positions in it of other texts, by their `id`."""
        found = [] if self.neutral is None else [(self.neutral, {id(self.neutral): [*range(len(self.neutral))]})]
        for prompts in self.sets:
            found.append(
                (prompts.text, {id(some.text): [prompts.which.index(k) for k in some.which] for some in self.acting})
            )
        return found

    def prepare(self, pipe: DiffusionPipeline, images_per_prompt: int, encoder: Encoder) -> None:
        """Encodes the erasure prompts and the neutral texts."""
        method = self.method
        if not (method.edits_attention or method.guides):
            return
        texts = self.texts(pipe)
        self.of = tuple(group for group, _ in texts)
        neutral = () if method.guides else tuple(method.references)
        if not (texts or neutral):
            return
        if method.guides:
            self.sets = _by_length(encoder, [text for _, text in texts], family(pipe).padded_to_limit)
            self.encoded = self.sets[0].text.states
        else:
            own = itertools.groupby(texts, lambda each: each[0])
            made = encoder.each([*neutral, *([text for _, text in some] for _, some in own)])
            sizes, text = [len(group) for group in neutral], Text(made.text, made.mask)
            n = sum(sizes)
            self.encoded, which = made.text, tuple(range(len(texts)))
            if (facts := family(pipe)).joint_attention:
                means, padding = _means(text[:n], sizes, facts.weighs_padding), made.padding
                kinds = [group.amin(0) for group in padding[:n].split(sizes)]  # a token in one of its texts is a token
                self.neutral = None if means is None else compressed(means, torch.stack(kinds), facts)
                self.sets = (ErasurePrompts(compressed(text[n:], padding[n:], facts), made.own[n:], which=which),)
            else:
                self.sets = (ErasurePrompts(text[n:], made.own[n:], which=which),)
                self.neutral, self._unprojected = _means(text[:n], sizes), (text, sizes)
        self.acting = self.sets
        self.place(images_per_prompt)
        self.prepared = method.prepared(pipe, [text for _, text in texts], encoder.call, self.memory) or {}
        self.memory |= self.prepared

    def texts(self, pipe: DiffusionPipeline) -> list[tuple[tuple[Concept, ...], str]]:
        """The erasure prompts, with the concepts of each."""
        method, found = self.method, []
        rows, separator = [method.concepts] if method.rows is None else method.rows, ", " if method.guides else " "
        for group in dict.fromkeys(group for row in rows for group in method.groups(row)):
            phrases = [phrase for concept in group for phrase in concept.phrases]
            found += [(group, text) for text in (pack(pipe, phrases, separator) if method.packs else phrases)]
        return found

    def forget(self) -> None:
        """Empties the memory, for another pipeline call."""
        self.memory = dict(self.prepared)

    def project(self, projection: Callable[[Tensor], Tensor]) -> None:
        """Applies the denoiser's text projection to the texts, once per encoding."""
        if self._unprojected is None or self.prompts is None:
            return
        (text, sizes), self._unprojected = self._unprojected, None
        text = Text(projection(text.states), text.mask)
        self.neutral = _means(text[: sum(sizes)], sizes)
        self.sets = (replace(self.prompts, text=text[sum(sizes) :]),)
        self.acting = self.sets
        self.place(self._images_per_prompt)

    def place(self, images_per_prompt: int, batch: int | None = None) -> None:
        """Assigns the erasure prompts of a method with `rows` to the `batch` conditional rows."""
        row_concepts, self._images_per_prompt = self.method.rows, images_per_prompt
        self.check_rows(images_per_prompt, batch)
        if row_concepts is None or self.prompts is None:
            return
        alike: dict[tuple[int, ...], list[int]] = {}  # erasure prompts in the order of a row -> its rows of the batch
        for r, concepts in enumerate(row_concepts):
            groups = self.method.groups(concepts)
            which = tuple(k for group in groups for k, of in enumerate(self.of) if of == group)
            alike.setdefault(which, []).extend(range(r * images_per_prompt, (r + 1) * images_per_prompt))
        self.acting = tuple(
            some.of(chosen, batch_rows)
            for which, batch_rows in alike.items()
            for some in self.sets
            if (chosen := [some.which.index(k) for k in which if k in some.which])
        )

    def row_concepts(self, conditional: int) -> list[tuple[Concept, ...]]:
        """The concepts of each of the `conditional` rows."""
        rows = self.method.rows
        if rows is None:
            return [self.method.concepts] * conditional
        return [rows[row // self._images_per_prompt] for row in range(conditional)]

    def edited_rows(self, conditional: int) -> list[int]:
        """The numbers of the conditional rows that the method changes while it acts."""
        if self.method.steers:
            chosen = self.method.steered_concepts(self.row_concepts(conditional), self.memory)
            return [row for row, concepts in enumerate(chosen) if concepts]
        placed = [prompts.batch_rows for prompts in self.acting]
        if not placed:
            return [row for row, concepts in enumerate(self.row_concepts(conditional)) if concepts]
        if any(rows is None for rows in placed):
            return [*range(conditional)]
        return sorted({row for rows in placed for row in rows or ()})

    def has_rows(self, conditional: int) -> bool:
        """Whether any of the conditional rows has concepts."""
        if self.method.edits_attention or self.method.guides:
            return bool(self.acting)
        return not self.method.steers or bool(self.edited_rows(conditional))

    def check_rows(self, images_per_prompt: int, batch: int | None) -> None:
        row_concepts = self.method.rows
        if row_concepts is not None and batch is not None and len(row_concepts) * images_per_prompt != batch:
            raise ValueError(
                f"`rows` has {len(row_concepts)} entries, but the call has {batch // images_per_prompt} prompts. Give "
                "one list of concepts per prompt."
            )

    def check_text(self, text: Tensor) -> None:
        """Raises ValueError if the erasure prompts and the call's text differ in width, device or dtype."""
        ours = self.encoded
        if self.prompts is None or ours is None or self.method.is_off() or not len(text):
            return
        if ours.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"The call's text has width {text.shape[-1]}, but the pipeline's encoder returns width "
                f"{ours.shape[-1]}. Give embeddings of this encoder, or a prompt."
            )
        mixed = ours.dtype != text.dtype and not torch.is_autocast_enabled(text.device.type)
        if ours.device != text.device or mixed:
            raise ValueError(
                f"The erasure prompts of {type(self.method).__name__} are {ours.dtype} on {ours.device}, but the "
                f"call's text is {text.dtype} on {text.device}. Call the pipeline, which encodes them again, or apply "
                "the eraser again."
            )


def _joined(parts: Sequence[Encoded]) -> Encoded:
    """Texts of one length that were encoded apart."""
    masks, pools = (
        [x for x in each if x is not None] for each in zip(*((p.mask, p.pooled) for p in parts), strict=True)
    )
    return Encoded(
        torch.cat([part.text for part in parts]),
        torch.cat(pools) if len(pools) == len(parts) else None,
        tuple(itertools.chain(*(part.own for part in parts))),
        torch.cat([part.padding for part in parts]),
        torch.cat(masks) if len(masks) == len(parts) else None,
    )


def _by_length(encoder: Encoder, texts: list[str], together: bool) -> tuple[ErasurePrompts, ...]:
    """The texts of a method that guides, grouped by length.

    Encodes them `together` only if all texts have one length. Otherwise the longest text would change the others, which
    may belong to other rows of the batch.
    """
    found: dict[int, list[tuple[int, Encoded]]] = {}
    for k, made in enumerate([encoder(texts)] if together else [encoder([text]) for text in texts]):
        found.setdefault(made.text.shape[1], []).append((k, made))
    sets = []
    for some in found.values():
        text = Text.cat([Text(made.text, made.mask) for _, made in some])
        own = tuple(columns for _, made in some for columns in made.own)
        which = tuple(range(len(texts))) if together else tuple(k for k, _ in some)
        pools = [made.pooled for _, made in some if made.pooled is not None]
        sets.append(ErasurePrompts(text, own, which=which, pooled=torch.cat(pools) if pools else None))
    return tuple(sets)


def _means(text: Text, sizes: list[int], weighs_padding: bool = False) -> Text | None:
    """The mean of each group of texts. With masks, the mean over texts with a token in the column, unless the denoiser
    reads masked columns too. None: no group."""
    if not sizes:
        return None
    if text.mask is None:
        return Text(torch.stack([group.mean(0) for group in text.states.split(sizes)]))
    read = torch.ones_like(text.mask) if weighs_padding else text.mask
    seen = [group[..., None].to(text.states.dtype) for group in read.split(sizes)]
    groups = zip(text.states.split(sizes), seen, strict=True)
    states = torch.stack([(group * s).sum(0) / s.sum(0).clamp_min(1) for group, s in groups])
    return Text(states, torch.stack([group.any(0) for group in text.mask.split(sizes)]))
