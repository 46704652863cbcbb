"""Erasers beside other parts of diffusers, other pipelines and other threads."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from test_conformance import EFFECT, ERASERS, assert_unchanged, each, refusal
from tiny import (
    ALCOHOL,
    CAT,
    PROMPT,
    PROMPTS,
    STEPS,
    add_lora,
    batch,
    change,
    denoiser,
    drawn,
    fitted,
    latents,
    pipeline,
)
from torch import Tensor, nn

import efface
from efface import EIUP, GIE, SAFREE, SLD, Delta, NegativePrompt
from efface.hooks import Prediction

pytestmark = pytest.mark.thinned("long")

PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def other(kind: Any, pipe: Any, **parts: Any) -> Any:
    if hasattr(pipe, "safety_checker"):
        parts["requires_safety_checker"] = False
    made = kind(**pipe.components, **parts)
    made.set_progress_bar_config(disable=True)
    return made


@contextlib.contextmanager
def predictions(pipe: Any) -> Iterator[list[Tensor]]:
    """What the pipeline gets from its denoiser, step by step: unconditional rows, then conditional ones."""
    found: list[Tensor] = []
    watch = pipe.unet.register_forward_hook(lambda module, args, out: found.append(out[0]))
    try:
        yield found
    finally:
        watch.remove()


def assert_erases(eraser: Any, pipe: Any, **call: Any) -> tuple[Tensor, Tensor]:
    """Changes the picture, in the first step on the rows that its class says, and leaves the pipeline as it was."""
    call = {"num_inference_steps": 10 if getattr(eraser, "validation", None) else 4, **call}  # the filter is soon over
    call = {"negative_prompt": "a red beer", **call}  # EIUP edits no unconditional row without one
    with predictions(pipe) as before:
        plain = latents(pipe, PROMPT, **call)
    with eraser.apply(pipe), predictions(pipe) as after:
        erased = latents(pipe, PROMPT, **call)
    assert change(erased, plain) > EFFECT and len(before) == len(after)
    if eraser.touches_uncond:
        assert change(after[0][:1], before[0][:1]) > EFFECT
    else:
        assert_unchanged(after[0][:1], before[0][:1], eraser)
        assert change(after[-1][1:], before[-1][1:]) > EFFECT
    assert torch.equal(latents(pipe, PROMPT, **call), plain)
    return plain, erased


# ---------------------------------------------------------------- other pipelines


@pytest.mark.thinned
@each
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_image_to_image(eraser: Any, family: str) -> None:
    kind = {"sd1": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline}[family]
    pipe = other(kind, pipeline(family))
    plain, _ = assert_erases(eraser, pipe, image=PICTURE, strength=0.9)
    call = {"image": 1 - PICTURE, "strength": 0.9, "num_inference_steps": 4}
    assert change(latents(pipe, PROMPT, **call), plain) > EFFECT  # the picture does take part


@each
def test_inpainting_changes_what_is_masked(eraser: Any) -> None:
    mask = torch.ones(1, 1, 16, 16)
    mask[..., :8] = 0
    call = {"image": PICTURE, "mask_image": mask, "strength": 0.9, "height": 16, "width": 16}
    pipe = other(StableDiffusionInpaintPipeline, pipeline())
    if getattr(eraser, "trajectories", 1) == 2:  # the picture beside would have to be blended too
        with pytest.raises(ValueError, match="StableDiffusionInpaintPipeline inserts the given picture"):
            eraser.apply(pipe)
        return
    plain, erased = assert_erases(eraser, pipe, **call)
    assert torch.equal(erased[..., :4], plain[..., :4]) and change(erased[..., 4:], plain[..., 4:]) > EFFECT


def with_control(base: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        control = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16))
        for name, weight in control.named_parameters():
            if "controlnet" in name:
                nn.init.normal_(weight, std=0.3)
    return other(StableDiffusionControlNetPipeline, base, controlnet=control)


@pytest.mark.thinned
@each
def test_control_net(eraser: Any) -> None:
    pipe = with_control(pipeline())
    plain, erased = assert_erases(eraser, pipe, image=PICTURE)
    assert change(plain, drawn(num_inference_steps=4)) > EFFECT
    assert change(erased, drawn("sd1", eraser, num_inference_steps=4)) > EFFECT


def test_the_concepts_row_has_the_residuals_of_the_prompts_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen, given = with_control(pipeline()), [], []
    spy_on_sld(monkeypatch, seen)
    with SLD(ALCOHOL).apply(pipe):
        latents(pipe, PROMPT, image=PICTURE)
    watch = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: given.append({"sample": args[0], "timestep": args[1], **kwargs}), with_kwargs=True
    )
    latents(pipe, PROMPT, image=PICTURE)
    watch.remove()
    call, residual = given[0], given[0]["mid_block_additional_residual"]
    nothing = {"mid_block_additional_residual": torch.zeros_like(residual)}
    for text, row in ((PROMPT, seen[0].prompt), ("beer, wine glass", seen[0].concept)):
        call["encoder_hidden_states"] = pipe.encode_prompt(text, "cpu", 1, False)[0].repeat(2, 1, 1)
        with torch.no_grad():
            want, without = (pipe.unet(**call | changed)[0][1:] for changed in ({}, nothing))
        assert change(row, want) < 1e-5 and change(row, without) > 1e-3


def spy_on_sld(monkeypatch: pytest.MonkeyPatch, seen: list[Prediction]) -> None:
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])


# ---------------------------------------------------------------- adapters


@pytest.mark.long
@pytest.mark.thinned
@each
@pytest.mark.parametrize("first", ["lora", "eraser"])
def test_a_lora_takes_part(first: str, eraser: Any) -> None:
    """As if it were in the weights."""
    merged, pipe = pipeline(), pipeline()
    add_lora(merged)
    merged.unet.fuse_lora()
    merged.unet.unload_lora()
    with fitted(eraser, merged).apply(merged):
        want = latents(merged)
    if first == "lora":
        add_lora(pipe)
    handle = eraser.apply(pipe)
    if first == "eraser":
        assert torch.equal(latents(pipe), drawn("sd1", eraser))
        add_lora(pipe)
    erased = latents(pipe)
    handle.remove()
    plain = latents(pipe)
    assert change(erased, want) < 2e-2 * change(want, latents(merged))  # SLD's mask has an edge
    assert change(want, drawn("sd1", eraser)) > 1e-2 and change(erased, plain) > EFFECT
    handle = eraser.apply(pipe)
    pipe.unet.unload_lora()
    assert torch.equal(latents(pipe), drawn("sd1", eraser))
    handle.remove()
    assert torch.equal(latents(pipe), drawn())


COUPLES = [("eiup", "sld"), ("gie-adapter", "safree"), ("negative_prompt", "gie-2")]


@pytest.mark.thinned
@pytest.mark.parametrize("couple", COUPLES, ids=map("+".join, COUPLES))
@pytest.mark.parametrize("where", ["sdxl", "bert", "pixart", "lora", "ip_adapter"])
def test_pairs_come_off_in_any_order_elsewhere(where: str, couple: tuple[str, str]) -> None:
    pipe, call = pipeline(where if where in ("sdxl", "bert", "pixart") else "sd1"), {}
    if where == "lora":
        add_lora(pipe)
    if where == "ip_adapter":
        add_ip_adapter(pipe)
        call["ip_adapter_image_embeds"] = [SHOWN]
    a, b = fitted(ERASERS[couple[0]], pipe), dataclasses.replace(ERASERS[couple[1]], concepts=[CAT])
    if refusal(b, pipe):
        pytest.skip("refused there")
    plain, alone = latents(pipe, **call), []
    for one in (a, b):
        with one.apply(pipe):
            alone.append(latents(pipe, **call))
    on_a, on_b = a.apply(pipe), b.apply(pipe)
    both = latents(pipe, **call)
    on_a.remove()
    assert torch.equal(latents(pipe, **call), alone[1])
    on_a = a.apply(pipe)
    on_b.remove()
    assert torch.equal(latents(pipe, **call), alone[0])
    on_a.remove()
    assert torch.equal(latents(pipe, **call), plain)
    assert all(change(both, one) > EFFECT and change(one, plain) > EFFECT for one in alone)


def add_ip_adapter(pipe: Any) -> None:
    """A picture's embedding [rows, 1, 12] as two more tokens beside the text, with a softmax of their own."""
    unet, made = pipe.unet, {}
    with torch.random.fork_rng():
        torch.manual_seed(6)
        for name, old in unet.attn_processors.items():
            made[name] = old
            if "attn2" in name:
                width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
                made[name] = IPAdapterAttnProcessor2_0(width, 32, num_tokens=(2,), scale=1.0)
        unet.set_attn_processor(made)
        layer = ImageProjection(image_embed_dim=12, cross_attention_dim=32, num_image_text_embeds=2)
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([layer])
    unet.config.encoder_hid_dim_type = "ip_image_proj"


