"""Modular pipelines of diffusers draw with erasers by `efface.Guider`, and never without them unnoticed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
)
from diffusers.modular_pipelines import StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks
from torch import Tensor

import efface
from efface.testing import change, latents, pipeline

BLOCKS = {"sdxl": StableDiffusionXLAutoBlocks, "sd3": StableDiffusion3AutoBlocks}
NAMED = {"sdxl": "unet", "sd3": "transformer"}
PROMPTS = ["a glass of wine", "a red cat"]
CAT, WINE = efface.Concept("cat"), efface.Concept("wine", ("wine", "beer"))
SCALE, SEED, STEPS = 5.0, 1_000_000, 3
ORDINARY = functools.cache(pipeline)


@functools.cache
def modular(family: str) -> Any:
    """A modular pipeline of the parts of the ordinary one, without a `Guider`."""
    made = BLOCKS[family]().init_pipeline()
    made.set_progress_bar_config(disable=True)
    parts = ORDINARY(family).components
    made.update_components(**{name: part for name, part in parts.items() if name in made.component_names})
    return made


def noise(family: str) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))


def by_modular(family: str, guider: BaseGuidance, **options: Any) -> Tensor:
    pipe = modular(family)
    pipe.update_components(guider=guider)
    call = {"prompt": PROMPTS, "latents": noise(family), "height": 16, "width": 16, "num_inference_steps": STEPS}
    call |= {"negative_prompt": ""} if family == "sd3" else {}  # else it has no guidance
    found: Tensor = pipe(**call | options, output="latents")
    return found


def guarded(family: str, guider: BaseGuidance | None = None, **options: Any) -> Tensor:
    guider = ClassifierFreeGuidance(guidance_scale=SCALE) if guider is None else guider
    return by_modular(family, efface.Guider(ORDINARY(family), guider), **options)


@functools.cache
def base(family: str) -> Tensor:
    return by_modular(family, ClassifierFreeGuidance(guidance_scale=SCALE))


def ordinary(family: str, **options: Any) -> Tensor:
    call = {"latents": noise(family), "height": 16, "width": 16, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    settings = {"max_sequence_length": 256} if family == "sd3" else {}
    return latents(ORDINARY(family), PROMPTS, **call | settings | options)


METHODS = {
    "eiup": efface.EIUP(WINE),
    "eiup rows": efface.EIUP(WINE, rows=[[WINE], []]),
    "sld": efface.SLD.max(WINE),
    "negative prompt": efface.NegativePrompt(WINE, strength=2.0),
    "crg": efface.CRG(CAT, threshold=-1.0),
    "nag": efface.NAG(WINE),
}


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("name", METHODS)
def test_a_modular_pipeline_draws_the_pictures_of_the_ordinary_one(family: str, name: str) -> None:
    """Although its predictions come from separate denoiser calls."""
    with METHODS[name].apply(ORDINARY(family)) as handle:
        expected, made = ordinary(family), guarded(family)
        record = handle.record
    assert change(expected, base(family)) > 1e-3
    assert change(made, expected) < 1e-4
    rows = {"0": STEPS} if name == "eiup rows" else {"0": STEPS, "1": STEPS}
    assert record["rows"] == rows and record["calls"] == 2 * STEPS


def test_a_negative_prompt_is_edited_as_in_the_ordinary_pipeline() -> None:
    words = {"negative_prompt": ["a beer", "a dog"]}
    with efface.EIUP(WINE).apply(ORDINARY("sdxl")):
        made, expected = guarded("sdxl", **words), ordinary("sdxl", **words)
    with efface.EIUP(WINE, normalization="gated").apply(ORDINARY("sdxl")):  # which edits no unconditional row
        other = ordinary("sdxl", **words)
    assert change(made, expected) < 1e-4 < change(other, expected)


def test_without_erasers_and_after_them_the_guider_draws_what_its_own_guider_draws() -> None:
    guider = efface.Guider(ORDINARY("sdxl"), ClassifierFreeGuidance(guidance_scale=SCALE))
    assert torch.equal(by_modular("sdxl", guider), base("sdxl"))
    with efface.SLD.max(WINE).apply(ORDINARY("sdxl")):
        first, second = by_modular("sdxl", guider), by_modular("sdxl", guider)
    assert torch.equal(first, second)  # the momentum starts anew in each call
    assert change(first, base("sdxl")) > 1e-3
    assert torch.equal(by_modular("sdxl", guider), base("sdxl"))
    assert change(ordinary("sdxl"), base("sdxl")) < 1e-4  # the ordinary pipeline has batches again


def test_other_guiders_and_windows_of_guidance() -> None:
    with efface.EIUP(WINE).apply(ORDINARY("sdxl")):
        projected = guarded("sdxl", AdaptiveProjectedGuidance(guidance_scale=SCALE, eta=0.0))
        early = guarded("sdxl", ClassifierFreeGuidance(guidance_scale=SCALE, stop=0.5))
    for made in (projected, early):
        assert change(made, base("sdxl")) > 1e-3 and bool(made.isfinite().all())
    # Where guidance is off, the scale is 1, so a negative prompt of strength s has the factor s.
    with efface.NegativePrompt(WINE, strength=2.0).apply(ORDINARY("sdxl")):
        part = guarded("sdxl", ClassifierFreeGuidance(guidance_scale=SCALE, stop=0.5))
        original = guarded("sdxl", ClassifierFreeGuidance(guidance_scale=SCALE - 1, use_original_formulation=True))
        assert change(original, ordinary("sdxl")) < 1e-4
        with pytest.raises(ValueError, match="guidance scale"):
            guarded("sdxl", AdaptiveProjectedGuidance(guidance_scale=SCALE))
    assert change(part, early) > 1e-3


def test_calls_that_erasers_cannot_follow_are_refused() -> None:
    pipe = ORDINARY("sdxl")
    with efface.EIUP(WINE).apply(pipe):
        with pytest.raises(RuntimeError, match="another pipeline shares this denoiser"):
            by_modular("sdxl", ClassifierFreeGuidance(guidance_scale=SCALE))
        assert change(guarded("sdxl"), base("sdxl")) > 1e-3
        with pytest.raises(RuntimeError, match="another pipeline shares this denoiser"):  # nor afterwards
            by_modular("sdxl", ClassifierFreeGuidance(guidance_scale=SCALE), prompt=["a dog", "a moon"])
        with pytest.raises(RuntimeError, match="Expected the `unet` of the StableDiffusionXLPipeline"):
            by_modular("sdxl", efface.Guider(pipeline("sdxl")))
    for method in (efface.SAFREE(WINE), efface.NegativePrompt(WINE)):
        with method.apply(pipe), pytest.raises(ValueError, match="prompt_embeds"):
            guarded("sdxl")
    with efface.SLD(WINE).apply(pipe), pytest.raises(ValueError, match="needs guidance"):
        guarded("sdxl", ClassifierFreeGuidance(guidance_scale=1.0))


def test_an_eraser_applied_between_two_steps_is_refused() -> None:
    """It has not seen the prompts of the call."""
    guider = efface.Guider(ORDINARY("sdxl"), ClassifierFreeGuidance(guidance_scale=SCALE))
    applied: list[Any] = []
    denoiser = ORDINARY("sdxl").unet
    hook = denoiser.register_forward_hook(lambda *_: applied or applied.append(efface.EIUP(WINE).apply(pipe)))
    pipe = ORDINARY("sdxl")
    try:
        with pytest.raises(RuntimeError, match="did not call the unet with the erasers"):
            by_modular("sdxl", guider)
    finally:
        hook.remove()
        for handle in applied:
            handle.remove()
    assert applied


@pytest.mark.parametrize(
    "guider",
    [PerturbedAttentionGuidance(perturbed_guidance_layers=[0]), AutoGuidance(auto_guidance_layers=[0], dropout=0.5)],
)
def test_guiders_with_other_predictions_are_refused(guider: BaseGuidance) -> None:
    with pytest.raises(ValueError, match="other predictions"):
        efface.Guider(ORDINARY("sdxl"), guider)


def test_what_is_no_guider_or_has_no_modular_form_is_refused() -> None:
    with pytest.raises(TypeError, match="guider of diffusers"):
        efface.Guider(ORDINARY("sdxl"), 7.5)
    with pytest.raises(TypeError, match="modular form"):
        efface.Guider(pipeline("sd1"))
