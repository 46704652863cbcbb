"""The facts of a family of pipelines: reading of texts, denoiser calls, and offers to methods.

A new family is one file in this package: it makes one or more `Family` objects, and overrides here what differs. A
family names no method. What methods may need, and families may offer, is listed in `_offers`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._parts import Adapted, class_names, encoder_name, held, is_kind, video_argument
from ._texts import InTexts
from ._training import InTraining

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

_JOINT = ("add_k_proj", "add_v_proj", "to_k", "to_v")


@dataclass(frozen=True)
class Family(InTexts, InTraining):
    """The facts on a family of pipelines for hooks and methods.

    Args:
        name: the name in docs and errors.
        denoiser_class: the class of the denoiser, or a base class of it.
        encoders: prefixes of the class names of the family's text encoders, in the order `text_encoder`,
            `text_encoder_2`, ...; "" for any class.
        offers: names from `OFFERS`. `offered` lists those of one pipeline.
        denoiser: the pipeline's attribute for the denoiser.
        returns: the outputs of `encode_prompt`, in order: "text", "pooled", "mask", the same for negative prompts
            ("negative", "negative_pooled", "negative_mask"), or "ids".
        texts: the tokenizers whose encoders' states the denoiser reads, in groups. States of a group share columns,
            side by side; groups follow each other.
        pools: the tokenizers whose encoders' pooled states form "pooled", side by side. This text bypasses attention.
        bidirectional: the tokenizers whose encoders are not causal (BERT, T5).
        resizable: the tokenizers whose limit follows the call argument `max_sequence_length`.
        left_padded: the tokenizers that pad before the text.
        padded_to_limit: whether texts are padded to the encoder's limit, or to the longest of an `encode_prompt` call.
        settings: the arguments of `encode_prompt` that change the encoding of any text.
        width_names: entries of the denoiser's config with the width of its text. The first that is set counts.
        scale: the call argument, and in some pipelines the attribute, with the guidance scale.
        unguided: the guidance scale that means no guidance. Larger ones add to 1 in u + w (c - u).
        ends_guidance: whether the pipeline itself may leave out the unconditional rows of late steps.
        guidance_in_two_calls: whether unconditional predictions come from separate denoiser calls, not from rows of the
            same call.
        unit_time: whether the denoiser takes times from 0 to 1, not training steps.
        text_argument, time_argument, mask_argument, pooled_argument: the denoiser's arguments for the text, the time,
            the mask of the text's padding, and the pooled text.
        shared_arguments: the denoiser's arguments that all rows of a batch share.
        skip_argument: the denoiser's argument with the numbers of the `transformer_blocks` that a call skips.
        weighs_padding: whether the denoiser reads masked padding too, with less weight. Otherwise it ignores it.
        positions: whether a column of the text has a position in joint attention.
        text_multiple: texts are padded to a multiple of so many columns, with learned tokens that the denoiser reads.
        joins_late: whether texts pass layers of their own in the denoiser before joint attention.
        joint: the last name of the modules with joint attention.
        text_first: whether text precedes the picture in joint attention.
        projection: the denoiser's module that projects the text for all layers; "" if there is none.
        text_inputs, pooled_inputs: the denoiser's linear modules that read the encoded text, and the pooled one, before
            all of its layers.
        original: this denoiser's modules as in the checkpoint that the model was published with, see `original_place`.
        bottleneck: the denoiser's module in the middle, whose output is smaller than its input; "" if there is none.
        picture_output: the position of the picture among the outputs of a block that returns text and picture.
        variances: whether the denoiser may predict variances in further channels, which pipelines leave out.
        outer_layers: prefixes of the names of the denoiser's parameters before and after its blocks.
    """

    name: str
    denoiser_class: str
    encoders: tuple[str, ...]
    offers: frozenset[str]
    denoiser: str = "transformer"
    returns: tuple[str, ...] = ("text", "negative")
    texts: tuple[tuple[str, ...], ...] = (("tokenizer",),)
    pools: tuple[str, ...] = ()
    bidirectional: tuple[str, ...] = ()
    resizable: tuple[str, ...] = ()
    left_padded: tuple[str, ...] = ()
    padded_to_limit: bool = True
    settings: tuple[str, ...] = ("clip_skip", "lora_scale", "clean_caption", "max_sequence_length")
    width_names: tuple[str, ...] = ("joint_attention_dim",)
    scale: str = "guidance_scale"
    unguided: int = 1
    ends_guidance: bool = False
    guidance_in_two_calls: bool = False
    unit_time: bool = False
    text_argument: str = "encoder_hidden_states"
    time_argument: str = "timestep"
    mask_argument: str = "encoder_attention_mask"
    pooled_argument: str = "pooled_projections"
    shared_arguments: tuple[str, ...] = ()
    skip_argument: str = ""
    weighs_padding: bool = False
    positions: bool = False
    text_multiple: int = 1
    joins_late: bool = False
    joint: str = "attn"
    text_first: bool = True
    projection: str = ""
    text_inputs: tuple[str, ...] = ()
    pooled_inputs: tuple[str, ...] = ()
    original: Mapping[str, str] = field(default_factory=dict, hash=False)
    bottleneck: str = ""
    picture_output: int = 0
    variances: bool = False
    outer_layers: tuple[str, ...] = ()

    # ---- what follows from the facts

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """All tokenizers that read the prompt."""
        return tuple(dict.fromkeys(itertools.chain(*self.texts, self.pools)))

    @property
    def cross_attention(self) -> bool:
        """Whether the denoiser reads text in cross-attention, not in joint attention."""
        return "cross_text" in self.offers

    @property
    def joint_attention(self) -> bool:
        """Whether the denoiser reads text in joint attention."""
        return "joint_text" in self.offers

    @property
    def causal(self) -> bool:
        """Whether a text token sees only earlier tokens, so that a prefix keeps its states."""
        return not self.bidirectional

    @property
    def pooled(self) -> bool:
        """Whether a pooled text bypasses attention."""
        return "pooled" in self.returns

    @property
    def masked(self) -> bool:
        """Whether the denoiser takes a mask of the text's padding."""
        return "mask" in self.returns

    @property
    def returns_negative(self) -> bool:
        """Whether `encode_prompt` also encodes the negative prompts. Otherwise it is called again."""
        return "negative" in self.returns

    @property
    def guidance_condition(self) -> str:
        """The call arguments that enable guidance; "" if the pipeline's defaults do."""
        return "" if self.returns_negative else f"`{self.scale}` above 1 and a negative prompt"

    def guided(self, guidance: float) -> dict[str, Any]:
        """The call arguments for this guidance scale; 1 means no guidance."""
        found = {self.scale: guidance - 1 + self.unguided}
        return found if self.returns_negative else {**found, "negative_prompt": ""}

    def protocol(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A suite's call arguments for this family: `guidance` becomes `guidance_scale`; distilled families drop it."""
        named = {"guidance": self.scale} if self.scale == "guidance_scale" else {}
        found = {named.get(name, name): value for name, value in call.items() if name != "guidance" or named}
        return found | ({self.scale: call["guidance"] - 1 + self.unguided} if named and "guidance" in call else {})

    def scale_of(self, pipe: DiffusionPipeline | None) -> float:
        """The guidance scale w of the pipeline's call in u + w (c - u); NaN if it does not expose one."""
        return float(getattr(pipe, self.scale, math.nan)) + 1 - self.unguided

    # ---- which pipelines are of the family

    def recognises(self, pipe: DiffusionPipeline) -> bool:
        """Whether a pipeline is of this family, by its class, its denoiser and its text encoders."""
        other = not self.has_denoiser(pipe) or not self.has_slots(pipe) or bool(self.lost(pipe))
        if other or not hasattr(pipe, "encode_prompt") or video_argument(type(pipe)):
            return False
        found = (getattr(pipe, slot) for slot in self.slots)
        return all(is_kind(part, kind) for part, kind in zip(found, self.encoders, strict=True))

    def has_denoiser(self, pipe: DiffusionPipeline) -> bool:
        """Whether the pipeline's denoiser has this family's class."""
        return self.denoiser_class in class_names(held(pipe).get(self.denoiser))

    def model(self, pipe: DiffusionPipeline) -> str:
        """The name in methods' tables of defaults: the family's, unless the family tells its models apart."""
        return self.name

    @property
    def slots(self) -> tuple[str, ...]:
        """The pipeline's attributes for the required text encoders."""
        return tuple("text_encoder" + (f"_{k + 1}" if k else "") for k in range(len(self.encoders)))

    def has_slots(self, pipe: DiffusionPipeline) -> bool:
        """Whether the pipeline's class takes exactly this family's text encoders."""
        there = {name for name in held(pipe) if name.startswith("text_encoder")}
        return set(self.slots) <= there <= {*self.slots, *map(encoder_name, self.tokenizers)}

    def lost(self, pipe: DiffusionPipeline) -> list[str]:
        """The required text encoders and tokenizers that the pipeline lacks."""
        named = [name for slot in self.slots for name in (slot, slot.replace("text_encoder", "tokenizer"))]
        return [name for name in named if held(pipe).get(name, "") is None]

    def cure_for_lost(self, lost: Sequence[str]) -> str:
        """The cure for missing text encoders."""
        return "Load the pipeline with all its text encoders and tokenizers, and keep them while an eraser is applied"

    def offered(self, pipe: DiffusionPipeline) -> frozenset[str]:
        """The offers of this pipeline: `offers`, without those that its denoiser or class lacks."""
        found = self.offers - {"guidance_scale"} | ({"guidance_scale"} if self.tells_scale(pipe) else set())
        if not self.joint_layers(getattr(pipe, self.denoiser)):
            found -= {"joint_text"}
        if not any(getattr(m, "is_cross_attention", False) for m in getattr(pipe, self.denoiser).modules()):
            found -= {"cross_text", "text_weights"}
        return found

    def tells_scale(self, pipe: DiffusionPipeline) -> bool:
        """Whether the pipeline object exposes the guidance scale of its call."""
        return hasattr(type(pipe), self.scale)

    def adds_rows(self, pipe: DiffusionPipeline) -> bool:
        """Whether the pipeline adds further rows to denoiser calls (perturbed attention guidance)."""
        return hasattr(type(pipe), "set_pag_applied_layers")

    def distilled(self, denoiser: nn.Module) -> bool:
        """Whether the denoiser is guidance-distilled: it takes the guidance scale as an input."""
        return False

    def train_timesteps(self, pipe: DiffusionPipeline) -> int:
        """The time of pure noise, in the denoiser's unit."""
        return 1 if self.unit_time else pipe.scheduler.config.num_train_timesteps

    # ---- the denoiser's call

    def adapted(
        self,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        prompts: int | None,
        guided: bool,
        length: int | None,
    ) -> Adapted:
        """A denoiser call with tensors in the order of rows that methods expect.

        Args:
            forward: the denoiser's `forward`.
            arguments: its arguments, by name.
            prompts: the number of prompts of the pipeline call; None outside of one.
            guided: whether that call has guidance.
            length: of its text.
        """
        return Adapted(forward, arguments)

    def text_columns(self, arguments: Mapping[str, Any]) -> int:
        """The number of the text's columns in joint attention."""
        return int(arguments[self.text_argument].shape[1])

    def noise(self, time: Any) -> Any:
        """The denoiser's time, in which pure noise is at `train_timesteps` and the picture at 0."""
        return time

    def text_width(self, denoiser: nn.Module) -> int | None:
        """The width of the denoiser's text; None if its config does not say."""
        config: Any = denoiser.config
        read = next((config[name] for name in self.width_names if config.get(name) is not None), None)
        return read if isinstance(read, int) else None

    def text_mask(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """The mask of the text's padding [B, L] among a denoiser's arguments."""
        mask = arguments.get(self.mask_argument)
        return mask if mask is not None and mask.ndim == 2 else None

    def with_mask(self, arguments: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
        """The arguments with another mask of the text's padding, for the same text."""
        return {**arguments, self.mask_argument: mask}

    def pooled_text(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """The pooled text [B, P] among a denoiser's arguments."""
        return arguments.get(self.pooled_argument)

    def with_pooled(self, arguments: Mapping[str, Any], pooled: Tensor) -> dict[str, Any]:
        """The arguments with another pooled text."""
        return {**arguments, self.pooled_argument: pooled}

    def for_length(self, arguments: dict[str, Any], length: int) -> dict[str, Any]:
        """The denoiser's arguments with other inputs that depend on the text's `length`, such as positions."""
        return arguments

    def with_positions(self, arguments: dict[str, Any], positions: Tensor, length: int) -> dict[str, Any]:
        """As `for_length`, with the positions [X] of further columns beside the text's own columns."""
        return self.for_length(arguments, length)

    def placed(self, denoiser: nn.Module, carried: Any) -> AbstractContextManager[Any]:
        """Gives the columns of texts that joint attention carries what only the denoiser's own modules can: positions
        where it counts columns, or the columns themselves, if it `joins_late`."""
        return nullcontext()

    def text_projection(self, denoiser: nn.Module) -> nn.Module | None:
        """The module that projects the text for all layers, if there is one."""
        return getattr(denoiser, self.projection) if self.projection else None

    def projects(self, denoiser: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The complete projection of a text, from the `forward` of that module."""
        return forward

    def joint_layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The modules with joint attention, by their names in the denoiser."""
        modules = denoiser.named_modules() if self.joint_attention else ()
        return {name: m for name, m in modules if name.rpartition(".")[2] == self.joint}

    def text_readers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The projections that make keys and values from the text, by their names in the denoiser.

        In joint attention these are the text's projections, or those of text and picture if the text has none.
        """
        if not self.cross_attention:
            named = {name: m for name, m in denoiser.named_modules() if name.rpartition(".")[2] in _JOINT}
            alone = {name: m for name, m in named.items() if name.endswith(_JOINT[:2])}
            return alone or named
        layers = [(n, m) for n, m in denoiser.named_modules() if getattr(m, "is_cross_attention", False)]
        return {f"{name}.{part}": getattr(layer, part) for name, layer in layers for part in ("to_k", "to_v")}
