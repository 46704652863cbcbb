"""Calls of a pipeline inside others, beside others and after others that broke: each has its own rows and records."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import ALCOHOL, CAT, PROMPT, bare, batch, change, drawn, latents, pipeline
from torch import Tensor

import efface
from efface import EIUP, GIE, NAG, SAFREE, SLD
from efface.hooks.calls import CALLS

OTHER = "a red cat"
EFFECT = 1e-3


def beside(pipe: Any) -> Any:
    """A second pipeline on the same denoiser, with a scheduler of its own."""
    made = StableDiffusionPipeline(
        **pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def inside(act: Callable[[], Any], at: int = 0) -> Callable[..., dict[str, Tensor]]:
    """A callback that does something after one of the steps."""

    def after(pipe: Any, step: int, *_: Any) -> dict[str, Tensor]:
        if step == at:
            act()
        return {}

    return after


# ---------------------------------------------------------------- a call inside another


@pytest.mark.parametrize(
    "eraser",
    [EIUP(ALCOHOL), SLD(ALCOHOL, warmup=0.0), SAFREE(ALCOHOL), GIE(ALCOHOL, trajectories=2)],
    ids=["eiup", "sld", "safree", "gie"],
)
def test_a_call_inside_a_step_of_another_is_a_call_of_its_own(eraser: Any, sd1: Any) -> None:
    """Both pictures and both records are those of calls one after the other."""
    second, steps, inner = beside(sd1), 4, list[Any]()
    with eraser.apply(sd1) as handle, EIUP(CAT).apply(second):
        want = latents(sd1, num_inference_steps=steps), latents(second, OTHER)

        def draw() -> None:
            inner.append((latents(second, OTHER), handle.record))

        got = latents(sd1, num_inference_steps=steps, callback_on_step_end=inside(draw, 1))
        ((picture, record),) = inner
        assert torch.equal(picture, want[1]) and change(want[0], drawn("sd1", num_inference_steps=steps)) > EFFECT
        assert torch.equal(got, want[0])
        assert record["calls"] == 2 and handle.record["calls"] == steps
    assert CALLS.get() == ()


def test_a_call_inside_another_may_be_of_other_rows_and_may_break(sd1: Any) -> None:
    """The outer call goes on with its own rows, and with the strength that was set meanwhile."""
    second, rows = beside(sd1), [[ALCOHOL], []]

    def draw() -> None:
        with pytest.raises(KeyboardInterrupt):
            latents(second, [OTHER, OTHER], callback_on_step_end=stop, num_images_per_prompt=2)
        handle.strength = 0.5

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def halve() -> None:
        handle.strength = 0.5

    prompts = [PROMPT, PROMPT]
    with EIUP(rows=rows).apply(sd1) as handle, SLD(CAT).apply(second):
        want = latents(sd1, prompts, callback_on_step_end=inside(halve))
        handle.strength = 2.25
        assert torch.equal(latents(sd1, prompts, callback_on_step_end=inside(draw)), want)
        handle.strength = 2.25
        assert change(latents(sd1, prompts)[0], want[0]) > EFFECT


def test_an_eraser_that_is_changed_inside_an_inner_call_is_changed_in_the_outer_one(sd1: Any) -> None:
    second = beside(sd1)

    def halve() -> None:
        handle.strength = 0.5

    def draw() -> None:
        latents(second, OTHER, callback_on_step_end=inside(halve))

    with EIUP(ALCOHOL).apply(sd1) as handle, SLD(CAT, strength=0.0).apply(second):
        want = latents(sd1, callback_on_step_end=inside(halve))
        handle.strength = 2.25
        assert torch.equal(latents(sd1, callback_on_step_end=inside(draw)), want)
        assert change(latents(sd1), drawn("sd1", EIUP(ALCOHOL))) > EFFECT  # it stays changed


def test_a_denoiser_call_of_the_callback_is_not_the_one_that_the_step_owes(sd1: Any) -> None:
    """It calls the guarded denoiser itself, while the pipeline's steps call another one."""
    own, other = sd1.unet, pipeline().unet

    def swap(pipe: Any, step: int, *_: Any) -> dict[str, Tensor]:
        if step:
            pipe.unet = own
            bare(pipe)
        pipe.unet = other
        return {}

    with EIUP(ALCOHOL).apply(sd1):
        with pytest.raises(RuntimeError, match="did not call the unet with the erasers"):
            latents(sd1, callback_on_step_end=swap)
        sd1.unet = own
        assert torch.equal(latents(sd1), drawn("sd1", EIUP(ALCOHOL)))


# ---------------------------------------------------------------- encode_prompt in a call


