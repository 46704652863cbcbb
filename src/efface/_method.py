"""What a run-time method sees of a pipeline's call, and what it may override."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ._attention import CrossAttention, Term
from ._text import check_phrases
from .core import Concept, as_concepts, as_rows, check_strength, check_window
from .families import check as check_needs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Prediction:
    """What the denoiser predicts in one step, conditional rows only, float32 or wider.

    Args:
        prompt: [B, C, h, w] for the user's prompt, before any eraser changed it.
        negative: the same rows' unconditional prediction.
        concept: for the concept's text, all else (noise, pooled size, ControlNet, IP-Adapter) as in the prompt's row;
            the mean, if the phrases fill several texts.
        guidance_scale: of the pipeline's call; NaN where pipelines do not tell it.
        time: 0 is pure noise, 1 the picture; it broadcasts over [B, C, h, w].
        memory: kept from step to step for this eraser, and empty when a call of the pipeline begins.
    """

    prompt: Tensor
    negative: Tensor
    concept: Tensor
    guidance_scale: float
    time: Tensor
    memory: dict[str, Tensor]


class Method:
    """What a run-time method may say of itself and do; here, nothing.

    A subclass is a frozen dataclass with `concepts` and overrides `edit` (attention), `guide` (predicted noise),
    `rewrite` (text, once) or `rewrite` and `reread` (text, at each step).
    """

    off: ClassVar[dict[str, Any] | None] = None
    needs: ClassVar[tuple[str, ...]] = ()  # of a pipeline: names from `efface.families.OFFERS`
    touches_uncond: ClassVar[bool] = False  # whether it may change unconditional rows
    edits_attention: ClassVar[bool] = False
    guides: ClassVar[bool] = False  # changes the prediction, which takes guidance
    repels = False  # guidance pushes away from its further predictions, so others edit them as unconditional rows
    negates = False  # changes the negative prompts, which takes guidance
    packs = True  # phrases share erasure prompts; a method may need one prompt per phrase
    references: tuple[tuple[str, ...], ...] = (("",),)  # the mean of each group of texts stands for "some picture"
    joins = False  # terms come with each prompt and the erasure prompt in one text
    twins = False  # the plain picture is drawn beside; the eraser keeps its window by the steps of `cross.beside`
    measures = False  # `weigh` gets features from a plain denoiser call in front of the first one

    concepts: tuple[Concept, ...]
    rows: tuple[tuple[Concept, ...], ...] | None = None
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the fields that methods share: `concepts`, and `strength`, `window` and `rows` where there are any."""
        concepts, names = as_concepts(self.concepts), {f.name for f in fields(self)}  # type: ignore[arg-type]
        checked: dict[str, Any] = {"concepts": concepts}
        if "rows" in names:
            checked["rows"] = as_rows(self.rows, concepts)
        for name, check in (("strength", check_strength), ("window", check_window)):
            optional = getattr(type(self), name, ()) is None  # None is a value only where it is the default
            if name in names and not (optional and getattr(self, name) is None):
                checked[name] = check(getattr(self, name))
        if not concepts and checked.get("rows") is None:
            cure = "give `concepts` or `rows`" if "rows" in names else "give `concepts`"
            raise ValueError(f"{type(self).__name__} needs at least one concept to erase, but got none: {cure}.")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def is_off(self) -> bool:
        return self.off is not None and all(getattr(self, k) == v for k, v in self.off.items())

    @property
    def wants_guidance(self) -> bool:
        """Whether a call without unconditional rows is an error."""
        return self.guides and not self.is_off()

    def exempt(self, time: Tensor) -> str:
        """Why it changes nothing at this time, beside its window; "" if it acts. It is only written into the record."""
        return ""

    def check(self, pipe: DiffusionPipeline) -> None:
        """ValueError if it cannot work on this pipeline; asked by `apply` and before any change through the handle.

        Here: a pipeline without what the method needs, and a phrase that a text encoder cannot read. A method that
        overrides it calls `super().check(pipe)`.
        """
        check_needs(self, pipe)
        concepts = dict.fromkeys([*self.concepts, *itertools.chain(*(self.rows or ()))])
        check_phrases(pipe, list(dict.fromkeys(phrase for concept in concepts for phrase in concept.phrases)))

    def edit(self, out: Tensor, cross: CrossAttention, term: Term) -> Tensor:
        """The attention output [B, Q, C] without the concept of `term`.

        The rows are conditional. A method with `touches_uncond` also gets those with `cross.unconditional`: the
        unconditional rows that read another text than the empty one, and further rows that guidance pushes away from.
        """
        return out

    def copies(self, step: int, steps: int, queries: int) -> bool:
        """With a twin: whether self-attention layers of so many queries take its maps in this step."""
        return False

    def weigh(self, features: Tensor, layers: tuple[str, ...]) -> Tensor:
        """Weights [B, tokens] of an erasure prompt's own tokens from the attention they get, [B, tokens, layers].

        `layers` are the names of the cross-attention layers in the order in which they ran.
        """
        raise NotImplementedError

    def guide(self, seen: Prediction) -> Tensor:
        """What to add to `seen.prompt` [B, C, h, w]. Every method sees the plain one: what they add is summed."""
        return torch.zeros_like(seen.prompt)

    def rewrite(
        self,
        pipe: DiffusionPipeline,
        encoded: tuple[Any, ...],
        call: inspect.BoundArguments,
        memory: dict[str, Tensor],
    ) -> tuple[Any, ...]:
        """What `encode_prompt` returned, changed; `memory` is empty and lasts for this call of the pipeline."""
        return encoded

    def negate(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: inspect.BoundArguments
    ) -> tuple[Any, ...]:
        """What `encode_prompt` returned for negative prompts, changed, if they get a call of their own (FLUX)."""
        return encoded

    def reread(
        self, text: Tensor, pooled: Tensor | None, time: Tensor, memory: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The text [B, L, D] and pooled text that the conditional rows read at this time."""
        return text, pooled

    def groups(self, concepts: Sequence[Concept]) -> list[tuple[Concept, ...]]:
        """Which concepts share erasure prompts: those of a guided prediction do."""
        if self.guides:
            return [tuple(concepts)] if concepts else []
        return [(concept,) for concept in dict.fromkeys(concepts)]
