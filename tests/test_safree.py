"""SAFREE against its formulas with full projectors, its filter, and what reaches the denoiser."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_guided import calls
from tiny import ALCOHOL, LIMIT, PROMPT, PROMPTS, change, drawn, latents, pipeline
from torch import Tensor

import efface
from efface import SAFREE, SLD
from efface.erasers.safree import basis, project

pytestmark = pytest.mark.thinned("long")

ALWAYS = SAFREE(ALCOHOL)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def projector(vectors: Tensor) -> Tensor:
    """C (C^T C)^+ C^T for columns C; vectors come as rows."""
    return vectors.T @ torch.linalg.pinv(vectors @ vectors.T) @ vectors


def written_out(states: Tensor, masked: Tensor, concept: Tensor, first: int, alpha: float) -> tuple[Tensor, float, Any]:
    """The edited states, beta and the triggers, token by token, with D x D matrices."""
    away, span = torch.eye(states.shape[-1], dtype=torch.float64) - projector(concept), projector(masked[1:])
    d = [float((away @ q).norm()) for q in masked[1:]]
    edited, triggers = states.clone(), []
    for i in range(len(d)):
        others = [x for j, x in enumerate(d) if j != i] or [float((away @ masked[0]).norm())]
        triggers.append(d[i] >= (1 + alpha) * sum(others) / len(others))
        if triggers[-1]:
            edited[first + i] = away @ span @ states[first + i]
    cosines = [torch.cosine_similarity(p, away @ span @ p, dim=0) for p in states[: first + len(d) + 1]]
    return edited, 1 - float(sum(cosines)) / len(cosines), triggers


# ---------------------------------------------------------------- the projection


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1_000))
def test_the_projection_is_the_formula(n: int, phrases: int, seed: int) -> None:
    states, masked, concept = (
        random(12, 24, seed=seed),
        random(1 + n, 24, seed=seed + 1),
        random(phrases, 24, seed=seed + 2),
    )
    edit, beta, triggers = project(states, masked, concept, range(1, 1 + n), 0.01)
    edited, want_beta, want_triggers = written_out(states, masked, concept, 1, 0.01)
    assert triggers.tolist() == want_triggers
    assert change(states + edit, edited) < 1e-10 and beta == pytest.approx(want_beta, abs=1e-10)
    others = [k for k in range(12) if not (1 <= k <= n and want_triggers[k - 1])]
    assert not edit[others].any()
    moved = (states + edit)[1 : 1 + n][triggers]
    assert float((moved @ concept.T).abs().sum()) < 1e-9


def test_the_planted_token_is_the_trigger() -> None:
    """All masked prompts lie in the concept's subspace, but the one that lacks the planted token."""
    concept, alone = random(3, 40), random(1, 40, seed=1)
    masked = random(6, 3, seed=2) @ concept + 1e-3 * random(6, 40, seed=3)
    masked[1 + 3] += alone[0]
    edit, _, triggers = project(random(9, 40, seed=4), masked, concept, range(1, 6), 0.01)
    assert triggers.tolist() == [False, False, False, True, False]
    assert [bool(row.any()) for row in edit] == [k == 4 for k in range(9)]


def test_the_order_of_the_projections_matters() -> None:
    states, masked, concept = random(8, 24), random(5, 24, seed=1), random(3, 24, seed=2)
    toxic, span = basis(concept), basis(masked[1:])
    away = torch.eye(24, dtype=torch.float64) - toxic @ toxic.T
    assert change(states @ span @ span.T @ away, states @ away @ span @ span.T) > 0.1
    edit, _, triggers = project(states, masked, concept, range(1, 5), -0.9)
    assert triggers.all() and change((states + edit)[1:5], (states @ span @ span.T @ away)[1:5]) < 1e-10


def test_phrases_that_nearly_coincide_are_one_direction() -> None:
    concept = random(1, 24).repeat(3, 1)
    concept[1] *= 2
    assert basis(concept).shape == (24, 1) and basis(random(3, 24)).shape == (24, 3)
    assert change(basis(concept) @ basis(concept).T, projector(concept[:1])) < 1e-12


