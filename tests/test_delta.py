"""`Delta`: what an editor learned, on and off a pipeline, in arithmetic, in files, and as a LoRA."""

from __future__ import annotations

import gc
import itertools
import json
import resource
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ALCOHOL, change, drawn, latents, pipeline
from torch import Tensor

import efface
from efface import EIUP, Concept, Delta
from efface._weights import keys_values, weight
from efface.delta import Factors, active, dense, present, unedited
from efface.delta.factors import truncate
from efface.pipelines import model_hash

pytestmark = pytest.mark.thinned("long")

EFFECT = 1e-3
CONV = "unet.down_blocks.0.resnets.0.conv1.weight"
BIAS = "unet.down_blocks.0.resnets.0.conv1.bias"


@dataclass(frozen=True)
class Noise:
    """An editor that learns nothing: random changes of rank 2, or whole ones."""

    whole: bool = False
    conv: bool = False
    size: float = 0.15

    def fit(self, pipe: Any, concepts: Any, *, seed: int = 0) -> Delta:
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return self.size * torch.randn(shape, generator=random)

        changed = {n: tuple(w.shape) for n, w in keys_values(pipe).items()}
        if self.conv:
            changed[CONV] = tuple(weight(pipe.unet, CONV.removeprefix("unet.")).shape)
        weights = {n: draw(*s) if self.whole else Factors(draw(s[0], 2), draw(2, *s[1:])) for n, s in changed.items()}
        return Delta.fitted(self, pipe, weights, concepts, seed=seed)


def low(pipe: Any, seed: int = 0, **fields: Any) -> Delta:
    return Noise(**fields).fit(pipe, [ALCOHOL], seed=seed)


