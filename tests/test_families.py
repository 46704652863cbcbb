"""Which pipelines are taken for which family, and what errors say of the others."""

from __future__ import annotations

import inspect
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    AnimateDiffPipeline,
    CogView4ControlPipeline,
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

import efface
from efface import EIUP, ESD, GIE, RECE, SAFREE, SLD, UCE, Concept, NegativePrompt, registry
from efface._masking import masked
from efface.families import FAMILIES, OFFERS, Family, Reading, check, family, filled, forms, uncalibrated
from efface.families._declared import declared
from efface.families._needs import default_forms
from efface.families.cogview4 import COGVIEW4
from efface.families.flux import FLUX
from efface.families.pixart import PIXART
from efface.families.sd3 import SD3
from efface.families.sdxl import SDXL
from efface.families.unet import EMOJI, SD

CAT = Concept("cat")
ALL = (EIUP([CAT]), GIE([CAT]), SLD([CAT]), SAFREE([CAT]), NegativePrompt([CAT]))
TESTED = (
    r"of a tested family \(Chroma, CogView4, emoji, emoji-flux, FLUX.1, FLUX.2, FLUX.2 klein, PixArt, Qwen-Image, "
    r"Qwen-Image-Edit, Sana, SD 1.x/2.x, SD 3/3.5, SDXL, Z-Image\), got "
)
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
    kinds += [(tiny.untouched("cogview4"), COGVIEW4)]
    kinds += [(CogView4ControlPipeline(**tiny.untouched("cogview4").components), COGVIEW4)]
    kinds += [(tiny.untouched(name), PIXART) for name in ("pixart", "pixart_sigma")]
    kinds += [(tiny.untouched("bert"), EMOJI), (tiny.untouched("sd35"), SD3)]
    for pipe, facts in kinds:
        assert family(pipe) is facts, type(pipe)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "pixart", "sd3", "flux", "cogview4", "flux2", "qwenimage"])
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
        ("cogview4", ("text_encoder", "tokenizer")),
        ("klein", ("text_encoder",)),
        ("qwenimage", ("text_encoder", "tokenizer")),
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
                with pytest.raises(ValueError, match="`text_encoder`.*keep them while an eraser is applied"):
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
            TypeError, match="LatentUpscalePipeline returns 4 values, .* return 2. Use the text-to-image"
        ):
            eraser.apply(pipe)
    assert "encode_prompt" not in vars(pipe)


# ---------------------------------------------------------------- what families offer and methods need


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_exactly_one_family_recognises_a_pipeline_and_it_has_what_the_family_offers(name: str) -> None:
    pipe = tiny.untouched(name)
    found = [each for each in FAMILIES if each.recognises(pipe)]
    assert found == [family(pipe)]
    assert found[0].offered(pipe) == found[0].offers
    ends = "cfg_truncation" in inspect.signature(type(pipe).__call__).parameters
    assert found[0].ends_guidance == ends, "others must refuse guided methods in steps without guidance"


def test_families_and_methods_speak_of_the_same_things() -> None:
    for each in FAMILIES:
        assert each.offers <= OFFERS.keys(), each.name
        assert ("causal_text" in each.offers) == each.causal, each.name
        assert {*each.bidirectional, *each.resizable, *each.left_padded} <= set(each.tokenizers)
    needed = {name for form in forms() for need in form.needs for name in need.split("|")}
    assert needed and needed <= OFFERS.keys()


def test_what_lists_read_in_the_source_is_what_the_classes_say() -> None:
    said = {form.method: form for form in forms() if not form.label}
    assert said == {form.method: form for form in default_forms()} and len(said) > 15
    native = {name: room for name, room in registry.methods().items() if room in ("erasers", "editors")}
    assert all(declared(name, room) for name, room in native.items())


def test_what_is_filled_in_says_where_it_was_calibrated() -> None:
    emoji, sd = tiny.untouched("bert"), tiny.untouched("sd1")
    assert filled(RECE(), emoji).lam == 100.0 and filled(RECE(), sd).lam == 0.1 and filled(RECE(lam=2.0), sd).lam == 2.0
    for method, known in ((RECE(), "emoji"), (ESD(), "emoji"), (EIUP([CAT]), "emoji, emoji-128")):
        assert uncalibrated(method, emoji) == ""
        assert uncalibrated(method, sd) == f"not calibrated for SD 1.x/2.x (calibrated: {known})"
    assert uncalibrated(EIUP([CAT], strength=1.0), sd) == "" != uncalibrated(EIUP([CAT], normalization="gated"), emoji)
    assert uncalibrated(RECE.nudity(), sd) == uncalibrated(SLD([CAT]), sd) == uncalibrated(UCE(), sd) == ""
    assert "calibrated: SD 1.x/2.x" in uncalibrated(SLD([CAT]), tiny.untouched("sd3"))


