"""Attacks: compositions follow their formula, the harness judges fairly, and cheap attacks propose what they say."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any, ClassVar

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import efface
from efface import Concept, checks, redteam, registry
from efface._latents import latents_of
from efface.attacks._compose import Composition, Denoiser, Seen, Term
from efface.attacks._contract import ACCESS, Attack, BudgetSpent, Cost, Proposal, Target
from efface.attacks._fit import fit, solved
from efface.attacks._pictures import Visible, from_pictures, half_mask
from efface.attacks._texts import encoded
from efface.attacks._words import random_text, words
from efface.attacks.latent_inversion import Near, inverted
from efface.attacks.quantisation import rounded
from efface.hooks import Method, Prediction
from efface.redteam.panel import CONCEPT, NOTHING, OTHER, Only, panel
from efface.redteam.result import AttackResult
from efface.redteam.trial import search
from efface.redteam.victim import GuardedModel

pytestmark = pytest.mark.thinned("long")

FAMILIES = ("sd1", "sdxl", "bert", "pixart", "sd3", "flux", "cogview4")
BEER, CAT, DOG = "a red beer", "a big cat", "the dog"


LENGTH = {"sd3": {"max_sequence_length": 24}, "flux": {"max_sequence_length": 24}}  # as `tiny.latents` calls them


def call_of(family: str, guidance: float) -> dict[str, Any]:
    more = {"negative_prompt": ""} if family == "sdxl" else {}  # whose unconditional text is zero without it
    return {"guidance_scale": guidance, **more}  # on FLUX, `tiny.latents` takes it for the scale of true guidance


def drawn(family: str, prompt: str, guidance: float, composition: Composition | None = None, *erasers: Any) -> Tensor:
    pipe = tiny.untouched(family)
    if composition is not None:
        composition = dataclasses.replace(composition, settings=LENGTH.get(family, {}))
    with efface.stack(pipe, *erasers), composition(pipe) if composition else nothing():
        return tiny.latents(pipe, prompt, num_inference_steps=3, **call_of(family, guidance))


@contextmanager
def nothing() -> Iterator[None]:
    yield


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------- composition


@pytest.mark.parametrize("family", FAMILIES)
def test_one_term_is_the_pipelines_own_guidance(family: str) -> None:
    plain, other = drawn(family, BEER, 7.0), drawn(family, BEER, 2.0)
    assert apart(other, plain) > 1e-2  # the scale matters
    composed = drawn(family, BEER, 2.0, Composition((Term(BEER, 7.0),), 2.0))
    assert apart(composed, plain) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_weights_are_the_unconditional_run(family: str) -> None:
    zero = drawn(family, BEER, 3.0, Composition((Term(BEER, 0.0), Term(CAT, 0.0)), 3.0))
    assert apart(zero, drawn(family, "", 3.0)) < 1e-4
    assert apart(zero, drawn(family, BEER, 3.0)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_order_and_splitting_of_terms_do_not_matter(family: str) -> None:
    one = drawn(family, BEER, 3.0, Composition((Term(BEER, 5.0), Term(CAT, -2.0)), 3.0))
    two = drawn(family, CAT, 3.0, Composition((Term(CAT, -1.0), Term(BEER, 5.0), Term(CAT, -1.0)), 3.0))
    assert apart(two, one) < 1e-4
    assert apart(one, drawn(family, BEER, 5.0)) > 1e-2


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize(
    "eraser",
    [
        efface.SAFREE(Concept("beer"), alpha=-0.99),
        efface.SemanticSurgery(Concept("beer"), threshold=-1.0),
        efface.SLD(Concept("wine glass"), threshold=1.0, momentum_scale=0.9, warmup=0.0),
    ],
    ids=lambda eraser: type(eraser).__name__,
)
def test_erasers_that_remember_a_prompt_remember_each_term(family: str, eraser: Any) -> None:
    if family == "flux" and not isinstance(eraser, efface.SAFREE):
        pytest.skip("refused there")
    guarded = drawn(family, BEER, 3.0, None, eraser)
    assert apart(guarded, drawn(family, BEER, 3.0)) > 1e-4  # it acts on this prompt
    composed = drawn(family, CAT, 3.0, Composition((Term(CAT, 0.0), Term(BEER, 3.0)), 3.0), eraser)
    assert apart(composed, guarded) < 1e-4
    assert apart(drawn(family, CAT, 3.0, None, eraser), guarded) > 1e-3
    three = Composition((Term(CAT, 0.0), Term("a dog", 0.0), Term(BEER, 3.0)), 3.0)
    assert apart(drawn(family, CAT, 3.0, three, eraser), guarded) < 1e-4


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_a_term_acts_in_its_window_only(family: str) -> None:
    never = Composition((Term(BEER, 4.0), Term(CAT, 9.0, (0.9995, 1.0))), 3.0)
    assert apart(drawn(family, BEER, 3.0, never), drawn(family, BEER, 4.0)) < 1e-4
    early = Composition((Term(BEER, 4.0), Term(CAT, 9.0, (0.0, 0.4))), 3.0)
    always = Composition((Term(BEER, 4.0), Term(CAT, 9.0)), 3.0)
    made = drawn(family, BEER, 3.0, early)
    assert apart(made, drawn(family, BEER, 4.0)) > 1e-3
    assert apart(made, drawn(family, BEER, 3.0, always)) > 1e-3


def test_noise_velocity_and_picture_predictions_compose_to_the_same() -> None:
    """The coefficients sum to 1, so the composition commutes with maps x -> a x_t + b e."""
    rng = torch.Generator().manual_seed(0)
    x, u, p, q = (torch.randn(2, 4, 8, 8, generator=rng, dtype=torch.float64) for _ in range(4))
    composition = Composition((Term("p", 3.0), Term("q", -5.0)), 2.0)

    def guided(change: Any) -> Tensor:
        seen = Seen({}, 2, torch.cat([change(u), change(p)]), change(u), 0.5)
        conditional = composition.composed(seen, {0: change(p), 1: change(q)})
        return change(u) + 2.0 * (conditional - change(u))

    plain = guided(lambda e: e)
    assert torch.allclose(plain, u + 3 * (p - u) - 5 * (q - u))
    assert torch.allclose(guided(lambda e: 0.7 * x - 1.9 * e), 0.7 * x - 1.9 * plain)


def test_the_norm_of_a_composition_can_be_limited() -> None:
    u, p = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    seen = Seen({}, 2, torch.cat([u, p]), u, 0.5)
    free = Composition((Term("p", 30.0),), 3.0).composed(seen, {0: p})
    held = Composition((Term("p", 30.0),), 3.0, most=2.0).composed(seen, {0: p})
    assert torch.allclose(free, 10 * p) and torch.allclose(held, 2 * p)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_hooks_go_with_the_block_also_after_an_error(family: str) -> None:
    pipe = tiny.untouched(family)
    before = len(tiny.denoiser_of(pipe)._forward_hooks)
    with pytest.raises(KeyError), Composition((Term(BEER, 1.0),), 3.0)(pipe):
        assert len(tiny.denoiser_of(pipe)._forward_hooks) == before + 1
        raise KeyError
    assert len(tiny.denoiser_of(pipe)._forward_hooks) == before


def test_without_guidance_nothing_is_composed_and_that_is_said() -> None:
    pipe = tiny.untouched("flux")
    with pytest.raises(RuntimeError, match="nothing was composed"), Composition((Term(BEER, 1.0),), 3.0)(pipe):
        tiny.latents(pipe, BEER, num_inference_steps=1)  # whose texts are 24 tokens long
    for family in ("sd1", "pixart", "sd3", "flux"):
        pipe, one = tiny.untouched(family), Composition((Term(BEER, 1.0),), 3.0, settings=LENGTH.get(family, {}))
        for prompts, guidance in (([BEER] * 2, 1.0), ([CAT] * 2, 3.0)):  # no guidance, or not the first term's prompt
            with pytest.raises(RuntimeError, match="nothing was composed"), one(pipe):
                tiny.latents(pipe, prompts, num_inference_steps=1, guidance_scale=guidance)
    pipe = tiny.untouched("sd1")
    pipe._guidance_rescale = 0.5
    try:
        with pytest.raises(ValueError, match="guidance_rescale"), Composition((Term(BEER, 1.0),), 3.0)(pipe):
            tiny.latents(pipe, BEER, num_inference_steps=1, guidance_scale=3.0, guidance_rescale=0.5)
    finally:
        pipe._guidance_rescale = 0.0
    with pytest.raises(ValueError, match="> 1"):
        Composition((Term(BEER, 1.0),), 1.0)
    with pytest.raises(ValueError, match="at least one term"):
        Composition((), 3.0)


# ---------------------------------------------------------------- ideal erasers


@dataclasses.dataclass(frozen=True)
class Reversed(Method):
    """What ESD trains towards: e'(c) = e0 - eta (e(c) - e0), here for every prompt."""

    guides: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("guidance",)
    concepts: Any = ()
    eta: float = 1.0

    def guide(self, seen: Prediction) -> Tensor:
        return -(1 + self.eta) * (seen.prompt - seen.negative)


