"""Methods that change the noise prediction, against their formulas: a loop of three separate denoiser calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)
from tiny import (
    ALCOHOL,
    CAT,
    PROMPT,
    PROMPTS,
    bare,
    batch,
    change,
    denoiser,
    drawn,
    latents,
    pipeline,
    stable_diffusion,
    tokenizer,
)
from torch import Tensor

import efface
from efface import EIUP, SLD, Concept, NegativePrompt
from efface._text import SITES
from efface.families.unet import SD
from efface.hooks import Method, Prediction

pytestmark = pytest.mark.thinned("long")

SAFETY = "beer, wine glass"  # the text of ALCOHOL
BEER = Concept("beer")
Rule = Callable[[float, Tensor, Tensor, Tensor], Tensor]  # time, e_u, e_p, e_S to the guided prediction


@functools.cache
def double(family: str) -> Any:
    return pipeline(family).to(torch.float64)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Prediction]:
    """What SLD is shown, call by call."""
    found: list[Prediction] = []
    original = SLD.guide

    def spy(self: SLD, prediction: Prediction) -> Tensor:
        found.append(dataclasses.replace(prediction, memory=dict(prediction.memory)))
        return original(self, prediction)

    monkeypatch.setattr(SLD, "guide", spy)
    return found


def calls(pipe: Any, prompt: Any, **options: Any) -> list[dict[str, Any]]:
    """The denoiser's arguments and its prediction, call by call."""
    found: list[dict[str, Any]] = []

    def see(unet: Any, args: Any, kwargs: Any, out: Any) -> None:
        found.append({"sample": args[0], "timestep": args[1], **kwargs, "out": out[0]})

    watch = pipe.unet.register_forward_hook(see, with_kwargs=True)
    latents(pipe, prompt, **options)
    watch.remove()
    return found


def written_out(pipe: Any, prompts: tuple[str, ...], safety: str, rule: Rule, images: int = 1) -> Tensor:
    """The pipeline's trajectory by hand: no hook, one call of the denoiser for each text."""
    start = calls(pipe, prompts, num_images_per_prompt=images, num_inference_steps=1)[0]
    x, ids = start["sample"][: len(prompts) * images], (start["added_cond_kwargs"] or {}).get("time_ids")

    def encoded(texts: list[str]) -> Any:
        out = pipe.encode_prompt(texts, device="cpu", num_images_per_prompt=images, do_classifier_free_guidance=True)
        return out[0], (out[2] if len(out) > 2 else None), out[1], (out[3] if len(out) > 3 else None)

    text, pooled, no_text, no_pooled = encoded(list(prompts))
    safe_text, safe_pooled, *_ = encoded([safety] * len(prompts))
    pipe.scheduler.set_timesteps(5)
    for k, t in enumerate(pipe.scheduler.timesteps):
        e = []
        for states, pool in ((no_text, no_pooled), (text, pooled), (safe_text, safe_pooled)):
            more = None if pool is None else {"text_embeds": pool, "time_ids": ids[: len(x)]}
            with torch.no_grad():
                e.append(pipe.unet(x, t, encoder_hidden_states=states, added_cond_kwargs=more).sample)
        x = pipe.scheduler.step(rule((k + 0.5) / 5, *e), t, x, return_dict=False)[0]
    return x


def sld_rule(scale: float, threshold: float, s_m: float, beta: float, warmup: float, rescale: float = 0.0) -> Rule:
    """Equations 3 to 8, and diffusers' `guidance_rescale` behind them."""
    nu: Any = 0.0

    def rule(time: float, e_u: Tensor, e_p: Tensor, e_s: Tensor) -> Tensor:
        nonlocal nu
        phi = scale * (e_p - e_s)
        mu = torch.minimum(phi.abs(), torch.ones_like(phi)) * ((e_p - e_s) < threshold)
        gamma = mu * (e_s - e_u) + s_m * nu
        nu = beta * nu + (1 - beta) * gamma
        away = gamma if time >= warmup else torch.zeros_like(gamma)
        e = e_u + 7.5 * ((e_p - e_u) - away)
        spread = (e_p - away).std((1, 2, 3), keepdim=True) / e.std((1, 2, 3), keepdim=True)
        return e * (rescale * spread + 1 - rescale)

    return rule


