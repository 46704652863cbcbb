"""The erasure prompts of one eraser that is on: encoded, and placed on the rows of the batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._attention import Term
from ._method import Method
from ._text import cleaned, encode, pack, readers
from ._weights import denoiser_of
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
        with torch.no_grad():
            text, mask = projected(denoiser_of(pipe), encoded.text), encoded.mask
        if mask is None:
            self.neutral = torch.stack([group.mean(0) for group in text[:n].split(sizes)])
        else:  # the mean of the texts that have a token there
            seen = [group[..., None].to(text.dtype) for group in mask[:n].split(sizes)]
            groups = zip(text[:n].split(sizes), seen, strict=True)
            self.neutral = torch.stack([(group * s).sum(0) / s.sum(0).clamp_min(1) for group, s in groups])
            self.neutral_mask = torch.stack([group.any(0) for group in mask[:n].split(sizes)])
        self.of = tuple(group for group, _ in texts)
        self.prompts = Term(text[n:], encoded.own[n:], mask=None if mask is None else mask[n:])
        joined: dict[str, Any] = {}
        if eraser.joins and prompts is not None and texts:
            joined = _join(pipe, prompts, [text for _, text in texts], **settings)
        self.change(images_per_prompt, **joined)

    def change(self, images_per_prompt: int, **parts: Any) -> None:
        """Changes parts of the erasure prompts, if there are any, and gives them their rows again."""
        if self.prompts is None:
            return
        self.prompts = replace(self.prompts, **parts)
        self.acting = (self.prompts,)
        self.place(images_per_prompt)

    def place(self, images_per_prompt: int, batch: int | None = None) -> None:
        """Gives the erasure prompts of an eraser with `rows` their rows of the batch, `batch` conditional ones."""
        rows = self.eraser.rows
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
                f"`rows` has {len(rows)} entries, but the call has {batch // images_per_prompt} prompts: give one list "
                "of concepts per prompt."
            )

    def check_text(self, text: Tensor) -> None:
        """ValueError if the erasure prompts and the call's text differ in width, device or dtype."""
        if self.prompts is None or self.eraser.is_off() or not len(text):
            return
        ours = self.prompts.text
        if ours.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"The call's text has width {text.shape[-1]}, but the pipeline's own encoder makes width "
                f"{ours.shape[-1]}: give embeddings of this encoder, or a prompt."
            )
        mixed = ours.dtype != text.dtype and not torch.is_autocast_enabled(text.device.type)
        if ours.device != text.device or mixed:
            raise ValueError(
                f"The erasure prompts of {type(self.eraser).__name__} are {ours.dtype} on {ours.device}, but the "
                f"call's text is {text.dtype} on {text.device}: the model was moved after `apply`. Call the pipeline, "
                "which encodes them anew, or apply the eraser again."
            )


def projected(denoiser: nn.Module, text: Tensor) -> Tensor:
    """A text as the cross-attention layers get it: some denoisers project it first."""
    projection = getattr(denoiser, "caption_projection", None)
    return text if projection is None else projection(text)


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
                    f'tokens (expected {n} + {m}, and at most {limit}): shorten one of them, or use values="paper".'
                )
        lengths.append(n)
    joined = encode(pipe, pairs, differentiable=True, **settings).text.unflatten(0, (len(texts), len(prompts)))
    return {"joined": joined, "lengths": torch.tensor(lengths[: len(prompts)], device=joined.device)}
