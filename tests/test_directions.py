"""Directions: vectors that are added to a module's output on conditional rows, and the fit that learns them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from test_conformance import assert_same
from test_training import assert_as_found, everything
from tiny import ALCOHOL, CAT, PROMPT, PROMPTS, bare, change, denoiser_of, drawn, latents
from torch import Tensor
from typer.testing import CliRunner

import efface
from efface import UCE, Concept, Delta, Directions, LatentDirections, api, pipelines
from efface._text import SITES
from efface.cli import app
from efface.delta import table
from efface.editors import _directions, _training
from efface.families import family as facts
from efface.metrics.deviation_ratio import deviation
from efface.models.emoji.eyes import load_eyes
from efface.testing import conformance
from efface.testing.conformance import EFFECT, ROUNDING, DoesNotApply, Trial
from efface.testing.drawing import ready, snapshot

DOG = Concept("dog")
QUICK = LatentDirections(steps=3, lr=0.05, batch=2, pictures=4, sampler_steps=2)
MODULES = {"unet": "mid_block", "transformer": "transformer_blocks.0"}


@functools.cache
def shape(family: str, module: str) -> tuple[int, ...]:
    """The shape of a module's output for one picture; of the picture's tokens, if text tokens come along."""
    found: list[Tensor] = []
    at = facts(tiny.untouched(family)).picture_output
    hook = (
        denoiser_of(tiny.untouched(family))
        .get_submodule(module)
        .register_forward_hook(lambda _, __, out: found.append(out if isinstance(out, Tensor) else out[at]))
    )
    latents(tiny.untouched(family), num_inference_steps=1)
    hook.remove()
    return tuple(found[0].shape[1:])


@functools.cache
def made(family: str = "sd1", *concepts: Concept, seed: int = 0, module: str = "", size: float = 0.1) -> Directions:
    """Directions of random vectors for a tiny pipeline."""
    pipe, concepts = tiny.untouched(family), concepts or (ALCOHOL,)
    module = module or MODULES[facts(pipe).denoiser]
    rng = torch.Generator().manual_seed(seed)
    vectors = size * torch.randn(len(concepts), *shape(family, module), generator=rng)
    return Directions.fitted(QUICK, pipe, {f"{facts(pipe).denoiser}.{module}": vectors}, concepts, seed=seed)


@functools.cache
def learned() -> Directions:
    return QUICK.fit(tiny.untouched("sd1"), [ALCOHOL, CAT])


def only_vector(directions: Directions) -> Tensor:
    (vectors,) = directions.vectors.values()
    return vectors


# ---------------------------------------------------------------- as an eraser

# These four build the method anew, for concepts without a vector or from a record, which does not hold the vectors.
NOT_FOR_VECTORS = ("a_row_is_the_row_alone", "comes_off_in_any_order", "pipelines_are_apart", "config_survives_json")
PROMISES = [
    pytest.param(family, promise, id=f"{family}-{promise.__name__}", marks=pytest.mark.slow if slow else ())
    for family in ("sd1", "sdxl", "flux")
    for promise in (*conformance.ON_EACH_FAMILY, *(conformance.ONCE if family == "sd1" else ()))
    if promise.__name__ not in NOT_FOR_VECTORS
    for slow in [promise.__name__ == "goes_with_shipped_methods"]
]


@pytest.mark.thinned("long")
@pytest.mark.filterwarnings("ignore:The vectors are")  # at the kit's larger strengths
@pytest.mark.parametrize(("family", "promise"), PROMISES)
def test_directions_keep_the_promises_of_run_time_erasers(family: str, promise: Any) -> None:
    pipe, _ = ready(family)
    try:
        promise(Trial(made(family, ALCOHOL, CAT, size=0.05), family, pipe))
    except DoesNotApply as reason:
        pytest.skip(str(reason))


def predictions(pipe: Any) -> tuple[Tensor, Tensor]:
    """The unconditional and the conditional prediction of the first step."""
    found: list[Tensor] = []
    after = denoiser_of(pipe).register_forward_hook(lambda _, __, out: found.append(out[0].clone()))
    latents(pipe, guidance_scale=4.0, num_inference_steps=1)
    after.remove()
    if len(found) == 1:
        unconditional, conditional = found[0].chunk(2)
    else:  # two calls: the order is the family's
        assert facts(pipe).guidance_in_two_calls or len(found) == 2
        conditional, unconditional = found
    return unconditional, conditional


@pytest.mark.parametrize("family", [name for name in tiny.EACH if name != "flux2"])  # which has none
def test_unconditional_rows_stay_to_the_bit(family: str) -> None:
    pipe = tiny.untouched(family)
    unconditional, conditional = predictions(pipe)
    with made(family).apply(pipe):
        steered = predictions(pipe)
    assert torch.equal(steered[0], unconditional) and change(steered[1], conditional) > EFFECT


@pytest.mark.parametrize("family", ["sd3", "flux", "cogview4"])
def test_text_tokens_of_a_joint_block_stay_to_the_bit(family: str) -> None:
    """The vectors have the picture's shape; the other output of the block is the text."""
    pipe, (name,) = tiny.untouched(family), made(family).steers
    at, found = facts(pipe).picture_output, []
    with made(family).apply(pipe) as handle:
        block = denoiser_of(pipe).get_submodule(name)
        hook = block.register_forward_hook(lambda _, __, out: found.append(out))  # after Efface's change
        for strength in (1.0, 0.0):
            handle.strength = strength
            latents(pipe, num_inference_steps=1)
        hook.remove()
    steered, base = found[0], found[len(found) // 2]
    assert len(base) == 2 and torch.equal(steered[1 - at], base[1 - at])
    assert change(steered[at], base[at]) > EFFECT


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_vectors_add_up(family: str, tmp_path: Path) -> None:
    one, two = made(family, ALCOHOL, seed=1), made(family, CAT, seed=2)
    pipe, base = tiny.pipeline(family), drawn(family)
    with efface.stack(pipe, one, two):
        stacked = latents(pipe)
    for other in (one + two, two + one, one - -two, (2 * one + 2 * two) * 0.5):
        with other.apply(pipe):
            assert change(latents(pipe), stacked) < ROUNDING
    assert change(stacked, base) > EFFECT and change(stacked, drawn(family, one)) > EFFECT
    with (2 * one).apply(pipe) as handle:
        handle.strength = 0.5
        half = latents(pipe)
        (halved,) = [dataclasses.replace(handle.eraser)]
    assert torch.equal(half, drawn(family, one))
    assert torch.equal(only_vector(halved + two)[0], only_vector(one)[0])  # a sum counts the strength
    assert torch.equal(only_vector(one + one)[0], 2 * only_vector(one)[0])
    assert torch.equal(latents(pipe), base)


def test_each_row_gets_its_own_vectors() -> None:
    both, pipe = made("sd1", ALCOHOL, CAT), tiny.untouched("sd1")
    prompts = (PROMPT, PROMPT, PROMPT)
    rows = [[ALCOHOL], [], [ALCOHOL, CAT]]
    want = [both.only(ALCOHOL), None, both]
    with both.apply(pipe) as handle:
        handle.rows = rows
        together = latents(pipe, prompts)
        record = handle.record
        twice = latents(pipe, (PROMPT, PROMPT, PROMPT), num_images_per_prompt=2)
    assert record["rows"] == {"0": 3, "2": 3} and record["calls"] == 3
    for k, directions in enumerate(want):
        alone = drawn("sd1", *filter(None, [directions]), seed=k)
        assert change(together[k : k + 1], alone) < ROUNDING, k
    assert (
        change(together[:1], drawn()) > EFFECT and change(together[2:], drawn("sd1", both.only(CAT), seed=2)) > EFFECT
    )
    for picture in (2, 3):  # both pictures of the second prompt
        assert change(twice[picture : picture + 1], drawn("sd1", seed=picture)) < ROUNDING


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0)])
def test_a_window_counts_as_for_other_methods(window: tuple[float, float]) -> None:
    directions = dataclasses.replace(made(), window=window)
    pipe = tiny.untouched("sd1")
    calls: list[bool] = []
    inside = type(directions).steer

    def steer(self: Directions, *given: Any) -> Tensor:
        calls.append(True)
        return inside(self, *given)

    with directions.apply(pipe) as handle, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Directions, "steer", steer)
        found = latents(pipe, num_inference_steps=4)
    exempt = handle.record["exempt"]["outside the window"]
    assert len(calls) == handle.record["rows"]["0"] == 4 - exempt and 0 < exempt < 4
    assert change(found, drawn("sd1", num_inference_steps=4)) > EFFECT
    assert change(found, drawn("sd1", made(), num_inference_steps=4)) > EFFECT