def state(pipe: Any) -> dict[str, Tensor]:
    return {n: w.clone() for n, w in pipe.unet.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---------------------------------------------------------------- on and off


@pytest.mark.parametrize("whole", [False, True])
def test_on_it_changes_the_picture_and_off_the_model_is_what_it_was(whole: bool, pipe: Any, family: str) -> None:
    before, digest = state(pipe), model_hash(pipe)
    delta = low(pipe, whole=whole)
    with delta.apply(pipe) as handle:
        on = latents(pipe)
        assert change(on, drawn(family)) > EFFECT
        assert model_hash(pipe) == digest and active(pipe) == [delta]
        for name, value in delta.weights.items():
            path = name.removeprefix("unet.")
            assert torch.allclose(weight(pipe.unet, path), before[path] + dense(value), atol=1e-6)
        handle.strength = 0.0
        assert same(state(pipe), before)
        handle.strength = 0.5
        half = latents(pipe)
    assert same(state(pipe), before) and torch.equal(latents(pipe), drawn(family)) and unedited(pipe) == {}
    assert torch.equal(half, drawn(family, replace(delta, strength=0.5))) and change(half, on) > EFFECT


def test_an_exception_takes_it_off(sd1: Any) -> None:
    before = state(sd1)
    with pytest.raises(KeyboardInterrupt), low(sd1).apply(sd1):
        raise KeyboardInterrupt
    assert same(state(sd1), before)


def test_an_apply_that_breaks_half_way_leaves_nothing(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, delta, other = state(sd1), low(sd1), low(sd1, seed=1)
    with other.apply(sd1) as handle:
        edited, calls = state(sd1), itertools.count()

        def out_of_memory(self: Factors) -> Tensor:
            if next(calls) == 5:
                raise MemoryError
            return self.B @ self.A

        with monkeypatch.context() as patch:
            patch.setattr(Factors, "dense", out_of_memory)
            with pytest.raises(MemoryError):
                delta.apply(sd1)
            assert same(state(sd1), edited) and active(sd1) == [other]
            calls = itertools.count()
            with pytest.raises(MemoryError):
                handle.strength = 2.0
        assert same(state(sd1), edited) and handle.strength == 1.0
    assert same(state(sd1), before)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_deltas_come_off_in_any_order(order: tuple[int, ...], sd1: Any) -> None:
    before = state(sd1)
    deltas = [low(sd1, 0), low(sd1, 1, whole=True), low(sd1, 2, conv=True)]
    handles = [delta.apply(sd1) for delta in deltas]
    for gone, k in enumerate(order, start=1):
        handles[k].remove()
        left = [deltas[j] for j in sorted(order[gone:])]
        present = state(sd1)
        with efface.stack(tiny.untouched("sd1"), *left):
            assert same(present, state(tiny.untouched("sd1")))
        assert active(sd1) == left
    assert same(state(sd1), before)


def test_an_eraser_on_top_acts_on_the_edited_model(sd1: Any) -> None:
    delta, eraser, merged = low(sd1), EIUP([ALCOHOL]), pipeline()
    delta.merge(merged)
    with eraser.apply(merged):
        want = latents(merged)
    handles = efface.stack(sd1, delta, eraser)
    assert torch.equal(latents(sd1), want)
    assert change(want, drawn("sd1", delta)) > EFFECT and change(want, drawn("sd1", eraser)) > EFFECT
    handles[0].remove()
    assert torch.equal(latents(sd1), drawn("sd1", eraser))
    handles.remove()
    assert torch.equal(latents(sd1), drawn())


def test_a_pipeline_can_be_freed_with_a_delta_on() -> None:
    pipe = pipeline("small")
    handle, gone = low(pipe).apply(pipe), weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None
    handle.strength = 2.0
    handle.remove()


def test_half_precision_and_conversion_while_on(sd1: Any) -> None:
    delta, half = low(sd1), pipeline().to(torch.float16)
    before = state(half)
    with delta.apply(half):
        assert not same(state(half), before)
    assert same(state(half), before)
    with low(half).apply(pipeline()):
        pass  # fitted in float16, on float32 values that round to the same
    converted = pipeline()
    with delta.apply(converted):
        converted.to(torch.float16)
    assert same(state(converted), before)


def test_present_names_all_that_shapes_the_pictures(tmp_path: Path) -> None:
    """A calibration that goes on compares it."""
    pipe = pipeline()
    seen = [present(pipe)]
    with EIUP(ALCOHOL).apply(pipe):
        seen.append(present(pipe))
    with low(pipe).apply(pipe):
        seen.append(present(pipe))
    assert present(pipe) == seen[0]
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen.append(present(pipe))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    seen.append(present(pipe))
    for seed in (0, 1):  # two LoRAs of one name
        low(pipe, seed).export(tmp_path / "lora.safetensors")
        pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="lora")
        seen.append(present(pipe))
        pipe.set_adapters("lora", 0.5)
        seen.append(present(pipe))
        pipe.disable_lora()
        assert present(pipe) == seen[4]
        pipe.unload_lora_weights()
    assert all(a != b for a, b in itertools.combinations(seen, 2))


def test_behind_a_lora_and_behind_compile(sd1: Any, tmp_path: Path) -> None:
    delta, other = low(sd1), low(sd1, 1)
    with efface.stack(sd1, delta, other):
        want = latents(sd1)
    other.export(tmp_path / "lora.safetensors")
    pipe = pipeline()
    before, digest = latents(pipe), model_hash(pipe)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    handle = delta.apply(pipe)
    assert change(latents(pipe), want) < 1e-4 and change(want, before) > EFFECT and model_hash(pipe) == digest
    pipe.unload_lora_weights()  # the names of the layers change while the delta is on
    assert torch.equal(latents(pipe), drawn("sd1", delta))
    handle.remove()
    assert torch.equal(latents(pipe), before)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    plain = state(pipe)
    with delta.apply(pipe):
        assert active(pipe) == [delta] and model_hash(pipe) == digest and not same(state(pipe), plain)
    assert same(state(pipe), plain)


# ---------------------------------------------------------------- which model


def test_another_model_is_refused_and_both_are_named(sd1: Any) -> None:
    delta, other = low(sd1), pipeline()
    first = next(iter(keys_values(other).values()))
    first.data[0, 0] = torch.nextafter(first.data[0, 0], torch.tensor(9.0))
    before = state(other)
    with pytest.raises(ValueError, match="1 of 8 weights differ") as error:
        delta.apply(other)
    assert delta.base_hash[:16] in str(error.value) and low(other).base_hash[:16] in str(error.value)
    assert same(state(other), before) and active(other) == []
    with pytest.raises(ValueError, match=r"does not match this pipeline, 'SD 1.x/2.x'.*Expected a change .*\[16, 48\]"):
        delta.apply(pipeline("sd2"))
    with pytest.raises(ValueError, match="does not match this pipeline, 'SDXL'"):
        delta.apply(pipeline("sdxl"))


def test_the_base_is_the_model_without_deltas(sd1: Any) -> None:
    earlier = low(sd1)
    with earlier.apply(sd1):
        later = low(sd1, 1)
    assert later.base_hash == earlier.base_hash and later.after == {earlier.hash: 1.0}
    with pytest.raises(ValueError, match=f"on top of the delta {earlier.hash[:16]} at strength 1, which is not on"):
        later.apply(sd1)
    with replace(earlier, strength=0.5).apply(sd1), pytest.raises(ValueError, match=r"which is on at 0.5"):
        later.apply(sd1)
    with efface.stack(sd1, earlier, later) as handles:
        both = latents(sd1)
        handles[0].remove()
    with pytest.raises(ValueError, match="requires others"):
        later.export("never.safetensors")
    assert (earlier + later).after == {}
    assert change(drawn("sd1", earlier + later), both) < 1e-5


def test_what_cannot_be_edited_is_an_error(sd1: Any) -> None:
    delta = low(sd1)
    fused = pipeline()
    fused.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        delta.apply(fused)
    fused.unet.unfuse_qkv_projections()
    handle = delta.apply(fused)
    on = latents(fused)
    fused.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        handle.remove()
    fused.unet.unfuse_qkv_projections()
    assert handle.active and torch.equal(latents(fused), on)
    handle.remove()
    assert torch.equal(latents(fused), drawn()) and change(on, drawn()) > 1e-3
    for make, words in (
        (lambda w: w.data.to(torch.float8_e4m3fn), "quantised"),
        (lambda w: w.data.to("meta"), "not in memory"),
    ):
        broken = pipeline()
        layer = broken.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        layer.weight = torch.nn.Parameter(make(layer.weight), requires_grad=False)
        with pytest.raises(ValueError, match=words):
            delta.apply(broken)


def test_changes_are_finite_and_there_is_one(sd1: Any) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Delta({"unet.x": torch.tensor([float("nan")])}, method="noise")
    with pytest.raises(ValueError, match="at least one"):
        Delta({}, method="noise")
    with low(sd1).apply(sd1) as handle, pytest.raises(ValueError, match="strength"):
        handle.strength = -1.0


def test_a_delta_prints_as_one_short_line(sd1: Any) -> None:
    delta = low(sd1)
    assert repr(delta) == "Delta(test_delta:Noise, alcohol, strength 1, 8 tensors (rank <= 2), base model 'SD 1.x/2.x')"
    both = replace(delta + low(sd1, 1, conv=True), strength=0.5, concepts=[Concept(name) for name in "abcde"])
    both = replace(both, weights={**both.weights, BIAS: torch.zeros(16)}, model="")
    assert repr(both) == (
        "Delta(test_delta:Noise, a, b, c and 2 more, strength 0.5, 10 tensors (rank <= 4 or dense), "
        "base model 'unknown')"
    )


# ---------------------------------------------------------------- arithmetic


def test_arithmetic_is_on_the_changes(sd1: Any) -> None:
    before, a, b = state(sd1), low(sd1), low(sd1, 1, whole=True)
    with (a - a).apply(sd1):
        assert same(state(sd1), before)
    for made, want in (
        (a + b, lambda n: dense(a.weights[n]) + b.weights[n]),
        (2 * a - b * 0.5, lambda n: 2 * dense(a.weights[n]) - 0.5 * b.weights[n]),
        (replace(a, strength=0.25) + b, lambda n: 0.25 * dense(a.weights[n]) + b.weights[n]),
        (-a, lambda n: -dense(a.weights[n])),
    ):
        assert all(torch.allclose(dense(w), want(n), atol=1e-6) for n, w in made.weights.items())
    assert {w.rank for w in (a + low(sd1, 2)).weights.values()} == {4}
    assert {w.rank for w in (a + 2 * a).weights.values()} == {2}
    other = pipeline()
    next(iter(keys_values(other).values())).data += 1
    with pytest.raises(ValueError, match="fitted on different models"):
        a + low(other)
    with pytest.raises(TypeError):
        a * "2"


matrices = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(1, 9))
def test_truncation_is_the_nearest_and_knows_its_error(shape: tuple[int, int, int], rank: int) -> None:
    out, width, seed = shape
    whole = torch.randn(out, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    factors, error = truncate(whole, rank)
    values = torch.linalg.svdvals(whole)
    assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-9)
    assert change(factors.dense(), whole) == pytest.approx(error, abs=1e-9)
    again, less = truncate(Factors(whole, torch.eye(width, dtype=torch.float64)), rank)
    assert less == pytest.approx(error, abs=1e-9) and torch.allclose(again.dense(), factors.dense())
    assert truncate(again, again.rank) == (again, 0.0) == truncate(again)


