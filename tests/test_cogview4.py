"""Run-time erasers on CogView4: a text's length depends on the batch, and texts of several lengths share no call."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_conformance import assert_same, snapshot
from test_guided import SAFETY, sld_rule
from test_joint import calls
from test_safree import written_out
from tiny import ALCOHOL, CAT, PROMPT, PROMPTS, change, drawn, latents, pipeline
from torch import Tensor

from efface import CCRT, EIUP, ESD, GIE, RECE, SAFREE, SDD, SLD, UCE, Concept, NegativePrompt
from efface._text import SITES, encode
from efface.hooks import Prediction

pytestmark = pytest.mark.thinned("long")

SCALE = 7.5
LONG = "a big red cat and a big red dog at the pub of the moon and the beer"
LONGER = (LONG, "a dog")  # in 32 columns, the second with 28 of padding in front
NEGATIVES = ["a dog", "the moon"]
WORDY = Concept("wordy", ("a big red glass of wine and a big red glass of beer at the pub",))  # 32 columns as well
SMOOTH = {"sld_guidance_scale": 5.0, "threshold": 10.0}


@functools.cache
def double() -> Any:
    return pipeline("cogview4").to(torch.float64)


@functools.cache
def shared() -> Any:
    return pipeline("cogview4")


@pytest.fixture
def pipe() -> Iterator[Any]:
    made, before = shared(), set(SITES)  # of other tests' pipelines
    yield made
    assert [site.applied for denoiser, site in SITES.items() if denoiser not in before] == []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Prediction]:
    """What methods that guide are shown, call by call."""
    found: list[Prediction] = []
    for method in (SLD, NegativePrompt):

        def spy(self: Any, made: Prediction, original: Any = method.guide) -> Tensor:
            found.append(made)
            return original(self, made)

        monkeypatch.setattr(method, "guide", spy)
    return found


@torch.no_grad()
def encoded(pipe: Any, texts: Any) -> Tensor:
    """Texts of one call, padded to the longest of them."""
    return pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, device="cpu")[0]


def shapes(made: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """The rows and the columns of text of each denoiser call."""
    return [tuple(call["encoder_hidden_states"].shape[:2]) for call in made]


def loop(pipe: Any, prompts: Any, negatives: Any, safety: str, rule: Callable[..., Tensor]) -> Tensor:
    """The pipeline's trajectory by hand: one denoiser call for each of three texts, then Euler's step."""
    start = calls(pipe, prompts, num_inference_steps=5)[0]
    x, sigmas, n = start["hidden_states"].clone(), pipe.scheduler.sigmas.double(), len(prompts)
    times = pipe.scheduler.timesteps.double()  # even, where the noise is not
    more = {name: start[name] for name in ("original_size", "target_size", "crop_coords")}
    texts = [encoded(pipe, each) for each in (negatives, prompts, [safety] * n)]
    for k, (t, (now, then)) in enumerate(zip(times, itertools.pairwise(sigmas), strict=True)):
        time, e = t.expand(n), []
        for text in texts:
            with torch.no_grad():
                given = {"hidden_states": x, "encoder_hidden_states": text, "timestep": time, **more}
                e.append(pipe.transformer(**given, return_dict=False)[0])
        x = x + (then - now) * rule((k + 0.5) / 5, *e)
    return x


def away(time: float, e_u: Tensor, e_p: Tensor, e_n: Tensor) -> Tensor:
    return e_u + SCALE * (e_p - e_u) - 4.0 * (e_n - e_u)


def test_a_text_is_padded_in_front_and_the_padding_is_read(pipe: Any) -> None:
    """What these tests are about: what a prompt draws depends on the longest prompt of its call."""
    short, both = encoded(pipe, ["a dog"]), encoded(pipe, LONGER)
    assert short.shape[1] == 16 and both.shape[1] == 32
    assert change(short[0, -2:], both[1, -2:]) > 1e-2
    plain = latents(pipe, LONGER)
    assert change(plain[1:], latents(pipe, "a dog", seed=1)) > 1e-2
    assert change(plain[:1], latents(pipe, LONG)) < 1e-5
    for text in ("a dog", LONG):
        made = encode(pipe, [text, LONG])
        assert made.own[0] == slice(32 - len(text.split()), 32)


# ---------------------------------------------------------------- guidance

LAYOUTS = {
    "one length": (PROMPTS, NEGATIVES, SAFETY, [(6, 16)]),
    "a long prompt": (LONGER, NEGATIVES, SAFETY, [(2, 32), (4, 16)]),
    "a long negative prompt": (PROMPTS, [LONG, "a dog"], SAFETY, [(4, 16), (2, 32)]),
    "a long concept": (PROMPTS, NEGATIVES, WORDY.phrases[0], [(4, 16), (2, 32)]),
    "long prompts and negative prompts": (LONGER, list(LONGER), SAFETY, [(4, 32), (2, 16)]),
}
each_layout = pytest.mark.parametrize(("prompts", "negatives", "safety", "made"), LAYOUTS.values(), ids=LAYOUTS)


@each_layout
def test_sld_is_the_loop_written_out(prompts: Any, negatives: Any, safety: str, made: Any) -> None:
    pipe, concept = double(), WORDY if safety != SAFETY else ALCOHOL
    options = {"num_inference_steps": 5, "guidance_scale": SCALE, "negative_prompt": negatives}
    eraser = SLD(concept, sld_guidance_scale=50, threshold=0.05, momentum_scale=0.5, momentum_beta=0.7, warmup=0.15)
    with eraser.apply(pipe):
        erased = latents(pipe, prompts, **options)
        assert torch.equal(erased, latents(pipe, prompts, **options))  # the momentum starts anew
    assert change(erased, latents(pipe, prompts, **options)) > 1e-2
    assert change(erased, loop(pipe, prompts, negatives, safety, sld_rule(50, 0.05, 0.5, 0.7, 0.15))) < 1e-5
    for other in ((50, 0.05, 0.0, 0.7, 0.15), (50, 0.05, 0.5, 0.7, 0.0)):  # momentum and warm-up are in it
        assert change(erased, loop(pipe, prompts, negatives, safety, sld_rule(*other))) > 1e-3
    unconditional = (2, encoded(pipe, negatives).shape[1])
    assert shapes(calls(pipe, prompts, eraser, **options)) == [*made, unconditional] * 5


@each_layout
def test_the_negative_prompt_with_a_strength_is_the_loop_written_out(
    prompts: Any, negatives: Any, safety: str, made: Any
) -> None:
    pipe, concept = double(), WORDY if safety != SAFETY else ALCOHOL
    options = {"num_inference_steps": 5, "guidance_scale": SCALE, "negative_prompt": negatives}
    with NegativePrompt(concept, strength=4.0).apply(pipe) as handle:
        erased = latents(pipe, prompts, **options)
        assert handle.record == {
            "calls": 10,
            "rows": {"0": 5, "1": 5},
            "exempt": {"unconditional call": 5},
            "layers": 0,
        }
    assert change(erased, latents(pipe, prompts, **options)) > 1e-2
    assert change(erased, loop(pipe, prompts, negatives, safety, away)) < 1e-5


@pytest.mark.parametrize("prompts", [PROMPTS, LONGER], ids=["short", "long"])
@pytest.mark.parametrize("given", [NEGATIVES, [LONG, "a dog"], None], ids=["short", "long", "none"])
def test_a_negative_prompt_is_diffusers_own(prompts: Any, given: Any, pipe: Any) -> None:
    """Whatever lengths come together, and where some rows have no concept."""
    plain = latents(pipe, prompts, negative_prompt=given)
    joined = [", ".join(filter(None, pair)) for pair in zip((SAFETY, SAFETY), given or ("", ""), strict=True)]
    with NegativePrompt(ALCOHOL).apply(pipe):
        erased = latents(pipe, prompts, negative_prompt=given)
    assert change(erased, plain) > 1e-2
    assert torch.equal(erased, latents(pipe, prompts, negative_prompt=joined))
    for concept in (ALCOHOL, WORDY):
        first = ", ".join(filter(None, [", ".join(concept.phrases), (given or [""])[0]]))
        want = latents(pipe, prompts, negative_prompt=[first, (given or ["", ""])[1]])
        with NegativePrompt(rows=[[concept], []]).apply(pipe):
            rows = latents(pipe, prompts, negative_prompt=given)
        assert torch.equal(rows, want) and change(rows[:1], plain[:1]) > 1e-2


def test_each_prediction_is_the_denoisers_own(seen: list[Prediction]) -> None:
    """Of concepts of two lengths, on a row each, with prompts of a third call's length."""
    pipe, options = double(), {"negative_prompt": NEGATIVES, "num_inference_steps": 1}
    with SLD(rows=[[WORDY], [ALCOHOL]]).apply(pipe):
        latents(pipe, LONGER, **options)
    (made,) = seen
    prompt, negative = (call["out"] for call in calls(pipe, LONGER, **options))
    assert change(made.prompt, prompt) < 1e-9 and change(made.negative, negative) < 1e-9
    for k, text in enumerate((WORDY.phrases[0], SAFETY)):
        want = calls(pipe, [text], seed=k, num_inference_steps=1)[0]["out"]
        assert change(made.concept[k], want[0]) < 1e-9
        assert change(want[0], prompt[k]) > 1e-2
    assert made.guidance_scale == 5.0 and float(made.time) == 0.5  # of one step