def test_several_modules_at_once_and_their_gradient() -> None:
    pipe, rng = tiny.untouched("sd1"), torch.Generator().manual_seed(0)
    names = ("mid_block", "up_blocks.0", "down_blocks.0.resnets.0")
    vectors = {f"unet.{n}": 0.05 * torch.randn(1, *shape("sd1", n), generator=rng) for n in names}
    several = Directions.fitted(QUICK, pipe, vectors, [ALCOHOL])
    alone = [dataclasses.replace(several, vectors={name: v}) for name, v in vectors.items()]
    with several.apply(pipe):
        want = latents(pipe)
    with efface.stack(pipe, *alone):
        assert change(latents(pipe), want) < ROUNDING
    assert min(change(want, drawn("sd1", one)) for one in alone) > EFFECT
    x = tiny.batch()["sample"].double().requires_grad_()
    doubled = tiny.pipeline("sd1")
    doubled.unet.double()
    with Directions.fitted(QUICK, doubled, several.vectors, several.concepts).apply(doubled):
        call = {**tiny.batch(), "encoder_hidden_states": tiny.batch()["encoder_hidden_states"].double()}

        def loss(sample: Tensor) -> Tensor:
            with efface.conditional_rows(doubled, [True, True]):
                return doubled.unet(**{**call, "sample": sample}).sample.square().sum()

        (gradient,) = torch.autograd.grad(loss(x), x)
        direction = torch.randn(x.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            slope = (loss(x + 1e-5 * direction) - loss(x - 1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


# ---------------------------------------------------------------- fair, safe and enhancing


def test_shares_are_drawn_per_picture_from_its_seed() -> None:
    both, pipe, n = made("sd1", ALCOHOL, CAT).fair(), tiny.untouched("sd1"), 5
    with both.apply(pipe):
        batch = latents(pipe, (PROMPT,) * n)
        again = torch.cat([latents(pipe, PROMPT, seed=k) for k in range(n)])
        backwards = [torch.Generator().manual_seed(n - 1 - k) for k in range(n)]
        reversed_ = latents(pipe, (PROMPT,) * n, generator=backwards)
    assert change(again, batch) < ROUNDING and change(reversed_.flip(0), batch) < ROUNDING
    which = []
    for k in range(n):
        far = [change(batch[k : k + 1], drawn("sd1", both.only(c), seed=k)) for c in (ALCOHOL, CAT)]
        assert min(far) < ROUNDING and max(far) > EFFECT
        which.append(far.index(min(far)))
    assert {0, 1} == set(which)
    certain = made("sd1", ALCOHOL, CAT).fair({"cat": 1.0, "alcohol": 0})
    assert change(drawn("sd1", certain), drawn("sd1", made("sd1", ALCOHOL, CAT).only(CAT))) < ROUNDING


def test_draws_follow_the_shares_and_are_apart_for_other_concepts() -> None:
    noise = torch.randn(4000, 4, 8, 8, generator=torch.Generator().manual_seed(1_000_000))
    shares = (0.2, 0.5, 0.3)
    first = torch.tensor(table.drawn(noise, shares, ("a", "b", "c")))
    for k, share in enumerate(shares):
        assert abs(float((first == k).float().mean()) - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    other = torch.tensor(table.drawn(noise, shares, ("d", "e", "f")))
    both = torch.stack([((first == k) & (other == j)).float().mean() for k in range(3) for j in range(3)])
    want = torch.tensor([a * b for a in shares for b in shares])
    assert float((both - want).abs().max()) < 0.03  # independent
    scaled = table.drawn((14.6 * noise).half(), shares, ("a", "b", "c"))
    assert scaled == first.tolist()  # as schedulers and dtypes leave it


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_fair_directions_work_on_other_kinds_of_models(family: str) -> None:
    both, pipe, prompts = made(family, ALCOHOL, CAT), tiny.untouched(family), (PROMPT,) * 5
    found = []
    for directions in (both.fair(), both.only(ALCOHOL), both.only(CAT)):
        with directions.apply(pipe):
            found.append(latents(pipe, prompts))
    near = [[change(x, y) < ROUNDING for y in pair] for x, *pair in zip(*found, strict=True)]
    assert all(sum(two) == 1 for two in near) and {two.index(True) for two in near} == {0, 1}


def test_an_extractor_chooses_by_the_prompt() -> None:
    asked: list[str] = []

    def extractor(prompt: str) -> Sequence[str]:
        asked.append(prompt)
        return [name for name in ("cat", "alcohol") if name in prompt]

    both, pipe = made("sd1", ALCOHOL, CAT), tiny.untouched("sd1")
    enhancing = both.enhancing(extractor)
    with enhancing.apply(pipe) as handle:
        found = latents(pipe, PROMPTS, num_images_per_prompt=2)
        with pytest.raises(ValueError, match="embeddings"):
            latents(pipe, None, prompt_embeds=torch.zeros(1, 16, 32), negative_prompt_embeds=torch.zeros(1, 16, 32))
        with pytest.raises(ValueError, match="direct denoiser call"):
            bare(pipe)
    assert asked == [*PROMPTS] and handle.config()["extractor"].endswith("extractor")
    assert change(found[:2], latents(pipe, PROMPTS, num_images_per_prompt=2)[:2]) < ROUNDING
    want = drawn("sd1", both.only(CAT), prompt=PROMPTS[1], seed=2)
    assert change(found[2:3], want) < ROUNDING and change(want, drawn(prompt=PROMPTS[1], seed=2)) > EFFECT
    with both.enhancing(lambda _: "dog").apply(pipe), pytest.raises(ValueError, match="not a shipped|no vector"):
        latents(pipe)
    with pytest.raises(ValueError, match="does not hold `extractor`"):
        enhancing.save("unused.safetensors")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shares": (0.5, 0.6)}, r"sum to 1, got a sum of 1\.1"),
        ({"shares": (1.5, -0.5)}, r"`shares\[1\]`"),
        ({"shares": (1.0,)}, "one share for each of alcohol, cat"),
        ({"shares": {"alcohol": 1.0}}, "one share for each of alcohol, cat"),
        ({"shares": (0.5, 0.5), "rows": [["cat"]]}, "one of `rows`, `shares` and `extractor`"),
        ({"rows": [[DOG]]}, "'dog' has no vector. Known: alcohol, cat"),
        ({"window": (0.5, 0.2)}, "window"),
        ({"strength": -1}, "strength"),
        ({"vectors": {}}, "at least one module"),
        ({"vectors": {"unet.mid_block": torch.zeros(3, 4)}}, "one vector per concept"),
        ({"vectors": {"unet.mid_block": torch.full((2, 4), torch.nan)}}, "not finite"),
        ({"concepts": (CAT, CAT)}, "one twice"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made("sd1", ALCOHOL, CAT), **fields)


def test_a_vector_of_another_model_module_or_size_is_refused() -> None:
    pipe, directions, both = tiny.untouched("sd1"), made(), made("sd1", ALCOHOL, CAT)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="weights differ|weight"):
        directions.apply(tiny.untouched("sd2"))
    with pytest.raises(ValueError, match=r"none in its transformer"):
        directions.apply(tiny.untouched("pixart"))
    with pytest.raises(ValueError, match="do not identify their base model"):
        dataclasses.replace(directions, base={}).apply(pipe)
    renamed = {"unet.middle": only_vector(directions)}
    with pytest.raises(ValueError, match="do not identify|Expected a module"):
        dataclasses.replace(directions, vectors=renamed).apply(pipe)
    with pytest.raises(ValueError, match="'cat' is zero"):
        (both - both.only(CAT)).apply(pipe)
    with directions.apply(pipe):
        with pytest.raises(ValueError, match=r"shape \[32, 4, 4\], but its output in this call has \[32, 8, 8\]"):
            latents(pipe, height=32, width=32)
        again = latents(pipe)
    assert torch.equal(again, drawn("sd1", directions)) and change(again, drawn()) > EFFECT
    assert_same(snapshot(pipe), before)
    pooled = {"unet.mid_block": only_vector(directions).mean((2, 3), keepdim=True)}
    with dataclasses.replace(directions, vectors=pooled).apply(pipe):
        assert latents(pipe, height=32, width=32).shape[-1] == 16


def test_a_model_that_changed_where_the_vector_acts_is_refused() -> None:
    pipe = tiny.pipeline("sd1")
    with torch.no_grad():
        next(pipe.unet.mid_block.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="1 of .* weights differ"):
        made().apply(pipe)


def test_a_sum_needs_equal_models_windows_and_no_modes() -> None:
    one = made("sd1", ALCOHOL)
    for other in (made("sdxl", CAT), made("sd1", CAT, module="up_blocks.0"), dataclasses.replace(one, window=(0, 0.5))):
        with pytest.raises(ValueError, match="differ in base model"):
            one + other
    with pytest.raises(ValueError, match="Set them on the sum"):
        made("sd1", ALCOHOL, CAT).fair() + one
    with pytest.raises(TypeError):
        one + UCE().fit(tiny.untouched("sd1"), [CAT])  # type: ignore[operator]


# ---------------------------------------------------------------- what other code does to the pipeline


def test_a_module_that_does_not_run_is_an_error() -> None:
    pipe, directions = tiny.pipeline("sd1"), made()
    handle, middle, forward = directions.apply(pipe), pipe.unet.mid_block, type(pipe.unet).forward
    pipe.unet.mid_block = None  # diffusers' UNet runs without it
    with pytest.raises(ValueError, match="'unet.mid_block'"):
        latents(pipe)
    pipe.unet.mid_block = middle

    def without(self: Any, *args: Any, **kwargs: Any) -> Any:  # as a cache that skips the middle
        self.mid_block = None
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.mid_block = middle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SITES[pipe.unet].hook, "below", without.__get__(pipe.unet))
        with pytest.raises(RuntimeError, match="'mid_block', whose output an eraser changes"):
            latents(pipe)
    assert torch.equal(latents(pipe), drawn("sd1", directions))
    handle.remove()
    assert torch.equal(latents(pipe), drawn())


def test_a_replaced_module_is_steered_in_its_turn() -> None:
    pipe, directions = tiny.pipeline("sd1"), made()
    with directions.apply(pipe):
        first, pipe.unet.mid_block = pipe.unet.mid_block, copy.deepcopy(pipe.unet.mid_block)
        assert torch.equal(latents(pipe), drawn("sd1", directions))
        pipe.unet.mid_block = first
        assert torch.equal(latents(pipe), drawn("sd1", directions))
    assert torch.equal(latents(pipe), drawn()) and "forward" not in vars(first)


def test_a_swapped_denoiser_is_an_error_and_a_copy_has_the_vectors() -> None:
    pipe, directions = tiny.pipeline("sd1"), made()
    handle = directions.apply(pipe)
    twin = copy.deepcopy(pipe)
    own, pipe.unet = pipe.unet, copy.deepcopy(tiny.untouched("sd1").unet)
    with pytest.raises(RuntimeError, match="was replaced after `apply`"):
        latents(pipe)
    pipe.unet = own
    handle.remove()
    assert torch.equal(latents(pipe), drawn())
    assert torch.equal(latents(twin), drawn("sd1", directions))
    efface.active(twin).remove()
    assert torch.equal(latents(twin), drawn())


@pytest.mark.parametrize("first", [True, False], ids=["offload, apply", "apply, offload"])
def test_offloading_keeps_the_vectors(first: bool) -> None:
    pipe, directions = tiny.pipeline("sd1"), made()
    if first:
        pipe.enable_model_cpu_offload(device="cpu")
    with directions.apply(pipe):
        if not first:
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(latents(pipe), drawn("sd1", directions))
    assert torch.equal(latents(pipe), drawn())


@pytest.mark.slow  # the compiler takes long to start
@pytest.mark.parametrize("whole", [True, False], ids=["denoiser", "its middle"])
def test_a_compiled_model_is_steered_and_draws_no_shares(whole: bool) -> None:
    pipe, directions = tiny.pipeline("sd1"), made("sd1", ALCOHOL, CAT)
    if whole:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.mid_block.compile(backend="eager")
    with directions.apply(pipe) as handle:
        assert torch.equal(latents(pipe), drawn("sd1", directions))
        handle.rows = [[CAT]]
        assert change(latents(pipe), drawn("sd1", directions.only(CAT))) < ROUNDING
    assert torch.equal(latents(pipe), drawn())
    if whole:
        with pytest.raises(ValueError, match="which a compiled denoiser does not allow to read"):
            directions.fair().apply(pipe)


def test_direct_calls_name_their_rows() -> None:
    pipe, directions = tiny.untouched("sd1"), made("sd1", ALCOHOL, CAT)
    base = bare(pipe)
    with directions.apply(pipe) as handle:
        both = bare(pipe)
        with pytest.raises(RuntimeError, match="conditional_rows"):
            pipe.unet(**tiny.batch())
        handle.rows = [[CAT], []]
        one = bare(pipe)
    assert change(both, base) > EFFECT and change(one[:1], base[:1]) > EFFECT
    assert change(one[1:], base[1:]) < ROUNDING


def test_a_cache_is_refused() -> None:
    pipe = tiny.pipeline("flux")
    from diffusers import FirstBlockCacheConfig

    with made("flux").apply(pipe):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(RuntimeError, match="has a cache"):
            latents(pipe)
        pipe.transformer.disable_cache()


def test_half_precision_and_large_vectors() -> None:
    pipe = tiny.pipeline("sd1")
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    with made().apply(pipe):  # fitted in float32
        assert latents(pipe).isfinite().all()
    with (1000 * made()).apply(tiny.untouched("sd1")), pytest.warns(UserWarning, match="times as large as the output"):
        latents(tiny.untouched("sd1"))


def test_it_stacks_with_weights_and_comes_off_in_any_order(sd1: Any) -> None:
    delta, directions, eraser = UCE().fit(sd1, [CAT]), made(), efface.EIUP([CAT])
    before = snapshot(sd1)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        handles = efface.stack(sd1, directions, delta, eraser)
        every = latents(sd1)
        assert change(every, drawn("sd1", delta)) > EFFECT and change(every, drawn("sd1", directions)) > EFFECT
        for k in order:
            handles[k].remove()
        assert_same(snapshot(sd1), before)
    assert torch.equal(latents(sd1), drawn())


# ---------------------------------------------------------------- files


def test_a_file_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    fair = dataclasses.replace(made("sd1", ALCOHOL, CAT), window=(0.2, 1.0), strength=0.5).fair([0.25, 0.75])
    fair.save(path)
    for read in (Directions.load(path), api.load_delta(path)):
        assert isinstance(read, Directions)
        assert read.config() == fair.config() and torch.equal(only_vector(read), only_vector(fair))
        assert torch.equal(drawn("sd1", read), drawn("sd1", fair))
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["efface"])
    assert header["kind"] == "directions" and header["shares"] == [0.25, 0.75]
    with pytest.raises(ValueError, match=r"holds directions, not weights. Load it with `efface.Directions.load`"):
        Delta.load(path)
    UCE().fit(tiny.untouched("sd1"), [CAT]).save(tmp_path / "uce.safetensors")
    with pytest.raises(ValueError, match="holds weights, not directions"):
        Directions.load(tmp_path / "uce.safetensors")


def test_the_command_line_describes_them_and_refuses_what_needs_weights(tmp_path: Path) -> None:
    path, run = tmp_path / "directions.safetensors", functools.partial(CliRunner().invoke, app)
    made("sd1", ALCOHOL, CAT).save(path)
    told = " ".join(run(["delta", "info", str(path)]).output.split())
    assert "concepts alcohol, cat" in told and "vectors [2, 32, 4, 4] at unet.mid_block" in told
    assert json.loads(run(["delta", "info", str(path), "--json"]).output)["kind"] == "directions"
    for command in (["delta", "export", str(path)], ["delta", "merge", str(path)]):
        done = run([*command, "--out", str(tmp_path / "out")])
        assert done.exit_code != 0 and "holds directions, and only a file of weights can be" in " ".join(
            done.output.split()
        )
    assert not (tmp_path / "out").exists()


def test_directions_of_a_model_with_a_delta_need_that_delta(sd1: Any) -> None:
    delta = UCE().fit(sd1, [CAT])
    with delta.apply(sd1):
        directions = QUICK.fit(sd1, [ALCOHOL])
        with directions.apply(sd1):
            both = latents(sd1)
    assert directions.after == {delta.hash: 1.0} and change(both, drawn("sd1", delta)) > 0
    with pytest.raises(ValueError, match="Apply that one first"):
        directions.apply(sd1)


# ---------------------------------------------------------------- the fit


@pytest.mark.long
def test_only_vectors_learn(sd1: Any) -> None:
    before = everything(sd1)
    directions = QUICK.fit(sd1, [ALCOHOL, CAT])
    assert_as_found(sd1, before)
    vectors = only_vector(directions)
    assert vectors.shape == (2, 32, 4, 4) and float(vectors.flatten(1).norm(dim=1).min()) > 0
    assert (
        directions.hash == learned().hash
        and directions.hash != dataclasses.replace(QUICK).fit(sd1, [ALCOHOL, CAT], seed=1).hash
    )
    pooled = dataclasses.replace(QUICK, spatial=False).fit(sd1, [CAT])
    assert only_vector(pooled).shape == (1, 32, 1, 1)
    several = dataclasses.replace(QUICK, at=("mid_block", "up_blocks.0")).fit(sd1, [CAT])
    assert [*several.vectors] == ["unet.mid_block", "unet.up_blocks.0"]
    assert all(float(v.norm()) > 0 for v in several.vectors.values())


BLOCKS = {
    "sd3": "transformer_blocks.1",
    "flux": "single_transformer_blocks.0",
    "pixart": "transformer_blocks.1",
    "sana": "transformer_blocks.1",
}


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd1", "sdxl", *BLOCKS])
def test_its_gradient_is_that_of_the_formula(family: str) -> None:
    """Against finite differences, with the vector of each row; nothing before the module records a graph."""
    pipe, module = tiny.untouched(family), BLOCKS.get(family, "mid_block")
    net = _directions.Steered(pipe, ["a cat", "a dog"], [module], 2, spatial=True, precision="auto")
    rng = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, 3, *net.shape, generator=rng)
    rows = net.numbers(torch.tensor([0, 1, 1]), torch.tensor([1, 2, 0]))
    points = net.noised(x, torch.tensor([10, 500, 900]), noise, rows)
    vectors = net.student()
    (v,) = vectors.values()
    graphs: list[bool] = []
    named = [given for given in ("hidden_states",) if family in ("sd3", "flux")]
    hook = net.module.get_submodule(module).register_forward_pre_hook(
        lambda _, args, kwargs: graphs.append((kwargs[named[0]] if named else args[0]).requires_grad), with_kwargs=True
    )
    value = _directions.loss(net, vectors, points)
    hook.remove()
    (gradient,) = torch.autograd.grad(value, v)
    assert graphs == [False] and all(p.grad is None for p in net.module.parameters())
    direction = torch.randn(v.shape, generator=rng)
    with torch.no_grad():
        ends = [_directions.loss(net, {n: s * direction for n in vectors}, points) for s in (1e-2, -1e-2)]
    assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float((gradient * direction).sum()), rel=2e-2)
    for row, own in ((0, 0), (1, 1)):  # the row's own vector counts, and no other
        point = points[row : row + 1]
        zero, whole = (_directions.loss(net, {n: s * direction for n in vectors}, point) for s in (0.0, 1.0))
        other = direction.clone()
        other[1 - own] *= 7
        assert zero != whole == _directions.loss(net, dict.fromkeys(vectors, other), point)


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_of_transformers_are_learned(family: str) -> None:
    """One vector per token of the picture, or one for all; they act as learned when the pipeline draws."""
    pipe, module = tiny.pipeline(family), BLOCKS[family]
    pipe.default_sample_size = 8
    before, editor = everything(pipe), dataclasses.replace(QUICK, at=(module,))
    with tiny.of_its_size(pipe):
        directions = editor.fit(pipe, [ALCOHOL, CAT])
        pooled = dataclasses.replace(editor, spatial=False, anti=True, neutral="a night").fit(pipe, [CAT])
    assert_as_found(pipe, before)
    assert [*directions.vectors] == [f"transformer.{module}"]
    assert only_vector(directions).shape == (2, *shape(family, module))
    assert float(only_vector(directions).flatten(1).norm(dim=1).min()) > 0
    without = latents(pipe)
    with directions.apply(pipe):
        assert change(latents(pipe), without) > 0
    assert only_vector(pooled).shape == (1, 1, shape(family, module)[1])
    with pooled.apply(pipe):
        assert change(latents(pipe), without) > 0


