"""What else may happen to the weights of a model while a delta is on: it is known and kept, or an error."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import tiny
import torch
from peft import LoraConfig
from tiny import CAT, change, drawn, latents, pipeline
from torch import Tensor

import efface
from efface import EIUP, UCE, Delta
from efface.delta import active, check_written, forget, handles, present, unedited
from efface.delta.overlay import Overlay
from efface.delta.watch import SAMPLE, Seal, Watch, differing, sampled
from efface.pipelines import model_hash

pytestmark = pytest.mark.thinned("long")

EFFECT = 1e-2
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
DELTA = UCE().fit(pipeline(), CAT)
MESSAGE = rf"Other code changed 1 of the weights .* 'unet.{KEY}.weight'.* Undo that change, or call `efface.delta"


def state(pipe: Any) -> dict[str, Tensor]:
    """Its weights by their names without a LoRA."""
    found = getattr(pipe.unet, "_orig_mod", pipe.unet).state_dict().items()
    return {n.replace("base_layer.", ""): w.clone() for n, w in found if "lora_" not in n}


def edited(pipe: Any) -> dict[str, Tensor]:
    """Those that the delta edits: fusing and unfusing leaves rounding errors in the others."""
    found = state(pipe)
    return {n.removeprefix("unet."): found[n.removeprefix("unet.")] for n in DELTA.weights}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].float().nan_to_num(7), b[n].float().nan_to_num(7)) for n in a)


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def weight(pipe: Any) -> Tensor:
    return getattr(pipe.unet, "_orig_mod", pipe.unet).get_submodule(KEY).weight


def assert_refused(pipe: Any, handle: Any, message: str = MESSAGE) -> None:
    """Every way in is an error that names the tensor, and none changes anything."""
    before = state(pipe)
    row = torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, tiny.LIMIT, 32)

    def set_strength() -> None:
        handle.strength = 0.5

    ways: list[Callable[[], Any]] = [lambda: latents(pipe), lambda: pipe.unet(*row), lambda: check_written(pipe)]
    for way in (*ways, handle.remove, set_strength, lambda: DELTA.apply(pipe)):
        with pytest.raises(RuntimeError, match=message):
            way()
    assert handle.active and handle.strength == 1.0 and active(pipe) == [DELTA] and same(state(pipe), before)


# ---------------------------------------------------------------- something else writes


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.add_(0.01),
        lambda w: setattr(w, "data", w.data + 0.01),
        lambda w: setattr(w, "data", w.data.clone().fill_(float("nan"))),
        lambda w: w.data[3, 5].add_(0.1),
        lambda w: w.data[:, 5].mul_(1.001),
        lambda w: w.data.copy_(torch.randn(w.shape)),
    ],
    ids=["+=", "swap", "nan", "element", "column", "copy"],
)
def test_a_foreign_write_is_an_error_until_it_is_undone(write: Any) -> None:
    pipe, plain = pipeline(), state(pipeline())
    handle = DELTA.apply(pipe)
    own = weight(pipe).data.clone()
    write(weight(pipe))
    assert_refused(pipe, handle)
    weight(pipe).data = own.clone()
    assert torch.equal(latents(pipe), drawn("sd1", DELTA)) and change(drawn("sd1", DELTA), drawn()) > EFFECT
    handle.strength = 0.5
    handle.remove()
    assert same(state(pipe), plain) and not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_added_and_taken_away_again_is_undone(dtype: torch.dtype) -> None:
    """Up to its rounding errors, which a check has seen the size of; not what is smaller than the change."""
    pipe = pipeline().to(dtype)
    plain = state(pipe)
    handle = DELTA.apply(pipe)
    other = torch.randn(weight(pipe).shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight(pipe).data += other
    with pytest.raises(RuntimeError, match=MESSAGE):
        handle.remove()
    weight(pipe).data -= other / 2
    with pytest.raises(RuntimeError, match=MESSAGE):
        handle.remove()
    weight(pipe).data -= other / 2
    handle.remove()
    assert same(state(pipe), plain)


def test_a_write_in_the_middle_of_a_call_is_an_error_in_the_next(sd1: Any) -> None:
    def write(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        weight(pipe).data.add_(0.01 * (step == 0))
        return {}

    with DELTA.apply(sd1) as handle:
        own = weight(sd1).data.clone()
        try:
            latents(sd1, callback_on_step_end=write)
        except RuntimeError as error:  # if there was time for another check
            assert "Other code changed" in str(error)
        assert_refused(sd1, handle)
        weight(sd1).data = own


def test_forget_keeps_the_weights_and_takes_the_deltas_off_the_list() -> None:
    pipe = pipeline()
    handle, other = DELTA.apply(pipe), (DELTA * 0.5).apply(pipe)
    weight(pipe).data.add_(0.01)
    before = state(pipe)
    forget(pipe)
    assert active(pipe) == [] and unedited(pipe) == {} and not pipe.unet._forward_pre_hooks
    with pytest.raises(ValueError, match="already removed"):
        handle.strength = 0.5
    handle.remove()
    other.remove()
    assert same(state(pipe), before) and latents(pipe).isfinite().all()
    forget(pipe)  # nothing to do


def test_a_replaced_layer_is_an_error() -> None:
    pipe = pipeline()
    handle = DELTA.apply(pipe)
    layer = pipe.unet.get_submodule(KEY)
    other = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    pipe.unet.set_submodule(KEY, other)
    assert_refused(pipe, handle)
    pipe.unet.set_submodule(KEY, torch.nn.Identity())
    with pytest.raises(RuntimeError, match=MESSAGE):
        latents(pipe)
    pipe.unet.set_submodule(KEY, layer)
    handle.remove()
    assert same(state(pipe), state(pipeline()))


def test_an_undisturbed_delta_is_checked_once_a_call(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a trajectory it is checked again only where that costs a small share of the time since the last check."""
    checked: list[int] = []
    whole = Overlay.strange
    monkeypatch.setattr(Overlay, "strange", lambda overlay: checked.append(1) or whole(overlay))
    monkeypatch.setattr("efface.delta.watch.SHARE", 10**9)
    with DELTA.apply(sd1):
        checked.clear()
        latents(sd1, num_inference_steps=6)
        assert len(checked) == 1
        latents(sd1, num_inference_steps=6)
        assert len(checked) == 2
        text = torch.zeros(1, tiny.LIMIT, 32)
        for time in (9, 5, 5, 3):  # from 5 on again: another trajectory
            sd1.unet(torch.zeros(1, 4, 8, 8), time, text)
        assert len(checked) == 4
        monkeypatch.setattr("efface.delta.watch.SHARE", 0)
        sd1.unet(torch.zeros(1, 4, 8, 8), 9, text)
        sd1.unet(torch.zeros(1, 4, 8, 8), 8, text)
        assert len(checked) == 6


