"""The interface of a run-time method: its declarations, and its functions in a pipeline call."""

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
"""A method's memory across steps: a dictionary from names to any values.

The engine empties it at the start of a pipeline call. It is the only place for state, because a method is a frozen
value and may be on several pipelines.

    previous = memory.get("momentum", 0.0)
"""

Seen = Callable[[str, CrossAttention | SelfAttention], None]
"""Receives a layer's name, and the layer's computation on the conditional rows."""


@dataclass(frozen=True)
class Encoding:
    """The texts that a pipeline call encodes. `Method.prepared` receives it.

    Args:
        prompts: one per conditional row; None if the caller gave embeddings.
        settings: further arguments of `encode_prompt`, such as `clip_skip`.

    Shapes: `prompts` has P texts; the call has P * `num_images_per_prompt` conditional rows.

    Raises:
        AttributeError: a field is set. The object is frozen.

    Example:
        >>> from efface.hooks import Encoding
        >>> Encoding(["a cat"], {"clip_skip": 1}).settings
        {'clip_skip': 1}
    """

    prompts: Sequence[str] | None
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One call of the denoiser, before it runs. `Method.around` receives it.

    Args:
        sample: the denoiser's input, unconditional rows first.
        first: the number of unconditional rows.
        prompt: the text of the conditional rows.
        timestep: the time as the denoiser gets it.
        erasure_prompts: returns the method's erasure prompts, projected inside `plain`; None if none acts.
        pipe: the pipeline of the current call; None for direct denoiser calls.
        memory: the method's memory.
        plain: calls the denoiser without any method, by default on `sample`, and shows the layers' computations.
            Methods that use it declare `calls_denoiser = True`.

    Shapes: `sample` [rows, C, h, w] (FLUX: [rows, L, C]); `prompt` holds rows - `first` texts.

    Raises:
        ValueError: the denoiser is compiled and the method declares `calls_denoiser`. Raised before `around` runs.

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
    """The denoiser's predictions in one step for conditional rows, float32 or wider. `Method.guide` receives it.

    Args:
        prompt: the prediction for the user's prompt, before any method changed it.
        negative: the unconditional prediction of the same rows.
        concept: the prediction for the concept's text, with all other inputs (noise, pooled size, ControlNet,
            IP-Adapter) as in the prompt's row. The mean, if the phrases fill several texts.
        guidance_scale: the guidance scale of the pipeline call; NaN if the pipeline does not expose it.
        time: 0 is pure noise, 1 the picture. Broadcasts over the predictions. For methods with `counts_steps`, the
            middle of the current step as a share of all steps.
        memory: the method's memory.

    Shapes: `prompt`, `negative` and `concept` [B, C, h, w] (FLUX: [B, L, C]); `time` [].

    Raises:
        AttributeError: a field is set. The object is frozen.

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
    """The interface of a run-time method. The defaults here do nothing.

    A subclass is a frozen dataclass with `concepts` and overrides `edit` (cross-attention), `edit_self`
    (self-attention), `steer` (outputs of other modules), `guide` (predicted noise), `rewrite` (text, once), `rewrite`
    and `reread` (text, at each step), or `around` (a whole denoiser call). The class attributes are constants, or
    `computed` from the fields.
    """

    off: ClassVar[dict[str, Any] | None] = None
    needs: ClassVar[tuple[str, ...]] = ()  # required of the pipeline: names from `efface.families.OFFERS`
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # by family, see `efface.families.filled`; {}: no table
    added: ClassVar[tuple[str, ...]] = ()  # fields of later versions, which records leave out at their defaults
    touches_uncond: ClassVar[bool] = False  # whether it may change unconditional rows
    edits_attention: ClassVar[bool] = False
    edits_self_attention: ClassVar[bool] = False
    # the denoiser's modules whose outputs it changes, such as ("mid_block",)
    steers: ClassVar[tuple[str, ...]] = ()
    guides: ClassVar[bool] = False  # changes the prediction, which needs guidance
    # guidance pushes away from its further predictions, so other methods edit them like unconditional rows
    repels: ClassVar[bool] = False
    negates: ClassVar[bool] = False  # changes the negative prompts, which needs guidance
    packs: ClassVar[bool] = True  # phrases share erasure prompts; a method may need one prompt per phrase
    # groups of neutral texts; each group's mean is used; may be ()
    references: ClassVar[tuple[tuple[str, ...], ...]] = (("",),)
    # its times are shares of the steps of a pipeline call, as in papers, not of the noise
    counts_steps: ClassVar[bool] = False
    # `around` makes further denoiser calls, which a compiled denoiser does not allow
    calls_denoiser: ClassVar[bool] = False

    # These two have no annotation: pyright would then refuse subclasses that declare them as `Converted`.
    if TYPE_CHECKING:
        concepts = cast("tuple[Concept, ...]", ())
    rows = cast("tuple[tuple[Concept, ...], ...] | None", None)  # the concepts of each prompt, if they differ
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the fields that methods share: `concepts`, and `strength`, `window` and `rows` if the method has
        them."""
        concepts, names = as_concepts(self.concepts), field_names(self)
        checked: dict[str, Any] = {"concepts": concepts}
        if "rows" in names:
            checked["rows"] = as_rows(self.rows, concepts)
        for name in ("strength", "window"):
            optional = getattr(type(self), name, ()) is None  # None is allowed only as the default
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
        """The weight of the edit at a time from 0 (pure noise) to 1 (the picture): 1 inside the window, 0 outside."""
        start, end = self.window
        if (start, end) == (0.0, 1.0):
            return 1.0
        if torch.compiler.is_compiling() and isinstance(time, Tensor):
            return ((time >= start) & (time <= end)).float()
        return float(start <= float(time) <= end)

    def exempt(self, time: Tensor) -> str:
        """The reason, besides the window, for no change at this time; "" if it acts. Only the record uses it."""
        return ""

    def check(self, pipe: DiffusionPipeline) -> None:
        """Raises ValueError if the method cannot work on this pipeline. `apply` and changes through the handle call it.

        By default it checks `needs`, and whether the text encoders can read each phrase. An override calls
        `super().check(pipe)`.
        """
        check_needs(self, pipe)
        concepts = dict.fromkeys([*self.concepts, *itertools.chain(*(self.rows or ()))])
        check_phrases(pipe, list(dict.fromkeys(phrase for concept in concepts for phrase in concept.phrases)))

    def prepared(
        self, pipe: DiffusionPipeline, erasure_prompts: Sequence[str], call: Encoding | None, memory: Memory
    ) -> Memory | None:
        """Called after the erasure prompts are encoded: by `apply`, in each pipeline call, and after changes.

        `call` holds the prompts of the pipeline call; None outside of a call. What it returns is in every memory until
        it is called again, also in direct denoiser calls.
        """
        return None

    def around(self, call: DenoiserCall, forward: Callable[[], Any]) -> Any:
        """Replaces a denoiser call. Returns the result of `forward()`, which runs the following methods and the
        denoiser."""
        return forward()

    def edit(self, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        """Returns the cross-attention output [B, Q, C] without the concept of the erasure prompts.

        The rows are conditional. A method with `touches_uncond` also receives rows with `cross.unconditional`:
        unconditional rows with a negative prompt, and further rows that guidance pushes away from.
        """
        return out

    def edit_self(self, out: Tensor, layer: SelfAttention, prompts: ErasurePrompts) -> Tensor:
        """Returns the self-attention output [B, Q, C] of conditional rows."""
        return out

    def steered_concepts(
        self, row_concepts: Sequence[tuple[Concept, ...]], memory: Memory
    ) -> Sequence[tuple[Concept, ...]]:
        """The concepts for which `steer` changes each conditional row; a row without any stays unchanged."""
        return row_concepts

    def steer(self, out: Tensor, module: str, row_concepts: Sequence[tuple[Concept, ...]], memory: Memory) -> Tensor:
        """Returns the output [B, ...] of a module of `steers`, on the conditional rows with these concepts.

        The output has the picture's tokens only, if the module returns text and picture.
        """
        return out

    def guide(self, seen: Prediction) -> Tensor:
        """Returns the change of `seen.prompt` [B, C, h, w]. All methods see the unchanged prediction, and their changes
        are summed."""
        return torch.zeros_like(seen.prompt)

    def rewrite(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: inspect.BoundArguments, memory: Memory
    ) -> tuple[Any, ...]:
        """Changes the output of `encode_prompt`. `memory` is empty and lasts for this pipeline call."""
        return encoded

    def negate(
        self, pipe: DiffusionPipeline, encoded: tuple[Any, ...], call: inspect.BoundArguments, prompts: int
    ) -> tuple[Any, ...]:
        """Changes the output of `encode_prompt` for the negative prompts of so many prompts.

        Only called if negative prompts have a separate `encode_prompt` call (FLUX).
        """
        return encoded

    def reread(self, text: Tensor, pooled: Tensor | None, time: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """Returns the text [B, L, D] and pooled text of the conditional rows at this time."""
        return text, pooled

    def groups(self, concepts: Sequence[Concept]) -> list[tuple[Concept, ...]]:
        """Groups concepts that share erasure prompts. Those of a guided prediction share them."""
        if self.guides:
            return [tuple(concepts)] if concepts else []
        return [(concept,) for concept in dict.fromkeys(concepts)]
