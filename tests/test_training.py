"""What every fine-tuned editor relies on: trajectories like the pipeline's, checkpoints, a pipeline left as found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import ALCOHOL, CAT, PROMPT, change
from torch import Generator, Tensor

from efface import CCRT, EIUP, ESD, RECE, SDD, UCE, Concept
from efface.delta import dense
from efface.editors import _training
from efface.editors._denoiser import Denoiser, trained
from efface.families import family as facts

pytestmark = pytest.mark.thinned("long")

QUICK: dict[str, Any] = {"batch": 2, "reuse": 2, "sampler_steps": 4}
EDITORS = [
    ESD(steps=4, lr=1e-3, biases=True, **QUICK),
    SDD(steps=4, lr=1e-3, ema=0.5, **QUICK),
    SDD(train="u", steps=2, **QUICK),
]


def everything(pipe: Any) -> dict[str, Any]:
    """All of a pipeline that training could change."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    found: dict[str, Any] = {}
    for part, module in parts.items():
        found |= {f"{part}.{name}": value.clone() for name, value in module.state_dict().items()}
        found |= {f"{part}.{name} asks": p.requires_grad for name, p in module.named_parameters()}
        found |= {f"{part}.{name} grad": p.grad is None for name, p in module.named_parameters()}
        found |= {f"{part}.{name} mode": m.training for name, m in module.named_modules()}
    found["scheduler"] = (id(pipe.scheduler), pipe.scheduler.timesteps.clone())
    return found


def assert_as_found(pipe: Any, before: dict[str, Any]) -> None:
    after = everything(pipe)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if isinstance(value, Tensor) else str(after[name]) == str(value)
        assert same, name


def tensors(change: Any) -> list[Tensor]:
    return [change] if isinstance(change, Tensor) else [change.B, change.A]


def same(a: Any, b: Any) -> bool:
    pairs = ((a.weights[n], b.weights[n]) for n in a.weights)
    return a.weights.keys() == b.weights.keys() and all(
        torch.equal(x, y) for one, other in pairs for x, y in zip(tensors(one), tensors(other), strict=True)
    )


# ---------------------------------------------------------------- which weights


def test_modes_name_the_weights_of_the_paper(pipe: Any) -> None:
    unet = pipe.unet
    names = {name for name, _ in unet.named_parameters()}
    x, u = set(trained(unet, "x")), set(trained(unet, "u", facts(pipe).outer_layers))
    assert x == {name for name in names if ".attn2." in name} != set()
    assert set(trained(unet, "x-strict")) == {n for n in x if n.endswith(("to_k.weight", "to_v.weight"))} != set()
    assert set(trained(unet, "self")) == {name for name in names if ".attn1." in name} != set()
    assert set(trained(unet, "full")) == names
    assert names - x - u == {n for n in names if n.startswith(("time_emb", "add_emb", "conv_norm_out", "conv_out"))}
    assert not x & u and any("norm" in name for name in u) and any("resnets" in name for name in u)


@pytest.mark.parametrize("train", ["x", "x-strict", "u", "self", "full"])
def test_without_biases_all_that_trains_fits_a_lora(train: str, pipe: Any) -> None:
    outer = facts(pipe).outer_layers
    every, without = (trained(pipe.unet, train, outer, biases=also) for also in (True, False))
    shapes = {name: weight.ndim for name, weight in pipe.unet.named_parameters()}
    assert without == [name for name in every if shapes[name] > 1] != []
    assert {shapes[name] for name in without} <= {2, 4}
    assert (without == every) == (train == "x-strict")
    assert any(name.endswith("to_out.0.bias") for name in every) == (train != "x-strict")


