"""Which pipelines are taken for which family, and what errors say of the others."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    EulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    MotionAdapter,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    TextToVideoSDPipeline,
    TextToVideoZeroPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from tiny import pipeline

from efface import EIUP, GIE, SAFREE, SLD, UCE, Concept, NegativePrompt
from efface.families import EMOJI, FLUX, PIXART, SD, SD3, SDXL, family

CAT = Concept("cat")
ALL = (EIUP([CAT]), GIE([CAT]), SLD([CAT]), SAFREE([CAT]), NegativePrompt([CAT]))
TESTED = r"of a tested family \(SD 1.x/2.x, SDXL, emoji, PixArt, SD 3/3.5, FLUX.1, emoji-flux\), but got "
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")


def parts(name: str = "sd1", *names: str) -> dict[str, Any]:
    have = tiny.untouched(name).components
    return {n: have[n] for n in (*PARTS, *names)}


def unet_3d() -> UNet3DConditionModel:
    return UNet3DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )


def motion() -> MotionAdapter:
    sizes = {"motion_layers_per_block": 1, "motion_norm_num_groups": 8, "motion_num_attention_heads": 2}
    return MotionAdapter(block_out_channels=(16, 32), **sizes)


def with_denoiser(denoiser: Any) -> Any:
    pipe = pipeline()
    pipe.unet = denoiser
    return pipe


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: TextToVideoSDPipeline(**parts(), unet=unet_3d()), "TextToVideoSDPipeline, which draws videos"),
        (lambda: AnimateDiffPipeline(**parts("sd1", "unet"), motion_adapter=motion()), "AnimateDiffPipeline, which"),
        (
            lambda: TextToVideoZeroPipeline(
                **parts("sd1", "unet", "feature_extractor"), safety_checker=None, requires_safety_checker=False
            ),
            r"TextToVideoZeroPipeline, which draws videos \(`video_length`\)",
        ),
        (lambda: with_denoiser(unet_3d()), "StableDiffusionPipeline with a UNet3DConditionModel as `unet`"),
        (
            lambda: with_denoiser(UNetMotionModel.from_unet2d(tiny.denoiser(32), motion())),
            "StableDiffusionPipeline with a UNetMotionModel as `unet`",
        ),
    ],
    ids=["3-D UNet", "AnimateDiff", "video zero", "3-D UNet elsewhere", "motion UNet elsewhere"],
)
def test_what_draws_videos_is_refused_with_the_tested_families(make: Any, got: str) -> None:
    pipe = make()
    for eraser in ALL:
        with pytest.raises(TypeError, match=TESTED + got):
            eraser.apply(pipe)
    with pytest.raises(TypeError, match=TESTED + got):
        UCE().fit(pipe, CAT)


def test_variants_of_tested_pipelines_are_taken() -> None:
    class Subclass(UNet2DConditionModel):
        pass

    whole = {"feature_extractor": None, "safety_checker": None, "requires_safety_checker": False}
    sd1, sdxl, sd3, flux = (tiny.untouched(name) for name in ("sd1", "sdxl", "sd3", "flux"))
    sub = pipeline()
    sub.unet.__class__ = Subclass
    kinds: list[tuple[Any, Any]] = [
        (kind(**parts("sd1", "unet"), **whole), SD)
        for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPAGPipeline)
    ]
    control = ControlNetModel.from_unet(sd1.unet, conditioning_embedding_out_channels=(8, 8))
    kinds += [(StableDiffusionControlNetPipeline(**parts("sd1", "unet"), controlnet=control, **whole), SD), (sub, SD)]
    kinds += [
        (kind.from_pipe(sdxl), SDXL) for kind in (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)
    ]
    kinds += [(StableDiffusion3Img2ImgPipeline.from_pipe(sd3), SD3)]
    kinds += [(kind.from_pipe(flux), FLUX) for kind in (FluxImg2ImgPipeline, FluxKontextPipeline)]
    kinds += [(tiny.untouched(name), PIXART) for name in ("pixart", "pixart_sigma")]
    kinds += [(tiny.untouched("bert"), EMOJI), (tiny.untouched("sd35"), SD3)]
    for pipe, facts in kinds:
        assert family(pipe) is facts, type(pipe)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "pixart", "sd3", "flux"])
def test_a_compiled_denoiser_or_encoder_is_what_it_was(name: str) -> None:
    pipe = pipeline(name)
    facts = family(pipe)
    setattr(pipe, facts.denoiser, torch.compile(getattr(pipe, facts.denoiser), backend="eager"))
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    assert family(pipe) is facts


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("sd1", ("text_encoder",)),
        ("sd1", ("tokenizer",)),
        ("sd1", ("text_encoder", "tokenizer")),
        ("bert", ("text_encoder", "tokenizer")),
        ("sdxl", ("text_encoder_2",)),
        ("pixart", ("text_encoder", "tokenizer")),
        ("sd3", ("text_encoder_2", "tokenizer_2")),
        ("flux", ("text_encoder_2",)),
        ("flux", ("text_encoder",)),
    ],
)
def test_a_missing_text_encoder_is_named(name: str, lost: tuple[str, ...]) -> None:
    pipe = pipeline(name)
    for part in lost:
        setattr(pipe, part, None)
    words = " and no ".join(f"`{part}`" for part in lost)
    for eraser in ALL:
        with pytest.raises(ValueError, match=f"has no {words}, but .*Load the pipeline with all its text encoders"):
            eraser.apply(pipe)


def test_the_refiner_of_sdxl_is_named_with_the_cure() -> None:
    base = tiny.untouched("sdxl").components
    given = {name: base[name] for name in ("vae", "unet", "scheduler", "text_encoder_2", "tokenizer_2")}
    pipe = StableDiffusionXLImg2ImgPipeline(**given, text_encoder=None, tokenizer=None, add_watermarker=False)
    with pytest.raises(ValueError, match="has no `text_encoder` .*Erase on the SDXL base pipeline"):
        ALL[0].apply(pipe)


def test_a_text_encoder_that_is_dropped_while_an_eraser_is_on_is_named() -> None:
    """By those that read the call's words, also where it gives embeddings; the eraser comes off all the same."""
    pipe = pipeline()
    text, negative = pipe.encode_prompt("a red cat", "cpu", 1, True)
    for eraser in ALL:
        kept = pipe.text_encoder, pipe.tokenizer
        with eraser.apply(pipe):
            pipe.text_encoder = pipe.tokenizer = None
            call = {"prompt_embeds": text, "negative_prompt_embeds": negative}
            if type(eraser) is SAFREE or (type(eraser) is NegativePrompt and eraser.strength is None):
                with pytest.raises(ValueError, match="`text_encoder`.*keep them while an eraser is on"):
                    tiny.latents(pipe, None, **call)
            else:  # the erasure prompts that were encoded by `apply` act
                assert tiny.change(tiny.latents(pipe, None, **call), tiny.drawn(prompt="a red cat")) > 1e-2
        pipe.text_encoder, pipe.tokenizer = kept
    assert torch.equal(tiny.latents(pipe), tiny.drawn())


def test_sd3_does_without_t5() -> None:
    pipe = pipeline("sd3")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    assert family(pipe) is SD3
    with SLD([CAT]).apply(pipe):
        pass


def test_a_pipeline_that_encodes_otherwise_is_named() -> None:
    """Its denoiser and text encoder are those of SD 1.x, but it returns the pooled text as well."""
    unet = tiny.denoiser(32, in_channels=8)
    given = {**parts(), "scheduler": EulerDiscreteScheduler()}
    pipe = StableDiffusionLatentUpscalePipeline(**given, unet=unet)
    for eraser in ALL:
        with pytest.raises(
            TypeError, match="LatentUpscalePipeline returns 4 values, .* return 2: it is not of a tested"
        ):
            eraser.apply(pipe)
    assert "encode_prompt" not in vars(pipe)