SHOWN = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(2))  # unconditional row, conditional row


@pytest.mark.long
@pytest.mark.thinned
@each
def test_an_ip_adapter_takes_part(eraser: Any) -> None:
    pipe = pipeline()
    add_ip_adapter(pipe)
    processors = pipe.unet.attn_processors
    call = {"ip_adapter_image_embeds": [SHOWN]}
    plain, erased = assert_erases(eraser, pipe, **call)
    with eraser.apply(pipe):
        assert all(pipe.unet.attn_processors[name] is it for name, it in processors.items())
        another = latents(pipe, PROMPT, num_inference_steps=4, ip_adapter_image_embeds=[SHOWN.flip(0)])
        assert change(another, erased) > EFFECT
        pipe.set_ip_adapter_scale(0.0)
        assert change(latents(pipe, PROMPT, **call), drawn("sd1", eraser)) < 1e-5
    assert change(plain, drawn(num_inference_steps=4)) > EFFECT


def test_the_concepts_row_sees_the_picture_that_the_prompts_row_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = pipeline(), []
    add_ip_adapter(pipe)
    spy_on_sld(monkeypatch, seen)
    with SLD(ALCOHOL).apply(pipe):
        latents(pipe, PROMPT, ip_adapter_image_embeds=[SHOWN])
    for text, row in ((PROMPT, seen[0].prompt), ("beer, wine glass", seen[0].concept)):
        with predictions(pipe) as found:
            latents(pipe, text, ip_adapter_image_embeds=[SHOWN])
            latents(pipe, text, ip_adapter_image_embeds=[SHOWN.flip(0)])
        assert change(row, found[0][1:]) < 1e-5 and change(row, found[STEPS][1:]) > 1e-3


