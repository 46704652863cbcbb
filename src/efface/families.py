"""Facts about model families, as data: what differs between the text encoders and denoisers that methods hook."""

from __future__ import annotations

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
        tokenizers: the pipeline's tokenizers, all of which see the whole prompt.
        causal: whether a text token sees only earlier ones (CLIP), so that a prefix keeps its embedding.
        masked: whether the denoiser gets a mask of the text's padding; `encode_prompt` then returns the text, its mask,
            the negative text and its mask.
        pooled: whether a pooled text embedding reaches the denoiser past cross-attention (not edited by EIUP).
    """

    name: str
    denoiser: str = "unet"
    tokenizers: tuple[str, ...] = ("tokenizer",)
    causal: bool = True
    pooled: bool = False
    masked: bool = False


SD = Family("SD 1.x/2.x")
SDXL = Family("SDXL", tokenizers=("tokenizer", "tokenizer_2"), pooled=True)
EMOJI = Family("emoji", causal=False)
PIXART = Family("PixArt", denoiser="transformer", causal=False, masked=True)
FAMILIES = (SD, SDXL, EMOJI, PIXART)


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
    if type(parts.get("transformer")).__name__ == "PixArtTransformer2DModel" and parts.get("text_encoder") is not None:
        return PIXART
    known = ", ".join(f.name for f in FAMILIES)
    raise TypeError(
        f"Expected a diffusers text-to-image pipeline of a tested family ({known}), but got {type(pipe).__name__}. "
        "It needs a UNet with CLIP text encoders (emoji: BERT), or PixArt's transformer with T5."
    )


_BY_ENCODERS = {("CLIPText",): SD, ("CLIPText", "CLIPText"): SDXL, ("Bert",): EMOJI}  # of pipelines with a UNet


def _kind(encoder: Any) -> str:
    """What a text encoder is, by the names of its classes; without what `torch.compile` wraps around it."""
    names = [kind.__name__ for kind in type(getattr(encoder, "_orig_mod", encoder)).__mro__]
    return next((kind for kind in ("CLIPText", "Bert") if any(name.startswith(kind) for name in names)), "")


def filled(method: Any, defaults: Mapping[str, Mapping[str, Any]], pipe: DiffusionPipeline) -> Any:
    """The method with its family's values, or those of "", where a field is None."""
    values = defaults.get(family(pipe).name, defaults.get("", {}))
    return replace(method, **{name: value for name, value in values.items() if getattr(method, name) is None})
