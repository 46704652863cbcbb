"""What a user is promised, on the shipped model with held-out seeds: the concept goes, the rest stays."""

import itertools

import pytest
import torch
from torch import Tensor

import efface
from efface.models import emoji
from efface.models.emoji.aligned import load_aligned
from efface.models.emoji.eyes import INDEX, Eyes, load_eyes
from efface.models.emoji.weights import FOLDER
from efface.pipelines import draw

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet"),
]
SEEDS = range(1_500_000, 1_500_032)


@pytest.fixture(scope="module")
def pipe() -> object:
    pipe = efface.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def eyes() -> Eyes:
    return load_eyes()


@pytest.fixture(scope="module")
def plain(pipe) -> Tensor:
    return draw(pipe, ["a night at the pub"] * len(SEEDS), SEEDS)


@pytest.fixture(scope="module")
def erased(pipe) -> Tensor:
    with efface.erase(pipe, "alcohol"):
        return draw(pipe, ["a night at the pub"] * len(SEEDS), SEEDS)


def share(found: Tensor, worst: str) -> float:
    """The rate of the eye that is worse for us."""
    rates = found.float().mean(1)
    return float(rates.max() if worst == "most" else rates.min())


def test_an_implicit_prompt_draws_the_concept_and_erased_it_does_not(plain: Tensor, erased: Tensor, eyes: Eyes) -> None:
    assert share(eyes.concept(plain, "alcohol"), "least") >= 0.4
    assert share(eyes.concept(erased, "alcohol"), "most") <= 0.1


def test_what_is_left_is_still_a_picture_of_the_theme(erased: Tensor, eyes: Eyes) -> None:
    others = [i for i in emoji.vocabulary()["themes"]["a night at the pub"] if i not in emoji.truth("alcohol")]
    assert share(eyes.concept(erased, others), "least") >= 0.5
    assert erased.std((1, 2, 3)).min() > 0.05  # no blank picture


@pytest.mark.slow
def test_more_strength_leaves_less_and_spares_the_rest(pipe, eyes: Eyes) -> None:
    """An implied and a named concept, 64 seeds each; a step of the ladder may not undo what the one before did."""
    prompts, seeds = ["a night at the pub", "a beer mug and a cat"] * 64, range(1_800_000, 1_800_128)
    left, kept, alive = [], [], []
    for strength in (0.0, 0.5, 1.0, efface.EIUP("alcohol").strength):
        with efface.EIUP("alcohol", strength=strength).apply(pipe):
            seen = eyes.see(draw(pipe, prompts, seeds))
        concept = eyes.concept(seen, "alcohol")
        left.append((share(concept[:, ::2], "most"), share(concept[:, 1::2], "most")))
        kept.append(share(eyes.concept(seen, "cat")[:, 1::2], "least"))
        alive.append(share(eyes.icons(seen).any(-1), "least"))
    for rates in zip(*left, strict=True):
        assert rates[0] >= 0.6 and rates[-1] <= 0.15
        assert all(after <= before + 0.02 for before, after in itertools.pairwise(rates))
    assert min(kept) >= kept[0] - 0.1 and min(alive) >= alive[0] - 0.2


@pytest.mark.long
def test_the_shipped_adapter_erases(pipe, eyes: Eyes) -> None:
    """What it was fitted on (cat), and what not (dog)."""
    prompts, rows = ["a cat", "a dog"] * 5, [["cat"], ["dog"]] * 5
    seeds = range(1_000_800, 1_000_810)
    plain = eyes.see(draw(pipe, prompts, seeds))
    with efface.GIE(rows=rows, adapter="emoji").apply(pipe):
        seen = eyes.see(draw(pipe, prompts, seeds))
    for row, concept in enumerate(("cat", "dog")):
        assert share(eyes.concept(plain, concept)[:, row::2], "least") >= 0.8
        assert share(eyes.concept(seen, concept)[:, row::2], "most") <= 0.35


@pytest.mark.long
def test_a_picture_is_nearer_to_its_own_prompt(pipe) -> None:
    prompts = ["a cat", "a rocket", "a pizza", "a violin", "a beer mug", "a horse", "a snowman", "a clown"]
    judge = load_aligned()
    images = draw(pipe, prompts, range(1_000_900, 1_000_900 + len(prompts)))
    cosines = judge.images(images) @ judge.texts(prompts).T  # [2, N, N]
    for eye in cosines:
        assert (eye.argmax(1) == torch.arange(len(prompts))).float().mean() >= 0.75
        assert eye.diagonal().mean() > eye.mean() + 0.3


def test_bystanders_stay(pipe, eyes: Eyes) -> None:
    prompts = ["a cat", "a rocket", "a pizza", "a violin"] * 2
    wanted = ["cat-face", "rocket", "pizza", "violin"] * 2
    rows = range(len(prompts))

    def right(images: Tensor) -> Tensor:
        return eyes.icons(images)[:, rows, [INDEX[i] for i in wanted]]

    plain = draw(pipe, prompts, [1_600_000 + k for k in rows])
    with efface.erase(pipe, "alcohol"):
        guarded = draw(pipe, prompts, [1_600_000 + k for k in rows])
    assert share(right(plain), "least") >= 0.8
    assert share(right(guarded), "least") >= 0.7
    assert not torch.equal(plain, guarded)


@pytest.mark.long
def test_free_text_erases_a_style(pipe, eyes: Eyes) -> None:
    prompts = ["a cat, neon sign style", "a neon sign of a guitar"] * 4
    seeds = [1_700_000 + k for k in range(8)]
    assert share(eyes.concept(draw(pipe, prompts, seeds), "neon sign"), "least") >= 0.75
    with efface.erase(pipe, efface.Concept("neon sign")):
        assert share(eyes.concept(draw(pipe, prompts, seeds), "neon sign"), "most") <= 0.25


@pytest.mark.long
@pytest.mark.parametrize(
    "editor",
    [
        efface.UCE(),
        efface.RECE(),
        *(pytest.param(slow, marks=pytest.mark.slow) for slow in (efface.ESD(), efface.SDD())),
    ],
    ids=lambda editor: type(editor).__name__,
)
def test_an_editor_takes_one_of_two_things_out(editor, pipe, eyes: Eyes) -> None:
    pairs = emoji.prompts("cat", "pair")
    rows = [pairs[k % len(pairs)] for k in range(8)]

    def seen(images: Tensor) -> tuple[Tensor, Tensor]:
        """Whether there is a cat, and whether there is the other thing, [2, 8] each."""
        other = [INDEX[keep] for _, (keep,) in rows]
        return eyes.concept(images, emoji.truth("cat")), eyes.icons(images)[:, range(8), other]

    prompts, seeds = [prompt for prompt, _ in rows], range(1_800_000, 1_800_008)
    cat, other = seen(draw(pipe, prompts, seeds))
    assert share(cat, "least") >= 0.75 and share(other, "least") >= 0.75
    with efface.stack(pipe, editor.fit(pipe, "cat")):
        cat, other = seen(draw(pipe, prompts, seeds))
    assert share(cat, "most") <= 0.25 and share(other, "least") >= 0.75
