"""Detector guidance: the algebra of its pushes, what it does to a picture, and what it refuses."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import efface
from efface import Concept
from efface._latents import latents_of, pictures_of
from efface.attacks._contract import Proposal, Target
from efface.attacks._noising import Noising
from efface.attacks.detector_guidance import Guided
from efface.models.emoji.eyes import STYLES, ConceptEyes, load_eyes
from efface.redteam.panel import Only
from efface.redteam.victim import GuardedModel

BEER = "a red beer"
FAMILIES = ("sd1", "sdxl", "sd3", "flux", "pixart", "cogview4", "sana", "chroma")
SIGNAL = torch.linspace(0.999, 0.01, 1000).double()


def bright(images: Tensor) -> Tensor:
    """Log-odds of a detector of light pictures, one judge."""
    return 40 * (images.mean((1, 2, 3)) - 0.5)[None]


class Bright:
    name = "light pictures"
    log_odds = staticmethod(bright)

    def __call__(self, images: Tensor) -> Tensor:
        return bright(images) > 0


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
@pytest.mark.parametrize("time", [20.0, 500.0, 980.0])
def test_a_moved_prediction_implies_the_moved_picture(kind: str, time: float) -> None:
    noising, rng = Noising(kind, SIGNAL, 1000), torch.Generator().manual_seed(0)
    clean, noise, change = (torch.randn(2, 4, 3, 3, generator=rng).double() for _ in range(3))
    noisy, truth = noising.noisy(clean, noise, time), noising.target(clean, noise, time)
    assert torch.allclose(noising.clean(truth, noisy, time), clean, atol=1e-9)
    moved = noising.moved(truth, change, time)
    assert torch.allclose(noising.clean(moved, noisy, time), clean + change, atol=1e-9)
    assert not torch.allclose(noising.clean(moved, noisy, time), clean, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_pictures_please_the_detector_and_without_strength_nothing_changes(family: str) -> None:
    pipe = tiny.untouched(family)
    plain = tiny.latents(pipe, BEER)
    found = {}
    for strength in (0.0, 0.3):
        with Guided(lambda images: bright(images)[0], strength, 1)(pipe):
            found[strength] = tiny.latents(pipe, BEER)
        assert "step" not in vars(pipe.scheduler)
    assert torch.allclose(found[0.0], plain, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        before, after = (float(pictures_of(pipe, each).mean()) for each in (plain, found[0.3]))
    assert after > before + 1e-3


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_a_push_has_the_length_and_the_direction_that_the_formula_says(family: str) -> None:
    pipe = tiny.untouched(family)
    clean = tiny.latents(pipe, BEER)

    def odds(latents: Tensor) -> Tensor:
        return bright(pictures_of(pipe, latents))[0]

    pushed = Guided(lambda images: bright(images)[0], 0.01, 1)._pushed(pipe, clean)
    assert torch.allclose((pushed - clean).norm(), 0.01 * clean.norm(), rtol=1e-3)
    with torch.no_grad():
        far = [clean + h * (pushed - clean) for h in (-1.0, 1.0)]
        rise = (odds(far[1]) - odds(far[0])) / 2
        other = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
        other *= (pushed - clean).norm() / other.norm()
        sideways = (odds(clean + other) - odds(clean - other)) / 2
    assert float(rise) > 5 * abs(float(sideways)) > 0


@pytest.mark.long
def test_the_shipped_eyes_give_the_log_odds_that_their_answers_follow_from() -> None:
    eyes, rng = load_eyes(), torch.Generator().manual_seed(0)
    drawn = efface.load("emoji")
    drawn.set_progress_bar_config(disable=True)
    prompts = ["a beer mug", "a cat", "a house, neon sign style", "a dog, watermark"]
    images = drawn(
        prompts, num_inference_steps=8, generator=[torch.Generator().manual_seed(k) for k in range(4)], output_type="pt"
    ).images
    images = torch.cat([images, torch.rand(2, 3, 64, 64, generator=rng)])
    seen = 0
    for concept in ("alcohol", "cat", STYLES[0], STYLES[-1], "watermark", ["cat", "dog"]):
        odds, answer = eyes.log_odds(images, concept), eyes.concept(images, concept)
        assert torch.equal(odds >= 0, answer)
        seen += int(answer.sum())
    assert seen > 2
    at = images[:1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(ConceptEyes("alcohol").log_odds(at)[0].sum(), at)
    with torch.no_grad():
        step = 1e-3 * slope / slope.norm()
        ends = [float(ConceptEyes("alcohol").log_odds((at + k * step).clamp(0, 1))[0]) for k in (-1, 1)]
    assert (ends[1] - ends[0]) / 2 == pytest.approx(1e-3 * float(slope.norm()), rel=0.2)


def test_one_eye_is_guided_by_and_the_other_one_is_not() -> None:
    both = ConceptEyes("alcohol")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first = Only(both, (0,)).log_odds
    assert first is not None and torch.equal(first(images), both.log_odds(images)[:1])
    victim = GuardedModel(None, (), Only(both, (1,)), (1,))
    assert torch.equal(victim.log_odds(images), both.log_odds(images)[1])


def test_what_cannot_be_guided_is_refused_with_the_reason() -> None:
    class Blind:
        name = "blind"

        def __call__(self, images: Tensor) -> Tensor:
            return torch.zeros(1, len(images), dtype=torch.bool)

    assert Only(Blind(), (0,)).log_odds is None
    attack, target = efface.DetectorGuidance(), Target(Concept("beer"), BEER)
    for search in (Blind(), Only(Blind(), (0,))):
        victim = GuardedModel(tiny.untouched("sd1"), (), search, (1,), steps=2)
        with pytest.raises(ValueError, match="no function `log_odds`"):
            next(attack.propose(target, victim))
    for family in ("flux2", "qwenimage"):
        with pytest.raises(ValueError, match="scaling_factor"):
            attack.check(tiny.untouched(family))
        with pytest.raises(ValueError, match="scaling_factor"):
            latents_of(tiny.untouched(family), torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="strengths"):
        efface.DetectorGuidance(strengths=(0.0,))
    with pytest.raises(ValueError, match="pushes"):
        efface.DetectorGuidance(pushes=0)


def test_the_attack_draws_what_its_detector_wants_through_the_guard() -> None:
    pipe: Any = tiny.untouched("sd1")
    victim = GuardedModel(pipe, (efface.EIUP(Concept("beer")),), Bright(), (1, 2), steps=3)
    proposals = list(efface.DetectorGuidance((0.1, 0.3)).propose(Target(Concept("beer"), BEER), victim))
    assert [each.prompt for each in proposals] == [BEER, "", BEER, ""]
    plain, guided = victim.draw(Proposal(BEER)), victim.draw(proposals[2])
    assert (bright(guided) > bright(plain) + 0.01).all()
    control = efface.DetectorGuidance().control(proposals[2], Target(Concept("beer"), BEER), victim, Random(0))
    assert control.prompt != BEER and control.inside is proposals[2].inside