# ---------------------------------------------------------------- erasers beside each other and beside deltas


@pytest.fixture(scope="module")
def delta() -> Delta:
    return efface.UCE().fit(pipeline(), [CAT])


@pytest.mark.thinned
@each
@pytest.mark.parametrize(("delta_first", "delta_leaves_first"), [*itertools.product([True, False], repeat=2)])
def test_with_a_delta_in_any_order(
    delta_first: bool, delta_leaves_first: bool, eraser: Any, delta: Delta, sd1: Any
) -> None:
    prompt = "a red cat"  # what the delta erases; the eraser takes something else
    on = {}
    for which in (True, False) if delta_first else (False, True):
        on[which] = (delta if which else eraser).apply(sd1)
    both = latents(sd1, prompt)
    on[delta_leaves_first].remove()
    left = eraser if delta_leaves_first else delta
    assert torch.equal(latents(sd1, prompt), alone := drawn("sd1", left, prompt=prompt))
    on[not delta_leaves_first].remove()
    assert torch.equal(latents(sd1, prompt), drawn(prompt=prompt))
    assert change(both, alone) > EFFECT and change(alone, drawn(prompt=prompt)) > EFFECT


def test_the_plain_picture_beside_reads_the_filtered_prompt() -> None:
    """Else a second trajectory would bring back what the filter took out."""
    pipe, read = pipeline(), []
    forward = pipe.unet.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["encoder_hidden_states"])
        return forward(*args, **kwargs)

    pipe.unet.forward = watched
    latents(pipe)
    with SAFREE(ALCOHOL).apply(pipe):
        latents(pipe)
        with GIE(ALCOHOL, trajectories=2).apply(pipe):
            latents(pipe)
    plain, filtered, beside = read[:STEPS], read[STEPS : 2 * STEPS], read[2 * STEPS :]
    assert len(beside) == 2 * STEPS and change(filtered[0], plain[0]) > 1e-2
    assert all(torch.equal(text, filtered[0]) for text in beside)


# ---------------------------------------------------------------- shared parts, other threads


def test_a_second_pipeline_on_the_denoiser_has_to_be_given_the_eraser(sd1: Any) -> None:
    second = other(StableDiffusionImg2ImgPipeline, sd1)
    handle = EIUP(ALCOHOL).apply(sd1)
    with pytest.raises(
        RuntimeError, match="If another pipeline shares this denoiser, apply the erasers to that pipeline"
    ):
        latents(second, PROMPT, image=PICTURE)
    assert torch.equal(latents(sd1), drawn("sd1", EIUP(ALCOHOL)))
    handle.remove()
    with EIUP(ALCOHOL).apply(second):
        latents(second, PROMPT, image=PICTURE)


