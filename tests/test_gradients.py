"""Gradients through every eraser equal finite differences, so that white-box attacks see what is computed.

In float64, through a denoiser call with guidance in one batch, with respect to latents, to the prompt's embeddings, to
negative ones, and to the embedding table of the text encoder (which reaches what a method encodes by itself).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import pytest
import torch
from test_conformance import refusal
from test_delta import Noise
from tiny import ALCOHOL, CAT, adapter_file, denoiser_of, fitted, pipeline, untouched
from torch import Tensor

from efface import CRG, EIUP, GIE, NAG, SAFREE, SLD, AdaVD, Delta, NegativePrompt, SemanticSurgery
from efface.delta import Factors
from efface.hooks import CrossAttention, ErasurePrompts

PROMPTS = ("a night at the pub", "a big moon")
OWN_WORDS = ("night", "pub", "moon")  # of the prompts alone: no phrase and no neutral text has them
NEUTRAL = (("a dog",), ("the red dog",), ("a red",))
FAMILIES = (
    "sd1",
    "sdxl",
    "bert",
    "pixart",
    "sd3",
    "flux",
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("sd2", "small", "pixart_sigma", "sd35")),
)
TOGETHER = (ALCOHOL, CAT)  # three phrases
ERASERS: dict[str, Any] = {
    "eiup": EIUP(TOGETHER, neutral=NEUTRAL),
    "eiup-swap": EIUP(TOGETHER, normalization="swap", neutral=NEUTRAL, anchors=("a big dog",), threshold=0.2),
    "eiup-separate": EIUP(TOGETHER, normalization="separate"),
    "eiup-gated": EIUP(TOGETHER, normalization="gated"),
    "eiup-rows": EIUP(rows=[[CAT, ALCOHOL], [ALCOHOL]], neutral=NEUTRAL),
    "gie": GIE(TOGETHER),
    "gie-official-values": GIE(TOGETHER, values="official"),
    "gie-two-trajectories": GIE(TOGETHER, trajectories=2),
    "gie-official": GIE.official(TOGETHER),
    "gie-adapter": GIE(TOGETHER, adapter=adapter_file(untouched("sd1"))),
    "nag": NAG(TOGETHER),
    "adavd": AdaVD(TOGETHER),
    "adavd-shift": AdaVD(TOGETHER, shift=(4.0, 0.1)),
    "crg": CRG(TOGETHER, threshold=-1.0),
    "semantic_surgery": SemanticSurgery(TOGETHER, threshold=-1.0, gamma=0.5),
    "safree": SAFREE(TOGETHER),
    "sld": SLD(TOGETHER, warmup=0.0, sld_guidance_scale=5.0, threshold=0.05),
    "sld-everywhere": SLD(TOGETHER, warmup=0.0, sld_guidance_scale=5.0, threshold=10.0),
    "negative_prompt": NegativePrompt(TOGETHER),
    "negative_prompt-6": NegativePrompt(TOGETHER, strength=6.0),
    "eiup+negative_prompt-6": (EIUP(TOGETHER, neutral=NEUTRAL), NegativePrompt(ALCOHOL, strength=6.0)),
    "delta": "delta",
}
TEXT_ONLY = ("gie-official-values", "gie-official", "safree", "negative_prompt")  # they read or write the call's texts

UNCHANGED = {  # what the method adds does not depend on this
    ("negative_prompt", "words"),
    ("negative_prompt-6", "prompt_embeds"),
    ("negative_prompt-6", "words"),
    *((name, "negative_prompt_embeds") for name in ("eiup-separate", "eiup-gated", "gie", "gie-adapter", "nag", "sld")),
    *((name, "negative_prompt_embeds") for name in ("adavd", "adavd-shift", "semantic_surgery")),
    ("sld-everywhere", "negative_prompt_embeds"),
    ("gie-two-trajectories", "negative_prompt_embeds"),
    ("negative_prompt-6", "negative_prompt_embeds"),
}


@functools.cache
def double(family: str) -> Any:
    pipe = pipeline(family).to(torch.float64)
    for part in (denoiser_of(pipe), pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.requires_grad_(False)
    return pipe


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_delta(pipe: Any) -> Delta:
    """Changes the values that the layers read from text."""
    ends = ("attn2.to_v.weight", "add_v_proj.weight")
    weights = {n: w for n, w in denoiser_of(pipe).named_parameters() if n.endswith(ends)}
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    changes = {
        f"{part}.{name}": Factors(0.1 * random(w.shape[0], 2, seed=k), random(2, w.shape[1], seed=99 + k))
        for k, (name, w) in enumerate(weights.items())
    }
    return Delta.fitted(Noise(), pipe, changes, [ALCOHOL], seed=0)


@contextlib.contextmanager
def on(name: str, pipe: Any) -> Iterator[None]:
    """The pipeline with an eraser on; skips what the method refuses on this family, if it says why."""
    erasers = ERASERS[name] if isinstance(ERASERS[name], tuple) else (ERASERS[name],)
    with contextlib.ExitStack() as stack:
        for eraser in erasers:
            eraser = a_delta(pipe) if eraser == "delta" else fitted(eraser, pipe)
            if not isinstance(eraser, Delta) and (reason := refusal(eraser, pipe)):
                pytest.skip(reason)
            stack.enter_context(eraser.apply(pipe))
        yield


# ---------------------------------------------------------------- one call of the denoiser


def call_denoiser(pipe: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a denoiser predicts for two prompts, unconditional rows first (FLUX: conditional ones alone).

    The one place that says how the denoiser is called. `inputs`: `latents`, and `prompt_embeds` and
    `negative_prompt_embeds` where they are given instead of texts.
    """
    denoiser, latents = denoiser_of(pipe), inputs["latents"]
    pipe._guidance_scale = 7.5
    arguments: dict[str, Any] = {"num_images_per_prompt": 1, "device": "cpu"}
    kind = type(pipe).__name__
    guided = not kind.startswith("Flux")
    if guided:
        arguments["do_classifier_free_guidance"] = True
        pipe.scheduler.set_timesteps(4)
    arguments |= {
        name: None for name in ("prompt_2", "prompt_3") if name in signature(type(pipe).encode_prompt).parameters
    }
    if "3" in kind or not guided:
        arguments["max_sequence_length"] = 24
    if "prompt_embeds" in inputs:
        given = {name: value for name, value in inputs.items() if name != "latents"}
        encoded = pipe.encode_prompt(prompt=None, **constant(pipe), **given, **arguments)
    else:
        more = {"negative_prompt": ["a red pub", "the wine"]} if guided else {}
        encoded = pipe.encode_prompt(prompt=list(PROMPTS), **more, **arguments)
    if kind.startswith("PixArt"):
        text, mask, negative, negative_mask = encoded
        return denoiser(
            torch.cat([latents] * 2),
            encoder_hidden_states=torch.cat([negative, text]),
            encoder_attention_mask=torch.cat([negative_mask, mask]),
            timestep=pipe.scheduler.timesteps[1].expand(4),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
    if kind.startswith("Flux"):
        text, pooled, ids = encoded
        return denoiser(
            hidden_states=latents,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((2,), 0.5, dtype=latents.dtype),
            guidance=torch.full((2,), 3.5, dtype=latents.dtype),
            txt_ids=ids,
            img_ids=torch.zeros(latents.shape[1], 3, dtype=latents.dtype),
        ).sample
    if kind.startswith("StableDiffusion3"):
        text, negative, pooled, negative_pooled = encoded
        return denoiser(
            hidden_states=torch.cat([latents] * 2),
            encoder_hidden_states=torch.cat([negative, text]),
            pooled_projections=torch.cat([negative_pooled, pooled]),
            timestep=torch.full((4,), 500.0, dtype=latents.dtype),
        ).sample
    more = {}
    if kind.startswith("StableDiffusionXL"):
        pooled = torch.cat([encoded[3], encoded[2]])
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.zeros(4, 6, dtype=latents.dtype)}}
    text = torch.cat([encoded[1], encoded[0]])
    time = pipe.scheduler.timesteps[1]
    return denoiser(torch.cat([latents] * 2), time, encoder_hidden_states=text, **more).sample