@pytest.mark.parametrize("family", ["sd2", "sdxl", "pixart", "sd3", "flux"])
def test_the_pipelines_of_other_families_are_checked(family: str) -> None:
    pipe = pipeline(family)
    plain, prefix = latents(pipe), "unet" if hasattr(pipe, "unet") else "transformer"
    named = dict(getattr(pipe, prefix).named_parameters())
    path = next(n for n in named if n.endswith((".attn2.to_v.weight", ".add_v_proj.weight")))
    tensor = named[path]
    handle = Delta.fitted(UCE(), pipe, {f"{prefix}.{path}": 0.5 * torch.randn(tensor.shape)}, CAT).apply(pipe)
    assert change(latents(pipe), plain) > 1e-3
    own = tensor.data.clone()
    tensor.data.add_(0.01)
    with pytest.raises(RuntimeError, match=f"'{prefix}.{path}'"):
        latents(pipe)
    tensor.data.copy_(own)
    handle.remove()
    assert torch.equal(latents(pipe), plain)


def test_any_way_to_call_the_denoiser_is_taken(sd1: Any) -> None:
    x, text, times = torch.zeros(2, 4, 8, 8), torch.zeros(2, tiny.LIMIT, 32), torch.tensor([5, 5])
    with DELTA.apply(sd1):
        for time in (5, 5.0, times, torch.tensor(5), times.float().requires_grad_()):
            sd1.unet(x, time, text)
            sd1.unet(x, timestep=time, encoder_hidden_states=text)
        together = torch.func.vmap(lambda x, t: sd1.unet(x[None], t, text[:1])[0])(x, times)
        assert torch.allclose(together[:, 0], sd1.unet(x, times, text)[0], atol=1e-5)


