"""What a run-time method says of itself, and what it may do in a call of the pipeline."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from .. import checks
from .._text import check_phrases
from ..core import Concept, as_concepts, as_rows
from ..families import check as check_needs
from ..fields import field_names
from .attention import CrossAttention, SelfAttention
from .texts import ErasurePrompts, Text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


Memory = dict[str, Any]
"""What a method keeps from step to step: a dictionary from a name of yours to any value.

The engine empties it when a call of the pipeline begins. It is the only place for state: a method is a frozen value,
and may be on several pipelines.

    previous = memory.get("momentum", 0.0)
"""

Seen = Callable[[str, CrossAttention | SelfAttention], None]
"""Gets a layer's name, and what the layer computed on the conditional rows."""


@dataclass(frozen=True)
class Encoding:
    """What a call of the pipeline encodes; `Method.prepared` gets it.

    Args:
        prompts: one for each conditional row; None where the caller gave embeddings.
        settings: further arguments of `encode_prompt`, such as `clip_skip`.

    Shapes: `prompts` has P texts; the call has P * `num_images_per_prompt` conditional rows.

    Raises:
        AttributeError: setting a field: it is frozen.

    Example:
        >>> from efface.hooks import Encoding
        >>> Encoding(["a cat"], {"clip_skip": 1}).settings
        {'clip_skip': 1}
    """

    prompts: Sequence[str] | None
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One call of the denoiser, before it runs; `Method.around` gets it.

    Args:
        sample: what the denoiser gets, unconditional rows first.
        first: the number of unconditional rows.
        prompt: what the conditional rows read.
        timestep: as the denoiser gets it.
        erasure_prompts: gives those of the method, in `plain` as the layers read them; None if none acts.
        pipe: the pipeline whose call this is part of; None if the denoiser was called by itself.
        memory: of the method.
        plain: calls the denoiser without any method, on another sample if given, and shows what the layers computed. A
            method that uses it says `calls_denoiser = True`.

    Shapes: `sample` [rows, C, h, w] (FLUX: [rows, L, C]); `prompt` holds rows - `first` texts.

    Raises:
        ValueError: on a compiled denoiser, before `around` runs, for a method that says `calls_denoiser`.

    Example:
        >>> from efface.hooks import DenoiserCall, Method
        >>> class Timed(Method):
        ...     def around(self, call: DenoiserCall, forward):
        ...         call.memory["steps"] = call.memory.get("steps", 0) + 1
        ...         return forward()
    """

    sample: Tensor
    first: int
    prompt: Text
    timestep: Tensor | float
    erasure_prompts: Callable[[], ErasurePrompts | None]
    pipe: DiffusionPipeline | None
    memory: Memory
    plain: Callable[[Tensor | None, Seen], Tensor]


@dataclass(frozen=True)
class Prediction:
    """What the denoiser predicts in one step, conditional rows only, float32 or wider; `Method.guide` gets it.

    Args:
        prompt: for the user's prompt, before any method changed it.
        negative: the same rows' unconditional prediction.
        concept: for the concept's text, all else (noise, pooled size, ControlNet, IP-Adapter) as in the prompt's row;
            the mean, if the phrases fill several texts.
        guidance_scale: of the pipeline's call; NaN where pipelines do not tell it.
        time: 0 is pure noise, 1 the picture; it broadcasts over the predictions. For a method with `counts_steps` it is
            the middle of the present step, as a share of all steps.
        memory: of the method.

    Shapes: `prompt`, `negative` and `concept` [B, C, h, w] (FLUX: [B, L, C]); `time` [].

    Raises:
        AttributeError: setting a field: it is frozen.

    Example:
        >>> import torch
        >>> from efface.hooks import Prediction
        >>> prompt, negative, concept = torch.zeros(3, 1, 4, 8, 8)
        >>> seen = Prediction(prompt, negative, concept, 7.5, torch.tensor(0.0), {})
        >>> (-(seen.concept - seen.negative)).shape
        torch.Size([1, 4, 8, 8])
    """

    prompt: Tensor
    negative: Tensor
    concept: Tensor
    guidance_scale: float
    time: Tensor
    memory: Memory


class Contract:
    """What a run-time method may say of itself and do; here, nothing.

    A subclass is a frozen dataclass with `concepts` and overrides `edit` (cross-attention), `edit_self`
    (self-attention), `guide` (predicted noise), `rewrite` (text, once), `rewrite` and `reread` (text, at each step),
    or `around` (a whole denoiser call). The class attributes are constants, or `computed` from the fields.
    """

    off: ClassVar[dict[str, Any] | None] = None
    needs: ClassVar[tuple[str, ...]] = ()  # of a pipeline: names from `efface.families.OFFERS`
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # by family, see `efface.families.filled`; {}: no table
    touches_uncond: ClassVar[bool] = False  # whether it may change unconditional rows
    edits_attention: ClassVar[bool] = False
    edits_self_attention: ClassVar[bool] = False
    guides: ClassVar[bool] = False  # changes the prediction, which takes guidance
    # guidance pushes away from its further predictions, so others edit them as unconditional rows
    repels: ClassVar[bool] = False
    negates: ClassVar[bool] = False  # changes the negative prompts, which takes guidance
    packs: ClassVar[bool] = True  # phrases share erasure prompts; a method may need one prompt per phrase
    # the mean of each group of texts stands for "some picture"; may be ()
    references: ClassVar[tuple[tuple[str, ...], ...]] = (("",),)
    # its times are shares of the steps done in a call of the pipeline, as papers count them, not of the noise
    counts_steps: ClassVar[bool] = False
    # `around` makes denoiser calls of its own, which a compiled denoiser does not allow
    calls_denoiser: ClassVar[bool] = False

    # These two have no annotation: pyright would then refuse subclasses that declare them as `Converted`.
    if TYPE_CHECKING:
        concepts = cast("tuple[Concept, ...]", ())
    rows = cast("tuple[tuple[Concept, ...], ...] | None", None)  # the concepts of each prompt, not the same for all
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the fields that methods share: `concepts`, and `strength`, `window` and `rows` where there are any."""
        concepts, names = as_concepts(self.concepts), field_names(self)
        checked: dict[str, Any] = {"concepts": concepts}
        if "rows" in names:
            checked["rows"] = as_rows(self.rows, concepts)
        for name in ("strength", "window"):
            optional = getattr(type(self), name, ()) is None  # None is a value only where it is the default
            if name in names and not (optional and getattr(self, name) is None):
                value = getattr(self, name)
                checked[name] = checks.number(name, value, 0) if name == "strength" else checks.window(name, value)
        if not concepts and checked.get("rows") is None:
            cure = "Give `concepts` or `rows`" if "rows" in names else "Give `concepts`"
            raise ValueError(f"{type(self).__name__} needs at least one concept to erase, got none. {cure}.")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def is_off(self) -> bool:
        return self.off is not None and all(getattr(self, k) == v for k, v in self.off.items())

    @property
    def wants_guidance(self) -> bool:
        """Whether a call without unconditional rows is an error."""
        return self.guides and not self.is_off()

    def weight(self, time: Tensor | float) -> Tensor | float:
        """How much it acts at a time, 0 (pure noise) to 1 (the picture): 1 inside its window, 0 outside."""
        start, end = self.window
        if (start, end) == (0.0, 1.0):
            return 1.0
        if torch.compiler.is_compiling() and isinstance(time, Tensor):
            return ((time >= start) & (time <= end)).float()
        return float(start <= float(time) <= end)

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

    def prepared(
        self, pipe: DiffusionPipeline, erasure_prompts: Sequence[str], call: Encoding | None, memory: Memory
    ) -> None:
        """Called when the erasure prompts were encoded: by `apply`, in each call of the pipeline, and after changes.

        `call` says what else the pipeline encodes; None outside of a call.
        """

    def around(self, call: DenoiserCall, forward: Callable[[], Any]) -> Any:
        """In place of a denoiser call: what `forward()` returns, which runs the methods behind it and the denoiser."""
        return forward()

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        """The cross-attention output [B, Q, C] without the concept of the erasure prompts.

        The rows are conditional. A method with `touches_uncond` also gets those with `cross.unconditional`: the
        unconditional rows that read another text than the empty one, and further rows that guidance pushes away from.
        """
        return out

    def edit_self(self, out: Tensor, layer: SelfAttention, prompts: ErasurePrompts) -> Tensor:
        """The self-attention output [B, Q, C] of conditional rows."""
        return out

    def guide(self, seen: Prediction) -> Tensor:
        """What to add to `seen.prompt` [B, C, h, w]. Every method sees the plain one: what they add is summed."""
        return torch.zeros_like(seen.prompt)

    def rewrite(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: inspect.BoundArguments, memory: Memory
    ) -> tuple[Any, ...]:
        """What `encode_prompt` returned, changed; `memory` is empty and lasts for this call of the pipeline."""
        return encoded

    def negate(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: inspect.BoundArguments, prompts: int
    ) -> tuple[Any, ...]:
        """What `encode_prompt` returned for the negative prompts of so many prompts, changed.

        Only where they get an `encode_prompt` of their own (FLUX).
        """
        return encoded

    def reread(self, text: Tensor, pooled: Tensor | None, time: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """The text [B, L, D] and pooled text that the conditional rows read at this time."""
        return text, pooled

    def groups(self, concepts: Sequence[Concept]) -> list[tuple[Concept, ...]]:
        """Which concepts share erasure prompts: those of a guided prediction do."""
        if self.guides:
            return [tuple(concepts)] if concepts else []
        return [(concept,) for concept in dict.fromkeys(concepts)]