@pytest.mark.long
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "editor",
    [ESD(steps=2, **QUICK), SDD(steps=2, **QUICK), CCRT(steps=2, keep=2, generations=0, **QUICK)],
    ids=lambda editor: type(editor).__name__,
)
def test_a_default_fit_exports_as_a_lora_and_one_with_biases_is_refused(
    editor: Any, layout: Any, sd1: Any, tmp_path: Path
) -> None:
    assert not editor.biases and not type(editor)().biases
    delta, other = editor.fit(sd1, CAT), tiny.pipeline()
    assert delta.export(tmp_path / "lora.safetensors", layout, dtype=torch.float32) < 1e-5
    other.load_lora_weights(tmp_path / "lora.safetensors")
    with delta.apply(sd1):
        want = tiny.latents(sd1)
    assert change(tiny.latents(other), want) < 1e-4 and change(want, tiny.drawn()) > 1e-7
    whole = replace(editor, biases=True).fit(sd1, CAT)
    with pytest.raises(ValueError, match="to_out.0.bias'. Fit without `biases`"):
        whole.export(tmp_path / "lora.safetensors", layout)


def test_what_cannot_be_trained_is_refused(sd1: Any) -> None:
    with pytest.raises(ValueError, match="one of 'x', 'x-strict', 'joint', 'u', 'self', 'full', got 'xattn'"):
        ESD(train="xattn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finds no parameters"):
        trained(torch.nn.Linear(2, 2), "x")
    with EIUP(ALCOHOL).apply(sd1), pytest.raises(ValueError, match=r"EIUP is applied.*handle.remove"):
        ESD().fit(sd1, CAT)
    with pytest.raises(ValueError, match="at least one concept"):
        ESD().fit(sd1, [])
    with pytest.raises(ValueError, match="tokens long"):
        ESD().fit(sd1, Concept("long", ("cat " * 20,)))
    with pytest.raises(TypeError, match="tested family"):  # as for SD3 and FLUX
        ESD().fit(object(), CAT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ESD needs a denoiser that trains .*this CogView4Pipeline"):
        ESD().fit(tiny.untouched("cogview4"), CAT)
    half = tiny.pipeline().to(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="precision='bfloat16'"):
        ESD(precision="float32").fit(half, CAT)
    lora = tiny.pipeline()
    lora.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="Unload it"):
        ESD().fit(lora, CAT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", -1),
        ("steps", 1.5),
        ("batch", 0),
        ("accumulate", None),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("eta", -2),
        ("guidance", 0.5),
        ("clip", -1.0),
        ("precision", "float16"),
        ("reuse", True),
        ("sampler_steps", 0),
        ("biases", 1),
        ("drawn_by", "teacher"),
    ],
)
def test_fields_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        ESD(**{field: value})


# ---------------------------------------------------------------- trajectories


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, PNDMScheduler])
def test_points_are_what_the_denoiser_sees_in_a_call_of_the_pipeline(family: str, scheduler: Any) -> None:
    """Latents as scaled by the scheduler, times, texts, pooled texts, and the unconditional rows of inference."""
    pipe, steps, guidance = tiny.pipeline(family), 4, 3.0
    if scheduler:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seen: list[dict[str, Any]] = []

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({"sample": args[0], "timestep": args[1], **kwargs})

    with pipe.unet.register_forward_pre_hook(watch, with_kwargs=True):
        tiny.latents(pipe, num_inference_steps=steps, guidance_scale=guidance, seed=5)
    net = Denoiser(pipe, ["a cat", PROMPT], "x", steps)
    stops = torch.arange(len(seen))[:, None]
    rng = Generator().manual_seed(5)
    points = net.trajectory(torch.tensor([2]), stops, None, guidance, rng, keep=True)
    assert len(seen) == len(points) == len(net.scheduler.timesteps)
    condition = net.condition.at(torch.tensor([0, 2]))
    for k, call in enumerate(seen):
        assert change(points.x[k], call["sample"][1]) < 1e-5
        assert points.t[k] == call["timestep"]
        assert torch.allclose(call["encoder_hidden_states"], condition["encoder_hidden_states"], atol=1e-6)
        for name, value in condition["added_cond_kwargs"].items():
            assert torch.allclose(call["added_cond_kwargs"][name], value, atol=1e-6)
        with torch.no_grad():
            own = pipe.unet(call["sample"], call["timestep"], call["encoder_hidden_states"], None,
                            added_cond_kwargs=call.get("added_cond_kwargs")).sample[1]  # fmt: skip
        assert change(points.own[k], own) < 1e-4
    if family == "sdxl":
        assert not condition["encoder_hidden_states"][0].any()  # SDXL's own null, not the text ""
    noise = torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(5)) * pipe.scheduler.init_noise_sigma
    assert change(points.x[-1:], noise) > 0.1  # something was drawn