@pytest.mark.parametrize("family", [name for name in BLOCKS if name != "pixart"])
def test_flow_matching_learns_the_velocity_of_the_scheduler(family: str) -> None:
    """A step of the pipeline's scheduler with the target, from any time to 0, ends at the picture."""
    pipe = tiny.untouched(family)
    net = _directions.Steered(pipe, ["a cat"], [BLOCKS[family]], 1, spatial=True, precision="auto")
    x, noise = torch.randn(2, 1, *net.shape, generator=torch.Generator().manual_seed(0))
    times = net.scheduler.timesteps
    points = net.noised(x, times[-1:], noise, torch.zeros(1).long())
    end = net.scheduler.step(points.target, times[-1], points.x, return_dict=False)[0]
    assert torch.allclose(end, x, atol=1e-5) and not torch.allclose(points.x, x, atol=1e-3)


@pytest.mark.parametrize("family", BLOCKS)
def test_pictures_of_a_transformer_are_those_of_its_pipeline(family: str) -> None:
    pipe = tiny.pipeline(family)
    pipe.default_sample_size = 8
    net = _directions.Steered(pipe, ["a cat"], [BLOCKS[family]], 1, spatial=True, precision="auto")
    tasks, call = (
        [_directions.Task.of(ALCOHOL, ["a night"], False)],
        {**facts(pipe).guided(4.0), "num_inference_steps": 2},
    )
    noise = torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(5))
    given = {**call, "negative_prompt": ["", ""], "latents": _directions.as_called(facts(pipe), noise)}
    with tiny.of_its_size(pipe):
        found = _directions.latents(pipe, tasks, 2, shape=net.shape, batch=2, seed=5, call=call, cache=None, tell=print)
        want = pipe(["beer", "wine glass"], output_type="latent", **given).images
    assert torch.equal(_directions.as_called(facts(pipe), found[0]), want) and found[0].shape[1:] == net.shape


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_targets_are_those_of_diffusers(kind: str) -> None:
    pipe = tiny.pipeline("sd1")
    pipe.scheduler.register_to_config(prediction_type=kind)
    net = _directions.Steered(pipe, ["a cat"], ["mid_block"], 1, spatial=True, precision="auto")
    x, noise = torch.randn(2, 2, *net.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 800])
    points = net.noised(x, t, noise, torch.zeros(2).long())
    assert torch.allclose(points.x, pipe.scheduler.add_noise(x, noise, t), atol=1e-6)
    want = {"epsilon": noise, "v_prediction": pipe.scheduler.get_velocity(x, noise, t), "sample": x}[kind]
    assert points.own is not None and torch.allclose(points.own, want, atol=1e-6)


