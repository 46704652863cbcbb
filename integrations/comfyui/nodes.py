"""The nodes of Efface."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.utils
import folder_paths

import efface
from efface import api

from .attention import Erasure
from .guidance import Guidance

GUIDING = ("sld.medium", "sld.weak", "sld.strong", "sld.max", "crg", "negative_prompt")
MODEL = {"model": ("MODEL",)}
ERASING = {
    **MODEL,
    "clip": ("CLIP",),
    "concepts": ("STRING", {"default": "alcohol", "tooltip": "Shipped concepts, with commas. `efface list concepts`."}),
    "phrases": ("STRING", {"default": "", "tooltip": "Your own words for a concept, with commas."}),
}


def number(default: float, most: float = 100.0) -> tuple[str, dict[str, float]]:
    """An input for a strength, or for a share of the steps if it is at most 1."""
    return ("FLOAT", {"default": default, "min": 0.0, "max": most, "step": 0.05 if most > 1 else 0.01})


def patched(model: Any, clip: Any, method: Any, change: type[Erasure | Guidance]) -> Any:
    """A copy of the model that `method` changes while it draws."""
    changed = model.clone()
    if not method.is_off():
        change(changed, clip, method).patch(changed)
    return (changed,)


def concepts_of(concepts: str, phrases: str) -> list[Any]:
    """The concepts of a node's two texts."""
    names, own = ([word.strip() for word in text.split(",") if word.strip()] for text in (concepts, phrases))
    return [*names, *([efface.Concept(own[0], tuple(own))] if own else [])]


class EffaceEIUP:
    """EIUP on cross-attention: removes what the prompt adds in the direction of the concept."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "erase", "efface"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **ERASING,
                "strength": number(2.25),
                "start": number(0.0, most=1.0),
                "end": number(1.0, most=1.0),
            }
        }

    def erase(
        self, model: Any, clip: Any, concepts: str, phrases: str, strength: float, start: float, end: float
    ) -> Any:
        method = efface.EIUP(concepts_of(concepts, phrases), strength=strength, window=(start, end))
        return patched(model, clip, method, Erasure)


class EffaceGuidance:
    """SLD, CRG or the negative prompt with a strength: changes the predicted noise."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "erase", "efface"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **ERASING,
                "method": (list(GUIDING), {"default": GUIDING[0]}),
                "strength": number(1.0),
            }
        }

    def erase(self, model: Any, clip: Any, concepts: str, phrases: str, method: str, strength: float) -> Any:
        made = api.build(method, concepts_of(concepts, phrases), strength=strength)
        return patched(model, clip, made, Guidance)


class EffaceDelta:
    """A delta that `efface delta export --layout kohya` wrote. Raises an error if the model lacks one of its layers."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "efface"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **MODEL,
                "delta": (folder_paths.get_filename_list("loras"),),
                "strength": number(1.0),
            }
        }

    def load(self, model: Any, delta: str, strength: float) -> Any:
        lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", delta), safe_load=True)
        wanted = {name.removesuffix(".lora_up.weight") for name in lora if name.endswith(".lora_up.weight")}
        known = comfy.lora.model_lora_keys_unet(model.model, {})
        if not wanted or (missing := sorted(wanted - known.keys())):
            got = f"{len(missing)} others of {len(wanted)}, such as {missing[0]!r}" if wanted else "none"
            raise ValueError(
                f"Expected changes of layers of this model in {delta!r}, got {got}. Export the delta with `--layout "
                "kohya`, and load the model that it was fitted on."
            )
        changed = model.clone()
        patches = comfy.lora.load_lora(lora, known)
        written = changed.add_patches(patches, strength)
        if len(set(written)) != len(wanted):
            raise ValueError(
                f"Expected to change {len(wanted)} layers by {delta!r}, but the model took {len(set(written))}. Load "
                "the model that the delta was fitted on."
            )
        return (changed,)


NODE_CLASS_MAPPINGS = {"EffaceEIUP": EffaceEIUP, "EffaceGuidance": EffaceGuidance, "EffaceDelta": EffaceDelta}
NODE_DISPLAY_NAME_MAPPINGS = {
    "EffaceEIUP": "Efface: EIUP",
    "EffaceGuidance": "Efface: guidance (SLD, CRG, negative prompt)",
    "EffaceDelta": "Efface: load delta",
}