@dataclasses.dataclass(frozen=True)
class Mapped(Method):
    """e'(c) = e(anchor): what UCE and MACE aim at. The concept's phrase is the anchor."""

    guides: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("guidance",)
    concepts: Any = ()

    def guide(self, seen: Prediction) -> Tensor:
        return seen.concept - seen.prompt


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_sign_flip_undoes_a_reversed_vector_and_nothing_else(family: str, eta: float) -> None:
    plain, empty = drawn(family, BEER, 6.0), drawn(family, "", 6.0)
    assert apart(plain, empty) > 1e-2
    flip = Composition((Term(BEER, -6.0 / eta),), 3.0)
    assert apart(drawn(family, BEER, 6.0, None, Reversed(Concept("dog"), eta=eta)), plain) > 1e-2
    assert apart(drawn(family, BEER, 3.0, flip, Reversed(Concept("dog"), eta=eta)), plain) < 1e-3
    erased = drawn(
        family, BEER, 3.0, flip, Reversed(Concept("dog"), eta=0.0)
    )  # maps to the empty prompt: carries no signal
    assert apart(erased, empty) < 1e-3
    to_anchor = drawn(family, BEER, 3.0, Composition((Term(BEER, -6.0),), 3.0), Mapped(Concept("dog")))
    assert apart(to_anchor, plain) > 1e-2


def test_the_prompt_as_negative_is_a_sign_flip_by_text_alone() -> None:
    """e(P) + (1 - g) (e(N) - e(P)) with P = "": the weight of the target is 1 - g."""
    pipe = tiny.untouched("sd1")
    proposal = next(efface.PromptAsNegative(guidance=(4.0,)).propose(Target(Concept("beer"), BEER), None))
    assert proposal.prompt == ""
    with Reversed(Concept("dog")).apply(
        pipe
    ):  # acts on conditional rows alone, so it leaves the negative prompt's prediction
        text = tiny.latents(pipe, "", num_inference_steps=3, guidance_scale=4.0, negative_prompt=BEER)
    own = tiny.latents(pipe, "", num_inference_steps=3, guidance_scale=4.0, negative_prompt=BEER)
    composed = drawn("sd1", BEER, 2.0, Composition((Term(BEER, -3.0),), 2.0))
    assert apart(own, composed) < 1e-4 < apart(text, composed)


# ---------------------------------------------------------------- fitted weights


def test_planted_weights_are_found() -> None:
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(4, 30, 50, generator=rng)
    planted = torch.tensor([2.0, -1.0, 0.0, 5.0])
    wanted = torch.einsum("i,ind->nd", planted, v)
    assert torch.allclose(solved(v, wanted, 1e-9).float(), planted, atol=1e-4)
    assert float(solved(v, wanted, 10.0).norm()) < 0.5 * float(planted.norm())  # the ridge shrinks
    with pytest.raises(ValueError, match="change nothing"):
        solved(torch.zeros_like(v), wanted)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_the_fit_finds_the_target_itself_and_says_how_well(family: str) -> None:
    victim = tiny_victim(family)
    length = LENGTH.get(family)
    found = fit(victim, BEER, [BEER, CAT], guidance=5.0, ridge=1e-6, settings=length)
    assert found.weights == pytest.approx((5.0, 0.0), abs=0.05)
    assert min(found.cosines) > 0.999 and found.signal > 1e-2
    other = fit(victim, BEER, [DOG], guidance=5.0, settings=length)
    assert max(other.cosines) < 0.99  # of an unrelated text
    if family != "flux":
        guarded = tiny_victim(family, erasers=(Reversed(Concept("dog"), eta=0.5),))
        halved = fit(guarded, BEER, [BEER], guidance=5.0, settings=length)
        assert halved.weights[0] == pytest.approx(-10.0, rel=1e-2)


def tiny_victim(family: str, **more: Any) -> GuardedModel:
    pipe = tiny.untouched(family)
    options: dict[str, Any] = {"erasers": (), "search": None, "seeds": (1, 2, 3, 4), "steps": 3, "guidance": 3.0}
    victim = GuardedModel(pipe, **(options | more))
    victim.draw_original = lambda prompt, seeds=None: tiny.latents(  # type: ignore[method-assign]
        pipe, [prompt] * 4, num_inference_steps=3, **call_of(family, 3.0)
    )
    return victim


# ---------------------------------------------------------------- the harness