def test_a_sum_with_a_delta_that_knows_no_model_is_refused(sd1: Any) -> None:
    """The sum would apply to any model."""
    known, other = low(sd1), low(sd1, 1)
    unknown = replace(other, base={})
    for pair in ((known, unknown), (unknown, known), (unknown, replace(known, base={}))):
        with pytest.raises(ValueError, match=r"does not identify its base model \(`base` is empty\)"):
            pair[0] + pair[1]
    assert (known + other).base == known.base


def without_base(delta: Delta) -> Delta:
    return replace(delta, base={})


def without_hashes(delta: Delta) -> Delta:
    return replace(delta, base={precision: {} for precision in delta.base})


def without_one_hash(delta: Delta) -> Delta:
    last = max(delta.weights)
    return replace(delta, base={p: {n: h for n, h in known.items() if n != last} for p, known in delta.base.items()})


@pytest.mark.parametrize("forget", [without_base, without_hashes, without_one_hash])
def test_a_delta_that_does_not_know_its_model_changes_none(forget: Any, sd1: Any, tmp_path: Path) -> None:
    before, delta = state(sd1), forget(low(sd1))
    changes = [delta.apply, delta.merge, delta.check, lambda pipe: efface.stack(pipe, low(sd1, 1), delta)]
    for put in (*changes, lambda pipe: replace(delta, strength=0.0).apply(pipe)):
        with pytest.raises(ValueError, match=r"does not identify its base model.*Make it with"):
            put(sd1)
    delta.save(tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="does not identify its base model"):
        Delta.load(tmp_path / "delta.safetensors")
    assert active(sd1) == [] and same(state(sd1), before)