# ---------------------------------------------------------------- LoRAs


def add_lora(pipe: Any, seed: int = 5, name: str = "default", **config: Any) -> None:
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False, **config), name)
    pipe.unet.set_adapters([*pipe.unet.peft_config])


def fused_plain(dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    pipe = pipeline().to(dtype)
    add_lora(pipe)
    pipe.unet.fuse_lora(**how)
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"lora_scale": 0.5}, {"safe_fusing": True}], ids=["", "scaled", "safe"])
def test_a_lora_fused_under_a_delta_is_kept(how: Any, dtype: torch.dtype) -> None:
    """Picture and weights are those of the model with the LoRA; unfused, those of the model without."""
    pipe, plain, with_lora = pipeline().to(dtype), pipeline().to(dtype), fused_plain(dtype, **how)
    digest = model_hash(pipe)
    handle = DELTA.apply(pipe)
    alone = edited(pipe)
    add_lora(pipe)
    before = latents(pipe)
    pipe.unet.fuse_lora(**how)
    check_written(pipe)
    eps = torch.finfo(dtype).eps
    assert far(edited(pipe), alone) > 0.3 and change(latents(pipe), latents(with_lora)) > EFFECT
    assert model_hash(pipe) == model_hash(with_lora) != digest
    if how != {"lora_scale": 0.5}:
        assert change(latents(pipe), before) < 500 * eps  # rounding differs between processors
    now = edited(pipe)
    handle.strength = 1.0
    assert far(edited(pipe), now) < 16 * eps
    handle.strength = 0.0
    assert same(state(pipe), state(with_lora))
    handle.strength = 1.0
    pipe.unet.unfuse_lora()
    latents(pipe)
    handle.strength = 1.0
    assert same(edited(pipe), alone)
    pipe.unet.fuse_lora(**({} if "lora_scale" in how else how))  # the scale of the first time is still on
    handle.remove()
    assert same(edited(pipe), edited(with_lora))
    pipe.unet.unfuse_lora()
    assert far(state(pipe), state(plain)) < 16 * eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_unfused_under_a_delta_is_gone(dtype: torch.dtype) -> None:
    pipe, unfused = fused_plain(dtype), fused_plain(dtype)
    unfused.unet.unfuse_lora()
    delta = UCE().fit(pipe, CAT)
    handle = delta.apply(pipe)
    pipe.unet.unfuse_lora()
    latents(pipe)
    handle.strength = 0.5
    handle.remove()
    assert same(state(pipe), state(unfused))


def test_two_loras_and_two_deltas() -> None:
    pipe, want = pipeline(), pipeline()
    for each in (pipe, want):
        add_lora(each, 5, "a")
        add_lora(each, 6, "b")
    first = DELTA.apply(pipe)
    pipe.unet.fuse_lora(adapter_names=["a"])
    second = UCE(tokens="last").fit(pipeline(), CAT)
    with pytest.raises(ValueError, match="weights differ"):  # it belongs to the model without the LoRA
        second.apply(pipe)
    pipe.unet.fuse_lora(adapter_names=["b"])
    latents(pipe)
    first.remove()
    want.unet.fuse_lora(adapter_names=["a"])
    want.unet.fuse_lora(adapter_names=["b"])
    assert same(state(pipe), state(want))


def test_a_lora_that_is_unloaded_while_fused_is_an_error() -> None:
    pipe = pipeline()
    handle = DELTA.apply(pipe)
    add_lora(pipe)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    with pytest.raises(RuntimeError, match=r"Other code changed 8 of the weights .*by unloading a fused LoRA"):
        latents(pipe)
    with pytest.raises(RuntimeError, match="Other code changed 8"):
        handle.remove()