def test_phrases_of_one_row_do_not_change_those_of_another(pipe: Any) -> None:
    """A concept that is longer than another one pads no other row's text."""
    for method in (SLD, NegativePrompt):
        fields = SMOOTH if method is SLD else {"strength": 4.0}
        with method(rows=[[ALCOHOL], [WORDY], [ALCOHOL, WORDY], []], **fields).apply(pipe):
            together = latents(pipe, [*PROMPTS, *PROMPTS])
        for k, concepts in enumerate(([ALCOHOL], [WORDY], [ALCOHOL, WORDY])):
            with method(concepts, **fields).apply(pipe):
                alone = latents(pipe, PROMPTS[k % 2], seed=k)
            assert change(together[k : k + 1], alone) < 1e-4
            assert change(alone, latents(pipe, PROMPTS[k % 2], seed=k)) > 1e-3
        assert change(together[3:], latents(pipe, PROMPTS[1], seed=3)) < 1e-5


@pytest.mark.parametrize("method", [SLD, NegativePrompt, SAFREE])
def test_a_row_of_a_batch_is_the_row_alone_as_far_as_the_padding_is_the_same(method: Any, pipe: Any) -> None:
    """The longest prompt alone, and the other one beside a prompt of the same length without a concept."""
    fields = {SLD: SMOOTH, NegativePrompt: {"strength": 4.0}, SAFREE: {}}[method]
    plain = latents(pipe, LONGER)
    with method(rows=[[ALCOHOL], [CAT]], **fields).apply(pipe) as handle:
        together = latents(pipe, LONGER)
        handle.rows = [[], [CAT]]
        beside = latents(pipe, LONGER)
    with method(ALCOHOL, **fields).apply(pipe):
        alone = latents(pipe, LONG)
    assert change(together[:1], plain[:1]) > 1e-3 and change(together[1:], plain[1:]) > 1e-3
    assert change(together[:1], alone) < 1e-4
    assert change(together[1:], beside[1:]) < 1e-5 and change(beside[:1], plain[:1]) < 1e-5