def test_a_single_token_is_compared_with_the_prompt() -> None:
    concept, inside = random(3, 24), random(1, 3, seed=1) @ random(3, 24)
    outside = random(1, 24, seed=2)
    for masked, trigger in (([inside, outside], True), ([outside, inside], False)):
        _, _, triggers = project(random(4, 24, seed=3), torch.cat(masked), concept, range(1, 2), 0.01)
        assert triggers.tolist() == [trigger]


# ---------------------------------------------------------------- the filter


def test_the_filter_is_a_switch() -> None:
    nudity, artist = SAFREE.paper(ALCOHOL), SAFREE.artist(ALCOHOL)
    table = {0.0: (0, 0), 0.45: (0, 0), 0.50: (2, 0), 0.53: (5, 2), 0.55: (7, 5), 0.60: (10, 10), 2.0: (10, 10)}
    for beta, steps in table.items():
        want = [(t + 1) / 50 if t else 0.0 for t in steps]
        assert [nudity.until(beta), artist.until(beta)] == pytest.approx(want)
    assert dataclasses.replace(nudity, validation=(1e6, 5.0)).until(0.0) == 0.0
    assert ALWAYS.until(0.0) == float("inf")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_of_fifty_steps_it_edits_those_of_the_paper(spacing: str) -> None:
    scheduler = type(pipeline().scheduler).from_config(pipeline().scheduler.config, timestep_spacing=spacing)
    scheduler.set_timesteps(50)
    times = 1 - scheduler.timesteps / 1000
    for beta, steps in ((0.5, 2), (0.53, 5), (0.6, 10)):
        edited = [SAFREE.paper(ALCOHOL).until(beta) > float(time) for time in times]
        assert edited == [i <= steps for i in range(50)]


# ---------------------------------------------------------------- what the denoiser reads


def states_of(pipe: Any, words: list[str], suffix: str = "") -> tuple[Tensor, Any]:
    """States [L, D] of one encoder for words looked up in the vocabulary, and the pooled text."""
    tokens, model = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
    vocabulary = tokens.get_vocab()
    ids = [0, *(vocabulary[word if word == "!" else f"{word}</w>"] for word in words), 1]
    ids += [vocabulary[tokens.pad_token]] * (LIMIT - len(ids))
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    return (out.hidden_states[-2] if hasattr(pipe, "tokenizer_2") else out.last_hidden_state)[0].double(), out


