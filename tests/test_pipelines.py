"""Loading: folders, single files, variants, devices; and files of strangers, which decide nothing that is imported."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders import single_file_utils as original
from safetensors.torch import save_file
from tiny import PROMPT, latents

import efface
from efface import _loading, pipelines
from efface.files import PICKLES


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here reaches for the network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd1"
    tiny.pipeline("sd1").save_pretrained(folder)
    return folder


def same(a: Any, b: Any) -> bool:
    return bool(torch.equal(latents(a), latents(b)))


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)],
)
def test_dtypes_by_name(saved: Path, given: Any, dtype: torch.dtype) -> None:
    pipe: Any = efface.load(saved, dtype=given)
    assert {p.dtype for p in pipe.unet.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", ["half precision", "nn", 16, "load"])
def test_a_dtype_is_one(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected `dtype` to be one of fp16, bf16, fp32 or a `torch.dtype`"):
        efface.load("emoji", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", 3.5, "xpu"])
def test_a_device_is_one_of_this_machine(device: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected (a device of this machine|`device` to be)"):
        efface.load("emoji", device=device)


def test_offloading_needs_an_accelerator_or_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="got a machine without one. Leave `offload` out"):
        efface.load("emoji", offload="model")
    with pytest.raises(ValueError, match="Expected `offload` to be one of model, sequential, group"):
        efface.load("emoji", offload="disk")  # type: ignore[arg-type]


@pytest.mark.parametrize("offload", ["model", "group"])
def test_an_offloaded_pipeline_draws_the_same_and_is_guarded(saved: Path, offload: Any) -> None:
    plain: Any = efface.load(saved)
    pipe: Any = efface.load(saved, device="cpu", offload=offload)
    assert same(pipe, plain)
    with efface.EIUP("cat", strength=1.0).apply(pipe), efface.EIUP("cat", strength=1.0).apply(plain):
        first = latents(pipe)
        assert torch.equal(first, latents(plain))
        assert torch.equal(first, latents(pipe))


@pytest.mark.parametrize("more", [{"variant": "fp16"}, {"config": "folder"}])
def test_embedded_models_come_as_one(more: Any) -> None:
    with pytest.raises(ValueError, match="for the embedded model 'emoji', got"):
        efface.load("emoji", **more)


# ---------------------------------------------------------------- folders


def test_variants_are_read_and_named(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    pipe.save_pretrained(tmp_path / "both")
    pipe.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    pipe.save_pretrained(tmp_path / "both", variant="fp16")
    for folder in ("half", "both"):
        half: Any = efface.load(tmp_path / folder, variant="fp16", dtype="fp16")
        assert next(half.unet.parameters()).dtype == torch.float16
    with pytest.raises(ValueError, match=r"has no weights without a variant. Give one of its variants: 'fp16'\."):
        efface.load(tmp_path / "half")
    with pytest.raises(ValueError, match=r"has no variant 'bf16'. Give one of its variants: 'fp16'\."):
        efface.load(tmp_path / "half", variant="bf16")


def test_a_variant_that_no_file_has(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"has no variant 'fp16', only weights without a variant. Leave `variant` out"):
        efface.load(saved, variant="fp16")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('"a text"', "names no pipeline class"),
        ("[1, 2]", "names no pipeline class"),
        ('{"unet": ["diffusers", "UNet2DConditionModel"]}', "names no pipeline class"),
        ('{"_class_name": ["mine", "Pipeline"]}', "names no pipeline class"),
        ("{", "is damaged, because it is not JSON"),
        ("[" * 100_000, "is damaged, because it is not JSON"),
        ('{"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}', "from the package 'os'"),
        ('{"_class_name": "StableDiffusionPipeline", "unet": ["this", "s"]}', "does not import for a file"),
        ('{"_class_name": "StableDiffusionPipeline", "vae": ["efface.models.evil", "X"]}', "of Efface lacks"),
    ],
)
def test_an_index_decides_nothing_that_is_imported(
    tmp_path: Path, index: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text(index)
    (tmp_path / "this.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        efface.load(tmp_path)


def test_a_fifo_in_a_folder_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"Expected only files and folders in .*pipe\.json, which is"):
        efface.load(tmp_path)


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"model{suffix}").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ValueError, match="has the suffix of a pickle, and reading a pickle runs code"):
        efface.load(tmp_path / f"model{suffix}")


def test_a_folder_with_pickles_only_is_refused(tmp_path: Path) -> None:
    tiny.pipeline("sd1").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="reads only safetensors, never pickles"):
        efface.load(tmp_path)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"is neither a folder nor a \.safetensors file"):
        efface.load(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["emojii", "./emojii", "../models/sd1", "/no/such/folder", "a/b/c", "models/"])
def test_a_misspelt_folder_never_reaches_for_a_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no folder {name!r}"):
        efface.load(name, allow_hub=True)


@pytest.mark.parametrize("allow", [False, True])
def test_a_hub_may_be_contacted_only_where_that_is_allowed(allow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *a, **k: asked.append(k))
    efface.load("owner/name", allow_hub=allow)
    assert [each["local_files_only"] for each in asked] == [not allow]


def test_a_hub_id_is_only_looked_up_in_the_cache_unless_allowed() -> None:
    with pytest.raises(FileNotFoundError, match=r"no such model in the local cache.*Give allow_hub=True"):
        efface.load("owner/no-such-model")


# ---------------------------------------------------------------- one file


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def moved(names: Iterable[str], ours: str, theirs: str) -> dict[str, str]:
    """The names below `ours`, and what they are called below `theirs`."""
    found = {}
    for name in names:
        if name.startswith(f"{ours}."):
            part, dot, rest = name.removeprefix(f"{ours}.").partition(".")
            part = RESNET.get(part, part) if ".resnets." in f".{ours}." else part
            found[name] = f"{theirs}.{part}{dot}{rest}"
    return found


def as_one_file(pipe: StableDiffusionPipeline, file: Path) -> None:
    """The pipeline's weights under the names of the first Stable Diffusion releases.

    diffusers' own converters, which read such names, check each of them.
    """
    state: dict[str, torch.Tensor] = {}
    config = dict(pipe.unet.config)
    blocks = len(config["block_out_channels"])
    each = config["layers_per_block"]
    unet = pipe.unet.state_dict()
    down = {"resnets": "0", "attentions": "1"}
    names: dict[str, str] = {}

    def block(ours: str, theirs: str) -> None:
        names.update({name: f"model.diffusion_model.{new}" for name, new in moved(unet, ours, theirs).items()})

    for k in range(blocks):
        for j in range(each):
            for ours, theirs in down.items():
                block(f"down_blocks.{k}.{ours}.{j}", f"input_blocks.{k * (each + 1) + j + 1}.{theirs}")
        block(f"down_blocks.{k}.downsamplers.0.conv", f"input_blocks.{(k + 1) * (each + 1)}.0.op")
        for j in range(each + 1):
            at = k * (each + 1) + j
            for ours, theirs in down.items():
                block(f"up_blocks.{k}.{ours}.{j}", f"output_blocks.{at}.{theirs}")
        attends = any(name.startswith(f"up_blocks.{k}.attentions.") for name in unet)
        block(f"up_blocks.{k}.upsamplers.0.conv", f"output_blocks.{(k + 1) * (each + 1) - 1}.{1 + attends}.conv")
    for ours, theirs in (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")):
        block(f"mid_block.{ours}", f"middle_block.{theirs}")
    for ours, theirs in (
        *(("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2")),
        *(("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2")),
    ):
        block(ours, theirs)
    assert names.keys() == unet.keys()
    state |= {names[name]: tensor for name, tensor in unet.items()}
    back = original.convert_ldm_unet_checkpoint(dict(state), dict(config))
    assert all(torch.equal(back[name], tensor) for name, tensor in unet.items())
    text = pipe.text_encoder.state_dict()
    state |= {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": t for name, t in text.items()
    }
    state |= vae_names(pipe)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file)


def vae_names(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    weights, found = pipe.vae.state_dict(), {}
    blocks = len(pipe.vae.config.block_out_channels)
    swaps = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "to_q": "q", "to_k": "k", "to_v": "v"}
    swaps |= {"to_out.0": "proj_out", "group_norm": "norm", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}
    swaps |= {"mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.0": "mid.block_1"}
    swaps |= {"mid_block.resnets.1": "mid.block_2"}
    for name, tensor in weights.items():
        own = name
        for k in range(blocks):
            own = own.replace(f"down_blocks.{k}.resnets", f"down.{k}.block").replace(f"down_blocks.{k}", f"down.{k}")
            up = blocks - 1 - k
            own = own.replace(f"up_blocks.{k}.resnets", f"up.{up}.block").replace(f"up_blocks.{k}", f"up.{up}")
        for ours, theirs in swaps.items():
            own = own.replace(f".{ours}.", f".{theirs}.")
        attends = "attentions" in name and tensor.ndim == 2
        found[f"first_stage_model.{own}"] = tensor[..., None, None] if attends else tensor
    back = original.convert_ldm_vae_checkpoint(dict(found), dict(pipe.vae.config))
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    return found


def test_a_checkpoint_in_one_file_draws_what_its_folder_draws(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    as_one_file(tiny.pipeline("sd1"), file)
    plain, pipe = efface.load(saved), efface.load(file, config=saved)
    assert same(plain, pipe)
    with efface.erase(pipe, "cat", strength=1.0):
        assert not same(pipe, plain)


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({}, "StableDiffusionPipeline"),
        ({original.CHECKPOINT_KEY_NAMES["xl_base"]: (1280, 1280)}, "StableDiffusionXLPipeline"),
        ({original.CHECKPOINT_KEY_NAMES["v2"]: (320, 1024)}, "StableDiffusionPipeline"),
        ({original.CHECKPOINT_KEY_NAMES["xl_refiner"]: (1280, 1280)}, ""),
    ],
)
def test_the_kind_of_a_single_file_comes_from_its_names(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only which class reads it: configurations would come from the hub, which no test contacts."""
    file, read = tmp_path / "model.safetensors", []
    save_file({"model.diffusion_model.out.0.bias": torch.ones(1)} | {k: torch.ones(s) for k, s in shapes.items()}, file)
    for name in {*_loading.KINDS.values()}:
        monkeypatch.setattr(getattr(diffusers, name), "from_single_file", lambda *a, name=name, **k: read.append(name))
    if kind:
        efface.load(file, allow_hub=True)
        assert read == [kind]
    else:
        with pytest.raises(ValueError, match="of a kind that Efface does not read"):
            efface.load(file, allow_hub=True)