def test_no_step_is_drawn_before_step_0(sd1: Any) -> None:
    """The published code of SDD runs all steps here and labels the picture as noise."""
    net = Denoiser(sd1, ["a cat"], "x", 4)
    points = net.trajectory(torch.tensor([1]), torch.tensor([[0]]), None, 3.0, Generator().manual_seed(1))
    assert net.rows == 0
    assert torch.equal(points.x, torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(1)))
    assert points.t.tolist() == [net.scheduler.timesteps[0]]


def test_stops_differ_by_row_and_by_use(sd1: Any) -> None:
    net = Denoiser(sd1, ["a cat", "a dog"], "x", 4)
    stops, prompts = torch.tensor([[3, 0], [1, 2]]), torch.tensor([1, 2])
    points = net.trajectory(prompts, stops, None, 3.0, Generator().manual_seed(1))
    every = net.trajectory(prompts, torch.arange(4)[:, None].expand(4, 2), None, 3.0, Generator().manual_seed(1))
    for k, (stop, row) in enumerate([(3, 0), (0, 1), (1, 0), (2, 1)]):
        assert torch.equal(points.x[k], every.x[2 * stop + row])
        assert points.t[k] == net.scheduler.timesteps[stop] and points.prompt[k] == prompts[row]


# ---------------------------------------------------------------- the pipeline