def by_hand(pipe: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
    words, parts, pooled = prompt.split(), [], None
    for suffix in ("", "_2") if hasattr(pipe, "tokenizer_2") else ("",):

        def end(text: list[str], suffix: str = suffix) -> Tensor:
            return states_of(pipe, text, suffix)[0][1 + len(text)]

        without = [[*words[:i], "!", *words[i + 1 :]] for i in range(len(words))]
        masked = torch.stack([end(text) for text in (words, *without)])
        concept = torch.stack([end(phrase.split()) for phrase in ALCOHOL.phrases])
        edited, _, triggers = written_out(states_of(pipe, words, suffix)[0], masked, concept, 1, 0.01)
        parts.append(edited)
        assert 0 < sum(triggers) < len(words)
        spread = (masked[1:] - masked[1:] @ projector(concept)).norm(dim=-1)
        assert float(spread.max() / spread.min()) > 1.02  # the encoder does notice single words
        if suffix:
            left = ["!" if trigger else word for word, trigger in zip(words, triggers, strict=True)]
            pooled = states_of(pipe, left, suffix)[1].text_embeds[0].double()
    return torch.cat(parts, -1), pooled


def test_the_authors_form_for_sdxl_edits_the_second_encoder_by_pooled_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: subspaces of projected pooled texts, applied to hidden states; all else stays, in every step."""
    pipe, read = pipeline("sdxl"), []
    reread = SAFREE.reread

    def spy(self: SAFREE, *args: Any) -> Any:
        read.append(reread(self, *args))
        return read[-1]

    monkeypatch.setattr(SAFREE, "reread", spy)
    eraser = dataclasses.replace(SAFREE.official_sdxl(ALCOHOL), alpha=0.0)
    with eraser.apply(pipe):
        latents(pipe, PROMPTS, num_inference_steps=2)
    plain, _, pooled, _ = pipe.encode_prompt(list(PROMPTS), device="cpu")
    assert len(read) == 2 and all(torch.equal(one, other) for one, other in zip(*read, strict=True))
    text, other = read[0]
    assert torch.equal(other, pooled) and change(text, plain) > 1e-3
    for k, prompt in enumerate(PROMPTS):
        words = prompt.split()
        without = [[*words[:i], "!", *words[i + 1 :]] for i in range(len(words))]
        masked = torch.stack([states_of(pipe, some, "_2")[1].text_embeds[0].double() for some in (words, *without)])
        phrases = [states_of(pipe, phrase.split(), "_2")[1].text_embeds[0].double() for phrase in ALCOHOL.phrases]
        states = states_of(pipe, words, "_2")[0]
        want, _, triggers = written_out(states, masked, torch.stack(phrases), 1, 0.0)
        first = plain.shape[-1] - states.shape[-1]
        assert any(triggers) and torch.equal(text[k, :, :first], plain[k, :, :first])
        assert change(text[k, :, first:].double(), want) < 1e-4
    encoders = dataclasses.replace(eraser, form="encoders")
    assert change(drawn("sdxl", eraser), drawn("sdxl", encoders)) > 1e-4


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux", "pixart"])
def test_the_form_of_pooled_texts_is_refused_where_there_are_none(family: str) -> None:
    with pytest.raises(ValueError, match="form 'pooled' needs a text encoder .* has none. Use form 'encoders'"):
        SAFREE.official_sdxl(ALCOHOL).apply(pipeline(family))
    with pytest.raises(ValueError, match="Expected `form`"):
        SAFREE(ALCOHOL, form="sdxl")  # type: ignore[arg-type]


def test_the_conditional_rows_read_the_filtered_prompt(pipe: Any, family: str) -> None:
    with ALWAYS.apply(pipe):
        call = calls(pipe, PROMPTS, num_images_per_prompt=2)[-1]
    plain = calls(pipe, PROMPTS, num_images_per_prompt=2)[-1]
    # `calls` sees the arguments that the pipeline gave: the filter is behind it
    assert torch.equal(call["encoder_hidden_states"], plain["encoder_hidden_states"])
    read: list[dict[str, Any]] = []
    original = pipe.unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs)
        return original(*args, **kwargs)

    pipe.unet.forward = forward
    with ALWAYS.apply(pipe):
        latents(pipe, PROMPTS, num_images_per_prompt=2)
    del pipe.unet.forward
    text = read[-1]["encoder_hidden_states"]
    assert torch.equal(text[:4], plain["encoder_hidden_states"][:4])
    for k, prompt in enumerate(PROMPTS):
        states, pooled = by_hand(pipe, prompt)
        for row in (4 + 2 * k, 5 + 2 * k):
            assert change(text[row].double(), states) < 1e-5
            assert change(states, plain["encoder_hidden_states"][row].double()) > 1e-2
            if pooled is not None:
                assert change(read[-1]["added_cond_kwargs"]["text_embeds"][row].double(), pooled) < 1e-5
                assert change(pooled, plain["added_cond_kwargs"]["text_embeds"][row].double()) > 1e-2


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (DDIMScheduler, [0, 1, 2, 3, 4]),
        (PNDMScheduler, [0, 0, 1, 2, 3, 4]),
        (HeunDiscreteScheduler, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
    ],
)
def test_the_prompt_comes_back_when_the_filter_lets_go(
    kind: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many steps, in which some schedulers call the denoiser twice."""
    pipe, options = pipeline(), {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    read: list[Tensor] = []
    original = SAFREE.reread

    def spy(self: SAFREE, *args: Any) -> Any:
        out = original(self, *args)
        read.append(out[0])
        return out

    monkeypatch.setattr(SAFREE, "reread", spy)
    monkeypatch.setattr(SAFREE, "until", lambda self, beta: 2 / 5)
    with SAFREE(ALCOHOL).apply(pipe):
        part = latents(pipe, PROMPTS, num_inference_steps=5)
    plain = pipe.encode_prompt(list(PROMPTS), "cpu", 1, False)[0]
    assert [torch.equal(text, plain) for text in read] == [step >= 2 for step in steps]
    assert torch.equal(read[0], read[1]) and change(part, latents(pipe, PROMPTS, num_inference_steps=5)) > 1e-3


def test_without_a_trigger_or_a_verdict_it_is_the_plain_pipeline(pipe: Any, family: str) -> None:
    never = SAFREE(ALCOHOL, validation=(50.0, 20.0))  # beta is at most 2
    for eraser in (dataclasses.replace(ALWAYS, alpha=100.0), never):
        with eraser.apply(pipe):
            assert torch.equal(latents(pipe), drawn(family))


def test_strength_acts_at_once(sd1: Any) -> None:
    with dataclasses.replace(ALWAYS, strength=0.0).apply(sd1) as handle:

        def switch_on(*_: Any) -> dict[str, Tensor]:
            handle.strength = 1.0
            return {}

        late = latents(sd1, callback_on_step_end=switch_on)
    assert change(late, drawn()) > 1e-3 and change(late, drawn("sd1", ALWAYS)) > 1e-3


def test_other_methods_rows_are_not_filtered(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    with SLD(ALCOHOL).apply(pipe):
        latents(pipe, num_inference_steps=1)
        with ALWAYS.apply(pipe):
            latents(pipe, num_inference_steps=1)
    assert change(seen[1].concept, seen[0].concept) < 1e-5 and change(seen[1].negative, seen[0].negative) < 1e-5
    assert change(seen[1].prompt, seen[0].prompt) > 1e-3


def test_prompts_that_are_empty_or_too_long(sd1: Any) -> None:
    long = "a red cat at the pub " * 5
    with ALWAYS.apply(sd1):
        assert torch.equal(latents(sd1, ""), drawn(prompt=""))
        assert change(latents(sd1, long), drawn(prompt=long)) > 1e-3
        assert change(latents(sd1, "beer"), drawn(prompt="beer")) > 1e-3


def test_what_it_cannot_read_it_refuses(sd1: Any) -> None:
    positive, negative = sd1.encode_prompt(PROMPT, "cpu", 1, True)
    with ALWAYS.apply(sd1), pytest.raises(ValueError, match="`prompt_embeds`. Give the text"):
        latents(sd1, None, prompt_embeds=positive, negative_prompt_embeds=negative)
    sdxl = pipeline("sdxl")
    with ALWAYS.apply(sdxl), pytest.raises(ValueError, match="a different `prompt_2`. Leave it out"):
        latents(sdxl, PROMPT, prompt_2="a dog")
    for fields in ({"alpha": -1.0}, {"validation": (1.0,)}, {"validation": (0.0, 5.0)}, {"strength": -1.0}):
        with pytest.raises(ValueError, match=f"Expected `{next(iter(fields))}"):
            SAFREE(ALCOHOL, **fields)
    with pytest.raises(ValueError, match="SAFREE needs at least one concept"):
        SAFREE([])


# ---------------------------------------------------------------- an encoder that understands words


@pytest.mark.long
def test_on_a_trained_encoder_the_triggers_are_the_concepts_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from efface.erasers import safree

    pipe = efface.load("emoji")
    found: list[Tensor] = []

    def spy(*args: Any) -> Any:
        out = project(*args)
        found.append(out[2])
        return out

    monkeypatch.setattr(safree, "project", spy)
    words = {
        "two champagne glasses": {"champagne"},
        "a tropical cocktail": {"tropical", "cocktail"},
        "a beer and a cloud": {"beer"},
    }
    for prompt, wanted in words.items():
        with SAFREE("alcohol").apply(pipe):
            pipe.encode_prompt(prompt, "cpu", 1, True)
        tokens = pipe.tokenizer.tokenize(prompt)
        triggers = {word for word, trigger in zip(tokens, found[-1].tolist(), strict=True) if trigger}
        assert wanted <= triggers and triggers - wanted <= {"a"}, prompt