@pytest.mark.parametrize("family", ["sd1", "flux", "qwenimage"])
def test_a_prompt_that_a_callback_encodes_is_erased_in_the_next_steps(family: str) -> None:
    """Where guidance comes in two calls, `encode_prompt` is also how negative prompts come: not within the steps."""
    pipe, eraser = pipeline(family), (EIUP if family == "sd1" else NAG)(ALCOHOL)

    def switch(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step:
            return {}
        more = {} if family == "sd1" else {"max_sequence_length": 24}
        made = pipe.encode_prompt(OTHER, device="cpu", num_images_per_prompt=1, **more, **guided)
        return {"prompt_embeds": torch.cat([made[1], made[0]]) if family == "sd1" else made[0]}

    guided = {"do_classifier_free_guidance": True} if family == "sd1" else {}
    call: dict[str, Any] = {} if family == "sd1" else {"guidance_scale": 1.0}
    call |= {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    base = latents(pipe, OTHER, **call)
    with eraser.apply(pipe) as handle:
        assert change(latents(pipe, OTHER, **call), base) > EFFECT
        assert handle.record["rows"] == {"0": handle.record["calls"]} and not handle.record["exempt"]


@pytest.mark.parametrize("when", ["steps", "before"])
def test_after_a_call_that_broke_the_next_text_is_a_prompt(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never taken for the negative prompt of the broken call, whose rows stay unedited."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    pipe, eraser = pipeline("flux"), NAG(ALCOHOL)
    seen: list[dict[str, Any]] = []
    watch = pipe.transformer.register_forward_pre_hook(lambda m, a, given: seen.append(given), with_kwargs=True)
    latents(pipe, PROMPT, num_inference_steps=1, guidance_scale=1.0)
    watch.remove()
    with eraser.apply(pipe):
        if when == "before":
            monkeypatch.setattr(pipe, "prepare_latents", stop)
        with pytest.raises(KeyboardInterrupt):
            latents(pipe, OTHER, callback_on_step_end=stop, guidance_scale=1.0)
        text, pooled, _ = pipe.encode_prompt(PROMPT, None, "cpu", max_sequence_length=24)
        arguments = seen[0] | {"encoder_hidden_states": text, "pooled_projections": pooled}
        if when == "before":  # whether the negative prompt of that call comes now is not known
            with pytest.raises(RuntimeError, match="outside of the steps of a pipeline call"):
                pipe.transformer(**arguments)
            return
        with torch.no_grad():
            erased = pipe.transformer(**arguments)[0]
    with torch.no_grad():
        assert change(erased, pipe.transformer(**arguments)[0]) > EFFECT


# ---------------------------------------------------------------- other threads


def thread(act: Callable[[], Any]) -> Exception | None:
    """Does something in another thread, and returns what it raises."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            act()
        except (RuntimeError, ValueError) as error:
            raised.append(error)

    other = threading.Thread(target=run)
    other.start()
    other.join()
    return raised[0] if raised else None


def test_a_call_of_another_thread_that_is_refused_early_changes_nothing() -> None:
    """While this thread encodes its prompts, one after the other, another one begins a call."""
    pipe, raised = pipeline("flux"), list[Any]()
    want = drawn("flux", NAG(ALCOHOL))

    def begin(*_: Any) -> None:
        raised.append(thread(lambda: pipe.check_inputs(None, None, 16, 16)))

    with NAG(ALCOHOL).apply(pipe):
        watch = pipe.text_encoder.register_forward_hook(begin)
        got = latents(pipe)
        watch.remove()
    assert len(raised) > 1 and all(isinstance(error, ValueError) for error in raised)
    assert torch.equal(got, want) and change(got, drawn("flux")) > EFFECT


def test_two_pipelines_on_one_denoiser_in_two_threads_never_mix(sd1: Any) -> None:
    """The one that draws gets its picture, the other an error, also if its thread has a copy of this one's context."""
    second, errors = beside(sd1), list[Any]()
    with EIUP(ALCOHOL).apply(sd1), EIUP(CAT).apply(second):
        want = latents(sd1)

        def draw() -> None:
            errors.append(thread(lambda: latents(second, OTHER)))

        assert torch.equal(latents(sd1, callback_on_step_end=inside(draw)), want)
        assert "Two threads use one pipeline" in str(errors[0])

        def copied() -> None:
            context = contextvars.copy_context()
            errors.append(thread(lambda: context.run(latents, second, OTHER)))

        # the callback waits for it, so it is a call inside this one
        assert torch.equal(latents(sd1, callback_on_step_end=inside(copied)), want) and errors[1] is None
    assert efface.active(sd1).config() == []


def test_a_text_may_be_encoded_in_another_context_than_the_denoiser_is_called_in(sd1: Any) -> None:
    """As in notebooks whose cells have contexts of their own."""
    with EIUP(ALCOHOL).apply(sd1), torch.no_grad():
        text, negative = contextvars.copy_context().run(sd1.encode_prompt, PROMPT, "cpu", 1, True)
        given = {name: torch.cat([x[:1]] * 2) if x.ndim else x for name, x in batch(rows=1).items()}
        erased = sd1.unet(**given | {"encoder_hidden_states": torch.cat([negative, text])}).sample
    with torch.no_grad():
        base = sd1.unet(**given | {"encoder_hidden_states": torch.cat([negative, text])}).sample
    assert torch.equal(erased[0], base[0]) and change(erased[1], base[1]) > EFFECT