def test_pictures_are_those_of_the_pipeline(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the negative prompt of `anti`, and each row's text."""
    calls: list[Any] = []
    inside = type(sd1).__call__

    def call(self: Any, prompt: Any, **given: Any) -> Any:
        calls.append((prompt, given.get("negative_prompt"), given["guidance_scale"], given["num_inference_steps"]))
        return inside(self, prompt, **given)

    monkeypatch.setattr(type(sd1), "__call__", call)
    QUICK.fit(sd1, [ALCOHOL])
    assert calls == [(["beer", "wine glass"], None, 7.5, 2)] * 2
    calls.clear()
    dataclasses.replace(QUICK, anti=True, neutral=("a night", "a moon")).fit(sd1, [ALCOHOL])
    assert calls == [(["a night", "a moon"], ["beer", "wine glass"], 7.5, 2)] * 2
    monkeypatch.undo()
    tasks = [_directions.Task.of(ALCOHOL, [""], False)]
    made_ = _directions.latents(
        sd1, tasks, 3, shape=(4, 8, 8), batch=2, seed=5, call={"num_inference_steps": 2}, cache=None, tell=print
    )
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    want = sd1(["beer", "wine glass"], latents=noise, num_inference_steps=2, output_type="latent").images
    assert torch.equal(made_[0, :2], want)


def test_an_interrupted_fit_goes_on(sd1: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    folder, drawn_, counted, want = tmp_path / "fit", [0], _directions.unobserved, learned().hash

    def counting(pipe: Any) -> Any:
        shadow = counted(pipe)

        def call(*args: Any, **kwargs: Any) -> Any:
            drawn_[0] += 1
            if drawn_[0] == 3:
                raise Stopped
            return shadow(*args, **kwargs)

        return call

    monkeypatch.setattr(_directions, "unobserved", counting)
    with pytest.raises(Stopped):
        QUICK.fit(sd1, [ALCOHOL, CAT], checkpoint=folder)
    update = _training._update

    def stopping(state: Any, *given: Any) -> None:
        if state.step == 4:
            raise Stopped
        update(state, *given)

    monkeypatch.setattr(_training, "_update", stopping)
    monkeypatch.setattr(_training, "EVERY", 1)
    with pytest.raises(Stopped):
        QUICK.fit(sd1, [ALCOHOL, CAT], checkpoint=folder)
    assert drawn_[0] == 5  # the first two batches stayed
    monkeypatch.setattr(_training, "_update", update)
    assert QUICK.fit(sd1, [ALCOHOL, CAT], checkpoint=folder).hash == want and drawn_[0] == 5
    for editor, seed, words in (
        (dataclasses.replace(QUICK, guidance=3.0), 0, "latents of another fit"),
        (QUICK, 1, "latents of another fit"),
        (dataclasses.replace(QUICK, lr=0.01), 0, "checkpoint of another fit"),
    ):
        with pytest.raises(ValueError, match=words):
            editor.fit(sd1, [ALCOHOL, CAT], checkpoint=folder, seed=seed)


@pytest.mark.long
def test_an_attribute_that_the_model_never_draws_is_refused(sd1: Any) -> None:
    class Eye:
        name = "eye"

        def __init__(self, share: float) -> None:
            self.share = share

        def __call__(self, images: Tensor) -> Tensor:
            return (torch.arange(len(images)) < self.share * len(images)).expand(2, -1)

    with pytest.raises(ValueError, match=r"sees 'cat' in 25% of 16 pictures of its phrases, less than 30%"):
        QUICK.fit(sd1, [CAT], detector=Eye(0.25))
    with pytest.raises(ValueError, match="none for 'alcohol'"):
        QUICK.fit(sd1, [CAT, ALCOHOL], detector={"cat": Eye(1.0)})
    with pytest.raises(ValueError, match="Give a mapping"):
        QUICK.fit(sd1, [CAT, ALCOHOL], detector=Eye(1.0))
    assert QUICK.fit(sd1, [CAT, ALCOHOL], detector=dict.fromkeys(("cat", "alcohol"), Eye(0.3125))).concepts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "a whole number `steps` >= 1"),
        ({"pictures": 1}, "`pictures`"),
        ({"lr": 0}, "lr"),
        ({"guidance": 1, "anti": True}, "`anti` uses negative prompts"),
        ({"shares": [0.5, 0.6]}, "sum to 1"),
        ({"window": (0.5, 0.1)}, "window"),
        ({"neutral": [1]}, "neutral"),
        ({"precision": "float16"}, "precision"),
        ({"spatial": "yes"}, "spatial"),
    ],
)
def test_fields_of_the_editor_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        LatentDirections(**fields)