def test_one_file_alone_does_not_say_how_it_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"without tokenizers and configurations. Give config=FOLDER"):
        efface.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("bad", ["cut", "text", "empty", "other"])
def test_a_damaged_checkpoint_in_one_file(saved: Path, tmp_path: Path, bad: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(100)}, file)
    if bad == "cut":
        file.write_bytes(file.read_bytes()[:50])
    elif bad != "other":
        file.write_text("not weights" if bad == "text" else "")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be loaded .*Give a complete checkpoint"):
        efface.load(file, config=saved)


def test_a_config_is_a_saved_model(tmp_path: Path, saved: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="has no model_index.json, so it is not a saved pipeline"):
        efface.load(tmp_path / "model.safetensors", config=tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        efface.load(tmp_path / "other.safetensors", config=saved)
    with pytest.raises(ValueError, match="Expected `config` only for"):
        efface.load(saved, config=saved)


# ---------------------------------------------------------------- drawing


def test_guidance_means_the_same_for_every_family() -> None:
    found = {name: pipelines.guided(tiny.pipeline(name), 3.0) for name in ("sd1", "pixart", "sd3", "flux")}
    plain = {"guidance_scale": 3.0}
    true = {"true_cfg_scale": 3.0, "negative_prompt": ""}
    assert found == {"sd1": plain, "pixart": plain, "sd3": plain, "flux": true}
    assert pipelines.guided(tiny.pipeline("flux"), None) == {}


def test_drawing_takes_guidance_and_leaves_the_pipelines_default(sd1: Any) -> None:
    more = {"num_inference_steps": 2, "height": 16, "width": 16}
    default = pipelines.draw(sd1, [PROMPT], [3], **more)
    assert torch.equal(default, pipelines.draw(sd1, [PROMPT], [3], guidance_scale=7.5, **more))
    assert torch.equal(default, pipelines.draw(sd1, [PROMPT], [3], guidance=7.5, **more))
    assert not torch.equal(default, pipelines.draw(sd1, [PROMPT], [3], guidance=2.0, **more))


def test_true_guidance_on_flux_reads_the_negative_prompt() -> None:
    flux = tiny.pipeline("flux")
    more = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 16}
    plain, guided = (pipelines.draw(flux, [PROMPT], [3], guidance=g, **more) for g in (None, 4.0))
    negative = pipelines.draw(flux, [PROMPT], [3], guidance=4.0, negative_prompt="a dog", **more)
    assert not torch.equal(plain, guided)
    assert not torch.equal(guided, negative)