@pytest.mark.parametrize("editor", EDITORS, ids=["esd", "sdd", "sdd-u"])
def test_fit_moves_what_it_trains_and_leaves_the_pipeline_as_found(editor: Any, pipe: Any) -> None:
    pipe.unet.train()
    before = everything(pipe)
    try:
        delta = editor.fit(pipe, [ALCOHOL, CAT], seed=3)
        assert_as_found(pipe, before)
        assert set(delta.weights) == {
            f"unet.{name}" for name in trained(pipe.unet, editor.train, facts(pipe).outer_layers, biases=editor.biases)
        }
        moved = [name for name, w in delta.weights.items() if dense(w).any()]
        assert len(moved) > 0.8 * len(delta.weights)
        assert same(delta, editor.fit(pipe, [ALCOHOL, CAT], seed=3))
        assert not same(delta, editor.fit(pipe, [ALCOHOL, CAT], seed=4))
    finally:
        pipe.unet.eval()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_so_does_an_exception_in_the_middle(error: Any, sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls, forward = everything(sd1), [], sd1.unet.conv_out.forward

    def fail(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 12:
            raise error
        return forward(x)

    sd1.unet.conv_out.forward = fail
    try:
        with pytest.raises(error):
            EDITORS[0].fit(sd1, CAT)
    finally:
        del sd1.unet.conv_out.forward
    assert len(calls) == 12
    assert_as_found(sd1, before)


def test_no_updates_learn_nothing(sd1: Any) -> None:
    for editor in (ESD(**ESD.off), SDD(**SDD.off)):
        delta = editor.fit(sd1, CAT)
        assert not any(dense(w).any() for w in delta.weights.values())
        assert delta.info["steps"] == 0


def test_half_precision_learns_in_float32(sd1: Any) -> None:
    """At 1e-5 an update of a bfloat16 weight rounds to nothing; and the change is about that of float32."""
    half, editor = tiny.pipeline().to(dtype=torch.bfloat16), ESD(steps=4, lr=1e-5, **QUICK)
    before = everything(half)
    low, full = editor.fit(half, CAT), editor.fit(sd1, CAT)
    assert_as_found(half, before)
    for w in low.weights.values():
        assert w.dtype == torch.float32
        assert 0 < float(w.abs().max()) <= 4.1e-5  # Adam moves at most lr an update
    flat = [torch.cat([dense(w).flatten() for w in d.weights.values()]) for d in (low, full)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.5


def test_float16_on_a_cpu_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match="does not train on a CPU. Load it in float32 or bfloat16"):
        ESD(steps=1, **QUICK).fit(tiny.pipeline().to(dtype=torch.float16), CAT)


def test_a_delta_that_is_on_belongs_to_the_model_that_is_trained(sd1: Any) -> None:
    first = EDITORS[0].fit(sd1, CAT)
    with first.apply(sd1):
        second = EDITORS[0].fit(sd1, ALCOHOL)
    assert list(second.after) == [first.hash]
    assert not same(second, EDITORS[0].fit(sd1, ALCOHOL))


# ---------------------------------------------------------------- updates


def test_parts_of_a_batch_add_up(sd1: Any) -> None:
    whole, parts = (
        ESD(steps=2, lr=1e-3, batch=3, reuse=2, sampler_steps=4, accumulate=n, clip=1.0).fit(sd1, CAT) for n in (1, 2)
    )
    for name, w in whole.weights.items():
        assert torch.allclose(parts.weights[name], w, atol=1e-4)  # of moves of 2e-3
    assert whole.info["loss"] == pytest.approx(parts.info["loss"], rel=1e-4)


def test_weight_decay_and_clipping_reach_the_optimiser(sd1: Any) -> None:
    plain = ESD(steps=1, lr=1e-2, eta=-1, **QUICK).fit(sd1, CAT)  # a loss of 0
    decayed = ESD(steps=1, lr=1e-2, eta=-1, weight_decay=0.5, **QUICK).fit(sd1, CAT)
    name = next(n for n in plain.weights if n.endswith("attn2.to_k.weight"))
    own = sd1.unet.get_parameter(name.removeprefix("unet.")).detach()
    assert float(dense(plain.weights[name]).abs().max()) < 1e-2 * float(own.abs().max())
    assert change(dense(decayed.weights[name]), dense(plain.weights[name]) - 0.005 * own) < 0.3
    clipped = ESD(steps=2, lr=1e-3, clip=1e-9, **QUICK).fit(sd1, CAT)
    free = ESD(steps=2, lr=1e-3, **QUICK).fit(sd1, CAT)
    assert float(dense(clipped.weights[name]).norm()) < 0.5 * float(dense(free.weights[name]).norm())  # Adam's epsilon


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("editor", [ESD(steps=7, lr=1e-3, **QUICK), SDD(steps=7, lr=1e-3, ema=0.5, **QUICK)])
def test_interrupted_and_gone_on_is_unbroken(
    editor: Any, sd1: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_training, "EVERY", 2)
    file, update, done = tmp_path / "fit.safetensors", _training._update, []
    unbroken = editor.fit(sd1, [ALCOHOL, CAT], seed=3)

    def interrupt(*args: Any) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(update(*args))

    with monkeypatch.context() as patch:
        patch.setattr(_training, "_update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            editor.fit(sd1, [ALCOHOL, CAT], seed=3, checkpoint=file)
    with safe_open(file, "pt") as kept:
        assert len(kept.get_tensor("losses")) == 4
        assert {name.split("/")[0] for name in kept.keys()} >= {"student", "adam", "rng"}  # noqa: SIM118
    done.clear()
    with monkeypatch.context() as patch:
        patch.setattr(_training, "_update", lambda *args: done.append(update(*args)))
        resumed = editor.fit(sd1, [ALCOHOL, CAT], seed=3, checkpoint=file)
        assert len(done) == 3
        again = editor.fit(sd1, [ALCOHOL, CAT], seed=3, checkpoint=file)  # finished: nothing is left to do
        assert len(done) == 3
    assert same(resumed, unbroken) and same(again, unbroken)
    assert resumed.info == unbroken.info


def test_a_checkpoint_of_another_fit_is_refused_and_kept(sd1: Any, tmp_path: Path) -> None:
    file, editor = tmp_path / "fit.safetensors", ESD(steps=2, lr=1e-3, **QUICK)
    editor.fit(sd1, CAT, checkpoint=file)
    written = file.read_bytes()
    for other, concept, seed, what in (
        (ESD(steps=3, lr=1e-3, **QUICK), CAT, 0, "steps"),
        (editor, ALCOHOL, 0, "phrases"),
        (editor, CAT, 1, "seed"),
    ):
        with pytest.raises(ValueError, match=f"(?s)another fit. .*{what}"):
            other.fit(sd1, concept, seed=seed, checkpoint=file)
    with editor.fit(sd1, CAT).apply(sd1), pytest.raises(ValueError, match=r"differs in\n  base: "):
        editor.fit(sd1, CAT, checkpoint=file)
    assert file.read_bytes() == written
    fields, biased = {"drawn_by": "frozen", "biases": True}, replace(editor, biases=True)
    for name, value in fields.items():
        with pytest.raises(ValueError, match=f"(?s)another fit. .*{name}: "):
            replace(editor, **{name: value}).fit(sd1, CAT, checkpoint=file)
    for one, changed in ((editor, {}), (biased, {"biases": True})):  # as before there were these fields
        file.unlink()
        want = one.fit(sd1, CAT, checkpoint=file)
        with safe_open(file, "pt") as kept:
            header, parts = kept.metadata(), {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        old = {k: v for k, v in json.loads(header["fit"]).items() if k not in fields}
        save_file(parts, file, header | {"fit": json.dumps(old)})
        assert same(replace(editor, **changed).fit(sd1, CAT, checkpoint=file), want)
    with pytest.raises(ValueError, match="(?s)another fit. .*biases: "):
        editor.fit(sd1, CAT, checkpoint=file)
    file.write_bytes(written[:100])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        editor.fit(sd1, CAT, checkpoint=file)


def test_a_loss_that_is_not_finite_ends_the_fit_and_keeps_the_checkpoint(
    sd1: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_training, "EVERY", 2)
    file, loss, calls, before = tmp_path / "fit.safetensors", ESD.loss, [], everything(sd1)

    def poisoned(*args: Any) -> Tensor:
        calls.append(None)
        return loss(*args) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(ESD, "loss", poisoned)
    with pytest.raises(RuntimeError, match=r"loss is nan in update 4 at lr 0\.001; the last checkpoint is in"):
        ESD(steps=6, lr=1e-3, **QUICK).fit(sd1, CAT, checkpoint=file)
    with safe_open(file, "pt") as kept:
        assert len(kept.get_tensor("losses")) == 2
        assert all(kept.get_tensor(name).isfinite().all() for name in kept.keys() if "/" in name)  # noqa: SIM118
        assert json.loads(kept.metadata()["done"]) is False
    assert_as_found(sd1, before)
    calls.clear()
    with pytest.raises(RuntimeError, match="there is no checkpoint yet"):
        ESD(steps=6, lr=1e-3, **QUICK).fit(sd1, CAT)


# ---------------------------------------------------------------- gradients off, or computed again


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
@pytest.mark.parametrize(
    "editor",
    [*EDITORS, CCRT(steps=2, keep=2, generations=1, **QUICK), UCE(), RECE(rounds=1)],
    ids=lambda editor: type(editor).__name__,
)
def test_a_fit_learns_where_gradients_are_off(editor: Any, mode: Any, sd1: Any) -> None:
    """Scripts that draw often turn them off; what is learned is the same, and usable outside."""
    want = editor.fit(sd1, CAT)
    assert max(float(dense(w).abs().max()) for w in want.weights.values()) > 0
    with mode():
        got = editor.fit(sd1, CAT)
        assert not torch.is_grad_enabled()
    assert same(got, want) and not any(t.is_inference() for w in got.weights.values() for t in tensors(w))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("editor", EDITORS, ids=lambda editor: type(editor).__name__)
def test_a_model_made_in_inference_mode_is_refused(editor: Any) -> None:
    with torch.inference_mode():
        pipe = tiny.pipeline()
        with pytest.raises(ValueError, match=r"loaded under `torch.inference_mode\(\)`.* Load the pipeline outside"):
            editor.fit(pipe, CAT)


def test_a_loss_without_gradient_is_an_error(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learned nothing, and the record had its losses."""
    before, whole = everything(sd1), ESD.loss
    monkeypatch.setattr(ESD, "loss", lambda *args: whole(*args).detach())
    with pytest.raises(RuntimeError, match="does not depend on the trained weights"):
        ESD(steps=1, **QUICK).fit(sd1, CAT)
    assert_as_found(sd1, before)


@pytest.mark.parametrize("editor", EDITORS, ids=lambda editor: type(editor).__name__)
def test_gradient_checkpointing_learns_the_same_and_stays_on(editor: Any) -> None:
    want, pipe, again = editor.fit(tiny.pipeline(), CAT), tiny.pipeline(), []

    def checkpoint(block: Any, *args: Any) -> Any:
        again.append(block)
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

    pipe.unet.enable_gradient_checkpointing(checkpoint)
    before = everything(pipe)
    got = editor.fit(pipe, CAT)
    assert again and same(got, want)
    assert_as_found(pipe, before)
    blocks = [m for m in pipe.unet.modules() if getattr(m, "gradient_checkpointing", False)]
    assert blocks and all(m._gradient_checkpointing_func is checkpoint for m in blocks)


def test_gradient_checkpointing_stays_on_after_an_exception(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline()
    pipe.unet.enable_gradient_checkpointing()
    before = {m: m._gradient_checkpointing_func for m in pipe.unet.modules() if hasattr(m, "gradient_checkpointing")}

    def broken(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.unet.conv_out, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        ESD(steps=1, **QUICK).fit(pipe, CAT)
    assert {m: m._gradient_checkpointing_func for m in before} == before


# ---------------------------------------------------------------- the detector


def test_pictures_that_became_nan_do_not_end_a_fit(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector sees nothing in them."""
    monkeypatch.setattr(_training, "LOOK", 1)
    monkeypatch.setattr(sd1.vae, "decode", lambda z, **_: (torch.full((len(z), 3, 16, 16), torch.nan),))
    with pytest.raises(ValueError, match="values that are not finite"):
        ESD(steps=2, **QUICK).fit(sd1, CAT, stop=lambda images: torch.zeros(1, len(images), dtype=torch.bool))


def test_a_fit_ends_when_the_detector_no_longer_sees_the_concept(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two judges, of which the worse counts; pictures are those of the edited model."""
    monkeypatch.setattr(_training, "LOOK", 2)
    monkeypatch.setattr(_training, "LOOK_IMAGES", 4)
    shown: list[Tensor] = []

    def judges(images: Tensor) -> Tensor:
        shown.append(images)
        sees = torch.zeros(2, len(images), dtype=torch.bool)
        sees[1, : 3 - len(shown)] = True  # 2 of 4 pictures, then 1, then none
        return sees

    before = everything(sd1)
    editor = ESD(steps=40, lr=1e-2, **QUICK)
    assert editor.fit(sd1, CAT, stop=judges, below=0.25).info["steps"] == 4
    assert_as_found(sd1, before)
    assert [tuple(images.shape) for images in shown] == [(4, 3, 16, 16)] * 2
    assert change(shown[0], shown[1]) > 1e-3