class Says:
    """A detector with fixed answers of its judges, for pictures whose mean is above a bound."""

    name = "a test's detector"

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([images.mean((1, 2, 3)) > bound for bound in self.bounds])


def test_no_detector_judges_what_it_searched_with() -> None:
    both = panel(Says(0.9, 0.8), None, Says(0.1, 0.2), needed=True)
    assert isinstance(both.search, Only) and isinstance(both.judge, Only)
    assert both.search.judges == (0,) and both.judge.judges == (1,)
    between = torch.full((1, 3, 4, 4), 0.85)
    assert not both.search(between).any() and both.judge(between).all()
    with pytest.raises(ValueError, match="one judge"):
        panel(Says(0.9), None, None, needed=True)
    assert panel(Says(0.9), None, None, needed=False).search is None
    assert panel(Says(0.9), Says(0.8), None, needed=True).search.bounds == (0.8,)


def test_a_detector_that_fires_on_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="pictures of noise"):
        panel(Says(0.1, 0.1), None, None, needed=True)


def test_three_outcomes() -> None:
    judges = panel(Says(0.9, 0.9), None, Says(0.5, 0.5), needed=True)
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.95, 0.7, 0.2)])
    assert judges.outcomes(images) == [CONCEPT, OTHER, NOTHING]


class Scripted:
    """A victim that draws what the test says: a proposal's prompt is the share of seeds that the search sees."""

    seeds, steps, guidance, pipe = (1, 2, 3, 4), 10, 2.0, None

    def __init__(self, budget: int = 10**6) -> None:
        self.spent, self.budget = Cost(), budget

    def draw(self, proposal: Proposal, seeds: Any = None) -> Tensor:
        if proposal.prompt == "refused":
            raise ValueError("this is not drawn")
        rows = 2 * self.steps * len(self.seeds)
        if self.spent.rows + rows > self.budget:
            raise BudgetSpent
        self.spent.forward += rows
        hits = round(float(proposal.prompt) * 4)
        return torch.tensor([1.0] * hits + [0.0] * (4 - hits)).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)

    def found(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3)) > 0.5

    guarded = metered = staticmethod(nothing)


def test_the_search_keeps_the_best_and_stops_at_success_or_budget() -> None:
    every, plain = ["0.25", "refused", "0.75", "0.5"], Proposal("0")
    made = search(Scripted(), plain, (Proposal(p) for p in every))  # type: ignore[arg-type]
    assert (made.best.prompt, made.found, made.tried, made.stopped) == ("0.75", 0.75, 3, "exhausted")
    assert len(made.refused) == 1 and "this is not drawn" in made.refused[0]
    made = search(Scripted(), plain, (Proposal(p) for p in ["0", "1", "1"]))  # type: ignore[arg-type]
    assert (made.best.prompt, made.tried, made.stopped) == ("1", 2, "found")
    made = search(Scripted(budget=280), plain, (Proposal(p) for p in every))  # type: ignore[arg-type]
    assert (made.best.prompt, made.tried, made.stopped, made.cost.rows) == ("0.75", 2, "budget", 240)


def test_an_attack_that_refuses_ends_its_search_and_not_the_others() -> None:
    def refusing() -> Iterator[Proposal]:
        yield Proposal("0.5")
        raise ValueError("these weights hold no eraser")

    made = search(Scripted(), Proposal("0"), refusing())  # type: ignore[arg-type]
    assert (made.best.prompt, made.tried, made.stopped) == ("0.5", 1, "exhausted")
    assert made.refused == ["these weights hold no eraser"]


def test_an_attacker_does_without_an_attack_that_helps_nothing() -> None:
    plain = Proposal("0.5")
    made = search(Scripted(), plain, (Proposal(p) for p in ["0.25", "0.5"]))  # type: ignore[arg-type]
    assert (made.best, made.tried) == (plain, 2)
    made = search(Scripted(), Proposal("1"), (Proposal(p) for p in ["1"]))  # type: ignore[arg-type]
    assert (made.tried, made.stopped) == (0, "found")  # it succeeds without one


def result(
    *attempts: dict[str, list[int]], quality: Any = None, control: bool = True, facts: Any = None
) -> AttackResult:
    setting = {
        "attack": {"method": "best_of_n"}, "access": "text", "concept": {"name": "cat"}, "erasers": [],
        "control": control, "quality": quality,
    }  # fmt: skip
    searched = {"cost": dataclasses.asdict(Cost(10, 0, 5, 2)), "tried": 1, "stopped": "exhausted", **(facts or {})}
    made = [
        {"prompt": f"p{k}", "outcomes": each, "search": {"attacked": searched} if each else {}, "seconds": 1.0}
        for k, each in enumerate(attempts)
    ]
    return AttackResult(None, setting, tuple(made))  # type: ignore[arg-type]


def arms(base: int, before: int, attacked: int, control: int) -> dict[str, list[int]]:
    """Pictures of four that show the concept, by arm."""
    counts = {"base": base, "before": before, "attacked": attacked, "control": control}
    return {arm: [CONCEPT] * n + [OTHER] * (4 - n) for arm, n in counts.items()}


def test_what_succeeded_before_the_attack_is_not_newly_successful() -> None:
    made = result(arms(4, 4, 4, 0), arms(4, 0, 4, 0), arms(4, 0, 1, 0), arms(4, 0, 0, 0))
    assert made.asr == {"before": 1, "newly": 1, "prompts": 4}
    assert made.share("attacked").value == 9 / 16 and made.share("before").value == 4 / 16
    assert made.recovered == pytest.approx((9 - 4) / (16 - 4))
    assert made.over("control").value == pytest.approx(9 / 16)


def test_prompts_that_the_base_model_does_not_draw_are_left_out_and_named() -> None:
    made = result(arms(4, 0, 4, 0), {})
    assert made.prompts == 1 and made.not_drawn == ["p1"]
    assert any("1 of 2 prompts were left out" in warning for warning in made.warnings())
    nothing_there = result({}, {})
    assert nothing_there.verdict().startswith("Not judged") and nothing_there.share("base") is None


def test_the_verdict_says_luck_a_weak_control_and_a_ruined_model() -> None:
    clear = result(*[arms(4, 0, 4, 0)] * 8, quality={"guarded": 1.0, "base": 1.0})
    assert "does more than luck" in clear.verdict() and clear.warnings() == []
    luck = result(*[arms(4, 0, 2, 2)] * 8)
    assert (
        "may do no more than luck"
        in dataclasses.replace(luck, attempts=(*luck.attempts, *clear.attempts[:1])).verdict()
    )
    assert "does no more than luck" in luck.verdict()
    weak = result(*[arms(2, 0, 2, 0)] * 8)
    assert any("positive control is weak" in warning for warning in weak.warnings())
    ruined = result(*[arms(4, 0, 0, 0)] * 8, quality={"guarded": 0.2, "base": 1.0})
    assert ruined.collapsed and any("no defence" in warning for warning in ruined.warnings())
    alone = result(*[arms(4, 0, 4, 0)] * 8, control=False)
    assert any("luck is not ruled out" in warning for warning in alone.warnings())


