"""The erasure prompts of one eraser that is on: encoded, and placed on the rows of the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._attention import Term
from ._method import Method
from ._records import Record
from ._text import cleaned, encode, pack, readers
from .core import Concept

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(eq=False)  # each is itself: the same eraser may be on twice
class Entry:
    """An eraser that is on, and its erasure prompts."""

    eraser: Method
    of: tuple[tuple[Concept, ...], ...] = ()  # whose each erasure prompt is
    prompts: Term | None = None
    neutral: Tensor | None = None
    neutral_mask: Tensor | None = None
    acting: tuple[Term, ...] = ()  # with the rows of the present batch
    memory: dict[str, Tensor] = field(default_factory=dict)  # of the present call
    record: Record = field(default_factory=Record)
    handle: Any = None
    read: Tensor | None = None  # the texts before any projection
    _unprojected: tuple[Tensor, Tensor | None, list[int]] | None = None
    _images_per_prompt: int = 1

    def prepare(
        self, pipe: DiffusionPipeline, images_per_prompt: int, prompts: list[str] | None = None, **settings: Any
    ) -> None:
        """Encodes the erasure prompts, and the neutral texts beside them; `prompts`: the call's."""
        eraser = self.eraser
        if not (eraser.edits_attention or eraser.guides):
            return
        rows, separator = [eraser.concepts] if eraser.rows is None else eraser.rows, ", " if eraser.guides else " "
        texts = []
        for group in dict.fromkeys(group for row in rows for group in eraser.groups(row)):
            phrases = [phrase for concept in group for phrase in concept.phrases]
            texts += [(group, text) for text in (pack(pipe, phrases, separator) if eraser.packs else phrases)]
        if eraser.guides:
            if texts:
                encoded = encode(pipe, [text for _, text in texts], **settings)
                self.of = tuple(group for group, _ in texts)
                self.prompts = Term(encoded.text, encoded.own, mask=encoded.mask, pooled=encoded.pooled)
                self.change(images_per_prompt)
            return
        sizes = [len(group) for group in eraser.references]
        neutral, n = itertools.chain(*eraser.references), sum(sizes)
        encoded = encode(pipe, [*neutral, *(text for _, text in texts)], **settings)
        self.of = tuple(group for group, _ in texts)
        mask = encoded.mask
        self.prompts = Term(encoded.text[n:], encoded.own[n:], mask=None if mask is None else mask[n:])
        self.read = encoded.text
        self._as_read(encoded.text, mask, sizes)
        self._unprojected = (encoded.text, mask, sizes)
        joined: dict[str, Any] = {}
        if eraser.joins and prompts is not None and texts:
            joined = _join(pipe, prompts, [text for _, text in texts], **settings)
        self.change(images_per_prompt, **joined)

    def _as_read(self, text: Tensor, mask: Tensor | None, sizes: list[int]) -> None:
        """Takes the neutral texts of these sizes, and the erasure prompts behind them, as the layers read them."""
        n = sum(sizes)
        if mask is None:
            self.neutral = torch.stack([group.mean(0) for group in text[:n].split(sizes)])
        else:  # the mean of the texts that have a token there
            seen = [group[..., None].to(text.dtype) for group in mask[:n].split(sizes)]
            groups = zip(text[:n].split(sizes), seen, strict=True)
            self.neutral = torch.stack([(group * s).sum(0) / s.sum(0).clamp_min(1) for group, s in groups])
            self.neutral_mask = torch.stack([group.any(0) for group in mask[:n].split(sizes)])

    def project(self, projection: Callable[[Tensor], Tensor]) -> None:
        """Puts the texts through what the denoiser has in front of its layers; once for each encoding."""
        if self._unprojected is None or self.prompts is None:
            return
        (text, mask, sizes), self._unprojected = self._unprojected, None
        text = projection(text)
        self._as_read(text, mask, sizes)
        self.change(self._images_per_prompt, text=text[sum(sizes) :])

    def change(self, images_per_prompt: int, **parts: Any) -> None:
        """Changes parts of the erasure prompts, if there are any, and gives them their rows again."""
        if self.prompts is None:
            return
        self.prompts = replace(self.prompts, **parts)
        self.acting = (self.prompts,)
        self.place(images_per_prompt)

    def place(self, images_per_prompt: int, batch: int | None = None) -> None:
        """Gives the erasure prompts of an eraser with `rows` their rows of the batch, `batch` conditional ones."""
        rows, self._images_per_prompt = self.eraser.rows, images_per_prompt
        self.check_rows(images_per_prompt, batch)
        if rows is None or self.prompts is None:
            return
        alike: dict[tuple[int, ...], list[int]] = {}  # erasure prompts in the order of a row -> its images
        for r, row in enumerate(rows):
            groups = self.eraser.groups(row)
            chosen = tuple(k for group in groups for k, of in enumerate(self.of) if of == group)
            alike.setdefault(chosen, []).extend(range(r * images_per_prompt, (r + 1) * images_per_prompt))
        self.acting = tuple(self.prompts.part(chosen, images) for chosen, images in alike.items() if chosen)

    def check_rows(self, images_per_prompt: int, batch: int | None) -> None:
        rows = self.eraser.rows
        if rows is not None and batch is not None and len(rows) * images_per_prompt != batch:
            raise ValueError(
                f"`rows` has {len(rows)} entries, but the call has {batch // images_per_prompt} prompts. Give one list "
                "of concepts per prompt."
            )

    def check_text(self, text: Tensor) -> None:
        """ValueError if the erasure prompts and the call's text differ in width, device or dtype."""
        if self.prompts is None or self.eraser.is_off() or not len(text):
            return
        ours = self.prompts.text if self.read is None else self.read
        if ours.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"The call's text has width {text.shape[-1]}, but the pipeline's own encoder makes width "
                f"{ours.shape[-1]}. Give embeddings of this encoder, or a prompt."
            )
        mixed = ours.dtype != text.dtype and not torch.is_autocast_enabled(text.device.type)
        if ours.device != text.device or mixed:
            raise ValueError(
                f"The erasure prompts of {type(self.eraser).__name__} are {ours.dtype} on {ours.device}, but the "
                f"call's text is {text.dtype} on {text.device}: the model was moved after `apply`. Call the pipeline, "
                "which encodes them anew, or apply the eraser again."
            )


def _join(pipe: DiffusionPipeline, prompts: list[str], texts: list[str], **settings: Any) -> dict[str, Tensor]:
    """`joined` and `lengths` of erasure prompts, for each prompt of the call."""
    pairs, lengths = [], []
    for text, prompt in itertools.product(texts, prompts):
        pairs.append(prompt + " " * (not prompt.endswith(" ")) + text)
        for tokenizer in (getattr(pipe, name) for name in readers(pipe)):
            three = cleaned(pipe, tokenizer, (prompt, text, pairs[-1]), **settings)
            n, m, both = (len(tokenizer(each, add_special_tokens=False).input_ids) for each in three)
            limit = tokenizer.model_max_length - 2
            if n + m != both or both > limit:
                raise ValueError(
                    f"Official values join prompt and erasure prompt into one text, but {pairs[-1]!r} has {both} "
                    f'tokens (expected {n} + {m}, and at most {limit}). Shorten one of them, or use values="paper".'
                )
        lengths.append(n)
    joined = encode(pipe, pairs, differentiable=True, **settings).text.unflatten(0, (len(texts), len(prompts)))
    return {"joined": joined, "lengths": torch.tensor(lengths[: len(prompts)], device=joined.device)}
