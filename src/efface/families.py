"""Facts about model families, as data: what differs between the text encoders and denoisers that methods hook."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
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
    """The family of a pipeline, told by its parts.

    Raises:
        TypeError: not a pipeline that Efface knows.
    """
    parts = getattr(pipe, "components", {})
    if parts and not hasattr(pipe, "encode_prompt"):
        raise TypeError(
            f"{type(pipe).__name__} has no `encode_prompt`, which tells Efface which rows are conditional: use a "
            "pipeline that has it, such as StableDiffusionPipeline."
        )
    encoders = tuple(_kind(parts[name]) for name in ("text_encoder", "text_encoder_2") if parts.get(name) is not None)
    if parts.get("unet") is not None and parts.get("tokenizer") is not None and encoders in _BY_ENCODERS:
        return _BY_ENCODERS[encoders]
    transformer = parts.get("transformer")
    found, needed = _BY_TRANSFORMER.get(type(getattr(transformer, "_orig_mod", transformer)).__name__, (None, 0))
    if found and len(encoders) >= needed:
        return EMOJI_FLUX if found is FLUX and encoders[0] == "Bert" else found
    known = ", ".join(f.name for f in FAMILIES)
    raise TypeError(
        f"Expected a diffusers text-to-image pipeline of a tested family ({known}), but got {type(pipe).__name__}. "
        "It needs a UNet with CLIP text encoders (emoji: BERT), or the transformer of PixArt, SD 3 or FLUX with theirs."
    )


_BY_ENCODERS = {("CLIPText",): SD, ("CLIPText", "CLIPText"): SDXL, ("Bert",): EMOJI}  # of pipelines with a UNet
_BY_TRANSFORMER = {  # and how many of the first two text encoders it takes
    "PixArtTransformer2DModel": (PIXART, 1),
    "SD3Transformer2DModel": (SD3, 2),
    "FluxTransformer2DModel": (FLUX, 2),
}


def _kind(encoder: Any) -> str:
    """What a text encoder is, by the names of its classes; without what `torch.compile` wraps around it."""
    names = [kind.__name__ for kind in type(getattr(encoder, "_orig_mod", encoder)).__mro__]
    return next((kind for kind in ("CLIPText", "Bert") if any(name.startswith(kind) for name in names)), "")


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