def test_a_sum_of_three_rounds_needs_none_of_them_under_it(sd1: Any) -> None:
    """Each fitted on top of those before; scaled sums and other strengths still do."""
    first = low(sd1)
    with first.apply(sd1):
        second = low(sd1, 1)
        with second.apply(sd1):
            third = low(sd1, 2)
    assert len(third.after) == 2 and (first + second + third).after == {} == (first + (second + third)).after
    assert ((first + second) * 2 + third).after == third.after
    assert (replace(first, strength=0.5) + second).after == second.after
    assert ((first + second) * 0.5 * 2 + third).after == {}
    with (first + second + third).apply(sd1):
        assert len(active(sd1)) == 1


def test_no_change_counts_twice(sd1: Any, tmp_path: Path) -> None:
    """Alone, read from a file, at another strength, or in a sum; on a pipeline, merged, or added up."""
    before, a, b = state(sd1), low(sd1), low(sd1, 1)
    a.save(tmp_path / "a.safetensors")
    both, twin = a + b, Delta.load(tmp_path / "a.safetensors")
    pairs = [(a, a), (a, twin), (a, replace(a, strength=0.5)), (both, a), (a, both), (both + low(sd1, 2), b)]
    for one, other in pairs:
        with pytest.raises(ValueError, match=r"Both sides contain the delta.*twice\. Scale it instead"):
            one + other
        with pytest.raises(ValueError, match=r"is already applied, alone or in a sum.*twice\. Set the `strength`"):
            efface.stack(sd1, one, other)
        assert active(sd1) == [] and same(state(sd1), before)
        with one.apply(sd1), pytest.raises(ValueError, match="Remove its handle before merging"):
            other.merge(sd1)
    name = next(iter(a.weights))
    assert torch.allclose(dense((2 * a).weights[name]), 2 * dense(a.weights[name]))
    assert change(dense((both - b).weights[name]), dense(a.weights[name])) < 1e-5  # taken out again
    assert float(dense((a - a).weights[name]).abs().max()) < 1e-6
    with a.apply(sd1) as handle, b.apply(sd1):
        handle.remove()
        with twin.apply(sd1):
            assert len(active(sd1)) == 2