# ---------------------------------------------------------------- SLD: the formulas


def test_sld_element_by_element_over_three_steps() -> None:
    """Every branch: below and above lambda, saturated or not, before and after the warm-up, with momentum."""
    values = (-0.3, -0.004, 0.0, 0.015, 0.2)
    triples = list(itertools.product(values, repeat=3))
    e_u, e_p, e_s = (torch.tensor(x, dtype=torch.float64).view(1, 1, 1, -1) for x in zip(*triples, strict=True))
    eraser = SLD(BEER, sld_guidance_scale=50, threshold=0.01, momentum_scale=0.3, momentum_beta=0.4, warmup=0.5)
    memory: dict[str, Tensor] = {}
    nu, branches = [0.0] * len(triples), set()
    for time, drift in ((0.25, 1.0), (0.5, -0.7), (0.75, 0.4)):
        made = eraser.guide(Prediction(drift * e_p, e_u, e_s, 7.5, torch.tensor(time), memory))
        for k, (u, p, s) in enumerate(triples):
            below, phi = drift * p - s < 0.01, 50 * (drift * p - s)
            gamma = (min(1.0, abs(phi)) if below else 0.0) * (s - u) + 0.3 * nu[k]
            nu[k] = 0.4 * nu[k] + 0.6 * gamma
            branches.add((below, abs(phi) > 1, time >= 0.5))
            assert float(made[0, 0, 0, k]) == pytest.approx(-gamma if time >= 0.5 else 0.0, abs=1e-12)
            assert float(memory["nu"][0, 0, 0, k]) == pytest.approx(nu[k], abs=1e-12)
    assert len(branches) == 8


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_sld_is_the_loop_written_out(family: str, rescale: float) -> None:
    pipe, options = double(family), {"num_inference_steps": 5, "guidance_scale": 7.5, "guidance_rescale": rescale}
    solver = DPMSolverMultistepScheduler if rescale else DDIMScheduler
    pipe.scheduler = solver.from_config(pipe.scheduler.config)
    eraser = SLD(ALCOHOL, sld_guidance_scale=50, threshold=0.05, momentum_scale=0.5, momentum_beta=0.7, warmup=0.3)
    rule = sld_rule(50, 0.05, 0.5, 0.7, 0.3, rescale)
    with eraser.apply(pipe):
        made = latents(pipe, PROMPTS, num_images_per_prompt=2, **options)
        again = latents(pipe, PROMPTS, num_images_per_prompt=2, **options)
    assert torch.equal(made, again)  # the momentum starts anew
    assert change(made, latents(pipe, PROMPTS, num_images_per_prompt=2, **options)) > 1e-2
    assert change(made, written_out(pipe, PROMPTS, SAFETY, rule, images=2)) < 1e-8
    still = sld_rule(50, 0.05, 0.0, 0.7, 0.3, rescale)
    assert change(made, written_out(pipe, PROMPTS, SAFETY, still, images=2)) > 1e-3  # and there is one