def constant(pipe: Any) -> dict[str, Any]:
    """What goes with given embeddings and is not differentiated: pooled texts, or masks."""
    return {name: text for name, text in given(pipe).items() if name not in ("prompt_embeds", "negative_prompt_embeds")}


@functools.cache
def given(pipe: Any) -> dict[str, Tensor]:
    """The prompts and negative prompts as embeddings."""
    kind, more = type(pipe).__name__, {}
    if kind.startswith("StableDiffusionXL"):
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    elif kind.startswith("StableDiffusion3"):
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        more = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 24}
    elif kind.startswith("PixArt"):
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    else:
        names = ("prompt_embeds", "negative_prompt_embeds")
    arguments = {"num_images_per_prompt": 1, "device": "cpu", "do_classifier_free_guidance": True, **more}
    with torch.no_grad():
        made = pipe.encode_prompt(prompt=list(PROMPTS), negative_prompt=["a red pub", "the wine"], **arguments)
    return dict(zip(names, made, strict=True))


@contextlib.contextmanager
def moved_words(pipe: Any, by: Tensor | None) -> Iterator[None]:
    """Text encoders whose input embeddings of `OWN_WORDS` are moved, by one vector for all encoders and words."""
    hooks, start = [], 0
    for name in [n for n in ("tokenizer", "tokenizer_2", "tokenizer_3") if getattr(pipe, n, None) is not None]:
        tokens, encoder = getattr(pipe, name), getattr(pipe, name.replace("tokenizer", "text_encoder"))
        vocabulary, table = tokens.get_vocab(), encoder.get_input_embeddings()
        ids = torch.tensor([vocabulary.get(f"{word}</w>", vocabulary.get(word)) for word in OWN_WORDS])
        size = len(ids) * table.weight.shape[1]
        rows = None if by is None else by[start : start + size].unflatten(0, (len(ids), -1))
        start += size

        def move(module: Any, args: Any, out: Tensor, ids: Tensor = ids, rows: Tensor | None = rows) -> Tensor:
            return out if rows is None else out + (args[0][..., None] == ids).to(out) @ rows

        tables = {m for m in encoder.modules() if getattr(m, "weight", None) is table.weight}  # T5 has it twice
        hooks += [module.register_forward_hook(move) for module in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def words_size(pipe: Any) -> int:
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    return sum(len(OWN_WORDS) * e.get_input_embeddings().weight.shape[1] for e in encoders if e is not None)


def latents_of(pipe: Any) -> Tensor:
    return random(2, 16, 16, seed=1) if type(pipe).__name__.startswith("Flux") else random(2, 4, 8, 8, seed=1)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def assert_is_the_gradient(found: Tensor, function: Callable[[Tensor], Tensor], x: Tensor, exact: bool) -> None:
    """Central differences along the gradient and two random directions; not `exact`: a part is in float32."""
    step, tolerance = (1e-6, 1e-4) if exact else (1e-3, 5e-2)
    directions = [found / found.norm(), *(random(*x.shape, seed=50 + k) for k in range(2))]
    for direction in directions:
        direction = direction / direction.norm()
        with torch.no_grad():
            difference = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
        scale = found.norm() / found.numel() ** 0.5
        assert abs(float(difference - (found * direction).sum())) < tolerance * float(scale)


@pytest.mark.long
@pytest.mark.thinned
@pytest.mark.parametrize("wrt", ["latents", "prompt_embeds", "negative_prompt_embeds", "words"])
@pytest.mark.parametrize("name", ERASERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_differences(family: str, name: str, wrt: str) -> None:
    pipe = double(family)
    embeddings = wrt.endswith("_embeds")
    if family == "flux" and (embeddings or name.startswith(("crg", "sld", "negative_prompt"))):
        pytest.skip("the unconditional prediction has a call of its own")
    if embeddings and name in TEXT_ONLY:
        pytest.skip("reads or writes the call's texts")
    base = {"latents": latents_of(pipe), **(given(pipe) if embeddings else {})}
    base = {key: value for key, value in base.items() if key not in (constant(pipe) if embeddings else ())}
    x = torch.zeros(words_size(pipe), dtype=torch.float64) if wrt == "words" else base[wrt]

    def function(x: Tensor) -> Tensor:
        with moved_words(pipe, x if wrt == "words" else None):
            out = call_denoiser(pipe, base if wrt == "words" else {**base, wrt: x})
        return (out * random(*out.shape, seed=7)).sum() / out.numel() ** 0.5

    without = gradient(function, x)
    with on(name, pipe):
        found = gradient(function, x)
        t5 = getattr(pipe, "tokenizer_3", None) is not None or family.startswith("pixart")
        rounded = "adapter" in name or family in ("flux", "sd35") or (wrt == "words" and t5)  # to float32
        if name == "sld" and rounded:
            pytest.skip("a large step crosses the edges of its mask")
        assert_is_the_gradient(found, function, x, exact=not rounded)
    assert float(found.norm()) > 1e-2
    if (name, wrt) not in UNCHANGED:
        assert float((found - without).norm() / without.norm()) > 1e-3


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "bert", "pixart"])
def test_eiup_is_active_in_a_part_of_the_queries(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides of its kink, in conditional rows: 20 to 80 % of phrases and queries. Others have no kink."""
    pipe, seen, original = double(family), {}, EIUP.edit

    def spy(self: EIUP, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        edited = [out]
        for k in range(1, len(prompts.text) + 1):  # the phrases act one after the other
            edited.append(original(self, out, cross, ErasurePrompts(prompts.text[:k], prompts.token_columns[:k])))
            acts = (edited[-1] - edited[-2]).norm(dim=-1) > 1e-9 * out.norm(dim=-1)
            seen.setdefault(cross.unconditional, []).append(acts.double().mean())
        return edited[-1]

    monkeypatch.setattr(EIUP, "edit", spy)
    with on("eiup", pipe), torch.no_grad():
        call_denoiser(pipe, {"latents": latents_of(pipe)})
    shares = {of: float(torch.stack(each).mean()) for of, each in seen.items()}
    assert shares.keys() == {False, True}
    assert 0.2 < shares[False] < 0.8 < shares[True]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "bert", "pixart", "sd3"])
def test_sld_is_active_in_a_part_of_the_picture(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen, original = double(family), [], SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(original(self, made)), seen[-1]][1])
    with on("sld", pipe), torch.no_grad():
        call_denoiser(pipe, {"latents": latents_of(pipe)})
    assert 0.2 < float((seen[0] != 0).double().mean()) < 0.8