def test_a_lora_whose_change_is_not_a_sum_is_an_error() -> None:
    pipe = pipeline()
    handle = DELTA.apply(pipe)
    add_lora(pipe, use_dora=True)
    for name, magnitude in pipe.unet.named_parameters():
        if "magnitude" in name:
            magnitude.data *= 1.5
    pipe.unet.fuse_lora()
    with pytest.raises(RuntimeError, match="Other code changed 8"):
        handle.remove()
    pipe.unet.unfuse_lora()
    handle.remove()
    assert far(state(pipe), state(pipeline())) < 1e-5


def test_a_foreign_write_beside_a_fused_lora_is_an_error() -> None:
    pipe = pipeline()
    handle = DELTA.apply(pipe)
    add_lora(pipe)
    pipe.unet.fuse_lora()
    pipe.unet.get_submodule(KEY).get_base_layer().weight.data += 0.01
    with pytest.raises(RuntimeError, match=MESSAGE):
        handle.remove()


# ---------------------------------------------------------------- load_state_dict


LOADED = r"`load_state_dict` replaced \d+ of the weights .* Call `handle.remove\(\)`, which keeps the loaded weights"


def test_loaded_weights_are_kept_and_the_delta_is_known_to_be_gone() -> None:
    other = {n: w + 0.01 for n, w in state(pipeline()).items()}
    for assign in (False, True):
        pipe = pipeline()
        handle = DELTA.apply(pipe)
        pipe.unet.load_state_dict(copy.deepcopy(other), assign=assign)
        before = state(pipe)
        for way in (latents, DELTA.apply, check_written):
            with pytest.raises(RuntimeError, match=LOADED):
                way(pipe)
        with pytest.raises(RuntimeError, match=LOADED):
            handle.strength = 0.5
        assert same(state(pipe), before)
        handle.remove()
        assert same(state(pipe), other) and active(pipe) == [] and latents(pipe).isfinite().all()
        assert not pipe.unet._forward_pre_hooks and not pipe.unet._load_state_dict_post_hooks


def test_what_a_part_of_a_state_left_is_restored() -> None:
    pipe, plain = pipeline(), state(pipeline())
    first, second = DELTA.apply(pipe), (DELTA * 0.5).apply(pipe)
    loaded = {f"{KEY}.weight": plain[f"{KEY}.weight"] + 1}
    pipe.unet.load_state_dict(loaded, strict=False)
    with pytest.raises(RuntimeError, match="replaced 1 of the weights"):
        latents(pipe)
    first.remove()
    with pytest.raises(RuntimeError, match="replaced 1 of the weights"):
        latents(pipe)
    second.remove()
    assert same(state(pipe), plain | loaded)
    with UCE().fit(pipe, CAT).apply(pipe):
        assert latents(pipe).isfinite().all()
    assert same(state(pipe), plain | loaded)


def test_the_same_weights_loaded_again_change_nothing(sd1: Any) -> None:
    with DELTA.apply(sd1) as handle:
        now = state(sd1)
        sd1.unet.load_state_dict(now)
        assert torch.equal(latents(sd1), drawn("sd1", DELTA))
        sd1.unet.load_state_dict({n: w * 2 for n, w in now.items()})
        sd1.unet.load_state_dict(now)
        handle.strength = 1.0


def test_weights_loaded_into_a_layer_are_an_error() -> None:
    pipe = pipeline()
    handle = DELTA.apply(pipe)
    pipe.unet.get_submodule(KEY).load_state_dict({"weight": torch.zeros_like(weight(pipe))})
    assert_refused(pipe, handle)


def test_a_foreign_write_beside_loaded_weights_is_an_error() -> None:
    pipe, plain = pipeline(), state(pipeline())
    handle = DELTA.apply(pipe)
    name = KEY.replace("to_k", "to_v")
    pipe.unet.load_state_dict({f"{name}.weight": plain[f"{name}.weight"]}, strict=False)
    weight(pipe).data.add_(0.01)
    before = state(pipe)
    with pytest.raises(RuntimeError, match=MESSAGE):
        handle.remove()
    assert same(state(pipe), before) and handle.active


# ---------------------------------------------------------------- precision and place


