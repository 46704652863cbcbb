"""CCRT: the search for calibration prompts, the distance it maximises, and removals in sequence."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ALCOHOL, CAT, change

from efface import CCRT, ESD, Concept, Delta
from efface.delta import dense
from efface.editors import _training
from efface.editors._denoiser import Denoiser, Points
from efface.editors._misalignment import Misalignment
from efface.editors._search import Calibration, Individual, compose, crossover, mutate, related, search

ENTITIES = ("dog", "moon", "pub", "night", "red")
QUICK: dict[str, Any] = {"lr": 1e-3, "batch": 2, "reuse": 2, "sampler_steps": 4, "template": "{}"}
SHORT: dict[str, Any] = {"steps": 4, "keep": 2, "generations": 1}

# A plant kingdom: oak and birch are trees, rose and tulip are flowers, trees and flowers are plants.
BROADER = {
    **dict.fromkeys(("oak", "birch"), ("tree",)),
    **dict.fromkeys(("rose", "tulip"), ("flower",)),
    **dict.fromkeys(("tree", "flower"), ("plant",)),
}


@pytest.fixture
def pipe() -> Any:
    return tiny.untouched("small")


def flat(delta: Delta) -> torch.Tensor:
    return torch.cat([dense(delta.weights[name]).flatten() for name in sorted(delta.weights)])


# ---------------------------------------------------------------- the search


def test_children_are_what_their_parents_share() -> None:
    assert crossover(("oak",), ("birch",), BROADER) == ("tree",)
    assert crossover(("tree",), ("flower",), BROADER) == ("plant",)
    assert crossover(("oak", "rose"), ("birch", "tulip"), BROADER) == ("flower", "tree")
    assert crossover(("tree",), ("tree", "rose"), BROADER) == ("birch", "oak", "plant")  # hypernyms and hyponyms
    assert crossover(("oak",), ("rose",), BROADER) == ("oak", "rose")  # nothing shared: both
    assert crossover(("oak",), ("birch",)) == ("oak", "birch")  # no graph: both
    assert crossover(("oak", "rose"), ("rose",)) == ("oak", "rose")


def test_mutation_replaces_no_gene_or_every_gene() -> None:
    parent: Individual = ("oak", "rose", "tulip")
    assert mutate(parent, ["moon"], 0.0, random.Random(0)) == parent
    assert mutate(parent, ["moon"], 1.0, random.Random(0)) == ("moon",) * 3
    assert parent == ("oak", "rose", "tulip")
    rate = sum(gene == "moon" for _ in range(1000) for gene in mutate(parent, ["moon"], 0.25, random.Random(_))) / 3000
    assert 0.2 < rate < 0.3


@given(seed=st.integers(0, 10**6), keep=st.integers(2, 12), mutation=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=30, deadline=None)
def test_the_best_never_get_worse(seed: int, keep: int, mutation: float) -> None:
    """With a fitness that is a function: sorted, bounded, few genes, nobody scored twice, the same by the seed."""
    entities = [f"e{k}" for k in range(12)]
    worth = {entity: random.Random(f"{seed}{entity}").random() for entity in entities}
    scored: list[Individual] = []

    def fitness(individuals: Sequence[Individual]) -> list[float]:
        scored.extend(individuals)
        return [sum(worth[gene] for gene in one) for one in individuals]

    def evolve(generations: int) -> list[tuple[Individual, float]]:
        scored.clear()
        rng = random.Random(seed)
        return search(entities, fitness, keep=keep, generations=generations, mutation=mutation, rng=rng)

    runs = [evolve(generations) for generations in range(4)]
    for best in runs:
        assert len(best) == keep
        assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)
        assert all(1 <= len(one) <= 3 and len(set(one)) == len(one) for one, _ in best)
    for before, after in itertools.pairwise(runs):
        assert all(b >= a for (_, a), (_, b) in zip(before, after, strict=True))
    assert runs[3] == evolve(3)
    assert len(scored) == len(set(scored))


def test_the_search_finds_more_than_it_was_given() -> None:
    worth = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0}
    best = search(
        list(worth),
        lambda individuals: [sum(worth[gene] for gene in one) for one in individuals],
        keep=4,
        generations=8,
        mutation=0.3,
        rng=random.Random(1),
    )
    assert best[0] == (("b", "c", "d"), 14.0)


def test_what_has_to_do_with_a_removed_concept_is_left_out() -> None:
    assert related("beer mug", ["a glass of beer"]) and related("Cat", ["a cat"])
    assert not related("a dog", ["a cat"]) and not related("concatenation", ["cat"])
    assert related("oak", ["plant"], BROADER) and not related("oak", ["flower"], BROADER)
    source = Calibration(["beer mug", "oak", "moon", "moon", "dog"], ["plant", "beer"], "{}", broader=BROADER)
    assert source.entities == ["moon", "dog"]
    short = Calibration(["moon", "dog", "tyrannosaur"], ["beer"], "{}", fits=lambda text: len(text) < 9)
    assert short.entities == ["moon", "dog"] and not short.allowed(("dog", "moon"))
    with pytest.raises(ValueError, match="got 1 of 2"):
        Calibration(["beer", "moon"], ["beer"], "{}")


def test_composed_prompts() -> None:
    assert [compose(e) for e in (["cat"], ["owl", "cat"], ["cat", "owl", "boat"])] == [
        "a cat", "an owl and a cat", "a cat, an owl and a boat"]  # fmt: skip
    asked: list[Sequence[str]] = []

    def composer(entities: Sequence[str]) -> str:
        asked.append(entities)
        return "beer" if "moon" in entities else f"the {entities[0]}"

    source = Calibration(["moon", "dog", "pub"], ["beer"], "a photo of {}", composer)
    measured: list[str] = []

    def distance(texts: Sequence[str]) -> list[float]:
        measured.extend(texts)
        return [float("moon" in text) for text in texts]

    found = source.prompts(distance, keep=3, generations=0, mutation=0.0, seed=0)
    assert measured == ["a photo of a moon", "a photo of a dog", "a photo of a pub"]
    assert asked[0] == ("moon",) and len(asked) == 3  # of the fittest, best first
    assert found == ["the dog", "the pub"]  # a prompt that names the removed concept is dropped
    always = Calibration(["moon", "dog"], ["beer"], "{}", lambda entities: "cold beer")
    with pytest.raises(ValueError, match="names a removed concept"):
        always.prompts(distance, keep=2, generations=0, mutation=0.0, seed=0)


# ---------------------------------------------------------------- the distance


def test_distance_is_that_of_two_denoisers_at_shared_points(pipe: Any) -> None:
    net = Denoiser(pipe, ["a cat"], "x", 4)
    noise = torch.Generator().manual_seed(2)
    edited = {name: w + 0.05 * torch.randn(w.shape, generator=noise) for name, w in net.base.items()}
    distance = Misalignment(net, net.base, seed=0)
    first = distance(["a dog", "a moon"], edited)
    rows = net.rows
    assert torch.equal(distance(["a dog", "a moon"], edited), first)
    assert net.rows - rows == 2 * len(distance.stops)  # the base model's part is known
    assert float(distance(["a dog", "a moon"], None).max()) < 1e-10 < 1e-4 < float(first.min())
    assert torch.allclose(distance(["a moon", "a pub", "a dog"], edited)[[2, 0]], first, rtol=1e-4)
    points = distance.known["a dog"]
    with torch.no_grad():
        text = net.condition.text[points.prompt]
        base = pipe.unet(points.x, points.t, text).sample
        with Delta.fitted(CCRT(), pipe, {n: w - net.base[n] for n, w in edited.items()}, CAT).apply(pipe):
            other = pipe.unet(points.x, points.t, text).sample
    assert float(first[0]) == pytest.approx(float((other - base).square().mean()), rel=1e-3)
    assert not torch.allclose(Misalignment(net, net.base, seed=1)(["a dog"], edited), first[:1], rtol=1e-2)


def test_guidance_of_the_search_draws_the_points_and_not_the_predictions(pipe: Any) -> None:
    """As in the published code: guided on the way, compared without."""
    net = Denoiser(pipe, ["a cat"], "x", 4)
    plain, guided = (Misalignment(net, net.base, 0, guidance) for guidance in (1.0, 3.0))
    assert float(guided(["a dog"], None).max()) < 1e-10  # the base model's part is its conditional prediction
    plain(["a dog"], None)
    assert torch.equal(plain.noise, guided.noise)
    one, other = plain.known["a dog"], guided.known["a dog"]
    assert torch.equal(one.t, other.t) and change(one.x, other.x) > 1e-2
    rows, every = net.add(["a dog"]), torch.arange(4)[:, None]
    by_hand = net.trajectory(rows, every, None, 3.0, torch.Generator().manual_seed(0), noise=guided.noise)
    assert change(other.x, by_hand.x[guided.stops]) < 1e-5


def test_a_sequence_searches_with_its_guidance(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, init = [], Misalignment.__init__

    def spy(self: Misalignment, net: Any, base: Any, seed: int, guidance: float = 1.0) -> None:
        seen.append(guidance)
        init(self, net, base, seed, guidance)

    monkeypatch.setattr(Misalignment, "__init__", spy)
    for guidance in (1.0, 3.0):
        CCRT(**SHORT, **QUICK, search_guidance=guidance).fit(pipe, CAT, entities=ENTITIES)
    assert seen == [1.0, 1.0, 3.0, 3.0]


# ---------------------------------------------------------------- rounds


def test_without_the_distillation_it_is_esd_to_the_bit(pipe: Any) -> None:
    esd = ESD(steps=4, **{k: v for k, v in QUICK.items() if k != "template"})
    ccrt = CCRT(reg=0.0, **SHORT, **QUICK)
    assert torch.equal(flat(ccrt.fit(pipe, ALCOHOL, seed=3, entities=ENTITIES)), flat(esd.fit(pipe, ALCOHOL, seed=3)))
    with_it = CCRT(reg=10.0, **SHORT, **QUICK).fit(pipe, ALCOHOL, seed=3, entities=ENTITIES)
    assert change(flat(with_it), flat(esd.fit(pipe, ALCOHOL, seed=3))) > 1e-2


@pytest.mark.long
def test_distillation_is_nothing_at_first_and_holds_the_calibration_prompts_in_place(pipe: Any) -> None:
    """At points that were not trained on; while the concept still goes."""
    losses: dict[str, list[float]] = {}
    update = _training._update

    def record(state: Any, *args: Any) -> None:
        update(state, *args)
        losses[str(id(state))] = state.losses

    settings = {**QUICK, "lr": 3e-3, "steps": 30, "keep": 3, "generations": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_training, "_update", record)
        (delta,) = CCRT(reg=10.0, **settings).sequence(pipe, [CAT], seed=1, entities=ENTITIES)
    probe, fit = losses.values()
    assert fit[0] == pytest.approx(probe[0], rel=1e-4) and probe[0] > 1e-3
    assert probe[1] != pytest.approx(fit[1], rel=1e-4) or probe[2] != pytest.approx(fit[2], rel=1e-4)
    distance = delta.info["distance"]
    assert distance["prompts"]["before"] < 1e-10
    for of in ("prompts", "entities"):
        assert distance[of]["after"] < 0.7 * distance[of]["probe"]
    net = Denoiser(pipe, ["cat"], "x", 4)
    points = net.trajectory(torch.tensor([1] * 4), torch.arange(4)[:, None].expand(4, 4), None, 3.0, torch.Generator())
    texts, target = ESD().target(net, points)
    with torch.no_grad():
        before = (net(points.x, points.t, texts) - target).square().mean()
        with delta.apply(pipe):
            after = (net(points.x, points.t, texts) - target).square().mean()
    assert after < 0.8 * before


@pytest.mark.long
def test_rounds_go_on_from_each_other_with_the_base_model_as_teacher(pipe: Any) -> None:
    before = {name: w.clone() for name, w in pipe.unet.state_dict().items()}
    taught: list[tuple[torch.Tensor, torch.Tensor]] = []
    target, name = ESD.target, next(n for n, _ in pipe.unet.named_parameters() if n.endswith("attn2.to_k.weight"))

    def see(self: ESD, net: Denoiser, points: Points, teacher: Any = None) -> Any:
        taught.append((teacher[f"unet.{name}"].clone(), net.base[f"unet.{name}"].clone()))
        return target(self, net, points, teacher)

    editor = CCRT(**SHORT, **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ESD, "target", see)
        first, second = editor.sequence(pipe, [ALCOHOL, CAT], seed=3, entities=ENTITIES)
    assert all(torch.equal(w, before[n]) for n, w in pipe.unet.state_dict().items())
    assert len(taught) == 16 and all(torch.equal(teacher, before[name]) for teacher, _ in taught)
    edited = before[name] + dense(first.weights[f"unet.{name}"])
    assert all(torch.equal(now, before[name]) for _, now in taught[:8])
    assert all(torch.equal(now, edited) and not torch.equal(now, before[name]) for _, now in taught[8:])
    assert first.after == {} and second.after == {first.hash: 1.0}
    assert [d.concepts for d in (first, second)] == [(ALCOHOL,), (CAT,)]
    before_second, after_first = (d.info["distance"]["entities"] for d in (second, first))
    assert before_second["before"] == pytest.approx(after_first["after"])
    assert not any(
        {"cat", "beer", "wine", "glass"} & set(p.split()) for d in (first, second) for p in d.info["prompts"]
    )
    with pytest.raises(ValueError, match="fitted on top of"):
        second.apply(pipe)
    # by hand, with the first round on, it is the same round
    with first.apply(pipe):
        (alone,) = editor.sequence(pipe, CAT, seed=13, entities=ENTITIES)
    assert alone.after == second.after
    whole = editor.fit(pipe, [ALCOHOL, CAT], seed=3, entities=ENTITIES)
    assert torch.allclose(flat(whole), flat(first) + flat(second), atol=1e-7)
    assert whole.after == {} and set(whole.concepts) == {ALCOHOL, CAT}


def test_every_calibration_prompt_is_used(pipe: Any) -> None:
    seen: set[str] = set()
    texts: list[str] = [""]
    init, add, call = Denoiser.__init__, Denoiser.add, Denoiser.__call__

    def see_init(self: Denoiser, pipe: Any, given: Any, *args: Any) -> None:
        texts.extend(given)
        init(self, pipe, given, *args)

    def see_add(self: Denoiser, given: Any) -> Any:
        texts.extend(given)
        return add(self, given)

    def see_call(self: Denoiser, x: Any, t: Any, prompt: Any, weights: Any = None) -> Any:
        if torch.is_grad_enabled():
            seen.update(texts[row] for row in prompt)
        return call(self, x, t, prompt, weights)

    with pytest.MonkeyPatch.context() as patch:
        for attribute, spy in (("__init__", see_init), ("add", see_add), ("__call__", see_call)):
            patch.setattr(Denoiser, attribute, spy)
        editor = CCRT(**QUICK, steps=12, keep=3, generations=0)
        (delta,) = editor.sequence(pipe, CAT, entities=ENTITIES, composer=lambda entities: f"the {entities[0]}")
    assert len(delta.info["prompts"]) == 3 and all(prompt.startswith("the ") for prompt in delta.info["prompts"])
    assert seen == {"cat", *delta.info["prompts"]}


@pytest.mark.long
def test_an_interrupted_sequence_goes_on(pipe: Any, tmp_path: Path) -> None:
    editor, update, done = CCRT(**SHORT, **QUICK), _training._update, []

    def interrupt(*args: Any) -> None:
        if len(done) == 13:  # in the fit of round 2
            raise KeyboardInterrupt
        done.append(update(*args))

    arguments: dict[str, Any] = {"seed": 3, "entities": ENTITIES}
    unbroken = editor.sequence(pipe, [ALCOHOL, CAT], **arguments)
    before = {name: w.clone() for name, w in pipe.unet.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_training, "_update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            editor.sequence(pipe, [ALCOHOL, CAT], checkpoint=tmp_path, **arguments)
    assert all(torch.equal(w, before[n]) for n, w in pipe.unet.state_dict().items())
    done.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_training, "_update", lambda *args: done.append(update(*args)))
        resumed = editor.sequence(pipe, [ALCOHOL, CAT], checkpoint=tmp_path, **arguments)
    assert len(done) == 4
    for a, b in zip(resumed, unbroken, strict=True):
        assert torch.equal(flat(a), flat(b)) and a.hash == b.hash and a.info == b.info


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep", 1),
        ("generations", -1),
        ("mutation", 1.5),
        ("reg", -1.0),
        ("teacher", "student"),
        ("template", "a"),
        ("search_guidance", 0.5),
    ],
)
def test_fields_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        CCRT(**{field: value})
    assert CCRT.paper().keep == 100 and CCRT.paper().steps == 1000


def test_it_needs_something_to_keep(pipe: Any) -> None:
    with pytest.raises(ValueError, match="got 1 of 2"):
        CCRT(**SHORT, **QUICK).fit(pipe, Concept("dog"), entities=["big dog", "moon"])