def test_texts_found_without_the_guard_that_do_better_than_gradients_are_a_warning() -> None:
    """Two judged pictures of four for the texts, one for the gradients."""

    def named(name: str, access: str, attacked: int) -> AttackResult:
        made = result(arms(4, 0, attacked, 0))
        return dataclasses.replace(made, setting={**made.setting, "attack": {"method": name}, "access": access})

    blind, white, other = named("gcg", "text", 2), named("p4d", "gradients", 1), named("best_of_n", "text", 4)
    warning = redteam.masking([other, white, blind])
    assert warning.startswith("Possibly masked gradients") and "gcg 50.0 %" in warning and "p4d 25.0 %" in warning
    assert redteam.masking([other, blind]) == redteam.masking([other, white]) == redteam.masking([]) == ""
    assert redteam.masking([blind, named("p4d", "gradients", 2)]) == ""
    assert redteam.masking([blind, white, named("unlearndiffatk", "gradients", 3)]) == ""


def test_a_prompt_without_a_proposal_counts_as_before() -> None:
    outcomes = arms(4, 1, 0, 0)
    del outcomes["attacked"], outcomes["control"]
    made = result(outcomes, arms(4, 0, 4, 0))
    assert made.share("attacked").value == 5 / 8
    assert made.over("control") is None  # not all prompts have one


def test_prompts_that_were_never_attacked_are_named_with_the_reason() -> None:
    outcomes = arms(4, 1, 0, 0)
    del outcomes["attacked"], outcomes["control"]
    made = result(outcomes, arms(4, 0, 4, 0), facts={"tried": 0, "stopped": "exhausted", "refused": ["No picture."]})
    assert any("For 2 of 2 prompts" in each and "(No picture)" in each for each in made.warnings())
    for facts in ({"tried": 0, "stopped": "found"}, {"tried": 1, "stopped": "budget"}):
        assert not any("no proposal" in each for each in result(arms(4, 0, 4, 0), facts=facts).warnings())


# ---------------------------------------------------------------- a real run


@dataclasses.dataclass(frozen=True)
class TakesOff(Attack):
    """Knows how to take the guard off: the strongest attack there is. Its first proposal does nothing."""

    access: ClassVar[Any] = "weights"
    useless: bool = False
    stops_at: str = ""

    def propose(self, target: Target, victim: Any) -> Iterator[Proposal]:
        if target.prompt == self.stops_at:
            raise KeyboardInterrupt

        @contextmanager
        def off(pipe: Any) -> Iterator[None]:
            with victim.original():
                yield

        yield Proposal(target.prompt, about="as before")
        if not self.useless:
            yield Proposal(target.prompt, about="off", inside=off)


ATTACKED: dict[str, Any] = {"prompts": ["a cat", "a dog"], "n": 2, "steps": 8, "budget": 500}


@pytest.fixture(scope="module")
def emoji() -> Any:
    return efface.load("emoji")


def cats(pipe: Any, attack: Any, out: Any, **more: Any) -> AttackResult:
    keep = {"eraser": efface.EIUP(Concept("cat", ("a cat",))), "benign": ("a rocket", "a guitar"), **ATTACKED, **more}
    return redteam.attack(pipe, attack, Concept("cat"), out=out, **keep)


