"""Finds the family of a pipeline, among all families in the modules of this package."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from ._parts import bare, held, video_argument
from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def _walked() -> tuple[Family, ...]:
    """Every `Family` of every module of this package, by name."""
    files = [module.name for module in iter_modules([str(Path(__file__).parent)]) if not module.name.startswith("_")]
    made = [value for file in files for value in vars(import_module(f"{__package__}.{file}")).values()]
    found = dict.fromkeys(value for value in made if isinstance(value, Family))
    return tuple(sorted(found, key=lambda each: each.name.casefold()))


FAMILIES = _walked()
_DENOISERS = tuple(dict.fromkeys(each.denoiser for each in FAMILIES))


def family(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline, by its class, its denoiser's class and its text encoders.

    Raises:
        TypeError: Efface does not know the pipeline.
        ValueError: the pipeline is of a known family, but lacks a text encoder or a tokenizer.
    """
    for each in FAMILIES:
        if each.recognises(pipe):
            return each
    raise _unknown(pipe)


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """The pipeline's attribute for the denoiser; "" if it has none. Text encoders may be missing."""
    return next((name for name in _DENOISERS if held(pipe).get(name) is not None), "")


def _unknown(pipe: DiffusionPipeline) -> Exception:
    """The error for a pipeline of an unknown family."""
    parts, got, name = getattr(pipe, "components", {}), type(pipe).__name__, denoiser_name(pipe)
    if parts and not hasattr(pipe, "encode_prompt"):
        return TypeError(
            f"{got} has no `encode_prompt`, which Efface needs to identify the conditional rows. Use a pipeline with "
            "it, such as StableDiffusionPipeline."
        )
    if parts and (frames := video_argument(type(pipe))):
        return _untested(f"{got}, which draws videos (`{frames}`)")
    near = [each for each in FAMILIES if each.has_denoiser(pipe)]
    if not near:
        return _untested(f"{got} with a {_class_name(parts[name])} as `{name}`" if name else got)
    for each in near:
        if each.has_slots(pipe) and (lost := each.lost(pipe)):
            return ValueError(
                f"This {got} has no {' and no '.join(f'`{part}`' for part in lost)}, but Efface encodes the concept's "
                f"phrases with the text encoders, also if prompts are embeddings. {each.cure_for_lost(lost)}."
            )
    there = [part for slot, part in parts.items() if slot.startswith("text_encoder") and part is not None]
    return _untested(f"{got} with {' and '.join(map(_class_name, there)) or 'no text encoder'}")


def _class_name(part: Any) -> str:
    return type(bare(part)).__name__


def _untested(got: str) -> TypeError:
    names = ", ".join(each.name for each in FAMILIES)
    denoisers = ", ".join(sorted({each.denoiser_class for each in FAMILIES}))
    return TypeError(
        f"Expected a diffusers text-to-image pipeline of a tested family ({names}), got {got}. Use a pipeline "
        f"whose denoiser is one of {denoisers}, with the text encoders of its family (SD and SDXL: CLIP)."
    )