def test_truncated_says_what_was_lost(sd1: Any) -> None:
    delta = low(sd1, whole=True, conv=True)
    thin = delta.truncated(4)
    note = thin.info["truncated"]
    lost = sum(float((dense(w) - delta.weights[n]).norm()) ** 2 for n, w in thin.weights.items())
    whole = sum(float(w.norm()) ** 2 for w in delta.weights.values())
    assert note["relative error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4) and 0.1 < note["relative error"] < 1
    assert low(sd1).truncated(2).info["truncated"]["relative error"] == 0


# ---------------------------------------------------------------- files


def test_a_file_holds_all_of_it(sd1: Any, tmp_path: Path) -> None:
    path = tmp_path / "no-alcohol.safetensors"
    delta = replace(low(sd1, 3) + low(sd1, 4, whole=True, conv=True), seed=3, strength=0.5)
    delta.save(path)
    read = Delta.load(path)
    assert read.hash == delta.hash and read.config() == delta.config() and read.base == delta.base
    assert read.concepts == (ALCOHOL,) and read.strength == 0.5
    assert json.loads(json.dumps(read.config())) == read.config()
    assert torch.equal(drawn("sd1", read), drawn("sd1", delta))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_file(sd1: Any, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    old, new = low(sd1), low(sd1, 1, whole=True, conv=True)
    old.save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"delta.safetensors|File too large"):
            new.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Delta.load(path).hash == old.hash and [p.name for p in tmp_path.iterdir()] == [path.name]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)


def newer(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path, {"efface": '{"format": 99}'})


def lacking(path: Path) -> None:
    tensors = load_file(path)
    del tensors[next(iter(tensors))]
    header = {f: [] if f == "concepts" else "" for f in ("method", "concepts", "model")}
    save_file(tensors, path, {"efface": json.dumps(header | {"format": 1})})