def test_a_suites_guidance_is_not_that_of_a_distilled_denoiser() -> None:
    from efface.families import family

    call = {"guidance": 7.5, "num_inference_steps": 50}
    assert family(tiny.pipeline("sd1")).protocol(call) == {"guidance_scale": 7.5, "num_inference_steps": 50}
    assert family(tiny.pipeline("flux")).protocol(call) == {"num_inference_steps": 50}
    own = {"true_cfg_scale": 2.0, "guidance_scale": 3.5}  # of a suite that is made for FLUX
    assert family(tiny.pipeline("flux")).protocol(own) == own


def test_a_record_can_say_which_guidance_a_call_draws_with() -> None:
    asked = {
        name: [pipelines.scales(pipe, pipelines.guided(pipe, g)) for g in (None, 3.0)]
        for name in ("sd1", "pixart", "flux")
        if (pipe := tiny.pipeline(name))
    }
    assert asked == {
        "sd1": [{"guidance_scale": 7.5}, {"guidance_scale": 3.0}],
        "pixart": [{"guidance_scale": 4.5}, {"guidance_scale": 3.0}],
        "flux": [
            {"guidance_scale": 3.5, "true_cfg_scale": 1.0},
            {"guidance_scale": 3.5, "true_cfg_scale": 3.0},
        ],
    }
