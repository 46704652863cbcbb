"""Erasers beside other parts of diffusers, other pipelines and other threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from tiny import ALCOHOL, CAT, PROMPT, change, drawn, latents, pipeline
from torch import Tensor

from efface import EIUP, SAFREE, SLD, NegativePrompt
from efface._hooks import Prediction

ERASERS = (EIUP(ALCOHOL), SLD(ALCOHOL), NegativePrompt(ALCOHOL, strength=5.0), SAFREE(ALCOHOL))
each = pytest.mark.parametrize("eraser", ERASERS, ids=["eiup", "sld", "negative_prompt", "safree"])
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def other(kind: Any, pipe: Any, **parts: Any) -> Any:
    made = kind(**pipe.components, **parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@each
def test_image_to_image_and_inpainting(eraser: Any) -> None:
    for kind, call in (
        (StableDiffusionImg2ImgPipeline, {"image": PICTURE, "strength": 0.9}),
        (
            StableDiffusionInpaintPipeline,
            {"image": PICTURE, "mask_image": torch.ones(1, 1, 16, 16), "strength": 0.9, "height": 16, "width": 16},
        ),
    ):
        pipe = other(kind, pipeline())
        plain = latents(pipe, PROMPT, num_inference_steps=6, **call)
        with eraser.apply(pipe):
            assert change(latents(pipe, PROMPT, num_inference_steps=6, **call), plain) > 1e-3
        assert torch.equal(latents(pipe, PROMPT, num_inference_steps=6, **call), plain)


@each
def test_control_net(eraser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        control = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16))
        for name, weight in control.named_parameters():
            if "controlnet" in name:
                torch.nn.init.normal_(weight, std=0.3)
    pipe, call = other(StableDiffusionControlNetPipeline, base, controlnet=control), {"image": PICTURE}
    plain = latents(pipe, PROMPT, **call)
    assert change(plain, drawn()) > 1e-3
    seen: list[Prediction] = []
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    with eraser.apply(pipe):
        assert change(latents(pipe, PROMPT, **call), plain) > 1e-3
    assert torch.equal(latents(pipe, PROMPT, **call), plain)
    if isinstance(eraser, SLD):  # the concept's row has the picture's residuals as the prompt's row has
        rows: list[Tensor] = []
        watch = base.unet.register_forward_hook(lambda module, args, out: rows.append(out[0]))
        latents(pipe, PROMPT, **call)
        watch.remove()
        assert change(seen[0].prompt, rows[0][1:]) < 1e-5 and change(seen[0].concept, rows[0][1:]) > 1e-3


def test_a_second_pipeline_on_the_denoiser_has_to_be_given_the_eraser(sd1: Any) -> None:
    second = other(StableDiffusionImg2ImgPipeline, sd1)
    handle = EIUP(ALCOHOL).apply(sd1)
    with pytest.raises(
        ValueError, match="StableDiffusionImg2ImgPipeline shares its denoiser .* none was applied to it"
    ):
        latents(second, PROMPT, image=PICTURE)
    assert torch.equal(latents(sd1), drawn("sd1", EIUP(ALCOHOL)))
    handle.remove()
    with EIUP(ALCOHOL).apply(second):
        latents(second, PROMPT, image=PICTURE)


def test_two_threads_on_one_pipeline_are_an_error(sd1: Any) -> None:
    errors: list[BaseException] = []

    def draw() -> None:
        try:
            latents(sd1)
        except RuntimeError as error:
            errors.append(error)

    def in_another_thread(*_: Any) -> dict[str, Tensor]:
        if not errors:
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()
        return {}

    with EIUP(ALCOHOL).apply(sd1):
        with pytest.raises(
            RuntimeError, match="another thread used the pipeline"
        ):  # the other one took over, and ended
            latents(sd1, callback_on_step_end=in_another_thread)
        watch = sd1.unet.conv_in.register_forward_hook(in_another_thread_hook(draw))
        latents(sd1, num_inference_steps=1)  # while the denoiser is at work, the newcomer is refused
        watch.remove()
        assert len(errors) == 1 and "take turns" in str(errors[0])
        assert torch.equal(latents(sd1), drawn("sd1", EIUP(ALCOHOL)))


def in_another_thread_hook(draw: Any) -> Any:
    def hook(*_: Any) -> None:
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()

    return hook


def test_two_pipelines_at_once(sd1: Any) -> None:
    second, made = pipeline(), {}
    with EIUP(ALCOHOL).apply(sd1), SLD([CAT]).apply(second):
        threads = [
            threading.Thread(target=lambda name=name, pipe=pipe: made.update({name: latents(pipe)}))
            for name, pipe in (("first", sd1), ("second", second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(made["first"], drawn("sd1", EIUP(ALCOHOL)))
    assert torch.equal(made["second"], drawn("sd1", SLD([CAT])))