def test_what_cannot_be_learned_is_refused(sd1: Any) -> None:
    for editor, concepts, words in (
        (QUICK, [Concept("cat", anchor="cat")], "without the concept 'cat'"),
        (dataclasses.replace(QUICK, at=("middle",)), [CAT], r"\"mid_block\""),
        (dataclasses.replace(QUICK, shares=(0.5, 0.5)), [CAT], "one share for each of cat"),
    ):
        with pytest.raises(ValueError, match=words):
            editor.fit(sd1, concepts)
    with pytest.raises(ValueError, match="LatentDirections needs a denoiser that trains"):
        QUICK.fit(tiny.untouched("flux"), [CAT])
    with made().apply(sd1), pytest.raises(ValueError, match="Directions is applied to the pipeline"):
        QUICK.fit(sd1, [CAT])
    without = tiny.pipeline("sd1")
    without.unet.mid_block = None
    with pytest.raises(ValueError, match="mid_block"):
        QUICK.fit(without, [CAT])


def test_fit_writes_its_use(sd1: Any) -> None:
    fair = dataclasses.replace(QUICK, shares="equal", window=(0, 0.5)).fit(sd1, [ALCOHOL, CAT])
    assert fair.shares == (0.5, 0.5) and fair.window == (0, 0.5)
    assert fair.info["steps"] == 6 and fair.info["held out"].keys() == {"alcohol", "cat"}