@pytest.mark.long
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_layerwise_casting_under_a_delta(storage: torch.dtype) -> None:
    """It acts as on a model with the change, its strength can be set, and it comes off to the bit."""
    pipe, plain, merged = pipeline(), pipeline(), pipeline()
    DELTA.merge(merged)
    handle = DELTA.apply(pipe)
    for each in (pipe, plain, merged):
        each.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert weight(pipe).dtype == storage
    for _ in range(2):
        assert torch.equal(latents(pipe), latents(merged)) and change(latents(pipe), latents(plain)) > EFFECT
    handle.strength = 0.0
    assert torch.equal(latents(pipe), latents(plain))
    handle.strength = 1.0
    assert torch.equal(latents(pipe), latents(merged))
    with pytest.raises(ValueError, match="is quantised"):
        DELTA.apply(pipe)
    handle.remove()
    assert same(state(pipe), state(plain)) and torch.equal(latents(pipe), latents(plain))


def test_a_cast_there_and_back_is_no_foreign_write() -> None:
    for steps in ([torch.float16], [torch.bfloat16, torch.float32], [torch.float16, torch.float32], [torch.float64]):
        pipe = pipeline()
        handle = DELTA.apply(pipe)
        for dtype in steps:
            pipe.to(dtype)
        assert latents(pipe).isfinite().all()
        weight(pipe).data.add_(0.1)
        with pytest.raises(RuntimeError, match=MESSAGE):
            handle.remove()
        weight(pipe).data.sub_(0.1)
        handle.remove()
        assert far(state(pipe), state(pipeline())) < 1e-2


def group(kind: str) -> Callable[[Any], None]:
    cpu, blocks = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda pipe: pipe.unet.enable_group_offload(cpu, cpu, offload_type=kind, **blocks)


OFFLOAD: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "leaf": group("leaf_level"),
    "block": group("block_level"),
}


@pytest.mark.parametrize("first", ["delta", "offload"])
@pytest.mark.parametrize("kind", OFFLOAD)
def test_a_delta_acts_with_offload(kind: str, first: str) -> None:
    pipe = pipeline()
    if first == "offload":
        OFFLOAD[kind](pipe)
    handle = DELTA.apply(pipe)
    if first == "delta":
        OFFLOAD[kind](pipe)
    for _ in range(2):
        assert torch.equal(latents(pipe), drawn("sd1", DELTA))
    handle.strength = 0.5
    handle.remove()
    assert torch.equal(latents(pipe), drawn())


def test_a_delta_acts_with_sequential_offload_and_comes_off_when_that_is_off() -> None:
    pipe = pipeline()
    handle = DELTA.apply(pipe)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(latents(pipe), drawn("sd1", DELTA))
    with pytest.raises(ValueError, match=r"is not in memory\. .*`pipe.remove_all_hooks\(\)`"):
        handle.remove()
    assert torch.equal(latents(pipe), drawn("sd1", DELTA)) and handle.active
    with pytest.raises(ValueError, match="is not in memory"):
        DELTA.apply(pipe)
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    handle.remove()
    assert torch.equal(latents(pipe), drawn())


@pytest.mark.parametrize("parts", [("unet", "text_encoder"), ("text_encoder", "unet")])
def test_a_delta_on_two_parts_comes_off_both_or_none(parts: tuple[str, str]) -> None:
    pipe, changes = pipeline(), {}
    for part in parts:
        name, tensor = next((n, w) for n, w in getattr(pipe, part).named_parameters() if w.ndim == 2)
        changes[f"{part}.{name}"] = torch.ones(tensor.shape)
    handle = Delta.fitted(UCE(), pipe, changes, CAT).apply(pipe)
    on = latents(pipe)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(ValueError, match="is not in memory"):
        handle.remove()
    with pytest.raises(ValueError, match="is not in memory"):
        handle.strength = 0.5
    assert handle.active and handle.strength == 1 and torch.equal(latents(pipe), on) and change(on, drawn()) > EFFECT
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    handle.remove()
    assert torch.equal(latents(pipe), drawn()) and handles(pipe) == []