def test_sld_is_diffusers_own() -> None:
    safe = pytest.importorskip("diffusers").StableDiffusionPipelineSafe
    pipe = double("sd1")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    theirs = safe(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.safety_concept = SAFETY
    for preset, options in (("weak", (20, 0.0, 0.0, 0.0)), ("strong", (2000, 0.025, 0.5, 0.7))):
        names = ("sld_guidance_scale", "sld_threshold", "sld_momentum_scale", "sld_mom_beta")
        how = {"num_inference_steps": 5, "output_type": "np"}
        want = latents(theirs, PROMPTS, sld_warmup_steps=2, **dict(zip(names, options, strict=True)), **how)
        with getattr(SLD, preset)(ALCOHOL, warmup=2 / 5).apply(pipe):
            made = latents(pipe, PROMPTS, **how)
        assert abs(made - want).max() < 1e-6 < 1e-2 < abs(made - latents(pipe, PROMPTS, **how)).max()


def test_presets_are_the_papers_table() -> None:
    table = {
        "weak": (20, 0.0, 0.0, 0.0, 15),
        "weak_paper": (200, 0.0, 0.0, 0.0, 15),
        "medium": (1000, 0.01, 0.3, 0.4, 10),
        "strong": (2000, 0.025, 0.5, 0.7, 7),
        "max": (5000, 1.0, 0.5, 0.7, 0),
    }
    for name, (scale, threshold, momentum, beta, steps) in table.items():
        made = getattr(SLD, name)(ALCOHOL, strength=0.5)
        assert made == SLD(ALCOHOL, 0.5, scale, threshold, momentum, beta, steps / 50)
    assert SLD.medium(ALCOHOL) == SLD(ALCOHOL)


SCHEDULERS = {  # and the step of each denoiser call, of 50
    "leading": (DDIMScheduler, {"timestep_spacing": "leading"}, [*range(50)]),
    "trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}, [*range(50)]),
    "karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, [*range(50)]),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}, [0, *range(50)]),
    "heun": (HeunDiscreteScheduler, {}, sorted([*range(50), *range(49)])),
    "dpm2": (KDPM2DiscreteScheduler, {}, sorted([*range(50), *range(49)])),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_warmup_of_fifty_steps_is_the_papers_count(name: str, seen: list[Prediction]) -> None:
    """Steps, of which some schedulers make two denoiser calls, whatever their noise."""
    pipe, (kind, options, steps) = pipeline(), SCHEDULERS[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    for preset, warmup in ((SLD.weak_paper, 15), (SLD.medium, 10), (SLD.strong, 7), (SLD.max, 0)):
        seen.clear()
        eraser = dataclasses.replace(preset(BEER), momentum_scale=0.1, sld_guidance_scale=50.0, threshold=10.0)
        with eraser.apply(pipe) as handle:
            latents(pipe, num_inference_steps=50)
        assert len(seen) == len(steps)
        assert [bool(eraser.guide(made).any()) for made in list(seen)] == [step >= warmup for step in steps]
        waited = sum(step < warmup for step in steps)
        assert handle.record["exempt"] == ({"warm-up": waited} if warmup else {})


def test_calls_without_a_pipeline_count_by_the_noise(sd1: Any, seen: list[Prediction]) -> None:
    """Also after a call of the pipeline has counted steps, and after one that broke."""
    text, empty = sd1.encode_prompt(PROMPT, "cpu", 1, True)

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    with SLD(BEER).apply(sd1):
        latents(sd1)
        with pytest.raises(KeyboardInterrupt):
            latents(sd1, callback_on_step_end=broken)
        seen.clear()
        with efface.conditional_rows(sd1, [False, True]), torch.no_grad():
            for t in (900, 500, 100):
                sd1.unet(torch.zeros(2, 4, 8, 8), t, torch.cat([empty, text]))
        assert [float(made.time) for made in seen] == pytest.approx([0.1, 0.5, 0.9])
        seen.clear()
        latents(sd1, num_inference_steps=2)
        assert [float(made.time) for made in seen] == [0.25, 0.75]


# ---------------------------------------------------------------- SLD: what follows from them


def test_sld_saturates(seen: list[Prediction]) -> None:
    with SLD(ALCOHOL).apply(pipe := pipeline()):
        latents(pipe, PROMPTS)
    sizes = []
    for scale in (0.1, 1.0, 10.0, 1e5, 1e6):
        eraser = SLD(ALCOHOL, sld_guidance_scale=scale, threshold=10.0, warmup=0.0)
        sizes.append(float(eraser.guide(dataclasses.replace(seen[0], memory={})).abs().mean()))
    assert 0 < sizes[0] < sizes[1] < sizes[2] < sizes[3] and sizes[4] == pytest.approx(sizes[3], rel=1e-3)


def test_a_prompt_that_is_the_concept_is_beyond_sld(sd1: Any) -> None:
    with SLD(BEER, warmup=0.0).apply(sd1):
        same, other = latents(sd1, "beer"), latents(sd1, "a beer")
    assert change(same, drawn(prompt="beer")) < 1e-2 < 0.1 < change(other, drawn(prompt="a beer"))
    with SLD(Concept("x", ("dog",))).apply(sd1):  # e_S = e_u
        assert change(latents(sd1, negative_prompt="dog"), latents(sd1)) > 1e-2
        none = latents(sd1, negative_prompt="dog")
    assert change(none, latents(sd1, negative_prompt="dog")) < 1e-4


def test_sld_asks_for_the_concept_only_when_it_needs_it(sd1: Any) -> None:
    def rows(eraser: Method) -> list[int]:
        found: list[int] = []
        watch = sd1.unet.conv_in.register_forward_hook(lambda module, args, out: found.append(len(out)))
        with eraser.apply(sd1):
            latents(sd1, num_inference_steps=5)
        watch.remove()
        return found

    assert rows(SLD(ALCOHOL)) == [3] * 5
    assert rows(SLD.weak(ALCOHOL, warmup=0.5)) == [2, 2, 3, 3, 3]
    assert rows(SLD(ALCOHOL, sld_guidance_scale=0.0)) == [2] * 5
    with SLD(ALCOHOL, sld_guidance_scale=0.0).apply(sd1):
        assert torch.equal(latents(sd1), drawn())
    assert rows(SLD(ALCOHOL, strength=0.0)) == rows(NegativePrompt(ALCOHOL, strength=0.0)) == [2] * 5
    assert rows(SLD(rows=[[]])) == rows(NegativePrompt(ALCOHOL)) == [2] * 5


# ---------------------------------------------------------------- further rows


def test_the_concepts_row_is_the_pipelines_own_prediction(pipe: Any, family: str, seen: list[Prediction]) -> None:
    with SLD(ALCOHOL).apply(pipe):
        latents(pipe, PROMPTS, num_inference_steps=1, negative_prompt=["a dog", "the moon"])
    (made,) = seen
    for name, prompts in (("prompt", PROMPTS), ("concept", (SAFETY, SAFETY)), ("negative", ("a dog", "the moon"))):
        want = calls(pipe, prompts, num_inference_steps=1, negative_prompt=["a dog", "the moon"])[0]["out"]
        assert change(getattr(made, name), want[:2] if name == "negative" else want[2:]) < 1e-5, name
    assert made.guidance_scale == (5.0 if family == "sdxl" else 7.5) and float(made.time) == 0.5  # of one step


def test_attention_methods_edit_the_prompts_rows_and_not_the_concepts(pipe: Any, seen: list[Prediction]) -> None:
    with SLD(ALCOHOL).apply(pipe):
        latents(pipe, PROMPTS, num_inference_steps=1)
        with EIUP(ALCOHOL, strength=2.0).apply(pipe):
            latents(pipe, PROMPTS, num_inference_steps=1)
    alone, beside = seen
    assert change(beside.concept, alone.concept) < 1e-5 and change(beside.negative, alone.negative) < 1e-5
    assert change(beside.prompt, alone.prompt) > 1e-2


def test_what_methods_add_is_summed_in_any_order(sd1: Any, seen: list[Prediction]) -> None:
    a, b = SLD(ALCOHOL, sld_guidance_scale=5.0, threshold=10.0), NegativePrompt([CAT], strength=3.0)
    one = calls_with(sd1, a, b)
    other = calls_with(sd1, b, a)
    assert change(one, other) < 1e-6
    plain = calls_with(sd1)
    assert change(one - plain, calls_with(sd1, a) - plain + calls_with(sd1, b) - plain) < 1e-4
    assert change(seen[0].prompt, plain[1:]) < 1e-5  # each sees the plain prediction


def calls_with(pipe: Any, *erasers: Method) -> Tensor:
    """The first prediction with these erasers on."""
    handles = [eraser.apply(pipe) for eraser in erasers]
    out = calls(pipe, PROMPT, num_inference_steps=1)[0]["out"]
    for handle in handles:
        handle.remove()
    return out


def test_phrases_that_fill_several_texts_are_averaged(pipe: Any, seen: list[Prediction]) -> None:
    long = ("a big red glass of wine and a big red glass of beer", "the moon")
    for phrases in (long, long[:1], long[1:]):
        with SLD(Concept("x", phrases)).apply(pipe):
            latents(pipe, num_inference_steps=1)
    both, first, second = (made.concept for made in seen)
    assert change(both, (first + second) / 2) < 1e-5 and change(first, second) > 1e-2


def longer(pipe: Any) -> dict[str, Tensor]:
    """A prompt in twice as many tokens as the encoder makes."""
    positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, "a dog")
    pairs = (("prompt_embeds", positive), ("negative_prompt_embeds", negative))
    return {name: torch.cat([text, text.flip(1)], 1) for name, text in pairs}


@pytest.mark.parametrize("edit", [False, True], ids=["alone", "with EIUP"])
def test_a_text_of_another_length_has_a_denoiser_call_of_its_own(
    edit: bool, sd1: Any, seen: list[Prediction], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It predicts what a further row predicts, also where EIUP edits the rows that guidance pushes away from."""
    rows: list[int] = []
    eraser = NegativePrompt(ALCOHOL, strength=3.0)
    original = NegativePrompt.guide
    monkeypatch.setattr(NegativePrompt, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    watch = sd1.unet.conv_in.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    plain = calls(sd1, None, num_inference_steps=1, **longer(sd1))[0]["out"]
    with contextlib.ExitStack() as on:
        handle = on.enter_context(eraser.apply(sd1))
        others = [on.enter_context(EIUP([BEER], strength=2.0).apply(sd1))] if edit else []
        erased = calls(sd1, None, num_inference_steps=1, **longer(sd1))[0]["out"]
        for each in (handle, *others):
            assert each.record["calls"] == 1 and each.record["rows"] == {"0": 1}
        latents(sd1, num_inference_steps=1)
    watch.remove()
    assert rows == [2, 2, 1, 3]  # the plain call; the prompt's, then the concept's; all in one
    assert change(erased[1:], plain[1:]) > 1e-2
    assert change(seen[0].concept, seen[1].concept) < 1e-5
    if not edit:
        assert torch.equal(erased[:1], plain[:1])
        return
    with eraser.apply(sd1):
        latents(sd1, None, num_inference_steps=1, **longer(sd1))
    assert change(seen[0].concept, seen[2].concept) > 1e-3  # it was edited


@pytest.mark.parametrize("text", ["", "a red beer"])
def test_in_two_calls_methods_see_the_unconditional_prediction_as_other_methods_edit_it(
    text: str, sd1: Any, seen: list[Prediction]
) -> None:
    """As if SD 1.x had guidance in two calls: what SLD sees in the conditional call is what the other call returns."""

    def unconditional(*erasers: Method) -> Tensor:
        with contextlib.ExitStack() as on, torch.no_grad():
            for each in erasers:
                on.enter_context(each.apply(sd1))
            SITES[sd1.unet].facts = dataclasses.replace(SD, guidance_in_two_calls=True)  # it goes with the erasers
            positive, negative = sd1.encode_prompt(PROMPT, "cpu", 1, True, text)
            sd1.unet(**{**batch(rows=1), "encoder_hidden_states": positive})
            return sd1.unet(**{**batch(rows=1), "encoder_hidden_states": negative}).sample

    plain, edited = (unconditional(SLD(ALCOHOL), *more) for more in ((), (EIUP(ALCOHOL, strength=0.5),)))
    assert (change(edited, plain) > 1e-3) == bool(text)
    assert change(seen[0].negative, plain) < 1e-5 and change(seen[1].negative, edited) < 1e-5


@pytest.mark.long
def test_so_it_has_compiled_without_a_graph_break() -> None:
    torch._dynamo.reset()
    pipe = pipeline("small")
    eraser = SLD(ALCOHOL, sld_guidance_scale=5.0, threshold=10.0)
    with eraser.apply(pipe):
        want = latents(pipe, None, **longer(pipe))
    assert change(want, latents(pipe, None, **longer(pipe))) > 1e-2
    pipe.unet.compile(backend="eager", fullgraph=True)
    with eraser.apply(pipe):
        assert change(latents(pipe, None, **longer(pipe)), want) < 1e-4
    torch._dynamo.reset()


def test_strength_and_rows_change_in_the_middle_of_a_call(sd1: Any) -> None:
    def then(change_it: Callable[[Any], None]) -> Tensor:
        with SLD(ALCOHOL).apply(sd1) as handle:
            return latents(
                sd1, PROMPTS, callback_on_step_end=lambda pipe, step, time, tensors: change_it(handle) or tensors
            )

    whole = drawn("sd1", SLD(ALCOHOL), prompt=PROMPTS)
    assert change(then(lambda handle: setattr(handle, "strength", 0.0)), whole) > 1e-3
    part = then(lambda handle: setattr(handle, "rows", [[ALCOHOL], []]))
    assert change(part[0], whole[0]) < 1e-4 and change(part[1], whole[1]) > 1e-3


# ---------------------------------------------------------------- the negative prompt with a strength


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_negative_prompt_with_a_strength_is_the_loop_written_out(family: str) -> None:
    pipe = double(family)
    with NegativePrompt(ALCOHOL, strength=4.0).apply(pipe):
        made = latents(pipe, PROMPTS, num_inference_steps=5, guidance_scale=7.5)

    def rule(time: float, e_u: Tensor, e_p: Tensor, e_n: Tensor) -> Tensor:
        return e_u + 7.5 * (e_p - e_u) - 4.0 * (e_n - e_u)

    assert change(made, written_out(pipe, PROMPTS, SAFETY, rule)) < 1e-8
    assert change(made, latents(pipe, PROMPTS, num_inference_steps=5, guidance_scale=7.5)) > 1e-2


@pytest.fixture
def guided(sd1: Any) -> Iterator[list[Tensor]]:
    """What the scheduler is given, step by step."""
    found: list[Tensor] = []
    original = sd1.scheduler.step

    def step(out: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(out)
        return original(out, *args, **kwargs)

    sd1.scheduler.step = step
    yield found
    del sd1.scheduler.step


def test_a_prompt_that_is_the_concept(sd1: Any, guided: list[Tensor]) -> None:
    e_u, e_p = calls(sd1, "beer", num_inference_steps=1)[0]["out"].split(1)
    assert change(e_u, e_p) > 1e-2
    want = {None: e_p, 3.0: e_u + (7.5 - 3.0) * (e_p - e_u), 7.5: e_u, 9.0: e_u - 1.5 * (e_p - e_u)}
    for strength, prediction in want.items():
        with NegativePrompt([BEER], strength=strength).apply(sd1):
            latents(sd1, "beer", num_inference_steps=1)
        assert change(guided[-1], prediction) < 1e-5, strength


def test_the_guidance_scale_is_the_present_one(sd1: Any, guided: list[Tensor]) -> None:
    def lower(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 2.0
        return {}

    with NegativePrompt([BEER], strength=3.0).apply(sd1):
        shown = calls(sd1, PROMPT, callback_on_step_end=lower)
    e_u, e_p = shown[1]["out"].split(1)  # changed by 3 / 2
    text = sd1.encode_prompt("beer", "cpu", 1, False)[0]
    step = {name: shown[1][name] for name in ("timestep", "added_cond_kwargs")}
    with torch.no_grad():
        e_n = sd1.unet(shown[1]["sample"][:1], encoder_hidden_states=text, **step).sample
        plain = sd1.unet(shown[1]["sample"][1:], encoder_hidden_states=shown[1]["encoder_hidden_states"][1:], **step)
    assert change(e_p, plain.sample - 1.5 * (e_n - e_u)) < 1e-5


def test_a_denoiser_called_by_itself_has_no_guidance_scale() -> None:
    pipe = pipeline()  # no call has set one
    with NegativePrompt(ALCOHOL, strength=5.0).apply(pipe), torch.no_grad():
        positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        with pytest.raises(ValueError, match="needs the guidance scale of a pipeline call"):
            pipe.unet(**{**batch(), "encoder_hidden_states": torch.cat([negative, positive])})


def test_the_two_forms_are_exchanged_between_calls_only(sd1: Any) -> None:
    tied, own = NegativePrompt([CAT]), NegativePrompt([CAT], strength=4.0)
    with tied.apply(sd1) as handle:
        assert handle.strength is None and torch.equal(latents(sd1), drawn("sd1", tied))
        handle.strength = 4.0
        assert torch.equal(latents(sd1), drawn("sd1", own))

        def back(*_: Any) -> Any:
            handle.strength = None

        with pytest.raises(ValueError, match="Set it between two calls"):
            latents(sd1, callback_on_step_end=back)
        assert handle.strength == 4.0 and handle.config()["strength"] == 4.0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("eraser", [SLD(ALCOHOL), NegativePrompt(ALCOHOL, strength=5.0)], ids=["sld", "negative"])
def test_without_unconditional_rows_it_says_so(eraser: Any, sd1: Any) -> None:
    with eraser.apply(sd1) as handle:
        with pytest.raises(ValueError, match="needs guidance.*`guidance_scale` above 1.*method without guidance"):
            latents(sd1, guidance_scale=1.0)
        with pytest.raises(ValueError, match="declare both kinds of rows in `efface.conditional_rows`"):
            bare(sd1)
        positive, negative = sd1.encode_prompt(PROMPT, "cpu", 1, True)
        for text in (positive, negative):
            with pytest.raises(ValueError, match="in one batch of a call of the pipeline"):
                sd1.unet(**{**batch(rows=1), "encoder_hidden_states": text})
        handle.strength = 0.0
        assert torch.equal(latents(sd1, guidance_scale=1.0), drawn(guidance_scale=1.0))


@pytest.mark.parametrize("eraser", [SLD(ALCOHOL), NegativePrompt(ALCOHOL), NegativePrompt(ALCOHOL, strength=5.0)])
def test_a_distilled_model_is_named_as_such(eraser: Any) -> None:
    """Its guidance scale is an input of the denoiser: a larger one brings no unconditional rows."""
    pipe = stable_diffusion(tokenizer(), 32, denoiser(32, time_cond_proj_dim=8))
    pipe.set_progress_bar_config(disable=True)
    with eraser.apply(pipe), pytest.raises(ValueError, match="is guidance-distilled .*. Use a method without guidance"):
        latents(pipe)
    with EIUP(ALCOHOL).apply(pipe):
        latents(pipe)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strength", -1.0),
        ("sld_guidance_scale", float("inf")),
        ("threshold", "0.1"),
        ("momentum_beta", 1.5),
        ("warmup", 10),
        ("momentum_scale", float("nan")),
    ],
)
def test_fields_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected `{field}`"):
        SLD(ALCOHOL, **{field: value})
    with pytest.raises(ValueError, match="SLD needs at least one concept"):
        SLD([])
    with pytest.raises(ValueError, match="strength"):
        NegativePrompt(ALCOHOL, strength=-1.0)


# ---------------------------------------------------------------- numbers and compilers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype: torch.dtype) -> None:
    pipe, eraser = pipeline().to(dtype), SLD(ALCOHOL, sld_guidance_scale=5.0, threshold=10.0)
    with eraser.apply(pipe):
        erased = latents(pipe)
    assert erased.dtype == dtype
    assert change(erased.float(), drawn("sd1", eraser)) < change(drawn(), drawn("sd1", eraser)) / 2


@pytest.mark.long
def test_compiled_without_a_graph_break() -> None:
    torch._dynamo.reset()
    pipe = pipeline("small")
    eraser = SLD(ALCOHOL, sld_guidance_scale=5.0, threshold=10.0, warmup=0.5)
    erasers = (eraser, NegativePrompt([CAT], strength=3.0))
    want = drawn("small", *erasers, prompt=PROMPTS)
    pipe.unet.compile(backend="eager", fullgraph=True)
    handles = [each.apply(pipe) for each in erasers]
    assert change(latents(pipe, PROMPTS), want) < 1e-4
    assert change(want, drawn("small", eraser, prompt=PROMPTS)) > 1e-2
    for handle in handles:
        handle.remove()
    torch._dynamo.reset()