def test_embeddings_that_are_given_are_guarded(pipe: Any) -> None:
    given = {"prompt_embeds": encoded(pipe, LONGER), "negative_prompt_embeds": encoded(pipe, NEGATIVES)}
    plain = latents(pipe, None, **given)
    for eraser in (SLD(ALCOHOL), NegativePrompt(ALCOHOL, strength=4.0)):
        with eraser.apply(pipe):
            erased = latents(pipe, None, **given)
            assert torch.equal(erased, latents(pipe, LONGER, negative_prompt=NEGATIVES))
        assert change(erased, plain) > 1e-2
    for eraser, said in ((SAFREE(ALCOHOL), "`prompt_embeds`"), (NegativePrompt(ALCOHOL), "`negative_prompt_embeds`")):
        with eraser.apply(pipe), pytest.raises(ValueError, match=f"{said}. Give the text"):
            latents(pipe, None, **given)


def test_a_prompt_that_equals_the_negative_prompt_keeps_its_two_calls_apart(pipe: Any) -> None:
    same = {"negative_prompt": [PROMPT]}
    plain = calls(pipe, PROMPT, **same)
    for eraser in (SLD(CAT, threshold=10.0, warmup=0.0), SAFREE(ALCOHOL)):
        made = calls(pipe, PROMPT, eraser, **same)
        assert torch.equal(made[1]["encoder_hidden_states"], plain[1]["encoder_hidden_states"])
        assert [len(call["out"]) for call in made] == ([3, 1] * 3 if isinstance(eraser, SLD) else [1, 1] * 3)


# ---------------------------------------------------------------- SAFREE


def test_the_conditional_rows_read_the_filtered_prompt_and_the_padding_stays() -> None:
    """With the states that the call's own padding makes; the last token takes the place of an end token."""
    pipe = double()
    plain = latents(pipe, LONGER)
    read, was = (calls(pipe, LONGER, *on, num_images_per_prompt=2) for on in ([SAFREE(ALCOHOL)], []))
    with SAFREE(ALCOHOL).apply(pipe):
        assert change(latents(pipe, LONGER), plain) > 1e-2
    vocabulary = pipe.tokenizer.get_vocab()

    @torch.no_grad()
    def states(words: list[str], length: int) -> Tensor:
        ids = [1, 2, *(vocabulary[word] for word in words)]
        ids = [0] * (length - len(ids)) + ids
        return pipe.text_encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0]

    text, given = read[0]["encoder_hidden_states"], was[0]["encoder_hidden_states"]
    assert all(
        torch.equal(a["encoder_hidden_states"], b["encoder_hidden_states"])
        for a, b in zip(read[1::2], was[1::2], strict=True)
    )
    concept = torch.stack([states(phrase.split(), 16)[-1] for phrase in ALCOHOL.phrases])
    for k, prompt in enumerate(LONGER):
        words = prompt.split()
        without = [words, *([*words[:i], "!", *words[i + 1 :]] for i in range(len(words)))]
        masked, first = torch.stack([states(each, 32)[-1] for each in without]), 32 - len(words)
        want, _, triggers = written_out(states(words, 32), masked, concept, first, 0.01)
        assert 0 < sum(triggers) < len(words)
        for row in (2 * k, 2 * k + 1):
            assert change(text[row], want) < 1e-6 and change(want, given[row]) > 1e-2
            assert torch.equal(text[row, :first], given[row, :first])