def test_projections_that_are_fused_keep_the_delta() -> None:
    pipe = pipeline()
    handle = DELTA.apply(pipe)
    pipe.unet.fuse_qkv_projections()
    assert change(latents(pipe), drawn("sd1", DELTA)) < 1e-5
    with pytest.raises(ValueError, match=r"`pipe.unet.unfuse_qkv_projections\(\)`"):
        handle.remove()
    pipe.unet.unfuse_qkv_projections()
    handle.remove()
    assert torch.equal(latents(pipe), drawn())


@pytest.mark.long
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_denoiser_is_checked(whole: bool) -> None:
    pipe = pipeline("small")
    delta, plain = UCE().fit(pipe, CAT), latents(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=whole)
    handle = delta.apply(pipe)
    assert change(latents(pipe), plain) > EFFECT
    own = weight(pipe).data.clone()
    weight(pipe).data.add_(0.01)
    with pytest.raises(RuntimeError, match="Other code changed"):
        latents(pipe)
    weight(pipe).data = own
    handle.remove()
    assert change(latents(pipe), plain) < 1e-6
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._orig_mod._forward_pre_hooks


@pytest.mark.long
def test_a_denoiser_can_be_compiled_with_a_delta_on() -> None:
    pipe = pipeline("small")
    delta, plain = UCE().fit(pipe, CAT), latents(pipe)
    handle = delta.apply(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    assert change(latents(pipe), plain) > EFFECT
    own = weight(pipe).data.clone()
    weight(pipe).data.add_(0.01)
    for check in (handle.remove, lambda: check_written(pipe), lambda: latents(pipe)):
        with pytest.raises(RuntimeError, match="Other code changed"):
            check()
    weight(pipe).data = own
    handle.remove()


def test_a_delta_goes_on_and_off_in_inference_mode_and_out_of_it() -> None:
    """Also on a model that was loaded in that mode, whose weights can only be written there."""
    for loaded, on, off in itertools.product((False, True), repeat=3):
        with torch.inference_mode(loaded):
            pipe = pipeline()
        with torch.inference_mode(on):
            handle = DELTA.apply(pipe)
        assert torch.equal(latents(pipe), drawn("sd1", DELTA))
        handle.strength = 0.5
        with torch.inference_mode(off):
            handle.remove()
        assert same(state(pipe), state(pipeline())) and active(pipe) == [] and not pipe.unet._forward_pre_hooks


def test_a_removal_that_breaks_half_way_leaves_the_delta_on(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, whole, written = DELTA.apply(sd1), Tensor.copy_, []

    def breaks(self: Tensor, value: Tensor) -> Tensor:
        written.append(1)
        if len(written) == 3:
            raise KeyboardInterrupt
        return whole(self, value)

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "copy_", breaks)
        with pytest.raises(KeyboardInterrupt):
            handle.remove()
    assert handle.active and active(sd1) == [DELTA] and torch.equal(latents(sd1), drawn("sd1", DELTA))
    handle.remove()
    assert torch.equal(latents(sd1), drawn())


# ---------------------------------------------------------------- copies


def test_a_deep_copy_has_the_delta_and_weights_of_its_own() -> None:
    pipe = pipeline()
    plain, digest = latents(pipe), model_hash(pipe)
    handle = DELTA.apply(pipe)
    twin = copy.deepcopy(pipe)
    assert active(twin) == [DELTA] and model_hash(twin) == digest
    assert torch.equal(latents(twin), drawn("sd1", DELTA))
    handle.remove()
    assert torch.equal(latents(pipe), plain) and torch.equal(latents(twin), drawn("sd1", DELTA))
    again = (DELTA * 0.5).apply(twin)  # the base is known
    again.remove()
    weight(twin).data.add_(0.01)
    with pytest.raises(RuntimeError, match=MESSAGE):
        latents(twin)
    weight(twin).data.sub_(0.01)
    (own,) = handles(twin)
    assert own.eraser is DELTA
    own.strength = 0.5
    assert change(latents(twin), drawn("sd1", DELTA)) > EFFECT
    own.remove()
    assert torch.equal(latents(twin), plain) and active(twin) == handles(twin) == []
    assert not any((m._forward_pre_hooks, m._load_state_dict_post_hooks) != ({}, {}) for m in (pipe.unet, twin.unet))


def test_a_copied_denoiser_brings_its_deltas_along() -> None:
    pipe, other = pipeline(), pipeline()
    first, second = DELTA.apply(pipe), (DELTA * 0.5).apply(pipe)
    other.unet = copy.deepcopy(pipe.unet)
    want = latents(pipe)
    second.remove()
    first.remove()
    assert torch.equal(latents(other), want) and len(active(other)) == 2
    for handle in handles(other):
        handle.remove()
    assert same(state(other), state(pipeline()))


def test_a_lost_handle_can_be_had_again(sd1: Any) -> None:
    DELTA.apply(sd1)
    (handle,) = handles(sd1)
    handle.remove()
    assert torch.equal(latents(sd1), drawn())


def test_a_shared_denoiser_is_one(sd1: Any) -> None:
    """`copy.copy` and `from_pipe` do not copy weights."""
    twin = copy.copy(sd1)
    handle = DELTA.apply(twin)
    assert active(sd1) == [DELTA] and torch.equal(latents(sd1), drawn("sd1", DELTA))
    handle.remove()
    assert torch.equal(latents(twin), drawn())


def test_a_pickle_has_the_weights_and_no_delta(sd1: Any) -> None:
    with DELTA.apply(sd1):
        (watch,) = sd1.unet._forward_pre_hooks.values()
        made, given = watch.__reduce__()
        assert made is Watch and type(made(*given)) is Watch
        made, given = sd1.check_inputs.__reduce__()
        assert made is getattr and given == (sd1, "check_inputs")


def test_a_merged_model_is_not_watched() -> None:
    pipe = pipeline()
    DELTA.merge(pipe)
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._load_state_dict_post_hooks
    weight(pipe).data.add_(0.01)
    latents(pipe)


# ---------------------------------------------------------------- another module in the pipeline


REPLACED = r"`pipe.unet` was replaced after `apply`, .* Restore the old one, or call `handle.remove\(\)` and apply"


def assert_replaced(pipe: Any) -> None:
    for way in (latents, check_written, DELTA.apply):
        with pytest.raises(RuntimeError, match=REPLACED):
            way(pipe)


def test_another_denoiser_in_the_pipeline_is_an_error() -> None:
    pipe = pipeline()
    handle, old = DELTA.apply(pipe), pipe.unet
    pipe.unet = pipeline().unet
    assert_replaced(pipe)
    assert active(pipe) == [] and [each.eraser for each in handles(pipe)] == [DELTA]
    pipe.unet = old
    assert torch.equal(latents(pipe), drawn("sd1", DELTA))
    pipe.unet, old = pipeline().unet, None
    assert_replaced(pipe)
    assert_replaced(copy.deepcopy(pipe))
    handle.remove()
    assert torch.equal(latents(pipe), drawn()) and "check_inputs" not in vars(pipe)
    DELTA.apply(pipe)
    pipe.unet = None
    with pytest.raises(RuntimeError, match=REPLACED):
        check_written(pipe)
    forget(pipe)
    assert handles(pipe) == [] and "check_inputs" not in vars(pipe)


def test_a_replacement_may_have_the_delta_too() -> None:
    pipe = pipeline()
    handle = DELTA.apply(pipe)
    pipe.unet = copy.deepcopy(pipe.unet)
    assert torch.equal(latents(pipe), drawn("sd1", DELTA))
    efface.active(pipe).remove()
    handle.remove()
    assert torch.equal(latents(pipe), drawn()) and "check_inputs" not in vars(pipe)


@pytest.mark.long
@pytest.mark.thinned
@pytest.mark.parametrize("on", [(0, 1, 2), (1, 0, 2)])
@pytest.mark.parametrize("off", [*itertools.permutations(range(3))])
def test_another_denoiser_is_noticed_with_erasers_that_come_and_go(on: tuple[int, ...], off: tuple[int, ...]) -> None:
    """Also in a deep copy; in the end the pipeline has its own method."""
    pipe, other, erasers = pipeline(), pipeline().unet, (DELTA, EIUP([CAT]), DELTA * 0.5)
    there = {k: erasers[k].apply(pipe) for k in on}
    for k in off:
        want = latents(pipe)
        for one in (pipe, copy.deepcopy(pipe)):
            assert torch.equal(latents(one), want) and change(want, drawn()) > 1e-3
            own, one.unet = one.unet, other
            with pytest.raises(RuntimeError, match=REPLACED):
                latents(one)
            one.unet = own
            assert torch.equal(latents(one), want)
        there[k].remove()
    assert torch.equal(latents(pipe), drawn()) and "check_inputs" not in vars(pipe)


def test_a_shallow_copy_draws_with_the_delta_and_after_it() -> None:
    pipe = pipeline()
    handle = DELTA.apply(pipe)
    twin = copy.copy(pipe)
    (DELTA * 0.5).apply(twin).remove()
    assert torch.equal(latents(twin), drawn("sd1", DELTA))
    handle.remove()
    assert torch.equal(latents(twin), drawn())


def test_a_method_that_the_user_has_replaced_is_put_back() -> None:
    pipe, seen = pipeline(), []
    own = pipe.check_inputs
    pipe.check_inputs = mine = lambda *args, **kwargs: seen.append(1) or own(*args, **kwargs)
    with DELTA.apply(pipe), (DELTA * 0.5).apply(pipe):
        latents(pipe)
    assert pipe.check_inputs is mine and len(seen) == 1


@pytest.mark.long
def test_a_denoiser_compiled_in_place_is_checked() -> None:
    pipe = pipeline("small")
    UCE().fit(pipe, CAT).apply(pipe)
    pipe.unet.compile(backend="eager")
    latents(pipe)
    weight(pipe).data.add_(0.01)
    with pytest.raises(RuntimeError, match="Other code changed"):
        latents(pipe)


# ---------------------------------------------------------------- with the rest


def test_an_eraser_on_top_is_checked_too() -> None:
    pipe = pipeline()
    with EIUP([CAT]).apply(pipe):
        handle = DELTA.apply(pipe)
        latents(pipe)
        present(pipe)
        own = weight(pipe).data.clone()
        weight(pipe).data.add_(0.01)
        assert_refused(pipe, handle)
        weight(pipe).data = own
        handle.remove()


def test_an_exception_in_the_block_is_not_hidden() -> None:
    pipe = pipeline()
    with pytest.raises(RuntimeError, match=MESSAGE) as error, DELTA.apply(pipe):
        weight(pipe).data.add_(0.01)
        raise KeyError("mine")
    assert isinstance(error.value.__context__, KeyError)


# ---------------------------------------------------------------- the sample


@pytest.mark.parametrize("shape", [(), (7,), (9000,), (64, 64), (320, 768), (1280, 768), (64, 64, 3, 3), (5, 3, 1, 1)])
def test_a_sample_meets_every_column_and_is_small(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert 0 < sampled(tensor).numel() <= SAMPLE
    seal = Seal.of(tensor)
    assert differing({"a": (seal, tensor)}) == [] and seal.near(tensor)
    last = shape[-1] if shape else 1
    for column in {0, last // 2, last - 1}:
        other = tensor.clone().reshape(-1, last)
        other[:, column] += 1
        strange = differing({"a": (seal, other.reshape(shape))})
        assert strange == (["a"] if len(shape) != 1 or last <= SAMPLE else strange)
        assert not strange or not seal.near(other.reshape(shape))
    channels = (
        tensor.to(memory_format=torch.channels_last) if len(shape) == 4 else tensor.mT if len(shape) == 2 else tensor
    )
    if len(shape) == 4:
        assert differing({"a": (seal, channels)}) == []
    assert differing({"a": (seal, torch.cat([tensor.reshape(-1)] * 2))}) == ["a"]


def test_an_inert_watch_does_nothing() -> None:
    module = torch.nn.Linear(2, 2)
    Watch().put(module)
    module.load_state_dict(copy.deepcopy(module).state_dict())
    assert module(torch.zeros(1, 2)).shape == (1, 2)
    Watch.take_off(module)
    assert not module._forward_pre_hooks and not module._load_state_dict_post_hooks