@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_thread_is_refused_and_the_first_ones_picture_is_right(compiled: bool) -> None:
    pipe, errors = pipeline("small"), []
    if compiled:
        torch._dynamo.reset()
        pipe.unet.compile(backend="eager", fullgraph=True)

    def draw(**call: Any) -> None:
        try:
            latents(pipe, "a red cat", **call)
        except RuntimeError as error:
            errors.append(str(error))

    def in_another_thread(*_: Any) -> dict[str, Tensor]:
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
        return {}

    with EIUP(ALCOHOL).apply(pipe):
        assert change(latents(pipe, callback_on_step_end=in_another_thread), drawn("small", EIUP(ALCOHOL))) < 1e-5
        assert len(errors) == STEPS and all("one thread at a time" in error for error in errors)
        in_another_thread()  # nobody draws now
        assert len(errors) == STEPS
        if not compiled:  # while the denoiser is at work, the newcomer is refused too
            watch = pipe.unet.conv_in.register_forward_hook(lambda *_: [in_another_thread(), None][1])
            latents(pipe, num_inference_steps=1)
            watch.remove()
            assert len(errors) == STEPS + 1


def test_a_call_that_an_exception_ended_is_in_nobodys_way(sd1: Any) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with NegativePrompt(ALCOHOL).apply(sd1) as handle:
        with pytest.raises(KeyboardInterrupt):
            latents(sd1, PROMPTS, callback_on_step_end=stop)
        with torch.no_grad(), efface.conditional_rows(sd1, [True] * 3):
            sd1.unet(**batch(rows=3))
        handle.rows, handle.strength = [[ALCOHOL]], 6.0  # one prompt, and other rows of the batch: between two calls
        made = together(lambda: latents(sd1))
        assert torch.equal(made[0], drawn("sd1", NegativePrompt([ALCOHOL], strength=6.0)))


def together(*jobs: Any) -> dict[int, Any]:
    """What each job made, or its RuntimeError; they start at the same moment in threads of their own."""
    made: dict[int, Any] = {}
    start = threading.Barrier(len(jobs))

    def work(k: int, job: Any) -> None:
        start.wait()
        try:
            made[k] = job()
        except RuntimeError as error:
            made[k] = error

    threads = [threading.Thread(target=work, args=(k, job)) for k, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


@pytest.mark.thinned
@each
def test_threads_that_race_get_the_right_picture_or_an_error(eraser: Any, sd1: Any) -> None:
    want = [drawn("sd1", eraser, num_inference_steps=8, seed=k) for k in range(2)]
    with eraser.apply(sd1):
        errors: list[str] = []
        for _ in range(5):  # a busy machine may draw one after the other
            made = together(*(lambda k=k: latents(sd1, num_inference_steps=8, seed=k) for k in range(2)))
            errors += [str(result) for result in made.values() if isinstance(result, RuntimeError)]
            assert all(torch.equal(got, want[k]) for k, got in made.items() if isinstance(got, Tensor))
            if errors:
                break
        assert errors and all("Two threads use one pipeline" in error for error in errors)
        assert torch.equal(latents(sd1), drawn("sd1", eraser))  # and it is not stuck


@pytest.mark.long
def test_two_pipelines_at_once(sd1: Any) -> None:
    second, how = pipeline(), {"num_inference_steps": 8}
    for a, b in zip(ERASERS.values(), itertools.cycle((SLD(CAT), SAFREE(CAT), GIE(CAT, trajectories=2)))):
        with a.apply(sd1), b.apply(second):
            made = together(lambda: latents(sd1, **how), lambda: latents(second, "a red cat", **how))
        assert torch.equal(made[0], drawn("sd1", a, **how))
        assert torch.equal(made[1], drawn("sd1", b, prompt="a red cat", **how))


def test_a_text_encoder_may_be_shared_with_a_pipeline_in_another_thread() -> None:
    """Even while its tokens are masked for one of them."""
    first = pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(9)
        parts = first.components | {"unet": denoiser(32)}
    second = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    want, found = second.encode_prompt("a red cat", "cpu", 1, False)[0], []

    def in_between(module: nn.Module, args: Any, out: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            encode = threading.Thread(
                target=lambda: found.append(second.encode_prompt("a red cat", "cpu", 1, False)[0])
            )
            encode.start()
            encode.join()

    with SAFREE(ALCOHOL).apply(first):
        watch = first.text_encoder.register_forward_hook(in_between)
        first.encode_prompt(PROMPT, "cpu", 1, True)
        watch.remove()
    assert len(found) > 3 and all(torch.equal(text, want) for text in found)
