"""Run-time erasers where text and picture attend at once: SD 3/3.5 and FLUX, against their formulas written out."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_guided import SAFETY, sld_rule
from test_safree import written_out as by_formula
from tiny import ALCOHOL, CAT, LIMIT, PROMPT, PROMPTS, change, drawn, latents, pipeline
from tiny.flux import flux
from torch import Tensor

from efface import EIUP, GIE, MACE, RECE, SAFREE, SLD, UCE, Concept, NegativePrompt
from efface._text import SITES, encode, pack
from efface._weights import keys_values
from efface.pipelines import model_hash

pytestmark = pytest.mark.thinned("long")

ALL = ("sd3", "sd35", "flux")
SCALE = 7.5
LENGTH = 24  # of T5's text, which `tiny.latents` asks for
Encoding = tuple[Tensor, Tensor]  # text, pooled


@functools.cache
def double(family: str) -> Any:
    return pipeline(family).to(torch.float64)


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    before = set(SITES)  # of other tests' pipelines
    yield
    assert [site.applied for denoiser, site in SITES.items() if denoiser not in before] == []


def calls(pipe: Any, prompt: Any, *erasers: Any, **options: Any) -> list[dict[str, Any]]:
    """What the denoiser's own forward gets and gives, call by call, with these erasers in front of it."""
    found: list[dict[str, Any]] = []
    original = pipe.transformer.forward

    def forward(**given: Any) -> Any:
        out = original(**given)
        found.append({**given, "out": out[0]})
        return out

    pipe.transformer.forward = forward
    try:
        with contextlib.ExitStack() as on:
            for eraser in erasers:
                on.enter_context(eraser.apply(pipe))
            latents(pipe, prompt, **options)
    finally:
        del pipe.transformer.forward
    return found


@torch.no_grad()
def encoded(pipe: Any, texts: Any) -> Encoding:
    """Each text by the pipeline itself."""
    texts = list(texts)
    if hasattr(pipe, "tokenizer_3"):
        text, _, pooled, _ = pipe.encode_prompt(texts, None, None, "cpu", max_sequence_length=LENGTH)
    else:
        text, pooled, _ = pipe.encode_prompt(texts, device="cpu", max_sequence_length=LENGTH)
    return text, pooled


def loop(pipe: Any, prompts: tuple[str, ...], negative: Any, safety: str, rule: Callable[..., Tensor]) -> Tensor:
    """The pipeline's trajectory by hand: one denoiser call for each text, then Euler's step along the velocity."""
    start = calls(pipe, prompts, num_inference_steps=5)[0]
    x, sigmas = start["hidden_states"][: len(prompts)].clone(), pipe.scheduler.sigmas.double()
    more = {name: start[name] for name in ("img_ids", "txt_ids") if name in start}
    if start.get("guidance") is not None:
        more["guidance"] = start["guidance"][: len(prompts)]
    unit = 1.0 if more else 1000.0
    texts = [encoded(pipe, each) for each in (negative, prompts, [safety] * len(prompts))]
    for k, (now, then) in enumerate(itertools.pairwise(sigmas)):
        e = []
        for text, pooled in texts:
            given = {"encoder_hidden_states": text, "pooled_projections": pooled, **more}
            with torch.no_grad():
                time = torch.full((len(x),), float(now) * unit, dtype=x.dtype)
                e.append(pipe.transformer(hidden_states=x, timestep=time, return_dict=False, **given)[0])
        x = x + (then - now) * rule((k + 0.5) / 5, *e)
    return x


# ---------------------------------------------------------------- guidance


