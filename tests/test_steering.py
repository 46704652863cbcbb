"""CASteer, MidSteer, GLoCE, MACE and Receler against their formulas, and the artefact of edited outputs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import assert_same
from tiny import ALCOHOL, CAT, PROMPT, PROMPTS, bare, change, denoiser_of, drawn, latents
from torch import Tensor

import efface
from efface import MACE, CASteer, Concept, Delta, GLoCE, MidSteer, Receler, Steering
from efface._weights import keys_values, layer_names
from efface.delta import Factors, dense, gates
from efface.editors._adapters import Adapted, attacked
from efface.editors._fusion import Attending, divided, fused
from efface.editors._outputs import Moments, surrogate
from efface.editors.midsteer import direction
from efface.testing import conformance
from efface.testing.conformance import EFFECT, ROUNDING, DoesNotApply, Trial
from efface.testing.drawing import ready, snapshot

DOG = Concept("dog", anchor="moon")
seeds = st.integers(0, 2**31)
HELD_OUT = 1_000_000
CASTEER = CASteer(subjects=("dog", "moon"), template="{subject} {concept}", sampler_steps=2)
MIDSTEER = MidSteer(neutral=("dog", "moon"), pictures=1, sampler_steps=2)
GLOCE = GLoCE(preserve=("dog",), pictures=2, sampler_steps=3, observed=(0, 1), window=(0, 1))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def made(family: str = "sd1", *concepts: Concept, form: str = "direction") -> Steering:
    """A steering of random tensors for a tiny pipeline, strong enough to be seen."""
    pipe, concepts = tiny.untouched(family), concepts or (ALCOHOL,)
    vectors, k = {}, len(concepts)
    for n, name in enumerate(layer_names(pipe)):
        width = denoiser_of(pipe).get_submodule(name).out_dim
        unit = torch.nn.functional.normalize(random(n, k, 2, width), dim=-1)
        parts = {"read": unit, "taken": unit, "middle": torch.zeros(k, 2, width)}
        if form == "surrogate":
            axis = unit[:, 0]
            parts = {"toward": axis[:, :, None], "read": axis[:, None], "target": 0 * axis, "surrogate": 3 * axis}
            parts |= {"gate": axis[:, None], "general": 0 * axis, "centre": torch.full((k,), 0.1)}
            parts |= {"slope": torch.full((k,), 30.0)}
        if form == "adapter":
            down = random(n, k, 4, width) / width**0.5
            parts = {
                "down": down,
                "down_bias": torch.zeros(k, 4),
                "up": down.transpose(1, 2),
                "up_bias": 0 * down[:, 0],
            }
        vectors |= {f"{efface.families.family(pipe).denoiser}.{name}:{part}": each for part, each in parts.items()}
    use: dict[str, Any] = {"times": (900.0, 100.0)} if form == "direction" else {}
    return Steering.fitted(CASTEER, pipe, vectors, concepts, form=form, **use)


# ---------------------------------------------------------------- as an eraser

# These build the method anew, for concepts without tensors or from a record, which does not hold the tensors. The last
# one takes seconds, and is tried on the vectors of test_directions.
NOT_HERE = ("a_row_is_the_row_alone", "comes_off_in_any_order", "pipelines_are_apart", "config_survives_json")
NOT_HERE += ("goes_with_shipped_methods",)
PROMISES = [
    pytest.param(family, form, promise, id=f"{family}-{form}-{promise.__name__}")
    for family, form in (("sd1", "direction"), ("sd1", "surrogate"), ("pixart", "direction"))
    for promise in (*conformance.ON_EACH_FAMILY, *(conformance.ONCE if form == "direction" else ()))
    if promise.__name__ not in NOT_HERE and (family == "sd1" or promise in conformance.ON_EACH_FAMILY)
]


@pytest.mark.thinned("long")
@pytest.mark.parametrize(("family", "form", "promise"), PROMISES)
def test_steering_keeps_the_promises_of_run_time_erasers(family: str, form: str, promise: Any) -> None:
    pipe, _ = ready(family)
    try:
        promise(Trial(made(family, ALCOHOL, CAT, form=form), family, pipe))
    except DoesNotApply as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("form", gates.PARTS)
def test_rows_choose_concepts_and_rows_without_any_stay_to_the_bit(form: str) -> None:
    pipe, both = tiny.pipeline("sd1"), made("sd1", ALCOHOL, CAT, form=form)
    base = latents(pipe, PROMPTS)
    with dataclasses.replace(both, rows=[[], [CAT]]).apply(pipe):
        mixed = latents(pipe, PROMPTS)
    assert torch.equal(mixed[0], base[0])
    with dataclasses.replace(both, rows=[[CAT], [CAT]]).apply(pipe):
        whole = latents(pipe, PROMPTS)
    assert change(mixed[1:], whole[1:]) < ROUNDING and change(mixed[1:], base[1:]) > EFFECT


def test_directions_are_those_of_the_nearest_time() -> None:
    parts = {"read": random(1, 1, 3, 4)}
    times = torch.tensor([900.0, 500.0, 100.0])
    for timestep, at in ((999, 0), (701, 0), (699, 1), (torch.tensor(250), 2), (0, 2)):
        assert torch.equal(gates.nearest(parts, times, timestep)["read"], parts["read"][:, at])
    steering = made()
    zeroed = {n: v * torch.tensor([1.0, 0.0])[None, :, None] for n, v in steering.vectors.items()}
    first_only = dataclasses.replace(steering, vectors=zeroed)
    with first_only.apply(pipe := tiny.pipeline("sd1")):
        late, early = (bare(pipe, timestep=torch.tensor(t)) for t in (200, 800))
    assert torch.equal(late, bare(pipe, timestep=torch.tensor(200)))
    assert change(early, bare(pipe, timestep=torch.tensor(800))) > EFFECT


@pytest.mark.parametrize("form", gates.PARTS)
def test_gradients_are_those_of_what_it_computes(form: str) -> None:
    """White-box attacks go through the edit."""
    pipe = tiny.pipeline("sd1").to(torch.float64)
    sample = random(1, 2, 4, 8, 8)
    towards = random(2, *sample.shape)
    text = {"encoder_hidden_states": tiny.batch("sd1")["encoder_hidden_states"].double()}

    def loss(x: Tensor) -> Tensor:
        with torch.enable_grad(), efface.conditional_rows(pipe, [True] * 2):
            return pipe.unet(x, torch.tensor(500), **text).sample.square().sum()

    base = float(loss(sample).detach())
    with made("sd1", form=form).apply(pipe):
        given, h = sample.clone().requires_grad_(), 1e-6
        (slope,) = torch.autograd.grad(loss(given), given)
        rise = (loss(sample + h * towards) - loss(sample - h * towards)) / (2 * h)
        assert abs(float(loss(sample).detach()) - base) > 1e-3 * base
    assert float((slope * towards).sum()) == pytest.approx(float(rise.detach()), rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": [[DOG]]}, "'dog' has no vector. Known: alcohol, cat"),
        ({"strength": -1}, "strength"),
        ({"vectors": {}}, "at least one module"),
        ({"vectors": {"unet.a:read": torch.zeros(2, 2, 4)}}, r"parts read, taken, middle of 'unet\.a', got read"),
        ({"times": (1.0,)}, "2 concepts and 1 times"),
        ({"form": "adapter"}, "parts down, down_bias"),
        ({"concepts": (CAT, CAT)}, "one twice"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made("sd1", ALCOHOL, CAT), **fields)


def test_statistics_of_another_model_are_refused_by_their_checksum() -> None:
    pipe, steering = tiny.pipeline("sd1"), made()
    before = snapshot(pipe)
    with steering.apply(pipe):
        assert change(latents(pipe), drawn()) > EFFECT
    assert_same(snapshot(pipe), before)
    with pytest.raises(ValueError, match="do not identify their base model"):
        dataclasses.replace(steering, base={}).apply(pipe)
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_out[0].weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"1 of \d+ weights differ, first 'unet\.mid_block.*attn2\.to_out"):
        steering.apply(pipe)
    with pytest.raises(ValueError, match="Expected a module"):
        steering.apply(tiny.untouched("pixart"))
    with pytest.raises(ValueError, match="needs cross-attention layers"):
        steering.check(tiny.untouched("sd3"))
    zero = {name: v * (not name.endswith(":taken")) for name, v in steering.vectors.items()}
    with pytest.raises(ValueError, match="edit for 'alcohol' is zero"):
        dataclasses.replace(steering, vectors=zero).apply(tiny.untouched("sd1"))


def test_a_file_keeps_form_and_gate_and_is_of_its_kind(tmp_path: Path) -> None:
    steering = dataclasses.replace(GLOCE.fit(tiny.untouched("sd1"), CAT), strength=0.5)
    steering.save(tmp_path / "s.safetensors")
    read = Steering.load(tmp_path / "s.safetensors")
    assert (read.form, read.window, read.strength, read.hash) == ("surrogate", (0.0, 1.0), 0.5, steering.hash)
    assert torch.equal(drawn("sd1", read), drawn("sd1", steering))
    with pytest.raises(ValueError, match=r"holds steering, not weights. Load it with `efface.Steering.load`"):
        Delta.load(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="does not hold `rows`"):
        dataclasses.replace(steering, rows=[[CAT]]).save(tmp_path / "t.safetensors")


# ---------------------------------------------------------------- CASteer


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=seeds, strength=st.floats(0.1, 3))
def test_casteer_takes_the_positive_part_and_keeps_lengths(seed: int, strength: float) -> None:
    x, v = random(seed, 2, 7, 6), torch.nn.functional.normalize(random(seed + 1, 6), dim=0)
    parts = {"read": v[None], "taken": v[None], "middle": 0 * v[None]}

    def edited(strength: float) -> Tensor:
        return gates.without_direction(x, parts, torch.ones(2, 1), strength, True, True)

    share, got = x @ v, edited(strength)
    assert torch.allclose(got.norm(dim=-1), x.norm(dim=-1))
    assert change(got[share <= 0], x[share <= 0]) < 1e-12 or not (share <= 0).any()
    assert float((edited(1.0) @ v).max()) < 1e-12
    mirrored = x - 2 * share.clamp_min(0)[..., None] * v  # whose length needs no correction
    assert change(edited(2.0), mirrored) < 1e-12
    assert torch.equal(gates.without_direction(x, parts, torch.zeros(2, 1), strength, True, False), x)


def outputs(pipe: Any, prompts: Sequence[str], seed: int, steps: int) -> dict[str, list[Tensor]]:
    """The conditional rows of every cross-attention output, by plain hooks: module to one tensor per step."""
    found: dict[str, list[Tensor]] = {}
    hooks = [
        denoiser_of(pipe)
        .get_submodule(name)
        .register_forward_hook(lambda _, __, out, name=name: found.setdefault(name, []).append(out[len(out) // 2 :]))
        for name in layer_names(pipe)
    ]
    latents(pipe, tuple(prompts), seed=seed, num_inference_steps=steps, guidance_scale=7.5)
    for hook in hooks:
        hook.remove()
    return found


def test_casteer_measures_the_difference_of_means_per_layer_and_step(sd1: Any) -> None:
    steering = CASTEER.fit(sd1, CAT, seed=3)
    with_, without = (outputs(sd1, texts, 3, 2) for texts in (("dog cat", "moon cat"), ("dog", "moon")))
    assert len(steering.times) == 2 and len(steering.modules) == len(with_)
    for name, got in with_.items():
        for step in range(2):
            towards = got[step].mean((0, 1)) - without[name][step].mean((0, 1))
            assert change(steering.vectors[f"unet.{name}:read"][0, step], towards / towards.norm()) < 1e-4


def test_the_direction_separates_new_pictures_better_than_random_ones(sd1: Any) -> None:
    """On seeds and subjects that the fit did not see; a direction of noise would separate them as badly as others."""
    steering = CASTEER.fit(sd1, CAT)
    with_, without = (outputs(sd1, (text,), HELD_OUT, 2) for text in ("red moon cat", "red moon"))
    better = 0
    for name, got in with_.items():
        apart = (got[0] - without[name][0]).mean((0, 1))
        v = steering.vectors[f"unet.{name}:read"][0, 0]
        others = torch.nn.functional.normalize(random(5, 20, len(v)).float(), dim=1) @ apart
        better += int(float(v @ apart) > float(others.max()))
        share = (got[0] @ v > 0).float().mean()
        assert share > 0, "the positive part never acts"
    assert better >= len(with_) - 1


@pytest.mark.parametrize("editor", [MIDSTEER, GLOCE], ids=["midsteer", "gloce"])
def test_fits_work_where_the_text_is_projected_first(editor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("pixart")
    tiny_size = functools.partialmethod(type(pipe).__call__, use_resolution_binning=False)  # it has no bins for 16
    monkeypatch.setattr(type(pipe), "__call__", tiny_size)
    before = snapshot(pipe)
    steering = editor.fit(pipe, CAT)
    assert_same(snapshot(pipe), before)
    with steering.apply(pipe):
        assert change(latents(pipe, "cat"), drawn("pixart", prompt="cat")) > EFFECT
    with pytest.raises(ValueError, match="needs cross-attention layers"):
        editor.fit(tiny.untouched("flux"), CAT)


def test_casteer_refuses_what_teaches_nothing(sd1: Any) -> None:
    with pytest.raises(ValueError, match=r"`template` with \{subject\} and \{concept\}"):
        CASteer(template="{subject}")
    with pytest.raises(ValueError, match="at least one of `subjects`"):
        CASteer(subjects=())
    with pytest.raises(ValueError, match="are alike"), torch.no_grad():
        for name in layer_names(pipe := tiny.pipeline("sd1")):
            pipe.unet.get_submodule(name).to_out[0].weight.zero_()
        CASTEER.fit(pipe, CAT)


# ---------------------------------------------------------------- MidSteer


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=seeds, width=st.integers(2, 8))
def test_midsteer_moves_means_exactly_and_neutral_tokens_least(seed: int, width: int) -> None:
    c, a, m, other = random(seed, 4, width)
    root = random(seed + 1, width, width) + 2 * torch.eye(width, dtype=torch.float64)
    spread, ridge = root @ root.T, 1e-9

    def map_(x: Tensor, mode: str) -> Tensor:
        p, d = direction(c, a, m, spread, mode, ridge)
        parts = {"read": p[None], "taken": d[None], "middle": m[None]}
        return gates.without_direction(x[None, None], parts, torch.ones(1, 1), 1.0, False, False)[0, 0]

    for mode, aim in (("erase", m), ("switch", a)):
        assert torch.allclose(map_(c, mode), aim, atol=1e-6) and torch.allclose(map_(m, mode), m, atol=1e-9)
    p, _ = direction(c, a, m, spread, "leace", ridge)
    assert float(p @ map_(c, "leace")) == pytest.approx(float(p @ map_(a, "leace")), abs=1e-6)
    p, d = direction(c, a, m, spread, "erase", ridge)
    worse = other - (other @ d) / (d @ d) * d
    assert float(p @ d) == pytest.approx(1)
    assert float((p + 0.1 * worse) @ spread @ (p + 0.1 * worse)) >= float(p @ spread @ p) - 1e-9


def test_midsteer_refuses_equal_means(sd1: Any) -> None:
    same = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="means? .*are equal|outputs of concept and anchor are equal"):
        direction(same, same, same, torch.eye(3, dtype=torch.float64), "erase", 0.1)
    with pytest.raises(ValueError, match="its phrase 'dog' as a neutral text"):
        MidSteer(neutral=("dog",)).fit(sd1, DOG)
    with pytest.raises(ValueError, match="its phrase 'moon' as its anchor"):
        MidSteer("switch").fit(sd1, Concept("x", ("moon",), anchor="moon"))


# ---------------------------------------------------------------- GLoCE


def clusters(seed: int) -> tuple[Moments, Moments, Moments, list[Tensor]]:
    """Tokens of a concept, its anchor and preserved texts, around three centres."""
    centres, found, tokens = 4 * random(seed, 3, 8), [], []
    for k in range(3):
        tokens.append(centres[k] + 0.3 * random(seed + k + 1, 400, 8))
        found.append(Moments())
        found[-1].add(tokens[-1])
    return found[0], found[1], found[2], tokens


@pytest.mark.parametrize("seed", range(5))
def test_glores_gate_opens_for_the_concept_and_the_surrogate_is_the_anchors(seed: int) -> None:
    target, anchor, general, tokens = clusters(seed)
    part = surrogate(target, anchor, general, rank=3, surrogate_rank=2)
    largest = gates.gate_share(tokens[2].view(20, 20, 8), part).amax(1)
    part |= {"centre": largest.mean() + 1.5 * largest.std(), "slope": torch.tensor(math.log(99) / 0.0015)}
    parts = {name: each[None].double() for name, each in part.items()}

    def edited(x: Tensor) -> Tensor:
        return gates.blended(x[None], parts, torch.ones(1, 1), 1.0)[0]

    k = [torch.sigmoid(part["slope"] * (gates.gate_share(t, part) - part["centre"])).mean() for t in tokens]
    assert k[0] > 0.99 and k[2] < 0.1  # a constant gate would pass every test of the formula
    moved = edited(tokens[0])
    assert float((moved.mean(0) - anchor.mean).norm()) < 0.05 * float((target.mean - anchor.mean).norm())
    off = (moved - anchor.mean) - (moved - anchor.mean) @ part["toward"] @ part["toward"].T
    assert float(off.norm(dim=1).median()) < 1e-6  # within the anchor's two components
    reference = anchor.mean + (tokens[0] - target.mean) @ part["read"].T @ part["toward"].T
    assert change(edited(tokens[0])[:5], reference[:5]) < 1e-2  # with k = 1 one affine map
    shut = parts | {"centre": torch.tensor([2.0], dtype=torch.float64)}
    assert torch.equal(gates.blended(tokens[0][None], shut, torch.ones(1, 1), 1.0)[0], tokens[0])


def test_the_concept_with_the_larger_gate_is_taken() -> None:
    target, anchor, general, tokens = clusters(11)
    one = surrogate(target, anchor, general, rank=2, surrogate_rank=1) | {"slope": torch.tensor(1.0)}
    two = one | {"surrogate": 9 + one["surrogate"]}
    low, high = ({**p, "centre": torch.tensor(c)} for p, c in ((one, 0.5), (two, 0.0)))
    both = {name: torch.stack([low[name], high[name]]).double() for name in low}
    alone = {name: high[name][None].double() for name in high}
    x = tokens[0][None]
    assert torch.equal(gates.blended(x, both, torch.ones(1, 2), 1.0), gates.blended(x, alone, torch.ones(1, 1), 1.0))
    masked = gates.blended(x, both, torch.tensor([[1.0, 0.0]]), 1.0)
    assert change(masked, gates.blended(x, both, torch.ones(1, 2), 1.0)) > 0.1


def test_gloce_learns_a_gate_that_is_not_constant_and_refuses_missing_anchors(sd1: Any) -> None:
    steering = GLOCE.fit(sd1, CAT)
    own, preserved = steering.info["gate open, concept and preserved"]["cat"]
    assert own > 5 * preserved and 0 < preserved < 0.2
    with pytest.raises(ValueError, match=r"texts whose pictures close the gate of 'cat', got none"):
        GLoCE().fit(sd1, CAT)
    with pytest.raises(ValueError, match="'cat' is both erased and preserved"):
        GLoCE(preserve=("cat",)).fit(sd1, CAT)
    with pytest.raises(ValueError, match="has itself as anchor"):
        GLOCE.fit(sd1, Concept("cat", anchor="Cat"))


# ---------------------------------------------------------------- MACE

QUICK_MACE = MACE(templates=("a {}", "{} and moon"), steps=15, lr=3e-2, batch=2, pictures=2, sampler_steps=2)


def test_fusion_is_the_minimum_over_all_concepts_and_preserved_texts() -> None:
    """Against least squares over stacked rows, without the normal equations."""
    texts, kept = [random(k, 5, 6) for k in range(2)], random(7, 4, 6)
    learned = [{"w": Factors(random(10 + k, 3, 1).float(), random(20 + k, 1, 6).float())} for k in range(2)]
    lam, b = 0.3, 2.0
    pairs = [(d, e.T @ e) for d, e in zip(learned, texts, strict=True)]
    got = dense(fused(pairs, b * kept.T @ kept, lam)["w"]).double()
    rows = torch.cat([*texts, b**0.5 * kept, lam**0.5 * torch.eye(6, dtype=torch.float64)])
    aims = [e @ dense(d["w"]).double().T for d, e in zip(learned, texts, strict=True)]
    want = torch.linalg.lstsq(rows, torch.cat([*aims, torch.zeros(10, 3, dtype=torch.float64)])).solution.T
    assert change(got, want) < 1e-5
    assert change(want, dense(learned[0]["w"]).double()) > 0.1  # it is no copy of one


def test_words_beside_the_concept_read_as_beside_its_anchor(sd1: Any) -> None:
    from efface.editors._closed_form import Texts

    delta = dataclasses.replace(QUICK_MACE, steps=0, lam=1e-4, preserve=()).fit(sd1, DOG)
    texts = Texts(sd1, ["dog and moon", "moon and moon"])
    own, beside, wanted = divided(sd1, texts, "{} and moon", "dog", "moon")
    assert beside.shape == wanted.shape and len(beside) == len(texts.rows("dog and moon")) - 1
    assert torch.equal(own, texts.rows("dog and moon")[1:2])  # after the start token
    assert not any(torch.equal(row, own[0]) for row in beside)
    assert change(beside, wanted) > 1e-2
    for name, w in keys_values(sd1).items():
        old, new = (w.detach().double(), w.detach().double() + dense(delta.weights[name]).double())
        before, after = (float((beside @ x.T - wanted @ old.T).norm()) for x in (old, new))
        assert after < 0.1 * before
    assert "attention, first and last" not in delta.info


def test_mace_lowers_attention_to_the_concept_on_new_noise_and_has_low_rank(sd1: Any) -> None:
    both = QUICK_MACE.fit(sd1, [DOG, Concept("cat", anchor="moon")])
    first, last = both.info["attention, first and last"]["dog"]
    assert last < 0.7 * first
    refined = dataclasses.replace(QUICK_MACE, steps=0).fit(sd1, [DOG, Concept("cat", anchor="moon")])
    learned = {n: dense(w).double() - dense(refined.weights[n]).double() for n, w in both.weights.items()}
    assert max(int(torch.linalg.matrix_rank(w, rtol=1e-4)) for w in learned.values()) <= 2
    net = Attending(sd1, ["dog"], 1, "auto")
    noise = torch.randn(4, *net.shape, generator=torch.Generator().manual_seed(HELD_OUT))
    points = net.noised(noise, torch.full((4,), 300), noise.flip(0), torch.ones(4, dtype=torch.long))
    found = []
    for delta in (refined, both):
        net.start = {n: w + dense(delta.weights[n]) for n, w in net.base.items()}
        found.append(float(net.attended(points, None).detach()))
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("fields", [{"templates": ("a",)}, {"times": (400, 200)}, {"steps": -1}, {"lr": 0.0}])
def test_mace_refuses_fields_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^Expected .*`?(templates|times|steps|lr)"):
        MACE(**fields)


# ---------------------------------------------------------------- Receler


@functools.cache
def adapted() -> Adapted:
    return Adapted(tiny.untouched("sd1"), ["cat"], 4, 3, "auto", torch.Generator().manual_seed(0))


def points(net: Adapted) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(HELD_OUT))
    return x, torch.tensor([700, 300]), torch.ones(2, dtype=torch.long)


def test_new_adapters_add_nothing_and_trained_ones_draw_as_the_steering(sd1: Any) -> None:
    net, (x, t, prompt) = adapted(), points(adapted())
    with torch.no_grad():
        assert torch.equal(net(x, t, prompt, net.student()), net(x, t, prompt))
        weights = {n: w + 0.1 * torch.randn(w.shape, generator=net.random) for n, w in net.student().items()}
        want, plain = net(x, t, prompt, weights), net(x, t, prompt)
    assert change(want, plain) > EFFECT
    parts = {name: w[None] for name, w in weights.items()}
    text = net.condition.text[prompt]
    with Steering.fitted(Receler(), sd1, parts, CAT, form="adapter").apply(sd1):
        assert change(bare(sd1, sample=x, timestep=t, encoder_hidden_states=text), want) < ROUNDING


def test_the_inner_attack_lowers_its_loss_and_moves_nothing_but_its_slots() -> None:
    net, (x, t, prompt) = adapted(), points(adapted())
    weights = {n: w.detach() + 0.3 * torch.randn(w.shape, generator=net.random) for n, w in net.student().items()}
    before = {n: w.clone() for n, w in weights.items()}
    with torch.no_grad():
        aim = net(x, t, prompt)
    text, losses = attacked(net, x, t, prompt, weights, aim, slots=3, steps=12, lr=0.1)
    assert losses[-1] < 0.9 * losses[0]
    start = net.condition.text[prompt]
    assert torch.equal(text[:, :-3], start[:, :-3]) and change(text[:, -3:], start[:, -3:]) > EFFECT
    assert all(torch.equal(weights[n], before[n]) for n in before) and len(net.condition.text) == 2


def test_outside_the_mask_the_adapters_output_costs(sd1: Any) -> None:
    """All attention is above 0, so nothing is outside at `mask` 0, and everything at 1. Between, a part of it is."""
    net, (x, t, prompt) = adapted(), points(adapted())
    weights = {n: w.detach() + 0.3 * torch.randn(w.shape, generator=net.random) for n, w in net.student().items()}
    seen = efface.editors._denoiser.Points(x, t, prompt)
    free, none, some, held = (
        float(Receler(inner_steps=0, reg=reg, mask=mask).loss(net, weights, seen, []))
        for reg, mask in ((0.0, 1.0), (0.5, 0.0), (0.5, 0.5), (0.5, 1.0))
    )
    total = sum(float(out.detach().square().mean(-1).mean()) for out in net.outputs.values())
    assert held == pytest.approx(free + 0.5 * total, rel=1e-4) and free == none < some < held
    _, maps = net.concept_maps(x, t, prompt)
    assert all(float((m > 0.1).float().mean()) > 0 and float(m.max()) == pytest.approx(1) for m in maps.values())


@pytest.mark.long
def test_receler_lets_the_attack_find_less(sd1: Any) -> None:
    """The prediction for the concept moves away from the base model's, on noise that the fit did not see."""
    fit = Receler(steps=8, lr=1e-2, inner_steps=2, slots=2, width=8, reuse=2, sampler_steps=3)
    steering = fit.fit(tiny.untouched("sd1"), CAT)
    facts = steering.info["cat"]
    assert facts["loss"][1] < facts["loss"][0] and facts["attack, last loss of first"] < 1
    assert drawn("sd1", steering, prompt=PROMPT).isfinite().all()
    assert change(drawn("sd1", steering, prompt="cat"), drawn("sd1", prompt="cat")) > EFFECT