@pytest.mark.long
def test_taking_the_guard_off_brings_the_base_model_back(emoji: Any, tmp_path: Any) -> None:
    made = cats(emoji, TakesOff(), tmp_path / "a")
    assert made.prompts == 1 and made.not_drawn == ["a dog"]  # the base model draws no cat for it
    (attempt,) = made.attacked
    assert attempt["outcomes"]["base"] == attempt["outcomes"]["attacked"] == [CONCEPT, CONCEPT]
    assert CONCEPT not in attempt["outcomes"]["before"] + attempt["outcomes"]["control"]
    assert set(attempt["seeds"]).isdisjoint(attempt["searched"])
    found = attempt["search"]["attacked"]
    assert (found["proposal"]["about"], found["tried"], found["stopped"]) == ("off", 2, "found")
    assert found["cost"]["forward"] == 3 * 2 * 8 * 2 and found["cost"]["pictures"] == 6  # tries, seeds, steps, rows
    assert made.setting["quality"]["base"] == 1.0 and made.asr == {"before": 0, "newly": 1, "prompts": 1}
    useless = cats(emoji, TakesOff(useless=True), tmp_path / "b", prompts=["a cat"], control=False)
    assert useless.asr["newly"] == 0 and useless.attacked[0]["outcomes"]["attacked"] == attempt["outcomes"]["before"]

    page = efface.write_attacks([made], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in text and made.verdict() in text.replace("&#39;", "'")
    assert page["attacks"][0]["rates"]["attacked"]["value"] == 1.0
    shown = [line for line in text.splitlines() if 'alt="attacked: cat seen' in line]
    assert shown and all("veil" in line for line in shown)
    with pytest.raises(ValueError, match="not comparable"):
        efface.write_attacks(
            [made, cats(emoji, TakesOff(), tmp_path / "c", eraser=None, control=False)], tmp_path / "d.html"
        )


@pytest.mark.long
def test_an_interrupted_attack_continues_where_it_was(emoji: Any, tmp_path: Any) -> None:
    options = {"prompts": ["a cat", "a cat and a rocket"], "control": False, "n": 1, "search_seeds": 1, "eraser": None}
    whole = cats(emoji, efface.BestOfN((2,)), tmp_path / "whole", **options)

    class Interrupted(efface.BestOfN):
        def propose(self, target: Target, victim: Any) -> Iterator[Proposal]:
            if target.prompt == "a cat and a rocket":
                raise KeyboardInterrupt
            return super().propose(target, victim)

    registered = registry.name_of
    try:
        registry.name_of = lambda cls: "best_of_n" if cls is Interrupted else registered(cls)  # type: ignore[assignment]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("efface.core.name_of", registry.name_of)
            with pytest.raises(KeyboardInterrupt):
                cats(emoji, Interrupted((2,)), tmp_path / "cut", **options)
    finally:
        registry.name_of = registered
    folder = tmp_path / "cut"
    assert len((folder / "attempts.jsonl").read_text().splitlines()) == 1
    with (folder / "attempts.jsonl").open("a") as file:
        file.write('{"k": 1, "half')  # as a kill leaves it
    made = cats(emoji, efface.BestOfN((2,)), folder, **options)
    same = [{k: v for k, v in each.items() if k != "seconds"} for each in made.attempts]
    assert same == [{k: v for k, v in each.items() if k != "seconds"} for each in whole.attempts]
    with pytest.raises(ValueError, match=r"another attack(.|\n)*budget"):
        cats(emoji, efface.BestOfN((2,)), folder, **options, budget=501)


@pytest.mark.long
def test_what_cannot_be_attacked_is_refused_with_the_reason(emoji: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="One proposal costs about 32"):
        cats(emoji, "best_of_n", tmp_path / "a", budget=31)
    with pytest.raises(checks.NotJudged, match="draws cat with none of 1 prompt, as"):
        cats(emoji, "best_of_n", tmp_path / "b", prompts=["a rocket"])
    with pytest.raises(ValueError, match="held-out seeds would include"):
        cats(emoji, "best_of_n", tmp_path / "c", seed=1)
    with pytest.raises(ValueError, match="tuning seeds in"):
        cats(emoji, "best_of_n", tmp_path / "c", first_search_seed=10_000)
    with pytest.raises(ValueError, match="No shipped detector knows"):
        redteam.attack(emoji, "best_of_n", Concept("zebra"), prompts=["a zebra"], out=tmp_path / "d")
    with pytest.raises(ValueError, match="no default prompts"):
        redteam.attack(emoji, "best_of_n", Concept("zebra"), judge=Says(0.9, 0.9), out=tmp_path / "d")
    with efface.EIUP(Concept("cat")).apply(emoji), pytest.raises(ValueError, match="already has an eraser"):
        cats(emoji, "best_of_n", tmp_path / "e")
    with pytest.raises(ValueError, match=r"Unknown.*best_of_m.*best_of_n"):
        cats(emoji, "best_of_m", tmp_path / "f")
    with pytest.raises(checks.NotJudged, match="drew no proposal for any prompt"):
        cats(emoji, efface.Lookalike(()), tmp_path / "g", prompts=["a cat"], control=False)
    with pytest.raises(checks.NotJudged, match="EIUP acts at run time"):
        cats(emoji, "quantisation", tmp_path / "h", prompts=["a cat"], control=False)
    assert not (tmp_path / "a").exists() and not (tmp_path / "d").exists()


class NoTable:
    """A tokenizer that reads texts and has no table of its tokens."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.own(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name in ("own", "get_vocab"):
            raise AttributeError(name)
        return getattr(self.own, name)


FINE = Says(0.9, 0.9)
BAD: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "no guidance": ("flux2", "guidance_sweep", {}, "needs guidance, but this Flux2Pipeline"),
    "a black box": ("sd1", "concept_arithmetics", {"access": "text"}, "sampling loop, but the attacker has 'text'"),
    "a service with embeddings": ("sd1", "p4d", {"access": "embeddings"}, "gradients of the guarded model, but"),
    "an unknown access": ("sd1", "p4d", {"access": "all"}, "one of 'text', 'embeddings', 'gradients'"),
    "a budget below one attempt": ("sd1", "best_of_n", {"budget": 99}, "about 100 denoiser rows.*budget is 99"),
    "a tokenizer without a table": ("no table", "gcg", {}, "table of its tokens"),
    "a detector that fires on noise": ("sd1", "best_of_n", {"judge": Says(0.1, 0.1)}, "8 of 8 pictures of noise"),
    "a detector of the search that does": ("sd1", "best_of_n", {"search": Says(0.1)}, "8 of 8 pictures of noise"),
    "a judge alone": ("sd1", "best_of_n", {"judge": Says(0.9)}, "judge what was optimised for it"),
    "another model's detectors": ("sd1", "best_of_n", {"judge": None}, "default detectors know the pictures of"),
    "weights of a run-time eraser": ("sd1", "relearning", {"eraser": efface.EIUP(Concept("beer"))}, "acts at run time"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_two_sentences_before_anything_is_drawn(case: str, tmp_path: Any) -> None:
    kind, attack, options, reason = BAD[case]
    pipe = tiny.untouched("sd1" if kind == "no table" else kind)
    if kind == "no table":
        pipe = copy.copy(pipe)
        pipe.tokenizer = NoTable(pipe.tokenizer)
    calls: list[int] = []
    hook = tiny.denoiser_of(pipe).register_forward_pre_hook(lambda module, args: calls.append(1))
    given = {"prompts": [BEER], "judge": FINE, "out": tmp_path / "a", **options}
    try:
        with pytest.raises(ValueError, match=reason) as told:
            redteam.attack(pipe, attack, Concept("beer"), **given)
    finally:
        hook.remove()
    first, _, second = str(told.value).rpartition(". ")
    assert first and second.endswith(".") and calls == [] and not (tmp_path / "a").exists()


def test_an_attack_that_the_budget_ends_before_its_first_proposal_is_not_judged(tmp_path: Any) -> None:
    """One more than the plain prompt costs: the check of the budget cannot know what a proposal of an attack costs."""

    class Drawn:
        name = "sees every picture of the judge's, none of the search's"

        def __init__(self, sees: bool) -> None:
            self.sees = sees

        def __call__(self, images: Tensor) -> Tensor:
            return torch.full(
                (1, len(images)), self.sees and not bool((images[0] - images[0].mean()).abs().max() > 0.49)
            )

    pipe = tiny.untouched("sd1")
    options = {
        "judge": Drawn(True),
        "search": Drawn(False),
        "n": 1,
        "steps": 2,
        "budget": 9,
        "benign": (),
        "control": False,
    }
    with pytest.raises(checks.NotJudged, match=r"\(the budget of 9 rows ended before the first one\).*Raise `budget`"):
        redteam.attack(pipe, "paraphrase", Concept("beer"), prompts=[BEER], out=tmp_path / "a", **options)


def test_attacks_that_share_a_memory_draw_what_is_not_an_attack_once() -> None:
    pipe = tiny.untouched("sd1")
    calls: list[int] = []
    hook = tiny.denoiser_of(pipe).register_forward_pre_hook(lambda module, args: calls.append(1))
    memory: dict[Any, Any] = {}
    try:
        one, two = (
            GuardedModel(
                pipe, (efface.EIUP(Concept("beer"), strength=s),), None, (1,), 2, 3.0, memory=memory, identity=name
            )
            for s, name in ((1.0, "one"), (3.0, "two"))
        )
        made = [victim.plain(BEER, (7, 8), guarded) for victim in (one, two, one, two) for guarded in (False, True)]
    finally:
        hook.remove()
    assert len(calls) == 3 * 2  # the base model, two guards; two steps each
    assert all(torch.equal(made[k], made[k + 4]) for k in range(4)) and torch.equal(made[0], made[2])
    assert not torch.equal(made[1], made[3]) and not torch.equal(made[0], made[1])
    with one.guarded():
        assert torch.equal(one.draw(Proposal(BEER), (7, 8)), made[1]) and torch.equal(
            one.draw_original(BEER, (7, 8)), made[0]
        )


def test_the_budget_counts_rows_with_gradients_twice() -> None:
    pipe = tiny.untouched("sd1")
    victim = GuardedModel(pipe, (), None, (1,), budget=5)
    text = encoded(pipe, [BEER])[0].text
    sample = torch.zeros(1, 4, 8, 8)
    with victim.metered():
        with torch.no_grad():
            pipe.unet(sample, 1, encoder_hidden_states=text)
        assert victim.spent == Cost(forward=1)
        pipe.unet(sample.requires_grad_(), 1, encoder_hidden_states=text)
        assert (victim.spent.forward, victim.spent.backward, victim.spent.rows) == (2, 1, 3)
        with pytest.raises(BudgetSpent):
            pipe.unet(torch.cat([sample] * 2), 1, encoder_hidden_states=torch.cat([text] * 2))
        assert victim.spent.rows == 3
        encoded(pipe, [BEER] * 120)  # with the empty texts of guidance
        assert victim.spent.texts == 240
        with pytest.raises(BudgetSpent):
            encoded(pipe, [BEER] * 6)
    assert not tiny.untouched("sd1").text_encoder._forward_pre_hooks
    assert not tiny.denoiser_of(pipe)._forward_pre_hooks


def test_the_guard_is_off_within_original_and_on_again_after_it() -> None:
    pipe = tiny.untouched("sd1")
    victim = GuardedModel(pipe, (efface.EIUP(Concept("beer")),), None, (1,))
    with victim.guarded():
        assert len(efface.active(pipe)) == 1
        with victim.guarded():
            assert len(efface.active(pipe)) == 1
        with pytest.raises(KeyError), victim.original():
            assert len(efface.active(pipe)) == 0
            raise KeyError
        assert len(efface.active(pipe)) == 1
    assert len(efface.active(pipe)) == 0


@pytest.mark.long
@pytest.mark.parametrize("eraser", ["uce", "eiup"])
def test_the_guard_is_as_the_innermost_block_says_however_blocks_are_nested(eraser: str) -> None:
    """Two nested `original` put the erasers on twice: deltas were refused, and EIUP stayed on the base model."""
    pipe = tiny.untouched("sd1")
    made = efface.UCE().fit(pipe, [Concept("beer")]) if eraser == "uce" else efface.EIUP(Concept("beer"))

    def enter(victim: GuardedModel, blocks: Sequence[str], stop: bool) -> None:
        if not blocks:
            if stop:
                raise KeyError
            return
        before = len(efface.active(pipe))
        try:
            with getattr(victim, blocks[0])():
                assert len(efface.active(pipe)) == (blocks[0] == "guarded")
                enter(victim, blocks[1:], stop)
                assert len(efface.active(pipe)) == (blocks[0] == "guarded")
        finally:
            assert len(efface.active(pipe)) == before

    for depth in (1, 2, 3, 4):
        for blocks in itertools.product(("guarded", "original"), repeat=depth):
            victim = GuardedModel(pipe, (made,), None, (1,))
            enter(victim, blocks, stop=False)
            with pytest.raises(KeyError):
                enter(victim, blocks, stop=True)


@pytest.mark.parametrize("eraser", ["uce", "eiup"])
@pytest.mark.parametrize("budget", [None, 14])
def test_a_fit_inside_of_the_guard_is_drawn_and_leaves_the_base_model_alone(eraser: str, budget: int | None) -> None:
    pipe = tiny.untouched("sd1")
    made = efface.UCE().fit(pipe, [Concept("beer")]) if eraser == "uce" else efface.EIUP(Concept("beer"))
    victim = GuardedModel(pipe, (made,), Says(9.0), (1, 2), steps=3, guidance=5.0, budget=budget)
    base = victim.draw_original(BEER)
    attack = efface.ConceptArithmetics(recipes=("fitted",))
    with victim.guarded():
        guarded = victim.draw(Proposal(BEER))
        found = search(victim, Proposal(BEER), attack.propose(Target(Concept("beer"), BEER), victim))
        assert found.refused == [] and (found.tried > 0) == (budget is None)
        assert torch.equal(victim.draw_original(BEER), base) and not torch.equal(guarded, base)
        assert torch.equal(victim.draw(Proposal(BEER)), guarded)
    assert len(efface.active(pipe)) == 0


@pytest.mark.parametrize("eraser", ["uce", "eiup"])
def test_a_pipeline_made_from_the_attacked_one_is_guarded_once(eraser: str) -> None:
    """It shares the models: an edit of the weights that counted twice was refused, and counted as resistance."""
    pipe = tiny.untouched("sd1")
    made = efface.UCE().fit(pipe, [Concept("beer")]) if eraser == "uce" else efface.EIUP(Concept("beer"))
    attack = Proposal(BEER, {"image": torch.rand(1, 3, 64, 64), "strength": 0.9}, pipeline=from_pictures)
    victim, plain = (GuardedModel(pipe, erasers, None, (1, 2), 3, 3.0) for erasers in ((made,), ()))
    with victim.guarded():
        guarded = victim.draw(attack)
        assert len(efface.active(pipe)) == 1
    other = from_pictures(pipe)
    with made.apply(other):
        expected = plain.draw(dataclasses.replace(attack, pipeline=lambda _: other))
    assert torch.equal(guarded, expected)
    assert not torch.equal(guarded, plain.draw(attack))


# ---------------------------------------------------------------- the cheap attacks


class OnTiny:
    pipe = tiny.untouched("sd1")
    seeds, steps, guidance = (1, 2), 3, 3.0


def proposals(attack: Attack, prompt: str = BEER, **concept: Any) -> list[Proposal]:
    return list(attack.propose(Target(Concept("beer", **concept), prompt), OnTiny()))


@pytest.mark.parametrize("name", registry.methods("attacks"))
def test_every_attack_says_what_access_it_needs_and_can_be_built(name: str) -> None:
    made = redteam.build(name)
    assert made.access in ACCESS and dataclasses.is_dataclass(made)
    assert getattr(efface, type(made).__name__) is type(made)
    with pytest.raises(ValueError, match="no field"):
        redteam.build(name, nonsense=1)


@pytest.mark.parametrize("name", registry.methods("attacks"))
def test_controls_have_as_many_tokens_and_no_word_of_the_concept(name: str) -> None:
    attack = redteam.build(name)
    if attack.access in ("gradients", "embeddings") or attack.control.__func__ is not Attack.control:
        pytest.skip("has a control of its own")
    pipe = OnTiny.pipe
    made = attack.control(Proposal(BEER), Target(Concept("beer"), BEER), OnTiny(), Random(0))
    count = len(pipe.tokenizer(BEER).input_ids)
    assert len(pipe.tokenizer(made.prompt).input_ids) == count and "beer" not in made.prompt.split()
    assert made.prompt != BEER


def test_random_texts_differ_by_seed_and_keep_away_from_the_concept() -> None:
    pipe = tiny.untouched("sd1")
    texts = {random_text(pipe, BEER, Random(k), ("a beer", "wine glass")) for k in range(20)}
    assert len(texts) > 10
    assert not {"beer", "wine", "glass"} & {word for text in texts for word in text.split()}
    assert words(pipe.tokenizer) is words(pipe.tokenizer)


def test_recipes_have_the_weights_of_the_table() -> None:
    def terms(**fields: Any) -> list[list[tuple[str, float]]]:
        made = proposals(efface.ConceptArithmetics(**fields), keep=("wine", "cat"), anchor="a glass")
        return [[(term.prompt, term.weight) for term in each.inside.terms] for each in made]  # type: ignore[union-attr]

    assert terms(recipes=("sign_flip",), weights=(-2.0,)) == [[(BEER, -2.0)]]
    cancelled = terms(recipes=("context_cancel",), contexts=("the pub",), context_weights=(5.0,))
    assert cancelled[0] == [(f"{BEER} and the pub", 5.0), ("the pub", -5.0)]
    assert cancelled[1] == [*cancelled[0], ("a glass", -5.0)]
    assert terms(recipes=("parts",), context_weights=(5.0,)) == [[("red", 5.0), ("beer", 5.0)]]
    (contrast,) = terms(recipes=("contrast",), context_weights=(4.0,), family="the glass")
    assert contrast == [("the glass", 4.0), ("wine", -2.0), ("cat", -2.0)]
    assert terms(recipes=("contrast",), context_weights=()) == []


def test_controls_of_compositions_keep_weights_and_windows() -> None:
    target = Target(Concept("beer"), BEER)
    attack = efface.ConceptArithmetics(recipes=("sign_flip",), window=(0.1, 0.9))
    proposal = next(attack.propose(target, OnTiny()))
    control = attack.control(proposal, target, OnTiny(), Random(0))
    mine, other = proposal.inside.terms[0], control.inside.terms[0]
    assert (other.weight, other.window) == (mine.weight, mine.window) and other.prompt != mine.prompt
    assert control.prompt == other.prompt and control.call == proposal.call
    with pytest.raises(TypeError, match="Give its own"):
        attack.control(Proposal(BEER), target, OnTiny(), Random(0))


def test_lookalikes_read_the_same_and_are_written_differently() -> None:
    made = {p.about: p.prompt for p in efface.Lookalike().propose(Target(Concept("b"), "a beer"), ON_EMOJI)}
    assert made["apart"] == "a b e e r" and made["hyphen"] == "a be-er"
    assert made["digits"] == "a b33r" and made["accents"] == "a béér"
    assert all(text != "a beer" for text in made.values())


class OnEmoji:
    seeds, steps, guidance = (1, 2), 3, 3.0

    @functools.cached_property
    def pipe(self) -> Any:
        return efface.load("emoji")


ON_EMOJI = OnEmoji()


def test_long_prompts_fit_the_encoder() -> None:
    for each in proposals(efface.Repetition(filler="the big red moon")):
        assert efface.pipelines.cut_off(OnTiny.pipe, each.prompt) == "" and BEER in each.prompt
    assert any(each.prompt.startswith("the big") for each in proposals(efface.Repetition(filler="the big red moon")))


def test_paraphrases_avoid_the_words_of_the_concept_and_begin_with_the_nearest() -> None:
    made = proposals(efface.Paraphrase(rewordings=(), neighbours=4), phrases=("wine",))
    texts = [each.prompt for each in made]
    assert texts and BEER not in texts and not any("wine" in text.split() for text in texts)
    table = torch.nn.functional.normalize(OnTiny.pipe.text_encoder.get_input_embeddings().weight.detach(), dim=-1)
    ids = {word: OnTiny.pipe.tokenizer(word).input_ids[1] for word in words(OnTiny.pipe.tokenizer)}
    near = sorted(ids, key=lambda word: -float(table[ids[word]] @ table[ids["beer"]]))
    allowed = [word for word in near if word not in ("beer", "wine")][:4]
    assert {text.split()[2] for text in texts if text.startswith("a red ")} == set(allowed)


def test_translations_replace_known_words() -> None:
    target = Target(Concept("beer"), "a beer at night")
    made = [each.prompt for each in efface.Translation().propose(target, ON_EMOJI)]
    assert "a cerveza at noche" in made and "cerveza noche" in made
    with pytest.raises(ValueError, match="words that have translations"):
        next(efface.Translation().propose(Target(Concept("x"), "a rocket"), ON_EMOJI))


def test_best_of_n_tries_seeds_until_the_search_sees_it() -> None:
    pipe = tiny.untouched("sd1")
    calls: list[int] = []

    class Third:
        name = "sees a picture at the third try"

        def __call__(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            return torch.full((1, len(images)), len(calls) >= 3)

    victim = GuardedModel(pipe, (), Third(), (1, 2), steps=1)
    images = victim.draw(Proposal(BEER, tries=5))
    assert calls == [2, 2, 2] and images.shape[0] == 2
    first = victim._drawn(Proposal(BEER), (1, 2))
    assert not torch.equal(images, first)


def test_a_schedule_switches_the_prompt() -> None:
    made = proposals(efface.PromptSchedule(covers=("the moon",), switches=(0.4,), guidance=3.0))
    terms = made[0].inside.terms  # type: ignore[union-attr]
    assert [(t.prompt, t.window) for t in terms] == [("the moon", (0.0, 0.4)), (BEER, (0.4, 1.0))]
    late = drawn("sd1", "the moon", 3.0, made[0].inside)
    assert apart(late, drawn("sd1", "the moon", 3.0)) > 1e-2 and apart(late, drawn("sd1", BEER, 3.0)) > 1e-2


def test_seen_from_outside_the_denoiser_predicts_what_the_pipeline_does() -> None:
    pipe = tiny.untouched("sd1")
    denoiser, both, found = Denoiser(pipe), encoded(pipe, [BEER, ""]), []
    with denoiser.watched(found.append, *both):
        tiny.latents(pipe, BEER, num_inference_steps=2, guidance_scale=3.0)
    assert len(found) == 2 and found[0].time < found[1].time
    (again,) = denoiser.predict(found[0], both[:1])
    assert torch.allclose(again, found[0].conditional, atol=1e-5)


# ---------------------------------------------------------------- hidden or gone


def test_only_the_hidden_part_of_a_picture_is_drawn() -> None:
    pipe, image = tiny.pipeline("sd1"), torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    known = latents_of(pipe, image)
    for side, hidden in (("left", slice(None, 4)), ("right", slice(4, None))):
        with Visible(image, half_mask(image, side))(pipe):
            made = tiny.latents(pipe, BEER, num_inference_steps=3, guidance_scale=3.0)
        shown = torch.ones(8, dtype=torch.bool)
        shown[hidden] = False
        assert torch.equal(made[..., shown], known[..., shown].to(made))
        assert apart(made[..., hidden], known[..., hidden]) > 0.1
    with Visible(image, half_mask(image, "all"))(pipe):
        everything = tiny.latents(pipe, BEER, num_inference_steps=3, guidance_scale=3.0)
    assert torch.equal(everything, tiny.latents(pipe, BEER, num_inference_steps=3, guidance_scale=3.0))
    assert "step" not in vars(pipe.scheduler)


def test_the_visible_part_also_stays_where_latents_are_packed() -> None:
    pipe, image = tiny.pipeline("flux"), torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    known = latents_of(pipe, image)
    with Visible(image, half_mask(image, "bottom"))(pipe):
        made = tiny.latents(pipe, BEER, num_inference_steps=3)
    assert torch.allclose(made[:, : made.shape[1] // 2], known[:, : made.shape[1] // 2].to(made), atol=1e-5)
    assert apart(made[:, made.shape[1] // 2 :], known[:, made.shape[1] // 2 :]) > 0.1


@pytest.mark.long
def test_inverted_noise_leads_back_to_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline("sd1")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    call = {"num_inference_steps": 200, "guidance_scale": 1.0}
    picture, other = (tiny.latents(pipe, BEER, **call, seed=seed) for seed in (1, 2))
    monkeypatch.setattr("efface.attacks.latent_inversion.latents_of", lambda pipe, images: picture)
    victim = GuardedModel(pipe, (), Says(-1.0), (1,), steps=200, guidance=1.0)
    noise = inverted(victim, Target(Concept("beer"), BEER))
    with Near(noise, 0.0)(pipe):
        again = tiny.latents(pipe, BEER, **call)
    assert apart(again, picture) < 0.1 * apart(other, picture)
    with Near(noise, 0.6)(pipe):
        first, second = (tiny.latents(pipe, BEER, **call, seed=seed) for seed in (1, 2))
    assert apart(first, second) > 1e-2
    assert isinstance(pipe.scheduler, DDIMScheduler) and "prepare_latents" not in vars(pipe)
    with pytest.raises(ValueError, match="image_to_image"):
        efface.LatentInversion().check(tiny.untouched("sd3"))


def test_stolen_weights_hold_the_deltas_and_run_time_erasers_have_none() -> None:
    pipe = tiny.pipeline("sd1")
    delta = efface.UCE().fit(pipe, Concept("beer"))
    victim = GuardedModel(pipe, (delta,), None, (1,), steps=2)
    stolen = victim.stolen()
    with delta.apply(pipe):
        erased = tiny.latents(pipe, BEER)
    assert apart(erased, tiny.latents(pipe, BEER)) > 1e-3
    assert torch.equal(tiny.latents(stolen.pipe, BEER), erased) and not efface.active(stolen.pipe)
    with pytest.raises(ValueError, match="EIUP acts at run time"):
        dataclasses.replace(victim, erasers=(delta, efface.EIUP(Concept("beer")))).stolen()


def test_rounded_weights_have_so_many_values_and_the_largest_stays() -> None:
    weight = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4):
        made = rounded(weight, bits)
        assert all(len(row.unique()) <= 2**bits - 1 for row in made)
        assert torch.allclose(made.abs().amax(1), weight.abs().amax(1))
    assert float((rounded(weight, 12) - weight).abs().max()) < 2e-3 < float((rounded(weight, 4) - weight).abs().max())


def test_relearning_trains_only_layers_that_read_text_and_counts_its_cost() -> None:
    pipe = tiny.pipeline("sd1")
    delta = efface.UCE().fit(pipe, Concept("beer"))
    victim = GuardedModel(pipe, (delta,), Says(-1.0), (1, 2), steps=2, guidance=3.0)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    attack = efface.Relearning(pictures=3, steps=(2, 4), batch=2, lr=1e-2)
    with victim.guarded(), victim.metered():
        first, second = attack.propose(Target(Concept("beer"), BEER), victim)
        assert victim.spent.backward == 4 * 2
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())
    with delta.apply(pipe):
        erased = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    changed, readers = {}, ("attn2.to_k.weight", "attn2.to_v.weight")
    for proposal in (first, second):
        assert not proposal.guarded
        state = proposal.pipeline(pipe).unet.state_dict()
        changed[proposal.about] = {name for name, weight in state.items() if not torch.equal(weight, erased[name])}
        assert changed[proposal.about] and all(name.endswith(readers) for name in changed[proposal.about])
    assert list(changed) == [f"after {k} steps on 3 pictures of 'a red beer'" for k in (2, 4)]


# ---------------------------------------------------------------- from the command line


@pytest.mark.long
def test_the_command_says_the_verdict_and_keeps_bars(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from efface.cli import app

    common = ["attack", "best_of_n", "--concept", "cat", "--prompt", "a cat", "--steps", "8", "-n", "2", "--no-control"]
    common += ["--option", "n=[2]", "--budget", "200"]
    out = tmp_path / "out"
    told = CliRunner().invoke(app, [*common, "--base", "--out", str(out), "--json"])
    assert told.exit_code == 0, told.output
    made = json.loads(told.stdout)["attacks"][0]
    assert made["rates"]["attacked"]["value"] == 1.0 and made["access"] == "text"
    assert (out / "attacks.html").is_file()
    told = CliRunner().invoke(app, [*common, "--base", "--out", str(out), "--at-most", "0.5"])
    assert told.exit_code == 3 and "exceeded by best_of_n" in told.output
    told = CliRunner().invoke(app, ["attack", "best_of_n", "--concept", "cat", "--prompt", "a rocket", "--steps", "2"])
    assert told.exit_code == 4 and "nothing to attack" in told.output.replace("\n", " ")
    only = {"quantisation": "attacks", "best_of_n": "attacks"}  # of which one is for weights
    known = registry.methods
    monkeypatch.setattr(registry, "methods", lambda room=None: only if room == "attacks" else known(room))
    every = ["attack", "all", *common[2:11], "--method", "eiup", "--budget", "200", "--out", str(tmp_path / "all")]
    told = CliRunner().invoke(app, every)
    assert told.exit_code == 0, told.output
    assert "quantisation was left out" in told.output.replace("\n", " ")
    assert (tmp_path / "all/best_of_n/attempts.jsonl").is_file() and (tmp_path / "all/attacks.html").is_file()
    monkeypatch.undo()
    for wrong in (["--base", "--method", "eiup"], ["--phrase", "x"], ["--budget", "3"]):
        assert CliRunner().invoke(app, [*common, *wrong, "--out", str(tmp_path / "w")]).exit_code == 2