def test_a_model_that_its_family_tells_apart_has_defaults_of_its_own_or_the_familys() -> None:
    """`emoji-128` is told by the config of its denoiser. It has EIUP's strength 1, and RECE's values of the family."""
    pipe = tiny.pipeline("bert")
    facts = family(pipe)
    assert facts.model(pipe) == facts.name == "emoji" and filled(EIUP([CAT]), pipe).strength == 2.25
    pipe.unet.register_to_config(sample_size=16, in_channels=8, cross_attention_dim=384)
    assert family(pipe) is facts and facts.model(pipe) == "emoji-128"
    for form, strength in (("projected", 1.0), ("swap", 1.0), ("oblique", 2.0), ("gated", 1.0)):
        eraser = EIUP([CAT], normalization=form)  # type: ignore[arg-type]
        assert filled(eraser, pipe).strength == strength and eraser.strength is None
        assert (uncalibrated(eraser, pipe) == "") == (form in ("projected", "swap"))
    assert filled(EIUP([CAT], strength=3.0), pipe).strength == 3.0
    assert filled(RECE(), pipe).lam == 100.0
    assert uncalibrated(RECE(), pipe) == "not calibrated for emoji-128 (calibrated: emoji)"
    pipe.unet.register_to_config(sample_size=32)
    assert facts.model(pipe) == "emoji"


def test_either_of_two_offers_may_be_enough() -> None:
    class Joint:
        needs = ("cross_text|joint_text",)

    class Neither:
        needs = ("joint_text", "training")

    check(Joint(), tiny.untouched("sd1"))
    check(Joint(), tiny.untouched("sd3"))
    with pytest.raises(ValueError, match="Neither needs joint attention layers, but .*Use it on no known family;"):
        check(Neither(), tiny.untouched("sd1"))


# ---------------------------------------------------------------- room for the next families


class Words:
    """A tokenizer without an end token, as decoders have."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [7 + len(word) for word in text.split()]
        return SimpleNamespace(input_ids=[1, 2, *ids] if add_special_tokens else ids)


def test_padding_in_front_moves_a_texts_tokens() -> None:
    facts = Family("x", "X", ("",), frozenset(), left_padded=("tokenizer",), padded_to_limit=False)
    pipe: Any = SimpleNamespace(tokenizer=Words(), text_encoder=SimpleNamespace(config=SimpleNamespace(hidden_size=3)))
    read = facts.read(pipe, "tokenizer", "a red cat", {})
    assert read.ids == [1, 2, 8, 10, 10] and read.own == slice(2, 5) and read.last == 4
    assert facts.shift("tokenizer", read, 16) == 11 and SD.shift("tokenizer", read, 16) == 0
    edit = torch.ones(2, 3)
    assert facts.padded(edit, 4)[:, 0].tolist() == [0, 0, 1, 1] and SD.padded(edit, 4)[:, 0].tolist() == [1, 1, 0, 0]


def test_a_masked_text_may_be_lengthened_and_no_other() -> None:
    text, mask = torch.randn(1, 3, 4), torch.tensor([[True, True, False]])
    longer = PIXART.lengthened(text, mask, 5)
    assert longer is not None
    assert (
        torch.equal(longer[0][:, :3], text)
        and longer[1] is not None
        and longer[1].tolist()[0] == [True, True, *[False] * 3]
    )
    assert PIXART.lengthened(text, None, 3) == (text, None)
    assert PIXART.lengthened(text, mask, 2) is None and SD.lengthened(text, None, 5) is None


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_the_pooled_text_of_a_denoiser_call_can_be_replaced(name: str) -> None:
    pipe, seen = tiny.pipeline(name), []
    denoiser = tiny.denoiser_of(pipe)
    with denoiser.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True):
        tiny.latents(pipe, num_inference_steps=1)
    facts = family(pipe)
    pooled = facts.pooled_text(seen[0])
    assert pooled is not None and facts.text_mask(seen[0]) is None
    other = facts.with_pooled(seen[0], pooled + 1)
    assert torch.equal(facts.pooled_text(other), pooled + 1) and torch.equal(facts.pooled_text(seen[0]), pooled)
    assert {*facts.shared_arguments, facts.text_argument, facts.time_argument} <= {*seen[0], "timestep"}


def test_tokens_that_the_pipeline_puts_in_front_and_drops_are_counted_when_others_are_masked() -> None:
    reading = Reading([7, 8, 9, 3], slice(0, 3), dropped=2)
    ids = torch.tensor([[1, 1, 7, 8, 9, 3]] * 2)
    given = {"input_ids": ids}
    made = masked(
        threading.get_ident(), 0, iter([(), (0, 2)]), SD, "tokenizer", reading, torch.nn.Identity(), (), given
    )
    assert made is not None and made[1]["input_ids"].tolist() == [[1, 1, 7, 8, 9, 3], [1, 1, 0, 8, 0, 3]]
    assert ids.tolist()[1] == ids.tolist()[0] and reading.last == 3


def test_each_family_has_tiny_pipelines_that_all_methods_are_tried_on() -> None:
    others = {"emoji-flux", "FLUX.2 klein", "Qwen-Image-Edit", "Z-Image"}  # with tests of their own
    assert {family(tiny.untouched(name)).name for name in tiny.EACH} | others == {each.name for each in FAMILIES}


def test_active_says_where_defaults_were_not_calibrated() -> None:
    pipe = pipeline("sd1")
    with efface.EIUP("cat").apply(pipe), efface.NegativePrompt("cat").apply(pipe):
        eiup, negative = str(efface.active(pipe)).splitlines()
    assert eiup.endswith("cat  not calibrated for SD 1.x/2.x (calibrated: emoji, emoji-128)")
    assert negative.endswith("cat")