# ---------------------------------------------------------------- on a trained model


def of_equal_norm(directions: Directions, other: Directions | None = None) -> Directions:
    """Vectors with the norms of `directions`: random ones, or those of `other` scaled."""
    rng, found = torch.Generator().manual_seed(0), {}
    for name, vectors in directions.vectors.items():
        new = torch.randn(vectors.shape, generator=rng) if other is None else other.vectors[name].clone()
        norms = [v.flatten(1).norm(dim=1) for v in (vectors, new)]
        found[name] = new * (norms[0] / norms[1])[:, None, None, None]
    return dataclasses.replace(directions, vectors=found)


@pytest.mark.slow
def test_fair_directions_balance_doctors_on_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    """Both vectors act, random vectors of their norms do not, nor do vectors of pictures without either attribute."""
    pipe, eyes, n = efface.load("emoji"), load_eyes(), 32
    pipe.set_progress_bar_config(disable=True)
    doctors = [Concept(f"{sex} doctor", (f"a {sex} doctor",), anchor="a doctor") for sex in ("male", "female")]
    learned_ = LatentDirections().fit(pipe, doctors)
    neutral = [
        dataclasses.replace(c, phrases=(text,)) for c, text in zip(doctors, ("the doctor", "one doctor"), strict=True)
    ]
    of_neutral = LatentDirections().fit(pipe, neutral)
    seeds = range(1_000_000, 1_000_000 + n)

    def counts(directions: Directions | None, prompt: str = "a doctor") -> tuple[list[list[int]], float, float]:
        """Men, women and others by each judge, the deviation ratio by the worse judge, and the share of cats."""
        with contextlib.nullcontext() if directions is None else directions.apply(pipe):
            pictures = pipelines.draw(pipe, [prompt] * n, seeds, num_inference_steps=20)
        seen = eyes.see(pictures)
        told = [[int((row == k).sum()) for k in (0, 1, -1)] for row in eyes.gender(seen)]
        ratio = max(float(deviation(np.array(row[:2]))) if sum(row[:2]) else 1.0 for row in told)
        return told, ratio, float(eyes.concept(seen, "cat").all(0).float().mean())

    found = {
        "base": counts(None),
        "fair": counts(learned_.fair()),
        "female": counts(learned_.only(doctors[1])),
        "random": counts(of_equal_norm(learned_).fair()),
        "neutral": counts(of_neutral.fair()),
        "cat": counts(learned_.fair(), "a cat"),
    }
    with capsys.disabled():
        print(found, learned_.info, of_neutral.info)
    ratios = {name: ratio for name, (_, ratio, _) in found.items()}
    assert ratios["base"] > 0.8 and ratios["fair"] < 0.5 < min(ratios["random"], ratios["neutral"])
    assert min(row[1] for row in found["female"][0]) > n / 2 and found["cat"][2] > 0.8
    assert sum(found["fair"][0][0][:2]) > 0.8 * n
