"""CRG, AdaVD, Semantic Surgery and SPEED against their formulas, written out without the package's code."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ALCOHOL, CAT, PROMPT, PROMPTS, bare, change, denoiser_of, drawn, latents, pipeline
from torch import Tensor

import efface
from efface import CRG, SPEED, UCE, AdaVD, Concept, SemanticSurgery
from efface._text import encode
from efface._weights import keys_values
from efface.delta import Delta, dense
from efface.editors.speed import invariants
from efface.erasers.adavd import component
from efface.erasers.semantic_surgery import presences
from efface.hooks import Prediction

pytestmark = pytest.mark.thinned("long")

CROSS = ("sd1", "sdxl", "bert", "pixart")
double = functools.cache(lambda family: pipeline(family).to(torch.float64))
every_family = pytest.mark.parametrize("family", CROSS)
seeds = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- CRG


def prediction(prompt: Tensor, negative: Tensor, concept: Tensor) -> Prediction:
    return Prediction(prompt, negative, concept, 7.5, torch.tensor(0.5), {})


def shares(seen: Prediction, prompt: Tensor) -> list[float]:
    """a of each picture."""
    towards = (seen.concept - seen.negative).flatten(1)
    return [float(x @ d / (d @ d)) for x, d in zip((prompt - seen.negative).flatten(1), towards, strict=True)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=seeds, threshold=st.floats(-1, 1), strength=st.floats(0.1, 3))
def test_crg_moves_the_share_towards_the_threshold_and_nothing_else(
    seed: int, threshold: float, strength: float
) -> None:
    negative, concept, rest = random(seed, 3, 4, 2, 2, 2)
    towards, want = concept - negative, [-1.5, threshold, 1.5, 0.7]
    flat, other = towards.flatten(1), rest.flatten(1)
    other = other - (other * flat).sum(1, keepdim=True) / (flat * flat).sum(1, keepdim=True) * flat
    prompt = negative + torch.tensor(want, dtype=rest.dtype)[:, None, None, None] * towards + other.view_as(rest)
    seen = prediction(prompt, negative, concept)
    edited = prompt + CRG("alcohol", strength=strength, threshold=threshold).guide(seen)
    for before, after in zip(want, shares(seen, edited), strict=True):
        assert after == pytest.approx(before - strength * max(before - threshold, 0), abs=1e-9)
    assert torch.equal(edited[0], prompt[0])  # below the threshold, to the bit
    excess = torch.tensor([max(a - threshold, 0) for a in want], dtype=rest.dtype)[:, None]
    assert float(((edited - prompt).flatten(1) + strength * excess * flat).abs().max()) < 1e-9


def test_crg_is_finite_where_the_concept_says_nothing() -> None:
    prompt, negative = random(1, 2, 3, 4, 2, 2)
    assert not CRG("alcohol").guide(prediction(prompt, negative, negative)).any()


@pytest.mark.parametrize("family", ["sd1", "sdxl", "pixart", "sd3", "cogview4"])
def test_crg_draws_the_concepts_own_prompt_as_an_empty_one(family: str) -> None:
    """a = 1 becomes 0 at the defaults, so the prediction is the unconditional one, and guidance vanishes."""
    pipe = double(family)
    text = "" if family not in ("sdxl", "sd3") else None
    with CRG(Concept("cat")).apply(pipe):
        got = latents(pipe, "cat", negative_prompt="")
    assert change(got, latents(pipe, "cat", negative_prompt="")) > 1e-2
    if text is not None:  # elsewhere the pooled texts of "" and of no negative prompt differ
        assert change(got, latents(pipe, "", negative_prompt="")) < 1e-9


def test_crg_leaves_prompts_below_the_threshold_alone() -> None:
    assert torch.equal(drawn("sd1", CRG(ALCOHOL, threshold=1e6)), drawn("sd1"))
    assert change(drawn("sd1", CRG(ALCOHOL, threshold=0.0)), drawn("sd1")) > 1e-3


# ---------------------------------------------------------------- AdaVD


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=seeds, concepts=st.integers(1, 4), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_adavd_without_shift_is_the_orthogonal_complement(seed: int, concepts: int, scale: float) -> None:
    values, concept = scale * random(seed, 2, 5, 8), random(seed + 1, concepts, 8)
    rest = values - component(values, concept, None)
    assert float((rest @ concept.T).abs().max()) < 1e-9 * scale
    assert change(component(rest, concept, None) + scale, torch.full_like(rest, scale)) < 1e-9  # idempotent
    q, _ = torch.linalg.qr(concept.T)
    assert change(component(values, concept, None), values @ q @ q.T) < 1e-9
    assert change(component(values, concept.flip(0), (3.0, 0.2)), component(values, concept, (3.0, 0.2))) < 1e-9
    twice = torch.cat([concept, concept[:1]])
    assert change(component(values, twice, None), component(values, concept, None)) < 1e-9


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=seeds, slope=st.floats(0.1, 100), threshold=st.floats(-1, 1))
def test_adavd_with_shift_is_the_papers_formula_for_one_phrase(seed: int, slope: float, threshold: float) -> None:
    values, c = random(seed, 5, 8), random(seed + 1, 8)
    for v, got in zip(values, component(values, c[None], (slope, threshold)), strict=True):
        cosine = float(v @ c / (v.norm() * c.norm()))
        f = 2 / (1 + math.exp(-slope * (cosine - threshold)))
        assert change(got + c, f * (v @ c) / (c @ c) * c + c) < 1e-9


@contextlib.contextmanager
def values_edited(pipe: Any, prompts: int, phrases: Sequence[Sequence[str]], shift: Any, first: int) -> Iterator[None]:
    """Edits the output of every `to_v` that reads text, on the conditional rows: AdaVD without attention."""
    texts = [encode(pipe, list(some)) if some else None for some in phrases]
    watches = []

    def hook(module: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        rows = [*out]
        for k, text in enumerate(texts):
            if text is None:
                continue
            states = denoiser_of(pipe).caption_projection(text.text) if family_projects(pipe) else text.text
            found = torch.nn.functional.linear(states, module.weight, module.bias)
            last = torch.stack([found[i, own.stop - 1] for i, own in enumerate(text.own)])
            row = len(out) - prompts + k
            edited = out[row] - component(out[row], last, shift)
            rows[row] = torch.cat([out[row, :first], edited[first:]])
        return torch.stack(rows)

    def family_projects(pipe: Any) -> bool:
        return getattr(denoiser_of(pipe), "caption_projection", None) is not None

    for name, module in denoiser_of(pipe).named_modules():
        if name.endswith("attn2.to_v"):
            watches.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for watch in watches:
            watch.remove()


@every_family
@pytest.mark.parametrize("shift", [None, (4.0, 0.1)])
def test_adavd_is_an_edit_of_the_values(family: str, shift: Any) -> None:
    pipe, words = double(family), ("beer", "wine glass")
    first = 0 if family == "pixart" else 1
    with AdaVD([Concept("alcohol", words)], shift=shift, tokens="last").apply(pipe):
        got = latents(pipe, PROMPTS)
    with values_edited(pipe, 2, [words, words], shift, first):
        want = latents(pipe, PROMPTS)
    assert change(got, want) < 1e-9
    assert change(got, latents(pipe, PROMPTS)) > 1e-2


def test_adavd_takes_concepts_per_row_and_composes_with_the_edit_of_the_output() -> None:
    pipe = double("sd1")
    with AdaVD(rows=[[], [CAT]], tokens="last").apply(pipe):
        got = latents(pipe, PROMPTS)
    with values_edited(pipe, 2, [(), ("cat",)], None, 1):
        assert change(got, latents(pipe, PROMPTS)) < 1e-9
    assert change(got[:1], latents(pipe, PROMPTS)[:1]) < 1e-12
    both = [drawn("sd1", *pair) for pair in ((AdaVD(ALCOHOL), efface.NAG(CAT)), (AdaVD(ALCOHOL),))]
    assert change(*both) > 1e-2


def test_adavd_takes_every_own_token_where_asked() -> None:
    last, own = (drawn("sd1", AdaVD(Concept("x", ("wine glass",)), tokens=tokens)) for tokens in ("last", "own"))
    assert change(last, own) > 1e-3
    one = [drawn("sd1", AdaVD(CAT, tokens=tokens)) for tokens in ("last", "own")]
    assert torch.equal(*one)  # one token


@pytest.mark.parametrize("shift", [(0.0, 0.5), (1.0, 2.0), (1.0,), "ab", (math.nan, 0.5), 3])
def test_adavd_refuses_a_shift_that_is_none(shift: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected `shift"):
        AdaVD("alcohol", shift=shift)


# ---------------------------------------------------------------- Semantic Surgery


def test_presence_is_the_mean_cosine_over_all_columns() -> None:
    prompt, concepts = random(3, 5, 6), random(4, 2, 5, 6)
    concepts[:, 0] = 0  # CLIP's start token is the same in every text
    for alpha, concept in zip(presences(prompt, concepts, 0.1, 0.05).tolist(), concepts, strict=True):
        pairs = [float(p @ c / (p.norm() * c.norm())) if c.any() else 0.0 for p, c in zip(prompt, concept, strict=True)]
        assert alpha == pytest.approx(1 / (1 + math.exp(-(sum(pairs) / 5 - 0.1) / 0.05)), rel=1e-9)


@pytest.mark.parametrize("family", ["sd1", "bert", "pixart", "sd3", "flux"])
def test_a_prompt_that_is_the_concept_reads_as_the_empty_text(family: str) -> None:
    pipe = double(family)
    states: list[Tensor] = []
    with SemanticSurgery(Concept("cat"), threshold=-1.0).apply(pipe):
        states += [pipe.encode_prompt(**arguments(pipe, "cat"))[0]]
    assert change(states[0], encode(pipe, [""]).text) < 1e-9
    assert change(states[0], encode(pipe, ["cat"]).text) > 1e-2


def arguments(pipe: Any, prompt: str) -> dict[str, Any]:
    from efface.families import family

    return family(pipe).encoding_arguments(pipe, [prompt], {})


def test_a_prompt_without_the_concept_is_drawn_to_the_bit() -> None:
    assert torch.equal(drawn("sd1", SemanticSurgery(ALCOHOL, threshold=1.0)), drawn("sd1"))
    assert change(drawn("sd1", SemanticSurgery(ALCOHOL, threshold=-1.0)), drawn("sd1")) > 1e-2


@every_family
def test_surgery_subtracts_one_text_with_the_phrases_that_the_prompt_holds(family: str) -> None:
    pipe, words = double(family), ("beer", "wine glass", "moon")
    found = encode(pipe, [PROMPT, *words, ""])
    prompt, empty = found.text[0], found.text[4]
    read = torch.ones(len(prompt), dtype=torch.bool) if found.mask is None else found.mask[0]
    cosines = [torch.nn.functional.cosine_similarity(found.text[1 + k] - empty, prompt, dim=-1) for k in range(3)]
    similar = [float(cosine[read].mean()) for cosine in cosines]
    threshold = (sorted(similar)[0] + sorted(similar)[1]) / 2  # the lowest stays below
    held = ", ".join(word for word, s in zip(words, similar, strict=True) if s >= threshold)
    alpha = 1 / (1 + math.exp(-(max(similar) - threshold) / 0.05))
    want = prompt - 0.7 * alpha * (encode(pipe, [held]).text[0] - empty)
    eraser = SemanticSurgery(Concept("x", words), strength=0.7, threshold=threshold, gamma=0.05)
    with eraser.apply(pipe):
        got = pipe.encode_prompt(**arguments(pipe, PROMPT))[0][0]
    assert change(got, want) < 1e-9
    assert change(got, prompt) > 1e-3


def test_surgery_takes_concepts_per_row_and_changes_no_negative_prompt() -> None:
    pipe = double("sd1")
    with SemanticSurgery(rows=[[], [CAT]], threshold=-1.0).apply(pipe):
        got = latents(pipe, PROMPTS, negative_prompt=["cat", "cat"])
    plain = latents(pipe, PROMPTS, negative_prompt=["cat", "cat"])
    with SemanticSurgery(CAT, threshold=-1.0).apply(pipe):
        whole = latents(pipe, PROMPTS, negative_prompt=["cat", "cat"])
    assert change(got[:1], plain[:1]) < 1e-12 and change(got[1:], whole[1:]) < 1e-12
    assert change(got[1:], plain[1:]) > 1e-3


def test_surgery_raises_where_it_cannot_act() -> None:
    """A denoiser that is called without `encode_prompt` would read an unedited prompt."""
    pipe = pipeline("sd1")
    with SemanticSurgery(CAT, threshold=-1.0).apply(pipe), pytest.raises(RuntimeError, match="edited 0 of the 2 in"):
        bare(pipe)
    assert bare(pipe).isfinite().all()


def test_surgery_refuses_phrases_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match=r"^SemanticSurgery joins the phrases into one text, but '.*' is over"):
        SemanticSurgery(
            Concept("many", tuple(f"{word} beer" for word in ("cat", "dog", "moon", "wine", "red", "big")))
        ).apply(pipeline("sd1"))


# ---------------------------------------------------------------- SPEED

KEEP = ("dog", "moon", "wine")
PAIR = Concept("cat", anchor="beer")
EDITOR = SPEED(tokens="last", preserve=KEEP, threshold=1e-6, scale=0.05, filter=False)


def last(pipe: Any, *texts: str) -> Tensor:
    """The last own tokens [N, D]."""
    found = encode(pipe, list(texts))
    return torch.stack([row[max(own.stop - 1, 0)] for row, own in zip(found.text.double(), found.own, strict=True)])


def edited(delta: Delta, pipe: Any) -> dict[str, Tensor]:
    """The changes of all values."""
    made = {name: dense(change).double() for name, change in delta.weights.items()}
    assert made.keys() == {name for name in keys_values(pipe) if name.endswith("to_v.weight")}
    return made


def test_speed_leaves_retained_tokens_and_invariants_and_moves_the_concept(sd1: Any) -> None:
    delta = EDITOR.fit(sd1, PAIR)
    cat, beer, *kept = last(sd1, "cat", "beer", *KEEP)
    fixed = invariants(encode(sd1, [""]).text[0].double())
    assert len(fixed) == 4 and 0 < delta.info["free dimensions"] < len(cat)
    assert delta.info["residual"] < 0.5
    for name, w in edited(delta, sd1).items():
        old = keys_values(sd1)[name].detach().double()
        size = float(w.norm())
        assert size > 1e-2
        for e in (*kept, *fixed):
            assert float((w @ e).norm()) < 1e-5 * size * float(e.norm())
        assert float(((old + w) @ cat - old @ beer).norm()) < 0.5 * float((old @ (cat - beer)).norm())


def test_speed_equals_the_published_form_where_its_inverse_exists(sd1: Any) -> None:
    """Delta = W (X - S) P [I - M K (K^T P M K)^-1 K^T P] M, with explicit inverses, layer by layer."""
    delta = EDITOR.fit(sd1, PAIR)
    c, a = last(sd1, "cat").T, last(sd1, "beer").T
    e, k = last(sd1, *KEEP).T, invariants(encode(sd1, [""]).text[0].double()).T
    values, vectors = torch.linalg.eigh(e @ e.T / e.shape[1])
    free = vectors[:, values < 1e-6]
    p, eye = free @ free.T, torch.eye(len(c), dtype=c.dtype)
    m = torch.linalg.inv(c @ c.T @ p + 0.05 * eye)
    inner = torch.linalg.inv(k.T @ p @ m @ k)
    whole = (a - c) @ c.T @ p @ (eye - m @ k @ inner @ k.T @ p) @ m
    for name, w in edited(delta, sd1).items():
        assert change(w, keys_values(sd1)[name].detach().double() @ whole) < 1e-4  # the delta is float32


def test_speed_is_the_minimum_among_the_changes_it_may_make(sd1: Any) -> None:
    delta = EDITOR.fit(sd1, PAIR)
    cat, beer, *kept = last(sd1, "cat", "beer", *KEEP)
    fixed = torch.stack([*kept, *invariants(encode(sd1, [""]).text[0].double())])
    q, _ = torch.linalg.qr(fixed.T)
    name, found = next(iter(edited(delta, sd1).items()))
    old = keys_values(sd1)[name].detach().double()

    def objective(w: Tensor) -> float:
        return float(((old + w) @ cat - old @ beer).square().sum() + 0.05 * w.square().sum())

    for seed in range(20):
        other = random(seed, *found.shape)
        other -= other @ q @ q.T
        assert objective(found + 1e-3 * other) > objective(found)


def test_speed_protects_what_it_would_change_most(sd1: Any) -> None:
    """With `copies=0` the filter keeps the texts whose influence is above the mean, layer by layer."""
    texts = ("dog", "moon", "wine", "a pub", "a red beer")
    delta = SPEED(tokens="last", preserve=texts, threshold=1e-6, copies=0).fit(sd1, PAIR)
    (cat,), beer, e = last(sd1, "cat"), last(sd1, "beer")[0], last(sd1, *texts)
    s = torch.outer(cat, cat)
    prior = torch.outer(beer - cat, cat) @ torch.linalg.inv(s + torch.eye(len(s), dtype=s.dtype))
    kept = set()
    for name, w in edited(delta, sd1).items():
        old = keys_values(sd1)[name].detach().double()
        influence = (old @ prior @ e.T).norm(dim=0)
        change_of = (w @ e.T).norm(dim=0) / (w.norm() * e.norm(dim=1))
        above = influence >= influence.mean()
        assert above.any() and not above.all()
        assert float(change_of[above].max()) < 1e-5 and float(change_of[~above].min()) > 1e-4
        kept.add(tuple(above.tolist()))
    augmented = SPEED(tokens="last", preserve=texts, threshold=1e-6).fit(sd1, PAIR, seed=1)
    assert augmented.info["free dimensions"] < delta.info["free dimensions"]


def test_speed_refuses_texts_that_leave_nothing_free(sd1: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected preserved texts that leave a direction free, got .* fill all"):
        SPEED(tokens="all", preserve=("", *KEEP, "a pub", "red"), threshold=1e-30, filter=False).fit(sd1, PAIR)


def test_speed_edits_keys_where_asked_and_has_the_rank_of_the_concepts(sd1: Any) -> None:
    both = SPEED(tokens="last", preserve=KEEP, weights="keys_values", filter=False).fit(
        sd1, [PAIR, Concept("moon pub")]
    )
    assert both.weights.keys() == keys_values(sd1).keys()
    assert {int(torch.linalg.matrix_rank(dense(w), rtol=1e-4)) for w in both.weights.values()} == {2}


def test_speed_moves_preserved_texts_less_than_uce() -> None:
    """On the embedded model, at equal residual. The texts are the same for both."""
    pipe = efface.load("emoji")
    keep = ("", "a cat", "a dog", "an apple", "a bicycle", "a cactus", "a clock", "a house", "a horse")
    concept = Concept("alcohol", ("beer mug", "wine glass"), anchor="glass of milk")
    speed = SPEED(preserve=keep, filter=False, threshold=1e-4, scale=0.002).fit(pipe, concept)
    uce = UCE(preserve=keep).fit(pipe, concept)
    assert speed.info["residual"] <= uce.info["residual"]
    text = encode(pipe, list(keep)).text.double().flatten(0, 1)
    names = [name for name in uce.weights if name.endswith("to_v.weight")]
    drift = [sum(float((text @ dense(d.weights[n]).double().T).square().sum()) for n in names) for d in (speed, uce)]
    assert drift[0] < 0.5 * drift[1]
