"""Facts about model families, as data: what differs between the text encoders and denoisers that methods hook."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Family:
    """What hooks and methods need to know about a family of pipelines.

    Args:
        name: as used in docs and errors.
        denoiser: the pipeline's attribute that predicts the noise.
        returns: what `encode_prompt` returns, in order. Without "negative" it is called once more for the negative
            prompts, and so is the denoiser.
        texts: the tokenizers whose encoders' states the denoiser reads: those of a group stand side by side in the same
            columns, the groups one behind the other.
        pools: the tokenizers whose encoders' pooled states stand side by side in "pooled", the text that reaches the
            denoiser past attention (not edited by EIUP).
        bidirectional: the tokenizers whose encoders are not causal (BERT, T5), so that no prefix keeps its embedding.
        cross_attention: whether the denoiser reads text in layers of its own, rather than beside the picture in one.
        scale: the argument of a call, and with some pipelines their attribute, that is the guidance scale.
        unit_time: whether the denoiser gets times from 0 to 1, not steps of the training.
    """

    name: str
    denoiser: str = "unet"
    returns: tuple[str, ...] = ("text", "negative")
    texts: tuple[tuple[str, ...], ...] = (("tokenizer",),)
    pools: tuple[str, ...] = ()
    bidirectional: tuple[str, ...] = ()
    cross_attention: bool = True
    scale: str = "guidance_scale"
    unit_time: bool = False

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """All that see the prompt."""
        return tuple(dict.fromkeys(itertools.chain(*self.texts, self.pools)))

    @property
    def causal(self) -> bool:
        """Whether a text token sees only earlier ones (CLIP), so that a prefix keeps its embedding."""
        return not self.bidirectional

    @property
    def about(self) -> str:
        """A line for lists."""
        if not self.cross_attention:
            encoders = "bidirectional text encoder" if set(self.pools) <= set(self.bidirectional) else "CLIP and T5"
            return f"{encoders}, read beside the picture; {self.methods}"
        return "causal text encoder" if self.causal else "bidirectional text encoder"

    @property
    def pooled(self) -> bool:
        return "pooled" in self.returns

    @property
    def masked(self) -> bool:
        """Whether the denoiser gets a mask of the text's padding."""
        return "mask" in self.returns

    @property
    def methods(self) -> str:
        """What works here, where cross-attention is missing."""
        if self.apart:
            return f"SAFREE, and SLD and NegativePrompt with `{self.scale}` above 1 and a negative prompt"
        return "SLD, SAFREE and NegativePrompt"

    @property
    def apart(self) -> bool:
        """Whether unconditional predictions come from denoiser calls of their own."""
        return "negative" not in self.returns


_BOTH, _POOLED = ("tokenizer", "tokenizer_2"), ("text", "negative", "pooled", "negative_pooled")
_MASKED = ("text", "mask", "negative", "negative_mask")
SD = Family("SD 1.x/2.x")
SDXL = Family("SDXL", returns=_POOLED, texts=(_BOTH,), pools=("tokenizer_2",))
EMOJI = Family("emoji", bidirectional=("tokenizer",))
PIXART = Family("PixArt", denoiser="transformer", returns=_MASKED, bidirectional=("tokenizer",))
SD3 = Family(
    "SD 3/3.5",
    denoiser="transformer",
    returns=_POOLED,
    texts=(_BOTH, ("tokenizer_3",)),
    pools=_BOTH,
    bidirectional=("tokenizer_3",),
    cross_attention=False,
)
FLUX = Family(
    "FLUX.1",
    denoiser="transformer",
    returns=("text", "pooled", "ids"),
    texts=(("tokenizer_2",),),
    pools=("tokenizer",),
    bidirectional=("tokenizer_2",),
    cross_attention=False,
    scale="true_cfg_scale",
    unit_time=True,
)
EMOJI_FLUX = replace(FLUX, name="emoji-flux", bidirectional=("tokenizer", "tokenizer_2"))  # BERT for CLIP and for T5
FAMILIES = (SD, SDXL, EMOJI, PIXART, SD3, FLUX, EMOJI_FLUX)