# ---------------------------------------------------------------- on and off

EVERY = {
    "sld": SLD(ALCOHOL),
    "safree": SAFREE(ALCOHOL),
    "negative": NegativePrompt(ALCOHOL),
    "negative-strength": NegativePrompt(ALCOHOL, strength=4.0),
}


@pytest.mark.parametrize("eraser", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("prompts", [PROMPTS, LONGER], ids=["short", "long"])
def test_it_comes_off_to_the_bit_and_strength_0_is_the_base_model(eraser: Any, prompts: Any, pipe: Any) -> None:
    before, plain = snapshot(pipe), latents(pipe, prompts)
    with eraser.apply(pipe) as handle:
        assert change(latents(pipe, prompts), plain) > 1e-2
        if not isinstance(eraser, NegativePrompt) or eraser.strength is not None:
            handle.strength = 0.0
            assert torch.equal(latents(pipe, prompts), plain)
    assert torch.equal(latents(pipe, prompts), plain)
    assert_same(snapshot(pipe), before)


def test_several_come_off_in_any_order(pipe: Any) -> None:
    plain, (sld, safree, *_) = latents(pipe, LONGER), EVERY.values()
    with contextlib.ExitStack() as on:
        handles = [on.enter_context(each.apply(pipe)) for each in EVERY.values()]
        every = latents(pipe, LONGER)
        for handle in handles[:0:-1]:
            handle.remove()
        one = latents(pipe, LONGER)
        handles[0].remove()
    assert change(every, plain) > 1e-2 and torch.equal(latents(pipe, LONGER), plain)
    assert torch.equal(one, drawn("cogview4", sld, prompt=LONGER))
    assert torch.equal(drawn("cogview4", sld, safree, prompt=LONGER), drawn("cogview4", sld, safree, prompt=LONGER))


# ---------------------------------------------------------------- refused


@pytest.mark.long
def test_what_needs_other_layers_names_where_it_works_and_what_works_here(pipe: Any) -> None:
    has, here = (
        "this CogView4Pipeline \\(CogView4\\) has joint",
        "CogView4 works with CRG, EIUP, NAG, NegativePrompt, SAFREE and SLD",
    )
    for eraser in (EIUP.reconstruction(CAT), GIE(CAT), GIE.official(CAT)):
        with pytest.raises(ValueError, match=f"needs cross-attention layers.*{has}.*{here}"):
            eraser.apply(pipe)
    for editor in (UCE(), RECE()):
        with pytest.raises(ValueError, match=f"needs weights that read the encoded text, but {has}.*{here}"):
            editor.fit(pipe, [CAT])
    for trained in (ESD(), SDD(), CCRT()):
        with pytest.raises(ValueError, match=f"needs a denoiser that trains outside .*{has}.*{here}"):
            trained.fit(pipe, [CAT])


def test_without_guidance_safree_works_and_the_others_say_what_is_missing(pipe: Any) -> None:
    plain = latents(pipe, LONGER, guidance_scale=1.0)
    for name, eraser in EVERY.items():
        with eraser.apply(pipe):
            if name == "safree":
                assert change(latents(pipe, LONGER, guidance_scale=1.0), plain) > 1e-2
                continue
            with pytest.raises(ValueError, match="needs guidance .*Set `guidance_scale` above 1, or use"):
                latents(pipe, LONGER, guidance_scale=1.0)


def test_a_broken_call_leaves_no_doubt_about_the_next(pipe: Any) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for eraser in EVERY.values():
        with eraser.apply(pipe):
            with pytest.raises(KeyboardInterrupt):
                latents(pipe, LONGER, callback_on_step_end=stop)
            pipe.encode_prompt("a dog", device="cpu")
            assert torch.equal(latents(pipe), drawn("cogview4", eraser))


@pytest.mark.long
def test_a_compiled_denoiser_needs_guidance_off(pipe: Any) -> None:
    torch._dynamo.reset()
    made = pipeline("cogview4")
    made.transformer.compile(backend="eager", fullgraph=True)
    with SAFREE(ALCOHOL).apply(made):
        assert change(latents(made, guidance_scale=1.0), drawn("cogview4", SAFREE(ALCOHOL), guidance_scale=1.0)) < 1e-4
        with pytest.raises(Exception, match="Give a pipeline that is not compiled"):
            latents(made)
    torch._dynamo.reset()