def without(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Spoils the hashes of the model's values, by precision and name."""

    def spoil(path: Path) -> None:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["efface"])
        header["base"] = change(header["base"])
        save_file(load_file(path), path, {"efface": json.dumps(header)})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without(lambda base: {}), "does not identify its base model, because its header has no hash of its weights"),
        (
            without(lambda base: {"float32": {}}),
            "does not identify its base model.* no hash of the value of 'unet.down_blocks.0",
        ),
        (
            without(lambda base: {p: dict(list(of.items())[1:]) for p, of in base.items()}),
            "no hash of the value of 'unet.down_blocks.0",
        ),
        (without(lambda base: base | {"float16": {}}), "no hash of the value of"),
        (without(lambda base: [1]), "expected `base` to be a valid mapping"),
        (without(lambda base: {"float32": "x"}), "expected `base.float32` to be a valid mapping"),
        (cut, "damaged"),
        (empty, "damaged"),
        (foreign, "not a delta of Efface"),
        (newer, "got 99"),
        (lacking, "not a complete delta"),
        (Path.unlink, "There is no delta"),
    ],
)
def test_a_bad_file_is_named_and_explained(spoil: Callable[[Path], None], words: str, sd1: Any, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    low(sd1).save(path)
    spoil(path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        Delta.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("layout", "tolerance"), [("diffusers", 1e-5), ("kohya", 2e-3)])
def test_a_lora_draws_the_same_pictures(layout: Any, tolerance: float, pipe: Any, family: str, tmp_path: Path) -> None:
    delta = replace(low(pipe) + low(pipe, 1, conv=family == "sd1") * 1e-3, strength=0.7)
    error = delta.export(tmp_path / "lora.safetensors", layout)
    assert error < tolerance
    tensors = load_file(tmp_path / "lora.safetensors")
    if layout == "kohya":
        assert {t.dtype for t in tensors.values()} == {torch.float16}
        assert any(n.startswith("lora_unet_") and n.endswith("_attn2_to_k.lora_down.weight") for n in tensors)
        assert {float(t) for n, t in tensors.items() if n.endswith(".alpha")} == {4.0}
    other = pipeline(family)
    other.load_lora_weights(tmp_path / "lora.safetensors")
    assert change(latents(other), drawn(family, delta)) < tolerance
    assert change(drawn(family, delta), drawn(family)) > 10 * tolerance


def mixed(pipe: Any, keep: str = "", ranks: int = 5) -> Delta:
    """Every matrix and convolution whose name holds `keep`, changed by another rank than its neighbour's."""
    random, found = torch.Generator().manual_seed(0), {}
    for name, value in pipe.unet.named_parameters():
        if keep in name and value.ndim in (2, 4):
            r = 1 + 7 * len(found) % ranks
            b, a = torch.randn(len(value), r, generator=random), torch.randn(r, *value.shape[1:], generator=random)
            found[f"unet.{name}"] = Factors(0.1 * b, 0.1 * a)
    return replace(Delta.fitted(Noise(), pipe, found, "cat"), strength=0.7)


def as_loaded(unet: Any) -> dict[str, Tensor]:
    """What the one LoRA on a UNet adds to its weights."""
    layers = {n: m for n, m in unet.named_modules() if hasattr(m, "lora_A")}
    return {f"unet.{n}.weight": m.get_delta_weight(next(iter(m.lora_A))) for n, m in layers.items()}


def wrongest(delta: Delta, got: dict[str, Tensor]) -> float:
    assert got.keys() == delta.weights.keys()
    return max(change(got[n], delta.strength * dense(w)) for n, w in delta.weights.items())


@pytest.mark.parametrize(("keep", "ranks"), [("attn2", 5), ("attn2", 1), ("conv", 5), ("", 9)])
@pytest.mark.parametrize(("layout", "dtype"), [("diffusers", None), ("kohya", torch.float32), ("kohya", None)])
def test_mixed_ranks_load_as_what_they_are(
    layout: Any, dtype: Any, keep: str, ranks: int, sd1: Any, tmp_path: Path
) -> None:
    """By diffusers, which takes one alpha for all modules of a file with kohya's names."""
    delta, file = mixed(sd1, keep, ranks), tmp_path / "lora.safetensors"
    error = delta.export(file, layout, dtype=dtype)
    precise = 1e-5 if layout == "diffusers" or dtype else 2e-3
    assert error < precise
    other = pipeline()
    other.load_lora_weights(file)
    assert wrongest(delta, as_loaded(other.unet)) < precise
    if layout == "kohya":  # as A1111 and ComfyUI do it, without diffusers
        tensors = load_file(file)
        for name, want in delta.weights.items():
            key = f"lora_{name.removesuffix('.weight').replace('.', '_')}"
            up, down = (tensors[f"{key}.lora_{way}.weight"].float().flatten(1) for way in ("up", "down"))
            made = (up @ down).reshape(want.shape) * float(tensors[f"{key}.alpha"]) / len(down)
            assert change(made, delta.strength * dense(want)) < precise


@pytest.mark.parametrize("keep", ["attn2", ""])
def test_the_file_for_diffusers_tells_peft_its_config(keep: str, family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pipe, file = pipeline(family), tmp_path / "lora.safetensors"
    delta = mixed(pipe, keep)
    delta.export(file)
    with safe_open(file, "pt") as opened:
        written = json.loads(opened.metadata()["lora_adapter_metadata"])
    config = peft.LoraConfig(**{name.removeprefix("unet."): value for name, value in written.items()})
    peft.inject_adapter_in_model(config, pipe.unet)
    tensors = {name.removeprefix("unet."): t for name, t in load_file(file).items()}
    loaded = peft.set_peft_model_state_dict(pipe.unet, tensors)
    assert not loaded.unexpected_keys
    assert wrongest(delta, as_loaded(pipe.unet)) < 1e-5


def test_what_kohyas_names_lose_is_refused(tmp_path: Path) -> None:
    delta = mixed(tiny.untouched("sdxl"), "add_embedding")
    with pytest.raises(ValueError, match=r"unet.add_embedding.linear_1.weight.*Export with `layout` 'diffusers'"):
        delta.export(tmp_path / "lora.safetensors", "kohya")
    assert delta.export(tmp_path / "lora.safetensors") < 1e-5


def test_whole_changes_need_their_full_rank_and_biases_do_not_fit(sd1: Any, tmp_path: Path) -> None:
    delta, path = low(sd1, whole=True), tmp_path / "lora.safetensors"
    assert delta.export(path) < 1e-6
    assert delta.export(path, rank=3) == pytest.approx(delta.truncated(3).info["truncated"]["relative error"], rel=1e-3)
    assert delta.export(path, rank=3) > 0.1
    bias = Delta({**delta.weights, BIAS: torch.ones(16)}, method="noise")
    path.unlink()
    for biases in (bias, Delta({BIAS: torch.ones(16)}, method="noise")):
        count = f"got 1 others of {len(biases.weights)}, such as '{BIAS}'"
        with pytest.raises(ValueError, match=f"{count}. Fit without `biases`, or merge the delta"):
            biases.export(path)
    with pytest.raises(ValueError, match="`layout`"):
        delta.export(path, "a1111")  # type: ignore[arg-type]
    assert not path.exists()


def test_merged_weights_are_a_plain_model(sd1: Any, tmp_path: Path) -> None:
    delta, merged = low(sd1, conv=True), pipeline()
    with low(sd1, 1).apply(merged), pytest.raises(ValueError, match="Remove its handle before merging"):
        delta.merge(merged)
    delta.merge(merged)
    assert active(merged) == [] and model_hash(merged) != model_hash(sd1)
    merged.save_pretrained(tmp_path)
    read = StableDiffusionPipeline.from_pretrained(tmp_path)
    read.set_progress_bar_config(disable=True)
    assert torch.equal(latents(read), drawn("sd1", delta)) and tiny.STEPS > 1
    with pytest.raises(ValueError, match=f"this pipeline is '{tmp_path.name}'"):
        delta.apply(read)