def spread(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """FLUX's predictions are [B, L, C], where `test_guided` takes a standard deviation over three dimensions."""
    return lambda time, *e: rule(time, *(x[:, None] if x.ndim == 3 else x for x in e)).reshape(e[0].shape)


@pytest.mark.parametrize("family", ALL)
def test_sld_is_the_loop_written_out(family: str) -> None:
    pipe, negative = double(family), ["a dog", "the moon"]
    options = {"num_inference_steps": 5, "guidance_scale": SCALE, "negative_prompt": negative}
    eraser = SLD(ALCOHOL, sld_guidance_scale=50, threshold=0.05, momentum_scale=0.5, momentum_beta=0.7, warmup=0.15)
    with eraser.apply(pipe):
        made = latents(pipe, PROMPTS, **options)
        assert torch.equal(made, latents(pipe, PROMPTS, **options))  # the momentum starts anew
    want = loop(pipe, PROMPTS, negative, SAFETY, spread(sld_rule(50, 0.05, 0.5, 0.7, 0.15)))
    assert change(made, want) < 1e-5
    assert change(made, latents(pipe, PROMPTS, **options)) > 1e-2
    for other in ((50, 0.05, 0.0, 0.7, 0.15), (50, 0.05, 0.5, 0.7, 0.0)):  # momentum and warm-up are in it
        assert change(made, loop(pipe, PROMPTS, negative, SAFETY, spread(sld_rule(*other)))) > 1e-3


@pytest.mark.parametrize("family", ["sd3", "sd35"])
def test_the_negative_prompt_with_a_strength_is_the_loop_written_out(family: str) -> None:
    pipe, options = double(family), {"num_inference_steps": 5, "guidance_scale": SCALE}
    with NegativePrompt(ALCOHOL, strength=4.0).apply(pipe):
        made = latents(pipe, PROMPTS, **options)

    def rule(time: float, e_u: Tensor, e_p: Tensor, e_n: Tensor) -> Tensor:
        return e_u + SCALE * (e_p - e_u) - 4.0 * (e_n - e_u)

    assert change(made, loop(pipe, PROMPTS, ["", ""], SAFETY, rule)) < 1e-5
    assert change(made, latents(pipe, PROMPTS, **options)) > 1e-2


@pytest.mark.parametrize("family", ALL)
def test_a_negative_prompt_is_diffusers_own(family: str) -> None:
    pipe, given = pipeline(family), ["a dog", "the moon"]
    joined = ["beer, wine glass, a dog", "beer, wine glass, the moon"]
    with NegativePrompt(ALCOHOL).apply(pipe):
        got = latents(pipe, PROMPTS, negative_prompt=given)
        with NegativePrompt([CAT]).apply(pipe):
            both = latents(pipe, PROMPTS, negative_prompt=given)
        names = ["negative_prompt_2", *(["negative_prompt_3"] if hasattr(pipe, "tokenizer_3") else [])]
        parts = latents(pipe, PROMPTS, negative_prompt=given, **{name: given[::-1] for name in names})
    assert torch.equal(got, latents(pipe, PROMPTS, negative_prompt=joined))
    assert change(got, latents(pipe, PROMPTS, negative_prompt=given)) > 1e-2
    assert torch.equal(both, latents(pipe, PROMPTS, negative_prompt=[f"cat, {text}" for text in joined]))
    swapped = [f"beer, wine glass, {text}" for text in given[::-1]]
    assert torch.equal(parts, latents(pipe, PROMPTS, negative_prompt=joined, **dict.fromkeys(names, swapped)))
    with NegativePrompt(rows=[[ALCOHOL], []]).apply(pipe):
        rows = latents(pipe, PROMPTS, negative_prompt=given)
    assert torch.equal(rows, latents(pipe, PROMPTS, negative_prompt=[joined[0], given[1]]))


@pytest.mark.parametrize("family", ALL)
def test_each_row_is_the_pipelines_own_prediction(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the pooled text of its own: the concept's and, on FLUX, the unconditional one beside."""
    pipe, seen, given = double(family), [], {"negative_prompt": ["a dog", "the moon"], "num_inference_steps": 1}
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    made = calls(pipe, PROMPTS, SLD(ALCOHOL), **given)
    rows, apart = [len(call["out"]) for call in made], family == "flux"
    assert rows == ([6, 2] if apart else [6])
    plain = calls(pipe, PROMPTS, **given)
    prompt, negative = (plain[0]["out"], plain[1]["out"]) if apart else plain[0]["out"].chunk(2)[::-1]
    concept = calls(pipe, (SAFETY, SAFETY), **given)[0]["out"][-2:]
    assert change(seen[0].prompt, prompt) < 1e-9 and change(seen[0].negative, negative) < 1e-9
    assert change(seen[0].concept, concept) < 1e-9 and float(seen[0].time) == 0.5
    pooled = made[0]["pooled_projections"][-2:]
    assert change(pooled, encoded(pipe, [SAFETY] * 2)[1]) < 1e-12
    assert change(pooled, encoded(pipe, PROMPTS)[1]) > 1e-2 and change(concept, prompt) > 1e-2


@pytest.mark.parametrize("family", ALL)
def test_phrases_that_fill_several_texts_are_averaged(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = pipeline(family), []
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    long = ("a big red glass of wine and a big red glass of beer", "the moon")
    assert len(pack(pipe, long)) == 2  # CLIP takes 14 words
    for phrases in (long, long[:1], long[1:]):
        with SLD(Concept("x", phrases)).apply(pipe):
            latents(pipe, num_inference_steps=1)
    both, first, second = (made.concept for made in seen)
    assert change(both, (first + second) / 2) < 1e-5 and change(first, second) > 1e-2


# ---------------------------------------------------------------- SAFREE


def clip(pipe: Any, suffix: str, words: list[str]) -> Any:
    tokens = getattr(pipe, f"tokenizer{suffix}")
    vocabulary = tokens.get_vocab()
    ids = [0, *(vocabulary[word if word == "!" else f"{word}</w>"] for word in words), 1]
    ids += [vocabulary[tokens.pad_token]] * (LIMIT - len(ids))
    return getattr(pipe, f"text_encoder{suffix}")(torch.tensor([ids]), output_hidden_states=True)


def t5(pipe: Any, suffix: str, words: list[str]) -> Tensor:
    """T5 sees its padding here."""
    vocabulary = getattr(pipe, f"tokenizer{suffix}").get_vocab()
    ids = [vocabulary.get(word, vocabulary["<unk>"]) for word in words] + [1]
    ids += [0] * (LENGTH - len(ids))
    return getattr(pipe, f"text_encoder{suffix}")(torch.tensor([ids])).last_hidden_state[0]


def without(words: list[str]) -> list[list[str]]:
    return [words, *([*words[:i], "!", *words[i + 1 :]] for i in range(len(words)))]


def filtered(words: list[str], states: Callable[[list[str]], Tensor], first: int) -> tuple[Tensor, list[bool]]:
    """The edited states of one encoder, whose text begins in column `first`, and its triggers."""

    def pooled(text: list[str]) -> Tensor:
        return states(text)[1 + len(text)] if first else states(text)[: 1 + len(text)].mean(0)

    masked = torch.stack([pooled(text) for text in without(words)])
    concept = torch.stack([pooled(phrase.split()) for phrase in ALCOHOL.phrases])
    edited, _, triggers = by_formula(states(words), masked, concept, first, 0.01)
    assert 0 < sum(triggers) < len(words)
    return edited, triggers


def left(words: list[str], triggers: list[bool]) -> list[str]:
    return ["!" if trigger else word for word, trigger in zip(words, triggers, strict=True)]


@torch.no_grad()
def by_hand(pipe: Any, prompt: str) -> Encoding:
    """What the denoiser is to read instead of a prompt."""
    words = prompt.split()
    if not hasattr(pipe, "tokenizer_3"):
        text, _ = filtered(words, functools.partial(t5, pipe, "_2"), 0)
        masked = torch.cat([clip(pipe, "", each).pooler_output for each in without(words)])
        concept = torch.cat([clip(pipe, "", phrase.split()).pooler_output for phrase in ALCOHOL.phrases])
        triggers = by_formula(torch.zeros(LIMIT, masked.shape[-1]).double(), masked, concept, 1, 0.01)[2]
        assert 0 < sum(triggers) < len(words)
        return text, clip(pipe, "", left(words, triggers)).pooler_output[0]
    parts, pooled = [], []
    for suffix in ("", "_2"):

        def states(text: list[str], suffix: str = suffix) -> Tensor:
            return clip(pipe, suffix, text).hidden_states[-2][0]

        edited, triggers = filtered(words, states, 1)
        parts.append(edited)
        pooled.append(clip(pipe, suffix, left(words, triggers)).text_embeds[0])
    text = torch.nn.functional.pad(torch.cat(parts, -1), (0, 48 - 40))
    behind = torch.zeros(LENGTH, 48).double()
    if pipe.text_encoder_3 is not None:
        behind, _ = filtered(words, functools.partial(t5, pipe, "_3"), 0)
    return torch.cat([text, behind]), torch.cat(pooled)


@pytest.mark.parametrize("family", ALL)
def test_the_conditional_rows_read_the_filtered_prompt(family: str) -> None:
    pipe = double(family)
    read = calls(pipe, PROMPTS, SAFREE(ALCOHOL), num_images_per_prompt=2)
    plain = calls(pipe, PROMPTS, num_images_per_prompt=2)
    assert len(read) == len(plain)
    if family == "flux":  # the prompts' call, then the unconditional one
        for k in range(1, len(read), 2):
            assert torch.equal(read[k]["encoder_hidden_states"], plain[k]["encoder_hidden_states"])
    got, was = (
        [call[-2 if family == "flux" else -1][name] for name in ("encoder_hidden_states", "pooled_projections")]
        for call in (read, plain)
    )
    if family != "flux":
        assert all(torch.equal(a[:4], b[:4]) for a, b in zip(got, was, strict=True))
        got, was = ([part[4:] for part in each] for each in (got, was))
    for k, prompt in enumerate(PROMPTS):
        for want, after, before in zip(by_hand(pipe, prompt), got, was, strict=True):
            for row in (2 * k, 2 * k + 1):
                assert change(after[row], want) < 1e-9
                assert change(want, before[row]) > 1e-2


def test_each_of_the_encoders_is_filtered_by_its_own_triggers() -> None:
    """Those of T5 stand behind the columns of CLIP."""
    pipe = double("sd3")
    read = calls(pipe, PROMPT, SAFREE(ALCOHOL), num_inference_steps=1)[0]["encoder_hidden_states"][1]
    changed = (read - encoded(pipe, [PROMPT])[0][0]).abs() > 1e-9
    n = len(PROMPT.split())
    for columns, features in ((slice(1, 1 + n), slice(0, 16)), (slice(1, 1 + n), slice(16, 40))):
        assert changed[columns, features].any()
    assert changed[LIMIT : LIMIT + n].any()
    changed[1 : 1 + n, :40] = changed[LIMIT : LIMIT + n] = False
    assert not changed.any()


def test_safree_holds_where_layers_are_skipped_and_guided_methods_say_so() -> None:
    pipe = double("sd3")
    options = {"skip_guidance_layers": [0], "num_inference_steps": 5, "skip_layer_guidance_stop": 0.5}
    read = calls(pipe, PROMPTS, SAFREE(ALCOHOL), **options)
    skipped = [call for call in read if call.get("skip_layers")]
    assert skipped and len(read) == 5 + len(skipped)
    for call in skipped:
        assert torch.equal(call["encoder_hidden_states"], read[0]["encoder_hidden_states"][2:])
        assert torch.equal(call["pooled_projections"], read[0]["pooled_projections"][2:])
    with SLD(ALCOHOL).apply(pipe), pytest.raises(ValueError, match=r"`skip_guidance_layers` compares .*guidance\."):
        latents(pipe, PROMPTS, **options)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_what_safree_cannot_read_it_refuses(family: str) -> None:
    pipe = pipeline(family)
    text, pooled = encoded(pipe, [PROMPT])
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    given |= {f"negative_{name}": value for name, value in given.items()}
    with SAFREE(ALCOHOL).apply(pipe):
        with pytest.raises(ValueError, match="`prompt_embeds`. Give the text"):
            latents(pipe, None, **given)
        with pytest.raises(ValueError, match="a different `prompt_2`. Leave it out"):
            latents(pipe, PROMPT, prompt_2="a dog")
        if family == "sd3":
            with pytest.raises(ValueError, match="a different `prompt_3`. Leave it out"):
                latents(pipe, PROMPT, prompt_3="a dog")
    with (
        NegativePrompt(ALCOHOL).apply(pipe),
        pytest.raises(ValueError, match="`negative_prompt_embeds`. Give the text"),
    ):
        latents(pipe, None, **given)
    with SLD(ALCOHOL).apply(pipe):
        assert change(latents(pipe, None, **given), latents(pipe, PROMPT, negative_prompt=[PROMPT])) < 1e-5


# ---------------------------------------------------------------- FLUX: which call is the unconditional one


@pytest.mark.parametrize("embeds", [True, False], ids=["dev", "schnell"])
def test_without_true_guidance_safree_works_and_the_others_say_what_is_missing(embeds: bool) -> None:
    pipe = flux(guidance_embeds=embeds)
    pipe.set_progress_bar_config(disable=True)
    for options in ({"negative_prompt": None}, {"guidance_scale": 1.0}):
        plain = latents(pipe, PROMPTS, **options)
        assert len(calls(pipe, PROMPTS, SAFREE(ALCOHOL), **options)) == 3
        with SAFREE(ALCOHOL).apply(pipe):
            assert change(latents(pipe, PROMPTS, **options), plain) > 1e-2
        for eraser in (SLD(ALCOHOL), NegativePrompt(ALCOHOL)):
            said = f"{type(eraser).__name__} needs guidance .*`true_cfg_scale` above 1 and give a `negative_prompt`"
            with eraser.apply(pipe), pytest.raises(ValueError, match=said):
                latents(pipe, PROMPTS, **options)
        with SLD(ALCOHOL, strength=0.0).apply(pipe):
            assert torch.equal(latents(pipe, PROMPTS, **options), plain)


def test_a_text_of_another_length_has_positions_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings in 40 columns; the concept has 24, so it has a denoiser call of its own."""
    pipe, seen, options = double("flux"), [], {"num_inference_steps": 1}
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    given = {}
    for name, texts in (("", PROMPTS), ("negative_", ("a dog", "the moon"))):
        text, given[f"{name}pooled_prompt_embeds"] = encoded(pipe, texts)
        given[f"{name}prompt_embeds"] = torch.cat([text, text[:, :16]], 1)
    made = calls(pipe, None, SLD(ALCOHOL, warmup=0.0), **given, **options)
    plain = calls(pipe, None, **given, **options)
    shapes = [tuple(call["encoder_hidden_states"].shape[:2]) for call in made]
    assert shapes == [(4, 40), (2, 24), (2, 40)] and [len(call["txt_ids"]) for call in made] == [40, 24, 40]
    assert change(seen[0].prompt, plain[0]["out"]) < 1e-9 and change(seen[0].negative, plain[1]["out"]) < 1e-9
    concept = calls(pipe, (SAFETY, SAFETY), **options)[0]["out"]
    assert change(seen[0].concept, concept) < 1e-9 and change(concept, plain[0]["out"]) > 1e-2


def test_a_prompt_that_equals_the_negative_prompt_keeps_its_two_calls_apart() -> None:
    pipe, same = pipeline("flux"), {"negative_prompt": [PROMPT]}
    plain = calls(pipe, PROMPT, **same)
    for eraser in (SLD(CAT, threshold=10.0, warmup=0.0), SAFREE(ALCOHOL)):
        made = calls(pipe, PROMPT, eraser, **same)
        assert torch.equal(made[1]["encoder_hidden_states"], plain[1]["encoder_hidden_states"])
        assert [len(call["out"]) for call in made] == ([3, 1] * 3 if isinstance(eraser, SLD) else [1, 1] * 3)


@pytest.mark.long
def test_a_broken_call_leaves_no_doubt_about_the_next() -> None:
    pipe = pipeline("flux")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for eraser in (SLD(ALCOHOL), NegativePrompt(ALCOHOL), SAFREE(ALCOHOL)):
        with eraser.apply(pipe):
            for options in ({"callback_on_step_end": stop}, {"negative_prompt": [3]}):  # the prompt is encoded by then
                for others in ((), ("a dog",), ("a dog", "a cat")):  # none is the negative prompt of anything
                    with pytest.raises((KeyboardInterrupt, ValueError, TypeError)):
                        latents(pipe, **options)
                    for text in others:
                        pipe.encode_prompt(text, device="cpu")
                    assert torch.equal(latents(pipe), drawn("flux", eraser))


def test_positions_are_not_rows() -> None:
    """16 pictures of 16 patches each."""
    pipe = pipeline("flux")
    eraser = SLD(ALCOHOL, sld_guidance_scale=5.0, threshold=10.0)
    with eraser.apply(pipe):
        many = latents(pipe, num_images_per_prompt=16, negative_prompt=[""])
    assert many.shape[:2] == (16, 16) and change(many[:1], drawn("flux", eraser)) < 1e-4


def test_one_negative_prompt_for_several_prompts() -> None:
    """diffusers asks for one each; a negative prompt of ours makes them."""
    pipe, one = pipeline("flux"), {"negative_prompt": "a dog"}
    with SLD(ALCOHOL).apply(pipe), pytest.raises(ValueError, match="2 rows of prompts, but 1 of negative prompts"):
        latents(pipe, PROMPTS, **one)
    with NegativePrompt(ALCOHOL).apply(pipe):
        made = latents(pipe, PROMPTS, **one)
    assert torch.equal(made, latents(pipe, PROMPTS, negative_prompt=["beer, wine glass, a dog"] * 2))


def test_the_guidance_scale_that_is_distilled_in_is_not_taken_for_the_true_one() -> None:
    with pytest.raises(ValueError, match=r"the guidance scale of the call, but this FluxPipeline \(FLUX.1\)"):
        NegativePrompt(ALCOHOL, strength=3.0).apply(pipeline("flux"))


# ---------------------------------------------------------------- texts


def test_a_prompt_is_cut_off_where_no_encoder_reads_on() -> None:
    pipe, eraser = pipeline("sd3"), SLD(ALCOHOL)
    twenty = " ".join(["a big red dog"] * 5)  # CLIP takes 14
    with eraser.apply(pipe):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latents(pipe, twenty)
        with pytest.warns(UserWarning, match="ignores 'red dog'"):
            latents(pipe, " ".join(["a big red dog"] * 6), max_sequence_length=23)
    bare = pipeline("sd35")
    with eraser.apply(bare), pytest.warns(UserWarning, match="ignores 'red dog a big red dog'"):
        latents(bare, twenty)
    with pytest.raises(ValueError, match="is 22 tokens long, but the text encoder takes 16"):
        encode(pipe, [twenty])


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_hash_of_a_model_tells_two_apart(family: str) -> None:
    one, other = pipeline(family), pipeline(family)
    assert model_hash(one) == model_hash(other)
    with torch.no_grad():
        other.transformer.transformer_blocks[0].attn.add_k_proj.weight += 1
    assert model_hash(one) != model_hash(other)


# ---------------------------------------------------------------- refused, and compiled


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_what_needs_cross_attention_names_where_it_works_and_what_works_here(family: str) -> None:
    pipe = pipeline(family)
    name, works = {
        "sd3": ("SD 3/3.5", "CRG, EIUP, NAG, NegativePrompt, SAFREE, SemanticSurgery, SLD, CCRT, ESD and SDD"),
        "flux": (
            "FLUX.1",
            "EIUP, NAG, SAFREE, SemanticSurgery, CCRT, ESD and SDD, and CRG, NegativePrompt and SLD with "
            "`true_cfg_scale` above 1 and a negative prompt",
        ),
    }[family]
    tested = "emoji, PixArt, Sana, SD 1.x/2.x or SDXL"
    has, here = f"but this {type(pipe).__name__} \\({name}\\) has joint attention", f"{name} works with {works}"
    for eraser in (GIE(CAT), GIE(CAT, adapter="emoji")):
        said = f"{type(eraser).__name__} needs cross-attention layers, {has} .*Use it on {tested}; {here}"
        with pytest.raises(ValueError, match=said):
            eraser.apply(pipe)
    said = f"EIUP with .* needs cross-attention layers, {has} .*Use EIUP without it, or with it on {tested}; {here}"
    with pytest.raises(ValueError, match=said):
        EIUP.reconstruction(CAT).apply(pipe)
    with pytest.raises(ValueError, match=f"GIE needs cross-attention layers.*{has}.*{here}"):
        GIE.official(CAT).apply(pipe)
    for editor in (UCE(), RECE()):
        with pytest.raises(ValueError, match=f"needs weights that read the encoded text, {has}.*{here}"):
            editor.fit(pipe, [CAT])
    with pytest.raises(ValueError, match=f"MACE needs weights .* and a denoiser that trains outside .*{has}.*{here}"):
        MACE().fit(pipe, [CAT])
    with pytest.raises(ValueError, match="in closed form needs cross-attention layers"):
        keys_values(pipe)
    assert "encode_prompt" not in vars(pipe) and "forward" not in vars(pipe.transformer)


@pytest.mark.long
def test_compiled_without_a_graph_break() -> None:
    torch._dynamo.reset()
    erasers = (SLD(ALCOHOL, sld_guidance_scale=5.0, threshold=10.0, warmup=0.1), SAFREE([CAT]))
    want = drawn("sd3", *erasers, prompt=PROMPTS)
    pipe = pipeline("sd3")
    pipe.transformer.compile(backend="eager", fullgraph=True)
    handles = [each.apply(pipe) for each in erasers]
    assert change(latents(pipe, PROMPTS), want) < 1e-4
    assert change(want, drawn("sd3", erasers[0], prompt=PROMPTS)) > 1e-2
    for handle in handles:
        handle.remove()
    torch._dynamo.reset()