def family(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline, told by its class, its denoiser's class and its text encoders.

    Raises:
        TypeError: not a pipeline that Efface knows.
        ValueError: the pipeline of a known family lacks a text encoder or a tokenizer.
    """
    parts = getattr(pipe, "components", {})
    if parts and not hasattr(pipe, "encode_prompt"):
        raise TypeError(
            f"{type(pipe).__name__} has no `encode_prompt`, which tells Efface which rows are conditional: use a "
            "pipeline that has it, such as StableDiffusionPipeline."
        )
    got, name = type(pipe).__name__, denoiser_name(pipe)
    if frames := _frames(type(pipe).__call__) if parts else "":
        raise _untested(f"{got}, which draws videos (`{frames}`)")
    kind = _known_class(parts.get(name), (*_BY_DENOISER, "UNet2DConditionModel"))
    if not kind:
        raise _untested(f"{got} with a {_class_name(parts[name])} as `{name}`" if name else got)
    facts, needed = _BY_DENOISER.get(kind, (None, 2))
    slots = [slot for slot in ("text_encoder", "text_encoder_2")[:needed] if slot in parts]
    lost = [part for slot in slots for part in (slot, _tokenizer(slot)) if part in parts and parts[part] is None]
    if lost:
        raise ValueError(
            _without_encoder(got, lost, refiner=facts is None and "text_encoder" in lost and len(slots) == 2)
        )
    if facts is None:
        facts, needed = _BY_ENCODERS.get(tuple(_known_class(parts[slot], _ENCODERS) for slot in slots)), len(slots)
    if facts is None or len(slots) < needed:
        encoders = " and ".join(_class_name(parts[slot]) for slot in slots) or "no text encoder"
        raise _untested(f"{got} with {encoders}")
    return EMOJI_FLUX if facts is FLUX and _known_class(parts[slots[0]], _ENCODERS) == "Bert" else facts


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """The pipeline's attribute that predicts the noise; "" if it has none. Text encoders may be missing."""
    parts = getattr(pipe, "components", {})
    return next((name for name in ("unet", "transformer") if parts.get(name) is not None), "")


_BY_ENCODERS = {("CLIPText",): SD, ("CLIPText", "CLIPText"): SDXL, ("Bert",): EMOJI}  # of UNet2DConditionModel
_ENCODERS = ("CLIPText", "Bert")  # how the names of their classes begin
_BY_DENOISER: Mapping[str, tuple[Family | None, int]] = {  # and how many of the first two text encoders it takes
    "PixArtTransformer2DModel": (PIXART, 1),
    "SD3Transformer2DModel": (SD3, 2),
    "FluxTransformer2DModel": (FLUX, 2),
}


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _known_class(part: Any, known: Iterable[str]) -> str:
    """Which of the known names one of its classes has or begins with; without what `torch.compile` wraps around it."""
    names = [kind.__name__ for kind in type(getattr(part, "_orig_mod", part)).__mro__]
    exact = next((each for each in known if each in names), "")
    return exact or next((each for each in _ENCODERS if each in known and any(n.startswith(each) for n in names)), "")


def _class_name(part: Any) -> str:
    return type(getattr(part, "_orig_mod", part)).__name__


@functools.cache
def _frames(call: Callable[..., Any]) -> str:
    """The argument by which a pipeline's `__call__` draws videos, such as "num_frames"; "" if it draws pictures."""
    arguments = inspect.signature(call).parameters
    return next((name for name in ("num_frames", "video_length", "video") if name in arguments), "")


def _untested(got: str) -> TypeError:
    known = ", ".join(f.name for f in FAMILIES)
    return TypeError(
        f"Expected a diffusers text-to-image pipeline of a tested family ({known}), but got {got}. It needs a UNet "
        "with CLIP text encoders (emoji: BERT), of the class UNet2DConditionModel, or the transformer of PixArt, SD 3 "
        "or FLUX with theirs."
    )


def _without_encoder(pipeline: str, lost: Sequence[str], refiner: bool) -> str:
    cure = "Load the pipeline with all its text encoders and tokenizers, and keep them while an eraser is on"
    if refiner:  # it is made without the first one
        cure = "Erase on the SDXL base pipeline, and leave an SDXL refiner out"
    return (
        f"This {pipeline} has no {' and no '.join(f'`{name}`' for name in lost)}, but Efface encodes the concept's "
        f"phrases with the text encoders, also where the prompts are given as embeddings. {cure}."
    )


def without_cross_attention(who: str, pipe: DiffusionPipeline) -> str:
    """What is wrong with a pipeline whose denoiser reads the text beside the picture, and what works there."""
    facts = family(pipe)
    tested = ", ".join(f.name for f in FAMILIES if f.cross_attention)
    return (
        f"{who} works in cross-attention, but this {type(pipe).__name__} has no cross-attention layers: {facts.name} "
        f"attends to text and picture at once. Use it on {tested}; what works on {facts.name} is {facts.methods}."
    )


def filled(method: Any, defaults: Mapping[str, Mapping[str, Any]], pipe: DiffusionPipeline) -> Any:
    """The method with its family's values, or those of "", where a field is None."""
    values = defaults.get(family(pipe).name, defaults.get("", {}))
    return replace(method, **{name: value for name, value in values.items() if getattr(method, name) is None})
