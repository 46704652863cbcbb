"""What a negative prompt may change under EIUP: nothing in the conditional rows, nothing that brings a concept back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_eiup import FORMS, compile_options, eiup, reference  # noqa: F401
from tiny import ALCOHOL, CAT, PROMPTS, change, denoiser_of, drawn, latents, pipeline
from torch import Tensor

import efface
from efface import EIUP, SLD, Concept, NegativePrompt
from efface.hooks import CrossAttention, ErasurePrompts, Prediction
from efface.models import emoji
from efface.models.emoji.eyes import load_eyes

pytestmark = pytest.mark.thinned("long")

EFFECT = 1e-3
NEGATIVES = (["a red beer", "wine at the pub"], list(PROMPTS), ["beer", "wine glass"], ["", "a big dog"])
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(params=("sd1", "sdxl", "bert", "pixart"))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def predictions(pipe: Any, prompts: Any = PROMPTS, **call: Any) -> tuple[Tensor, Tensor]:
    """What the denoiser predicts in the first step: unconditional rows, conditional rows."""
    seen: list[Tensor] = []
    watch = denoiser_of(pipe).register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        latents(pipe, prompts, **call)
    finally:
        watch.remove()
    return seen[0].chunk(2)


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each edit that EIUP makes, whether its rows are unconditional."""
    seen: list[bool] = []
    original = EIUP.edit

    def spy(self: EIUP, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        seen.append(cross.unconditional)
        return original(self, out, cross, prompts)

    monkeypatch.setattr(EIUP, "edit", spy)
    return seen


# ---------------------------------------------------------------- theorems


@each_form
def test_an_empty_negative_prompt_is_none_to_the_bit(form: str, pipe: Any, family: str, edits: list[bool]) -> None:
    """And edits no row more."""
    with eiup(form).apply(pipe):
        without, count = latents(pipe, PROMPTS), len(edits)
        if family == "sdxl":  # "" is a text there, and none is zeros
            made = pipe.encode_prompt(list(PROMPTS), device="cpu", num_images_per_prompt=1)
            call = {"negative_prompt_embeds": made[1], "negative_pooled_prompt_embeds": made[3]}
        else:
            call = {"negative_prompt": ["", ""]}
        assert torch.equal(latents(pipe, PROMPTS, **call), without)
    assert len(edits) == 2 * count > 0 and not any(edits)
    assert change(without, drawn(family, prompt=PROMPTS)) > EFFECT


@each_form
@pytest.mark.parametrize("negative", NEGATIVES, ids=" + ".join)
def test_conditional_rows_do_not_depend_on_it_to_the_bit(negative: Any, form: str, pipe: Any) -> None:
    plain = predictions(pipe, negative_prompt=negative)
    with eiup(form).apply(pipe):
        _, without = predictions(pipe)
        unconditional, conditional = predictions(pipe, negative_prompt=negative)
    assert torch.equal(conditional, without)
    assert change(conditional, plain[1]) > EFFECT
    if form not in ("projected", "swap"):
        assert torch.equal(unconditional, plain[0])


def test_an_empty_row_beside_another_is_untouched(pipe: Any, family: str) -> None:
    call: dict[str, Any] = {"negative_prompt": ["", "a red beer"]}
    if family == "sdxl":
        made = pipe.encode_prompt(list(PROMPTS), device="cpu", num_images_per_prompt=1, negative_prompt="a red beer")
        call = {"negative_prompt_embeds": made[1], "negative_pooled_prompt_embeds": made[3]}
        call = {name: torch.cat([torch.zeros_like(text[:1]), text[1:]]) for name, text in call.items()}
    plain, _ = predictions(pipe, **call)
    with eiup().apply(pipe):
        edited, _ = predictions(pipe, **call)
    assert torch.equal(edited[0], plain[0])
    assert change(edited[1], plain[1]) > EFFECT


@each_form
def test_zero_strength_is_the_base_model_to_the_bit(form: str, pipe: Any) -> None:
    plain = latents(pipe, PROMPTS, negative_prompt=NEGATIVES[0])
    with eiup(form, strength=0.0).apply(pipe):
        assert torch.equal(latents(pipe, PROMPTS, negative_prompt=NEGATIVES[0]), plain)


def test_above_1_strength_changes_the_conditional_rows_only(pipe: Any) -> None:
    made = {}
    for strength in (0.4, 1.0, 2.5):
        with eiup(strength=strength).apply(pipe):
            made[strength] = predictions(pipe, negative_prompt=list(PROMPTS))
    assert torch.equal(made[1.0][0], made[2.5][0]) and change(made[1.0][1], made[2.5][1]) > EFFECT
    assert change(made[0.4][0], made[1.0][0]) > EFFECT and change(made[0.4][1], made[1.0][1]) > EFFECT


def test_a_phrase_given_twice_is_taken_out_once(sd1: Any) -> None:
    """Directions that are alike are no division by zero."""
    twice = Concept("cat", ("cat", "cat", "cat"))
    with eiup("projected", twice).apply(sd1):
        repeated, _ = predictions(sd1, negative_prompt=NEGATIVES[0])
    with eiup("projected", CAT).apply(sd1):
        once, _ = predictions(sd1, negative_prompt=NEGATIVES[0])
    assert change(repeated, once) < 1e-4


# ---------------------------------------------------------------- however it comes about


@pytest.mark.parametrize("length", [8, 32], ids=["shorter", "longer"])
def test_embeddings_of_another_length(length: int, sd1: Any) -> None:
    texts, negatives = (
        torch.cat([text, text], 1)[:, :length]
        for text in sd1.encode_prompt(list(PROMPTS), "cpu", 1, True, ["a big cat", ""])
    )
    call = {"prompt_embeds": texts, "negative_prompt_embeds": negatives}
    with eiup().apply(sd1):
        erased = latents(sd1, None, **call)
    with reference(sd1, "projected"):
        assert change(erased, latents(sd1, None, **call)) < 1e-5
    assert change(erased, latents(sd1, None, **call)) > EFFECT


def test_embeddings_without_negative_ones_have_the_same_reference(sd1: Any) -> None:
    """The empty text is the encoder's, however long the prompt's embeddings are."""
    text = sd1.encode_prompt(list(PROMPTS), "cpu", 1, False)[0][:, :8]
    with eiup().apply(sd1):
        _, without = predictions(sd1, None, prompt_embeds=text)
        _, given = predictions(sd1, None, prompt_embeds=text, negative_prompt_embeds=text)
    assert torch.equal(without, given)


def test_rows_of_concepts(pipe: Any) -> None:
    plain, _ = predictions(pipe, negative_prompt=NEGATIVES[0])
    rows: Any = [[], [CAT, ALCOHOL]]
    with eiup().apply(pipe) as handle:
        handle.rows = rows
        edited, _ = predictions(pipe, negative_prompt=NEGATIVES[0])
        handle.rows = rows[::-1]
        other, _ = predictions(pipe, negative_prompt=NEGATIVES[0])
    assert torch.equal(edited[0], plain[0]) and change(edited[1], plain[1]) > EFFECT
    assert torch.equal(other[1], plain[1]) and change(other[0], plain[0]) > EFFECT
    with eiup("projected", CAT, ALCOHOL).apply(pipe):
        alone, _ = predictions(pipe, PROMPTS[1], negative_prompt=NEGATIVES[0][1], seed=1)
    assert change(edited[1:], alone) < 1e-5


def test_images_per_prompt(pipe: Any) -> None:
    repeated = [text for text in NEGATIVES[0] for _ in range(2)]
    with eiup().apply(pipe):
        together = latents(pipe, PROMPTS, num_images_per_prompt=2, negative_prompt=NEGATIVES[0])
        apart = latents(pipe, [text for text in PROMPTS for _ in range(2)], negative_prompt=repeated)
    assert change(together, apart) < 1e-5


def test_unconditional_rows_are_edited_in_the_window_only(sd1: Any) -> None:
    def steps(*erasers: EIUP) -> list[Tensor]:
        seen: list[Tensor] = []
        watch = sd1.unet.register_forward_hook(lambda module, args, out: seen.append(out[0][:1]))
        with efface.stack(sd1, *erasers):
            latents(sd1, negative_prompt="a red cat", num_inference_steps=5)
        watch.remove()
        return seen

    late, plain = steps(eiup(window=(0.5, 1.0))), steps()  # the times are 0.2, 0.4, 0.6, 0.8 and 1
    assert [torch.equal(a, b) for a, b in zip(late, plain, strict=True)] == [True, True, False, False, False]


@pytest.mark.long
def test_compiled_with_rows_of_concepts(compile_options: dict[str, Any]) -> None:  # noqa: F811
    rows, call = [[ALCOHOL], [CAT]], {"negative_prompt": ["", "a big dog"]}
    pipe, eager = pipeline("small"), pipeline("small")
    pipe.unet.compile(**compile_options)
    with EIUP(rows=rows).apply(pipe), EIUP(rows=rows).apply(eager):
        erased = latents(pipe, PROMPTS, **call)
        assert change(erased, latents(eager, PROMPTS, **call)) < 1e-5
    assert change(erased, latents(eager, PROMPTS, **call)) > EFFECT


# ---------------------------------------------------------------- NegativePrompt on the same pipeline


@pytest.mark.parametrize("first", ["eiup", "negative"])
def test_negative_prompts_of_an_eraser_are_negative_prompts(first: str, pipe: Any) -> None:
    erasers = [eiup(), NegativePrompt(ALCOHOL)]
    with efface.stack(pipe, *(erasers if first == "eiup" else erasers[::-1])):
        stacked = predictions(pipe)
    with eiup().apply(pipe):
        alone = predictions(pipe, negative_prompt=["beer, wine glass"] * 2)
    assert torch.equal(stacked[1], alone[1])
    assert change(stacked[0], alone[0]) < 1e-5


@pytest.mark.parametrize("rows", [None, [[], [ALCOHOL]]], ids=["all", "rows"])
def test_the_third_prediction_is_edited_like_an_unconditional_one(
    rows: Any, sd1: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Prediction] = []
    original = NegativePrompt.guide
    monkeypatch.setattr(NegativePrompt, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    third = NegativePrompt(ALCOHOL, strength=3.0, rows=rows)
    plain, _ = predictions(sd1, negative_prompt=["beer, wine glass"] * 2)
    with eiup().apply(sd1):
        want, _ = predictions(sd1, negative_prompt=["beer, wine glass"] * 2)
        with third.apply(sd1):
            predictions(sd1)
    of = slice(1 if rows else None, None)
    assert change(seen[0].concept[of], want[of]) < 1e-5
    assert change(want, plain) > EFFECT
    seen.clear()
    with EIUP(rows=[[ALCOHOL], []]).apply(sd1), third.apply(sd1):
        predictions(sd1)
    assert change(seen[0].concept[1:], plain[1:]) < 1e-5


def test_what_sld_looks_for_is_not_edited(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Prediction] = []
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    plain, _ = predictions(sd1, negative_prompt=["beer, wine glass"] * 2)
    with eiup().apply(sd1), SLD(ALCOHOL, warmup=0.0).apply(sd1):
        predictions(sd1)
    assert change(seen[0].concept, plain) < 1e-5


# ---------------------------------------------------------------- the outcome


SEEDS = range(70, 76)  # neither tuned on nor in a card


@functools.cache
def model() -> Any:
    pipe = efface.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def outcome(eraser: Any, prompt: str, negative: str) -> Callable[[str], int]:
    """Of the pictures, how many show an icon or a concept; the eye that sees it more often."""
    eyes = load_eyes()
    with efface.stack(model(), *filter(None, [eraser])):
        images = efface.pipelines.draw(
            model(), [prompt] * len(SEEDS), SEEDS, negative_prompt=negative, num_inference_steps=20
        )
    seen = eyes.see(images)
    return lambda name: int(eyes.concept(seen, emoji.truth(name)).sum(1).max())


@pytest.mark.long
@pytest.mark.parametrize(
    ("concept", "prompt", "negative"), [("cat", "a cat", "a cat"), ("alcohol", "a beer mug", "my beer mug.")]
)
def test_a_negative_prompt_that_repeats_the_prompt_does_not_bring_it_back(
    concept: str, prompt: str, negative: str
) -> None:
    assert outcome(None, prompt, negative)(concept) >= 3
    assert outcome(EIUP(concept), prompt, negative)(concept) == 0


@pytest.mark.long
def test_what_stands_next_to_the_concept_is_drawn() -> None:
    of = outcome(EIUP("cat"), "a cat and a guitar", "a cat")
    assert of("cat") == 0 and of("guitar") >= 5


@pytest.mark.long
def test_a_member_of_the_concept_as_negative_prompt_does_not_bring_another_one_back() -> None:
    """Guidance away from a dagger would otherwise draw a bomb."""
    assert outcome(EIUP("weapon"), "a pirate attack", "dagger")("weapon") <= 1


@pytest.mark.long
def test_an_ordinary_negative_prompt_keeps_its_effect() -> None:
    without = outcome(EIUP("cat"), "a dog and a guitar", "")
    pushed = outcome(EIUP("cat"), "a dog and a guitar", "a guitar")
    assert without("guitar") >= 5 and pushed("guitar") <= 3
