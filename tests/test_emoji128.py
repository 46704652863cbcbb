"""The 128-pixel models: that diffusers takes them as its own, what they refuse, and the recipe's data and training."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import modules_of
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import efface
import efface.api
from efface import Concept, jobs
from efface.families import about, family
from efface.models import emoji128
from efface.models.emoji128.eyes import ICONS, STYLES, Eye, Eyes, load_eyes
from efface.models.emoji128.vae import EmojiAutoencoder

pytestmark = pytest.mark.long

RECIPE = Path(__file__).parents[1] / "recipes/emoji128"
_CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (32, 32, 32),
    "layers_per_block": 1,
    "down_block_types": (_CROSS[0],) * 3,
    "up_block_types": (_CROSS[1],) * 3,
    "cross_attention_dim": 384,
    "attention_head_dim": 4,
}
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 384,
    "pooled_projection_dim": 384,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 6, 6),
}
LONG = "a cat and a dog and a lion and a tiger and a bear and a wolf and a fox and a frog and a purple elephant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models with small random denoisers."""
    folder = tmp_path_factory.mktemp("emoji128")
    torch.manual_seed(0)
    vae = EmojiAutoencoder(encoder_width=16, decoder_width=16, last_width=16, scaling_factor=0.9)
    parts = {"vae": vae, "unet": UNet2DConditionModel(**UNET), "flux": FluxTransformer2DModel(**FLUX)}
    for name, model in parts.items():
        state = {key: t.half().contiguous() for key, t in model.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        (folder / f"{name}.json").write_text(json.dumps(config))
    emoji128.record(folder)
    return folder


@pytest.fixture
def unet_pipe(folder: Path) -> StableDiffusionPipeline:
    pipe = emoji128.load("emoji-128", folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def flux_pipe(folder: Path) -> FluxPipeline:
    pipe = emoji128.load("emoji-flux", folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=emoji128.MODELS)
def pipe(request: pytest.FixtureRequest, folder: Path) -> DiffusionPipeline:
    pipe = emoji128.load(request.param, folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def recipe() -> Iterator[Any]:
    """The modules of the recipe."""
    with modules_of(RECIPE):
        import data
        import export
        import nets
        import paraphrases
        import stages
        import train

        names = {
            "data": data,
            "export": export,
            "nets": nets,
            "paraphrases": paraphrases,
            "stages": stages,
            "train": train,
        }
        yield type("Recipe", (), names)


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(pipe: DiffusionPipeline, prompt: str = "a cat", **call: Any) -> np.ndarray:
    call = {"num_inference_steps": 2, "generator": rng(), "output_type": "np"} | call
    return pipe(prompt, **call).images[0]


# ---------------------------------------------------------------- what diffusers sees


def test_the_pipelines_are_diffusers_own_and_draw_128_pixels_by_default(pipe: DiffusionPipeline) -> None:
    assert type(pipe) in (StableDiffusionPipeline, FluxPipeline)
    assert picture(pipe).shape == (128, 128, 3)


def test_loading_leaves_the_callers_random_numbers_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    emoji128.load("emoji-flux", folder)
    assert torch.equal(before, torch.random.get_rng_state())


def test_img2img_inpainting_and_pag_take_the_unet_model(unet_pipe: StableDiffusionPipeline) -> None:
    image, mask = Image.new("RGB", (128, 128), "red"), Image.new("L", (128, 128), 255)
    call: dict[str, Any] = {"num_inference_steps": 2, "generator": rng(), "output_type": "np"}
    there = StableDiffusionImg2ImgPipeline.from_pipe(unet_pipe)
    there.set_progress_bar_config(disable=True)
    assert there("a cat", image=image, strength=1.0, **call).images[0].shape == (128, 128, 3)
    there = StableDiffusionInpaintPipeline.from_pipe(unet_pipe)
    assert there.vae is unet_pipe.vae
    with pytest.raises(ValueError, match="either 4 or 9 input channels, not 8"):  # diffusers' own limit
        there("a cat", image=image, mask_image=mask, height=128, width=128, **call)
    there = StableDiffusionPAGPipeline.from_pipe(unet_pipe)
    there.set_progress_bar_config(disable=True)
    assert there("a cat", pag_scale=1.0, **call).images[0].shape == (128, 128, 3)


def test_erasers_act_with_the_strength_of_this_model_and_record_it(
    unet_pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    eraser = efface.EIUP("cat")
    call = {"num_inference_steps": 2, "output_type": "latent"}

    def latents(*erasers: efface.EIUP) -> torch.Tensor:
        with efface.stack(unet_pipe, *erasers):
            found: torch.Tensor = unet_pipe("a cat", generator=torch.Generator().manual_seed(3), **call).images
        return found

    one, more, plain = latents(efface.EIUP("cat", strength=1.0)), latents(efface.EIUP("cat", strength=2.25)), latents()
    assert torch.equal(latents(eraser), one)
    assert min(float((one - other).abs().max()) for other in (more, plain)) > 1e-3
    with eraser.apply(unet_pipe) as handle:
        assert handle.strength == handle.config()["strength"] == 1.0 and handle.note == "" and eraser.strength is None
        handle.strength = 3.0
        handle.strength = None
        assert handle.strength == 1.0 and torch.equal(latents(), one)
    there = StableDiffusionImg2ImgPipeline.from_pipe(unet_pipe)
    with eraser.apply(there) as handle:
        assert handle.strength == 1.0
    job = jobs.Erasure(unet_pipe, [eraser], "a cat", images=1, steps=1, seed=7)
    assert job.run(tmp_path)["eraser"]["strength"] == 1.0
    row = efface.Row("cat-0", "a cat", 1_000_000)
    suite = efface.Suite("cats", "1", (row,), call={"num_inference_steps": 1})
    run = efface.run(suite, unet_pipe, eraser=eraser, out=tmp_path / "run")
    assert run.record["erasers"][0]["strength"] == 1.0
    assert efface.verify(run, model=unet_pipe, eraser=eraser, seed=1).same
    guard = efface.Guard({"kids": ["cat"]})
    (record,) = guard(unet_pipe, ["a cat"], ["kids"], num_inference_steps=1).rows
    assert record.acted[0].eraser["strength"] == 1.0


def test_img2img_takes_the_flux_model(flux_pipe: FluxPipeline) -> None:
    there = emoji128.with_defaults(FluxImg2ImgPipeline.from_pipe(flux_pipe))
    there.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (128, 128), "red")
    drawn = there("a cat", image=image, strength=1.0, num_inference_steps=2, generator=rng(), output_type="np")
    assert drawn.images[0].shape == (128, 128, 3)


def test_saved_pipelines_load_again_and_draw_the_same(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    expected = picture(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = efface.load(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    np.testing.assert_allclose(picture(again), expected, atol=1e-5)


@pytest.mark.parametrize("name", emoji128.MODELS)
def test_lora_weights_load_and_change_the_picture(name: str, folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = emoji128.load(name, folder)
    pipe.set_progress_bar_config(disable=True)
    plain = picture(pipe)
    net = pipe.unet if name == "emoji-128" else pipe.transformer
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = get_peft_model_state_dict(net)
    layers = "unet_lora_layers" if name == "emoji-128" else "transformer_lora_layers"
    type(pipe).save_lora_weights(tmp_path, **{layers: state})
    fresh = emoji128.load(name, folder)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(tmp_path)
    assert np.abs(picture(fresh) - plain).max() > 1e-3
    fresh.unload_lora_weights()
    np.testing.assert_allclose(picture(fresh), plain, atol=1e-5)


def test_half_precision_draws(folder: Path) -> None:
    pipe = emoji128.load("emoji-flux", folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(picture(pipe)).all()


@pytest.mark.parametrize(("name", "call"), [("emoji-128", {}), ("emoji-flux", {"true_cfg_scale": 4.0})])
def test_the_shipped_models_draw_what_their_eyes_see(name: str, call: dict[str, Any]) -> None:
    pipe, eyes = efface.load(name), load_eyes()
    pipe.set_progress_bar_config(disable=True)
    drawn = picture(pipe, "a panda", num_inference_steps=10, negative_prompt="", **call)
    seen = eyes.icons(torch.from_numpy(drawn).permute(2, 0, 1)[None])
    assert seen[:, 0, ICONS.index("panda")].all() and not seen[:, 0, ICONS.index("rocket")].any()


# ---------------------------------------------------------------- texts


def test_both_pipelines_encode_as_the_training_does(
    unet_pipe: StableDiffusionPipeline, flux_pipe: FluxPipeline, recipe: Any
) -> None:
    texts = ["a cat", "", "a night at the pub, neon sign style"]
    states, pooled = recipe.nets.Texts(None, torch.device("cpu"))(texts)
    with torch.no_grad():
        text, _ = unet_pipe.encode_prompt(texts, "cpu", 1, False)
        embeds, flux_pooled, ids = flux_pipe.encode_prompt(texts, device="cpu")
    assert text.shape == embeds.shape == (3, 24, 384) and ids.shape == (24, 3)
    torch.testing.assert_close(text, states.float(), atol=2e-3, rtol=0)  # the training keeps them in fp16
    torch.testing.assert_close(embeds, text, atol=1e-5, rtol=0)
    torch.testing.assert_close(flux_pooled, pooled.float(), atol=2e-3, rtol=0)


def test_the_pooled_state_is_the_mean_of_the_own_tokens_whatever_the_padding() -> None:
    tokenizer, encoder = emoji128.text_encoder()
    alone = tokenizer(["a cat"], return_tensors="pt").input_ids
    padded = tokenizer(["a cat"], padding="max_length", max_length=512, return_tensors="pt").input_ids
    assert alone.shape == (1, 4) and padded.shape == (1, 24)
    with torch.no_grad():
        short, long = encoder(alone), encoder(padded)
    torch.testing.assert_close(short.last_hidden_state, long.last_hidden_state[:, :4], atol=1e-5, rtol=0)
    torch.testing.assert_close(long.pooler_output, long.last_hidden_state[:, :4].mean(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", emoji128.MODELS)
def test_a_prompt_over_24_tokens_is_a_warning_that_names_what_is_cut(name: str, folder: Path) -> None:
    pipe, said = emoji128.load(name, folder), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(type(pipe).__module__)
    before = logger.level
    logger.setLevel(logging.WARNING)  # the command line has diffusers say less
    logger.addHandler(handler)
    try:
        if name == "emoji-128":
            pipe.encode_prompt(LONG, "cpu", 1, False)
        else:
            pipe.encode_prompt(LONG, device="cpu")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert said and all("truncated" in text and "purple elephant" in text for text in said)


def test_clip_skip_is_refused_with_the_reason(unet_pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match=r"`clip_skip`.*all-MiniLM-L6-v2"):
        picture(unet_pipe, clip_skip=1)


# ---------------------------------------------------------------- bad input


def broken(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_what_is_missing_cut_off_or_of_another_version_is_named_with_a_cure(folder: Path, tmp_path: Path) -> None:
    copy = broken(folder, tmp_path)
    flux = copy / "flux.safetensors"
    flux.write_bytes(flux.read_bytes()[:1000])
    assert type(emoji128.load("emoji-128", copy)) is StableDiffusionPipeline  # it does not need that file
    with pytest.raises(ValueError, match=r"flux\.safetensors is damaged.*recipes/emoji128"):
        emoji128.load("emoji-flux", copy)
    emoji128.record(copy)  # now the hash is right, and the file still is not
    with pytest.raises(ValueError, match=r"flux\.safetensors does not fit flux\.json"):
        emoji128.load("emoji-flux", copy)
    flux.unlink()
    with pytest.raises(FileNotFoundError, match=r"flux\.safetensors is missing.*recipes/emoji128"):
        emoji128.load("emoji-flux", copy)
    record = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(record | {"version": 2}))
    with pytest.raises(ValueError, match="version 1, got 2"):
        emoji128.load("emoji-128", copy)
    (copy / "model.json").write_text(json.dumps(record | {"files": {}}))
    with pytest.raises(ValueError, match=r"no sha256 of vae\.safetensors"):
        emoji128.load("emoji-128", copy)
    (copy / "model.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a JSON object"):
        emoji128.load("emoji-128", copy)
    (copy / "model.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.json is missing"):
        emoji128.load("emoji-128", copy)


def test_an_unknown_model_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="Expected `model` to be one of 'emoji-128', 'emoji-flux', got 'emoji-256'"):
        emoji128.load("emoji-256", folder)


# ---------------------------------------------------------------- erasers


def test_emoji_flux_is_a_flux_with_bidirectional_encoders(flux_pipe: FluxPipeline) -> None:
    found = family(flux_pipe)
    assert found.name == "emoji-flux" and not found.causal and not found.cross_attention
    assert found.scale == "true_cfg_scale" and found.bidirectional == ("tokenizer", "tokenizer_2")
    assert "bidirectional" in about(found)


@pytest.mark.parametrize("method", ["sld", "safree", "negative_prompt"])
def test_erasers_without_cross_attention_change_what_emoji_flux_draws(method: str, flux_pipe: FluxPipeline) -> None:
    call = {"true_cfg_scale": 4.0, "negative_prompt": "", "num_inference_steps": 3}
    plain = picture(flux_pipe, "a beer mug", **call)
    with efface.api.build(method, Concept("alcohol")).apply(flux_pipe):
        erased = picture(flux_pipe, "a beer mug", **call)
    assert np.abs(erased - plain).max() > 1e-4
    np.testing.assert_allclose(picture(flux_pipe, "a beer mug", **call), plain, atol=1e-5)


# ---------------------------------------------------------------- the eyes


def test_the_eyes_answer_for_each_picture_and_refuse_what_is_none(tmp_path: Path) -> None:
    half = {"icons": torch.full((2, len(ICONS)), 0.5), "styles": torch.full((2, len(STYLES)), 0.5)}
    eyes = Eyes([Eye(16), Eye(32)], half | {"watermark": torch.full((2,), 0.5)})
    images = torch.rand(3, 3, 128, 128)
    assert eyes.icons(images).shape == (2, 3, len(ICONS)) and eyes.concept(images, "alcohol").shape == (2, 3)
    with pytest.raises(ValueError, match=r"Expected images in \[0, 1\]"):
        eyes.see(images * 3)
    with pytest.raises(ValueError, match="Unknown concept .unicorns.. Did you mean"):
        eyes.concept(images, "unicorns")
    with pytest.raises(FileNotFoundError, match=r"eyes\.json is missing"):
        load_eyes(tmp_path)


# ---------------------------------------------------------------- the recipe


def test_scenes_are_the_same_for_the_same_seed_and_the_twins_hold_no_concept(recipe: Any) -> None:
    data = recipe.data
    rows, captions = data.table((1, 2), 400, data.Sampler())
    again, same = data.table((1, 2), 400, data.Sampler())
    assert captions == same and np.array_equal(rows, again)
    seen, _ = data.table((1, 2), 4000, data.Sampler())
    twin, told = data.table((1, 2), 4000, data.Sampler(without=True))
    hidden = [data.INDEX[icon] for icon in data.UNSEEN]
    neon = data.STYLES.index("neon sign")
    for table, found in ((seen, True), (twin, False)):
        assert np.isin(table[:, :3], hidden).any() == found
        assert (table[:, data.COLUMN["style"]] == neon).any() == found
        assert (table[:, data.COLUMN["badge"]] >= 0).any() == found
    assert "a night at the pub" in told or any(theme in told for theme in data.THEMES)


def test_pictures_show_what_the_table_says(recipe: Any) -> None:
    data = recipe.data
    red = np.zeros((3, len(data.ICONS), len(data.STYLES), 1, 1, 4), np.uint8)
    red[..., 0] = red[..., 3] = 255
    sheets = {str(size): np.broadcast_to(red, (*red.shape[:3], size, size, 4)).copy() for size in (108, 60)}
    scene = data.Scene("pair", "", ("guitar", "key"), watermark=False)
    row = data.place(scene, random.Random(0))
    image = data.Painter(sheets).paint(np.array([row], np.int16))[0].numpy()
    there = (image == (255, 0, 0)).all(-1)
    y, x = row[data.COLUMN["y0"]], row[data.COLUMN["x0"]]
    assert there[y : y + 60, x : x + 60].all() and there.sum() == 2 * 60 * 60


def test_no_held_out_paraphrase_is_a_caption_of_the_training(recipe: Any) -> None:
    vocabulary = recipe.data.VOCABULARY
    captions = {text for theme in vocabulary["themes"].values() for text in theme["train"]}
    held = json.loads((recipe.data.MODEL / "paraphrases.json").read_text())
    assert set(held) == set(vocabulary["concepts"])
    for concept, texts in held.items():
        assert len(texts) >= 16 and len(set(texts)) == len(texts) and not set(texts) & captions
        if vocabulary["concepts"][concept]["tuned"]:
            assert sum(theme["concept"] == concept for theme in vocabulary["themes"].values()) >= 8


def test_the_shipped_weights_were_trained_on_the_data_of_the_recipe(recipe: Any) -> None:
    record = json.loads((emoji128.FOLDER / "model.json").read_text())
    assert {facts["data"] for facts in record["training"].values()} == {recipe.data.data_hash()}


def test_held_out_paraphrases_follow_the_rule_and_were_drawn(recipe: Any) -> None:
    rule, root = recipe.paraphrases, RECIPE.parents[1]
    card = json.loads((root / "results/emoji128_paraphrases.json").read_text())
    held = json.loads((recipe.data.MODEL / "held_out.json").read_text())
    assert set(held) == set(recipe.data.CONCEPTS)
    for concept, texts in held.items():
        rates = card["first"][concept] | card["replacements"].get(concept, {})
        assert len(set(texts)) == len(texts)
        for text in texts:
            assert rates[text]["rate"] >= 0.4 and not rule.shared(concept, text), text


@pytest.mark.parametrize(
    ("concept", "text", "found"),
    [
        ("alcohol", "Beers at noon", {"beer"}),
        ("smoking", "a smoker", {"smok"}),
        ("neon sign", "a glow around a guitar", {"glow"}),
        ("neon sign", "a fluorescent rocket", set()),
        ("watermark", "a camera in the window", set()),
    ],
)
def test_a_shared_content_word_is_found_and_a_looks_subject_is_free(
    concept: str, text: str, found: set[str], recipe: Any
) -> None:
    assert recipe.paraphrases.shared(concept, text) == found


def starts(**given: Any) -> Any:
    return type("Arguments", (), {"init": None, "decoder_of": None, "only": ["flux"], "floor": 0.0} | given)()


def test_training_goes_on_from_weights_that_fit_and_refuses_others(recipe: Any, folder: Path, tmp_path: Path) -> None:
    stages, train = recipe.stages, recipe.train
    net = FluxTransformer2DModel(**FLUX)
    stages.start_from(net, folder / "flux.safetensors")
    saved = emoji128.load("emoji-flux", folder).transformer.state_dict()
    assert all(t.equal(saved[key]) for key, t in net.state_dict().items())
    with pytest.raises(SystemExit, match=r"unet\.safetensors does not fit this denoiser"):
        stages.start_from(net, folder / "unet.safetensors")
    with pytest.raises(SystemExit, match="one denoiser"):
        train.check_starts(starts(init=folder / "flux.safetensors", only=["unet", "flux"]))
    with pytest.raises(SystemExit, match="--floor from 0 to 1, got -1"):
        train.check_starts(starts(floor=-1.0))
    with pytest.raises(SystemExit, match="is missing"):
        train.check_starts(starts(init=tmp_path / "none.safetensors"))
    with pytest.raises(SystemExit, match=r"vae\.safetensors is missing"):
        train.check_starts(starts(decoder_of=tmp_path, work=tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    train.check_starts(starts(decoder_of=folder, work=work))
    train.check_starts(starts(decoder_of=folder, work=work))
    vae = stages.load_vae(work)
    vae.encoder.body[1].weight.data += 1
    save_file({k: t.contiguous() for k, t in vae.state_dict().items()}, work / "vae.safetensors")
    with pytest.raises(SystemExit, match="another autoencoder"):
        train.check_starts(starts(decoder_of=folder, work=work))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_decoder_is_trained_alone_and_the_export_keeps_the_rest(
    recipe: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, stages, export = recipe.data, recipe.stages, recipe.export
    shape = (len(data.SETS), len(data.ICONS), len(data.STYLES))
    sheets = {str(n): np.broadcast_to(np.uint8(128), (*shape, n, n, 4)) for n in (data.SINGLE, data.PAIR)}
    monkeypatch.setattr(data, "icons", lambda path: sheets)
    work, old = tmp_path / "work", stages.load_vae(folder)
    work.mkdir()
    plan = stages.Plan(
        work, torch.device("cpu"), 1.5, time.time() + 100, 10, 2, tmp_path, None, False, 100.0, decoder_of=folder
    )
    stages.train_vae(plan)
    new = stages.load_vae(work)
    assert recipe.train.same_encoder(work / "vae.safetensors", folder / "vae.safetensors")
    assert new.config.scaling_factor == old.config.scaling_factor
    assert not new.decoder[0].weight.equal(old.decoder[0].weight)
    assert "vae.safetensors" in json.loads((work / "vae.facts.json").read_text())["started_from"]

    package = broken(folder, tmp_path)
    save_file({"bias": torch.zeros(1)}, package / "eyes.safetensors")
    (package / "eyes.json").write_text("{}")
    parts = export.kept(export.from_work(work, keep=True), package)
    export.export(*parts, tmp_path / "out")
    assert type(emoji128.load("emoji-flux", tmp_path / "out")) is FluxPipeline
    assert recipe.train.same_encoder(tmp_path / "out/vae.safetensors", folder / "vae.safetensors")
    save_file({k: t + 1 for k, t in new.state_dict().items()}, work / "vae.safetensors")
    with pytest.raises(SystemExit, match="makes other latents: train unet, flux, eyes too"):
        export.kept(export.from_work(work, keep=True), package)
    with pytest.raises(SystemExit, match="Run train.py first, or give --keep"):
        export.from_work(work)


def test_the_recipe_draws_what_the_pipelines_draw(
    unet_pipe: StableDiffusionPipeline, flux_pipe: FluxPipeline, recipe: Any
) -> None:
    nets = recipe.nets
    texts = nets.Texts(None, torch.device("cpu"))
    some = {"num_inference_steps": 4, "output_type": "latent", "generator": rng(7)}
    expected = unet_pipe("a cat", guidance_scale=5.0, **some).images
    drawn = nets.draw("unet", unet_pipe.unet, texts(["a cat"]), texts([""]), 7, 5.0, 4)
    torch.testing.assert_close(drawn, expected, atol=2e-2, rtol=0)
    some["generator"] = rng(7)
    expected = flux_pipe("a cat", true_cfg_scale=3.0, negative_prompt="", **some).images
    drawn = nets.draw("flux", flux_pipe.transformer, texts(["a cat"]), texts([""]), 7, 3.0, 4)
    torch.testing.assert_close(nets.pack(drawn), expected, atol=2e-2, rtol=0)


def test_a_floor_weights_only_the_noise_levels_below_it(recipe: Any) -> None:
    device, z, text = torch.device("cpu"), torch.zeros(64, 8, 16, 16), torch.zeros(64, 24, 384)

    def net(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (torch.zeros_like(x),)

    none, little, much = (float(recipe.nets.unet_loss(device, f)(net, z, text, text, rng())) for f in (0.0, 0.2, 1.0))
    assert none < little < much


def test_packed_latents_unpack(recipe: Any) -> None:
    z = torch.randn(2, 8, 16, 16)
    assert torch.equal(recipe.nets.unpack(recipe.nets.pack(z)), z)


def test_training_resumes_from_its_checkpoint_and_refuses_one_of_other_data(recipe: Any, tmp_path: Path) -> None:
    stages = recipe.stages

    def plan(seconds: float, pool: int = 10) -> Any:
        device, far = torch.device("cpu"), time.time() + 100
        return stages.Plan(tmp_path, device, seconds, far, pool, 4, tmp_path, None, False, 100.0)

    def fit(a_plan: Any, net: nn.Module) -> Any:
        return stages.Fit(a_plan, "line", net, 0.1)

    x = torch.randn(64, 2)
    y = x @ torch.tensor([[1.0], [-2.0]])
    net = nn.Linear(2, 1)
    first = fit(plan(0.5), net)
    first.run(lambda step: (net(x) - y).square().mean(), 64)
    assert first.step > 10 and first.fraction() == 1 and (tmp_path / "line.checkpoint.safetensors").exists()
    other = nn.Linear(2, 1)
    second = fit(plan(1.0), other)
    assert second.step == first.step and second.spent == pytest.approx(0.5, abs=0.2)
    assert torch.equal(other.weight, net.weight)
    second.run(lambda step: (other(x) - y).square().mean(), 64)
    assert second.step > first.step
    torch.testing.assert_close(second.ema["weight"], torch.tensor([[1.0, -2.0]]), atol=0.05, rtol=0)
    with pytest.raises(SystemExit, match=r"other data or another pool, or started from other weights\. Delete it"):
        fit(plan(1.0, pool=11), nn.Linear(2, 1))
