"""GIE against its formulas, written out with explicit softmax and sharing no code with the package; its adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_delta import low
from test_eiup import embed, logits, mix, softmax, written_out
from tiny import (
    ALCOHOL,
    CAT,
    LIMIT,
    PROMPT,
    PROMPTS,
    STEPS,
    WORDS,
    adapter,
    bare,
    change,
    drawn,
    execution_order,
    latents,
    pipeline,
)
from torch import Tensor, nn

from efface import EIUP, GIE, Concept, load
from efface._weights import layer_names, text_hash
from efface.erasers.gie.adapter import SHIPPED, Adapter, best_fixed
from efface.erasers.gie.fit import Ladder, Row, train
from efface.hooks.sites import site
from efface.models.emoji.weights import FOLDER

pytestmark = pytest.mark.thinned("long")

ERASED = {"alcohol": "beer wine glass", "cat": "cat"}
LONG = ("a big red dog at the pub", "a cat of the night and the moon")


@dataclasses.dataclass(frozen=True)
class Weighed(GIE):
    """Weights of its own for each row and token, all of them different."""

    measures = True

    def weigh(self, features: Tensor, layers: tuple[str, ...]) -> Tensor:
        return -weights(*features.shape[:2])


def weights(rows: int, tokens: int) -> Tensor:
    return 0.3 + torch.arange(1.0, 1 + rows * tokens).reshape(rows, tokens) / 3


class Reference:
    """An attention processor: row by row, concept by concept, one explicit map after the other."""

    def __init__(self, pipe: Any, prompts: Sequence[str], erased: Sequence[str], *, official: bool = False) -> None:
        self.official, self.prompts, self.erased = official, prompts, erased
        self.texts = {text: embed(pipe, text) for text in erased}
        self.joined = {(p, e): embed(pipe, f"{p} {e}") for p in prompts for e in erased}

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> Tensor:
        first, rows = len(hidden_states) - len(self.prompts), []
        for k, (hidden, text) in enumerate(zip(hidden_states, encoder_hidden_states, strict=True)):
            rows.append(self.row(attn, hidden, text, k - first) if k >= first else written_out(attn, hidden, text))
        return attn.to_out[1](attn.to_out[0](torch.stack(rows))) / attn.rescale_output_factor

    def row(self, attn: Attention, hidden: Tensor, text: Tensor, row: int) -> Tensor:
        plain = softmax(logits(attn, hidden, text))
        out = mix(attn, plain, text)
        for erased in self.erased:
            n, m = len(self.prompts[row].split()), len(erased.split())
            maps = softmax(logits(attn, hidden, self.texts[erased]))
            if self.official:  # the columns of the code's edited row, in its own numbering
                official = self.joined[self.prompts[row], erased]
                base = [*range(n + 1), *range(n + 1, n + 2), *range(n + m + 2, LIMIT)]
                assert len(base) + m == LIMIT
                out = out - mix(attn, plain, text) + mix(attn, plain[..., base], official[base])
            for k in range(m):
                out = out - float(weights(len(self.prompts), m)[row, k]) * mix(
                    attn, maps[..., [k + 1]], self.texts[erased][[k + 1]]
                )
        return out


@contextlib.contextmanager
def replaced(pipe: Any, processor: Any, name: str = "attn2") -> Iterator[None]:
    layers = {m: m.processor for n, m in pipe.unet.named_modules() if n.endswith(name)}
    for layer in layers:
        layer.processor = processor
    try:
        yield
    finally:
        for layer, old in layers.items():
            layer.processor = old


_double = functools.cache(lambda family: pipeline(family).to(torch.float64))


@pytest.mark.parametrize("values", ["paper", "official"])
def test_pictures_equal_the_formulas_with_a_weight_for_each_token(values: str, family: str) -> None:
    pipe = _double(family)
    erased = list(ERASED.values())
    with Weighed([ALCOHOL, CAT], values=values).apply(pipe):
        got = latents(pipe, LONG)
    with replaced(pipe, Reference(pipe, LONG, erased, official=values == "official")):
        want = latents(pipe, LONG)
    assert want.dtype == got.dtype == torch.float64
    assert change(got, want) < 1e-9
    assert change(got, latents(pipe, LONG)) > 0.1
    with replaced(pipe, Reference(pipe, LONG, erased, official=values != "official")):
        assert change(got, latents(pipe, LONG)) > 1e-3


@pytest.mark.long
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=9),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4),
)
def test_official_columns_whatever_the_lengths_and_repeated_words(prompt: list[str], erased: list[str]) -> None:
    pipe, text, phrase = _double("sd1"), (" ".join(prompt),), " ".join(erased)
    one = {"num_inference_steps": 1}
    with Weighed([Concept("x", (phrase,))], values="official").apply(pipe):
        got = latents(pipe, text, **one)
    with replaced(pipe, Reference(pipe, text, [phrase], official=True)):
        assert change(got, latents(pipe, text, **one)) < 1e-9
    with replaced(pipe, Reference(pipe, text, [phrase])):
        assert change(got, latents(pipe, text, **one)) > 1e-6


def test_a_fixed_weight_is_eiup_separate(pipe: Any, family: str) -> None:
    want = drawn(family, EIUP([ALCOHOL, CAT], strength=1.5, normalization="separate"), prompt=PROMPTS)
    assert change(drawn(family, GIE([ALCOHOL, CAT], strength=1.5), prompt=PROMPTS), want) < 1e-6
    assert change(want, drawn(family, prompt=PROMPTS)) > 0.1


def test_official_values_without_weights_are_not_plain(family: str) -> None:
    """Padding columns vanish and the end token carries the concept, which is why `off` sets the values as well."""
    none = drawn(family, GIE([ALCOHOL], strength=0.0, values="official"))
    assert change(none, drawn(family)) > 1e-3
    assert torch.equal(drawn(family, GIE([ALCOHOL], strength=0.0)), drawn(family))


def test_official_values_say_what_they_cannot_do(sd1: Any) -> None:
    official = GIE([ALCOHOL], values="official")
    with official.apply(sd1):
        with pytest.raises(ValueError, match=r"12 \+ 3 and at most 14 tokens, got 15"):
            latents(sd1, "a big red dog at the pub and a big red cat")
        with pytest.raises(ValueError, match="needs the text of each prompt"):
            bare(sd1)
        positive, negative = sd1.encode_prompt("a", "cpu", 1, True)
        with pytest.raises(ValueError, match="needs the text of each prompt"):
            latents(sd1, None, prompt_embeds=positive, negative_prompt_embeds=negative)
        latents(sd1)
    with pytest.raises(ValueError, match="`values`"):
        GIE([ALCOHOL], values="theirs")


@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
def test_official_values_need_a_causal_text_encoder() -> None:
    with pytest.raises(ValueError, match=r"needs a causal text encoder, but this .*\(emoji\) has cross"):
        GIE(["alcohol"], values="official").apply(load("emoji"))


# ---------------------------------------------------------------- two trajectories


class Both:
    """Processors of the public code's form, for rows [uncond, uncond, base, edit]; all maps written out.

    `end` and `copied` are the first steps outside the windows; `queries` is the most that are copied.
    """

    def __init__(
        self, pipe: Any, prompts: Sequence[str], erased: str, official: bool, steps: int, queries: int
    ) -> None:
        self.prompts, self.official, self.queries, self.step = prompts, official, queries, 0
        self.end, self.copied = int(0.8 * (steps + 1)), int(0.4 * steps)
        self.m, self.text = len(erased.split()), embed(pipe, erased)
        self.joined = [embed(pipe, f"{prompt} {erased}") for prompt in prompts]
        self.used: list[bool] = []

    def replaced(self, row: int) -> Tensor:
        """The code's text of the edited row: L columns, the concept's own tokens in front of the end token."""
        n, joined = len(self.prompts[row].split()), self.joined[row]
        own = self.text[1 : 1 + self.m]
        return torch.cat([joined[: n + 1], own, joined[n + 1 : n + 2], joined[n + self.m + 2 :]])

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        rows, out = len(self.prompts), []
        for k, hidden in enumerate(hidden_states):
            text = hidden if encoder_hidden_states is None else encoder_hidden_states[k]
            if k < 3 * rows:
                out.append(written_out(attn, hidden, text))
                continue
            base, row = hidden_states[k - rows], k - 3 * rows
            if encoder_hidden_states is None:
                copy = self.step < self.copied and len(hidden) <= self.queries
                self.used.append(copy)
                maps = softmax(logits(attn, base, base)) if copy else softmax(logits(attn, hidden, hidden))
                out.append(mix(attn, maps, hidden))
            elif self.step < self.end:
                out.append(self.inside(attn, hidden, base, text, row))
            else:
                out.append(written_out(attn, hidden, self.replaced(row) if self.official else text))
        return attn.to_out[1](attn.to_out[0](torch.stack(out))) / attn.rescale_output_factor

    def inside(self, attn: Attention, hidden: Tensor, base: Tensor, text: Tensor, row: int) -> Tensor:
        n, m = len(self.prompts[row].split()), self.m
        maps, concept = softmax(logits(attn, base, text)), softmax(logits(attn, hidden, self.text))
        weight = weights(len(self.prompts), m)[row].to(concept)
        inserted = -weight * concept[..., 1 : m + 1]
        if not self.official:
            return mix(attn, maps, text) + mix(attn, inserted, self.text[1 : m + 1])
        whole = torch.cat([maps[..., : n + 1], inserted, maps[..., n + 1 : n + 2], maps[..., n + m + 2 :]], -1)
        assert whole.shape[-1] == LIMIT
        return mix(attn, whole, self.replaced(row))


@torch.no_grad()
def both(pipe: Any, processors: Both, prompts: Sequence[str], steps: int) -> tuple[Tensor, Tensor]:
    """Latents of the plain and of the erased picture, by a sampling loop of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    positive, negative = pipe.encode_prompt(list(prompts), "cpu", 1, True)
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (0, 1)]
    x = torch.cat(noise * 2) * scheduler.init_noise_sigma
    with replaced(pipe, processors), replaced(pipe, processors, "attn1"):
        for step, time in enumerate(scheduler.timesteps):
            processors.step = step
            text = torch.cat([negative, negative, positive, positive])
            uncond, cond = pipe.unet(torch.cat([x, x]), time, text).sample.chunk(2)
            x = scheduler.step(uncond + 7.5 * (cond - uncond), time, x).prev_sample
    base, edit = x.chunk(2)
    return base, edit


@pytest.fixture
def pndm() -> Iterator[Any]:
    """In double precision, with a scheduler that makes one call more than there are steps."""
    pipe = _double("sd1")
    kept = pipe.scheduler
    pipe.scheduler = PNDMScheduler.from_config(kept.config, skip_prk_steps=True)
    yield pipe
    pipe.scheduler = kept


@pytest.mark.parametrize(("values", "queries"), [("paper", 256), ("official", 256), ("official", 16)])
def test_two_trajectories_are_the_public_code(
    values: str, queries: int, pndm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("efface.erasers.gie.method.QUERIES", queries)  # the layers have 64 and 16
    steps, erased = 5, ERASED["alcohol"]  # six calls: four in the window, two with copied self-attention
    reference = Both(pndm, PROMPTS, erased, values == "official", steps, queries)
    assert (reference.end, reference.copied) == (4, 2)
    base, want = both(pndm, reference, PROMPTS, steps)
    assert {True, False} == set(reference.used)
    twins: list[Tensor] = []

    def watch(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        twins.append(site(pipe).applied[0].memory["trajectory"].latents)
        return {}

    with Weighed([ALCOHOL], values=values, trajectories=2, window=(0.0, 0.8)).apply(pndm):
        got = latents(pndm, PROMPTS, num_inference_steps=steps, callback_on_step_end=watch)
    plain = latents(pndm, PROMPTS, num_inference_steps=steps)
    assert change(got, want) < 1e-9
    assert torch.equal(twins[-1], plain) and change(base, plain) < 1e-9
    assert len(twins) == steps + 1
    assert change(got, plain) > 1e-2
    with Weighed([ALCOHOL], values=values, window=(0.0, 0.8)).apply(pndm):
        assert change(got, latents(pndm, PROMPTS, num_inference_steps=steps)) > 1e-3


def test_official_is_the_published_setting() -> None:
    official = GIE.official([CAT], 2.0)
    assert (official.values, official.trajectories, official.window) == ("official", 2, (0.0, 0.8))
    with pytest.raises(ValueError, match="`trajectories` to be one of 1, 2, got 3"):
        GIE([CAT], trajectories=3)


def test_borrowed_maps_alone_change_nothing(family: str) -> None:
    weak = drawn(family, GIE([ALCOHOL], strength=1e-9, trajectories=2), prompt=PROMPTS)
    assert change(weak, drawn(family, prompt=PROMPTS)) < 1e-5


def test_the_twin_starts_from_the_same_noise_whatever_the_scheduler(sd1: Any) -> None:
    twins: list[Tensor] = []

    def watch(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        twins.append(site(pipe).applied[0].memory["trajectory"].latents)
        return {}

    kept = sd1.scheduler
    sd1.scheduler = EulerDiscreteScheduler.from_config(kept.config)  # scales what the denoiser gets
    plain = latents(sd1, PROMPTS)
    with GIE([ALCOHOL], trajectories=2).apply(sd1):
        latents(sd1, PROMPTS, callback_on_step_end=watch)
    sd1.scheduler = kept
    assert change(twins[-1], plain) < 1e-5


def test_two_trajectories_say_what_they_cannot_do(sd1: Any) -> None:
    with GIE([ALCOHOL], trajectories=2).apply(sd1):
        with pytest.raises(ValueError, match="need a pipeline call"):
            bare(sd1)
        with pytest.raises(ValueError, match="`guidance_rescale`"):
            latents(sd1, guidance_rescale=0.5)
        latents(sd1)
    pipe = pipeline("small")
    with GIE([ALCOHOL], trajectories=2).apply(pipe):
        pipe.unet.fuse_qkv_projections()
        with pytest.raises(ValueError, match=r"`pipe.unet.unfuse_qkv_projections\(\)`"):
            latents(pipe)  # or the maps of the layers would not be borrowed
        pipe.unet.unfuse_qkv_projections()
        latents(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ValueError, match="compiled denoiser"):
        GIE([CAT], trajectories=2).apply(pipe)


class Direct:
    """A processor that uses the weights of `to_q` and `to_out` without calling these modules."""

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = nn.functional.linear(hidden_states, attn.to_q.weight)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, attn.to_k(text), attn.to_v(text)))
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return nn.functional.linear(out, attn.to_out[0].weight, attn.to_out[0].bias) / attn.rescale_output_factor


def test_a_self_attention_layer_that_does_not_come_by_is_an_error(sd1: Any) -> None:
    """Or the maps of the other picture would silently not be copied."""
    plain = latents(sd1)
    with replaced(sd1, Direct(), "attn1"):
        assert change(latents(sd1), plain) < 1e-5  # the processor computes the same
        with GIE([CAT], trajectories=2).apply(sd1), pytest.raises(RuntimeError, match="attention layers ran without"):
            latents(sd1)
        with GIE([CAT]).apply(sd1):  # which does not edit them
            assert change(latents(sd1), plain) > 1e-3


def test_two_trajectories_that_take_nothing_out_are_plain_from_a_picture_on() -> None:
    base = pipeline()
    pipe = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"image": torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16), "strength": 0.9}
    plain = latents(pipe, **call)
    for strength, least, most in ((1e-9, 0.0, 1e-4), (1.0, 1e-2, 9.0)):
        with GIE([ALCOHOL], strength=strength, trajectories=2).apply(pipe):
            assert least <= change(latents(pipe, **call), plain) < most


# ---------------------------------------------------------------- the adapter


class Maps:
    """A processor that keeps the explicit maps of a text in the conditional rows, and draws the plain picture."""

    def __init__(self, text: Tensor, rows: int) -> None:
        self.text, self.rows, self.maps = text, rows, []

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        self.maps.append(torch.stack([softmax(logits(attn, h, self.text)) for h in hidden_states[-self.rows :]]))
        out = [written_out(attn, h, t) for h, t in zip(hidden_states, encoder_hidden_states, strict=True)]
        return attn.to_out[1](attn.to_out[0](torch.stack(out))) / attn.rescale_output_factor


def test_the_adapter_reads_each_tokens_attention_in_the_first_step(
    pipe: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(pipe)
    path = made.save(tmp_path / "adapter.safetensors")
    seen: list[tuple[Tensor, Tensor]] = []
    original = GIE.weigh

    def spy(self: GIE, features: Tensor, layers: tuple[str, ...]) -> Tensor:
        seen.append((features, original(self, features, layers)))
        return seen[-1][1]

    monkeypatch.setattr(GIE, "weigh", spy)
    calls: list[int] = []
    with GIE([ALCOHOL], adapter=path).apply(pipe):
        watch = pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
        erased = latents(pipe, PROMPTS)
        watch.remove()
    assert len(calls) == STEPS + 1 and len(seen) == 1
    maps = Maps(embed(pipe, ERASED["alcohol"]), len(PROMPTS))
    with replaced(pipe, maps):
        latents(pipe, PROMPTS)
    first = torch.stack([m.mean((1, 2)) for m in maps.maps[: len(made.layers)]], -1)[:, 1:4]  # [B, tokens, layers]
    features, predicted = seen[0]
    assert features.shape == (2, 3, len(made.layers))
    assert float((features - first).abs().max()) < 1e-6
    assert float(features.std(0).max()) > 1e-6  # rows differ, though little: random attention is nearly uniform
    x = (first - made.mean) / made.std
    for weight, bias in ((made.net[k].weight, made.net[k].bias) for k in (0, 2, 4)):
        x = x @ weight.T + bias
        x = x.relu() if len(weight) > 1 else x
    assert float((predicted + x[..., 0].clamp(min=0)).detach().abs().max()) < 1e-3
    assert bool((predicted <= 0).all()) and len(predicted.unique()) > 1
    assert change(erased, drawn(family, GIE([ALCOHOL]), prompt=PROMPTS)) > 1e-3
    reversed_ = dataclasses.replace(made, mean=made.mean.flip(0), std=made.std.flip(0))
    assert change(reversed_(features), made(features)) > 1e-2


def test_positive_weights_are_clamped(sd1: Any, tmp_path: Path) -> None:
    made = adapter(sd1)
    nn.init.zeros_(made.net[4].weight)
    nn.init.constant_(made.net[4].bias, -5.0)
    with GIE([ALCOHOL], adapter=made.save(tmp_path / "a.safetensors")).apply(sd1):
        assert torch.equal(latents(sd1), drawn())


def test_what_was_measured_stays_for_the_picture(sd1: Any, tmp_path: Path) -> None:
    """A strength set in the middle scales the weights of the first step; each call measures anew."""
    path = adapter(sd1).save(tmp_path / "a.safetensors")
    seen: list[Tensor] = []

    class Watched(Weighed):
        def weigh(self, features: Tensor, layers: tuple[str, ...]) -> Tensor:
            seen.append(features)
            return super().weigh(features, layers)

    def change_strength(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        handle.strength = 0.5
        return {}

    with Watched([ALCOHOL]).apply(sd1) as handle:
        latents(sd1, PROMPTS, callback_on_step_end=change_strength)
        assert len(seen) == 1
        latents(sd1, PROMPT)
        assert len(seen) == 2 and seen[1].shape[0] == 1
        for rows in (1, 2):  # outside a pipeline every call is a first one
            bare(sd1, rows=rows)
        assert [len(s) for s in seen] == [2, 1, 1, 2]
    with GIE(rows=[[ALCOHOL], [CAT, ALCOHOL]], adapter=path).apply(sd1):
        together = latents(sd1, PROMPTS)
    for i, concepts in enumerate(([ALCOHOL], [CAT, ALCOHOL])):
        with GIE(concepts, adapter=path).apply(sd1):
            assert change(together[i], latents(sd1, PROMPTS[i], seed=i)[0]) < 1e-5
    assert torch.equal(latents(sd1), drawn())


def test_an_adapter_file_is_the_adapter(sd1: Any, tmp_path: Path) -> None:
    made = adapter(sd1)
    path = made.save(tmp_path / "deep" / "a.safetensors")
    found, features = Adapter.load(path), torch.rand(2, 3, len(made.layers))
    assert torch.equal(found(features), made(features))
    assert (found.layers, found.model, found.text_encoder) == (made.layers, made.model, "CLIP")
    assert found.layers != tuple(n for n in layer_names(sd1)) or len(found.layers) < 3
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["adapter"])["layers"] == list(made.layers)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    config = GIE([ALCOHOL], adapter=path)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["adapter"] == str(path)


def test_adapters_that_do_not_fit_are_refused(pipe: Any, sd1: Any, family: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = adapter(pipe)
    adapter(pipe, model="0123456789abcdef").save(path)
    with pytest.raises(
        ValueError, match=rf"fitted on the model 0123456789ab.*this pipeline's model is {text_hash(pipe, {})[:12]}"
    ):
        GIE([ALCOHOL], adapter=path).apply(pipe)
    dataclasses.replace(made, layers=(*made.layers[:-1], "up.other")).save(path)
    with pytest.raises(ValueError, match=r"the first difference is '.*' and '.*'"):
        GIE([ALCOHOL], adapter=path).apply(pipe)
    made.save(path)
    if family != "sd1":
        with pytest.raises(ValueError, match="fitted on"):
            GIE([ALCOHOL], adapter=path).apply(sd1)
    dataclasses.replace(made, layers=made.layers[::-1]).save(path)
    if len(made.layers) > 1:  # the names alone do not tell; the run does
        with GIE([ALCOHOL], adapter=path).apply(pipe), pytest.raises(ValueError, match="the first difference"):
            latents(pipe)
    assert torch.equal(latents(pipe), drawn(family))


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors. Make one with GIE\.fit"):
        GIE([CAT], adapter=tmp_path / "none.safetensors")
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a GIE adapter"):
        GIE([CAT], adapter=path)
    save_file({"x": torch.zeros(1)}, path, {"efface": "gie adapter", "version": "1", "adapter": "{}"})
    with pytest.raises(ValueError, match="is damaged and has no `layers`"):
        GIE([CAT], adapter=path)
    path.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        GIE([CAT], adapter=path)


def test_a_compiled_denoiser_takes_fixed_weights_only() -> None:
    pipe = pipeline("small")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ValueError, match="compiled denoiser"):
        Weighed([Concept("cat")]).apply(pipe)
    GIE([Concept("cat")]).apply(pipe).remove()


# ---------------------------------------------------------------- training it

TEXTS = ("a cat", "a dog", "a red cat", "the moon", "a big dog at night", "a pub")
QUICK = {"seeds": [7], "strengths": (4, 1), "batch": 4, "num_inference_steps": 2, "most_epochs": 30}


class Bright:
    """Says that the brighter pictures of a batch have the concept, and stops at call `stop`."""

    name = "bright"

    def __init__(self, stop: int = 0) -> None:
        self.calls, self.stop, self.pictures = 0, stop, []

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.pictures.append(images)
        return torch.stack([images.mean((1, 2, 3)) > images.mean(), torch.zeros(len(images), dtype=torch.bool)])


def test_fit_draws_a_ladder_and_gives_an_adapter_of_this_model(sd1: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    bright, out = Bright(), tmp_path / "fits" / "cat.safetensors"
    gie = GIE.fit(sd1, CAT, TEXTS, detector=bright, out=out, progress=lambda *x: told.append(x), **QUICK)
    assert gie == GIE([CAT], adapter=out)
    assert [what for what, _ in told] == ["cat, plain", "cat, strength 1", "cat, strength 4"] * 2
    assert sum(n for _, n in told) == 3 * len(TEXTS)
    same = [torch.Generator().manual_seed(7) for _ in range(4)]
    plain = sd1(list(TEXTS[:4]), num_inference_steps=2, output_type="pt", generator=same).images
    assert torch.equal(bright.pictures[0], plain)
    made = Adapter.load(out)
    assert (made.layers, made.model, made.text_encoder) == (execution_order(sd1), text_hash(sd1, {}), "CLIPTextModel")
    assert made.facts["prompts"] == 6 and made.facts["held_out"] == 1 and made.facts["pictures"] == 18
    judged = json.loads(Path(f"{out}.ladder.json").read_text())["judged"]
    entry = judged[Row(CAT, "a dog", 7).key]
    assert set(entry) == {"features", "0", "1", "4"} and entry["0"][1] > 0.999 > entry["4"][1]
    assert len(entry["features"]) == 1 and len(entry["features"][0]) == len(made.layers)
    with gie.apply(sd1):
        latents(sd1)
    with pytest.raises(ValueError, match="fitted on"):
        gie.apply(pipeline("small"))


@pytest.mark.long
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_adapter_learns_where_gradients_are_off(mode: Any, sd1: Any, tmp_path: Path) -> None:
    want = GIE.fit(sd1, CAT, TEXTS, detector=Bright(), out=tmp_path / "a.safetensors", **QUICK)
    with mode():
        got = GIE.fit(sd1, CAT, TEXTS, detector=Bright(), out=tmp_path / "b.safetensors", **QUICK)
    one, other = Adapter.load(str(want.adapter)), Adapter.load(str(got.adapter))
    assert one.facts == other.facts and all(map(torch.equal, one.net.parameters(), other.net.parameters()))


def test_a_ladder_of_broken_pictures_is_an_error(sd1: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd1.vae, "decode", lambda z, **_: (torch.full((len(z), 3, 16, 16), torch.nan),))
    with pytest.raises(ValueError, match="values that are not finite"):
        GIE.fit(sd1, CAT, TEXTS, detector=Bright(), out=tmp_path / "a.safetensors", **QUICK)


@pytest.mark.long
def test_a_killed_fit_loses_one_batch(sd1: Any, tmp_path: Path) -> None:
    whole = GIE.fit(sd1, CAT, TEXTS, detector=Bright(), out=tmp_path / "whole.safetensors", **QUICK)
    out = tmp_path / "cat.safetensors"
    with pytest.raises(KeyboardInterrupt):
        GIE.fit(sd1, CAT, TEXTS, detector=Bright(stop=6), out=out, **QUICK)
    assert not out.exists()
    assert torch.equal(latents(sd1), drawn())  # nothing stays on
    rest = Bright()
    gie = GIE.fit(sd1, CAT, TEXTS, detector=rest, out=out, **QUICK)
    assert rest.calls == 2  # of six: the plain pictures of the second batch once more, and its last strength
    mine, unbroken = Adapter.load(out), Adapter.load(str(whole.adapter))
    assert mine.facts == unbroken.facts and all(map(torch.equal, mine.net.parameters(), unbroken.net.parameters()))
    again = Bright()
    assert GIE.fit(sd1, CAT, TEXTS, detector=again, out=out, **QUICK) == gie
    assert again.calls == 0
    with (
        EIUP([ALCOHOL]).apply(sd1),
        pytest.raises(ValueError, match="eiup is applied to the pipeline and would affect the ladder"),
    ):
        GIE.fit(sd1, CAT, TEXTS, detector=Bright(), out=out, **QUICK)
    with low(sd1).apply(sd1), pytest.raises(ValueError, match="present.deltas: "):
        GIE.fit(sd1, CAT, TEXTS, detector=Bright(), out=out, **QUICK)
    with pytest.raises(ValueError, match="(?s)rows: .*call.num_inference_steps: "):
        GIE.fit(sd1, CAT, TEXTS[:5], detector=Bright(), out=out, **{**QUICK, "num_inference_steps": 3})


@pytest.mark.long
def test_more_strengths_draw_only_these(sd1: Any, tmp_path: Path) -> None:
    out, few, more = tmp_path / "a.safetensors", Bright(), Bright()
    GIE.fit(sd1, CAT, TEXTS, detector=few, out=out, **QUICK | {"strengths": (1,)})
    GIE.fit(sd1, CAT, TEXTS, detector=more, out=out, **QUICK)
    assert (few.calls, more.calls) == (4, 4)  # of two batches each: the base model's pictures, and one strength
    whole = GIE.fit(sd1, CAT, TEXTS, detector=Bright(), out=tmp_path / "b.safetensors", **QUICK)
    longer, once = Adapter.load(out).facts, Adapter.load(str(whole.adapter)).facts
    assert longer == once and list(longer["losses"]) == list(longer["best"]) == ["0", "1", "4"]
    assert sum(longer["best"].values()) == longer["prompts"] == len(TEXTS) and longer["concepts"] == ["cat"]
    again = Bright()
    GIE.fit(sd1, CAT, TEXTS, detector=again, out=out, **QUICK | {"strengths": (1,)})
    assert again.calls == 0 and list(Adapter.load(out).facts["losses"]) == ["0", "1"]


def test_a_strength_at_an_end_of_the_ladder_is_not_called_the_best() -> None:
    inside = {"0": 0.6, "0.5": 0.5, "1": 0.2, "2": 0.2}
    assert best_fixed(inside) == 1.0  # of equals, the smallest
    for strength, where in (("0", "the base model"), ("0.5", "the smallest"), ("2", "the largest")):
        with pytest.raises(ValueError, match=rf"got {strength}, {where} of 0.5 to 2. Fit again with `strengths`"):
            best_fixed(inside | {strength: 0.1})
    with pytest.raises(ValueError, match="got 1, the largest of 1 to 1"):
        best_fixed({"0": 1.0, "1": 0.5})
    with pytest.raises(ValueError, match="the losses of its ladder, got one without. Fit it again"):
        best_fixed({})


def test_the_shipped_adapter_was_fitted_on_a_ladder_that_ends_at_its_best(tmp_path: Path) -> None:
    """As docs/methods.md says: half of the prompts that needed erasure did best at 2, the largest strength tried."""
    setting = json.loads(Path(f"{SHIPPED['emoji']}.ladder.json").read_text("utf-8"))["setting"]
    copy = tmp_path / "a.ladder.json"
    copy.write_bytes(Path(f"{SHIPPED['emoji']}.ladder.json").read_bytes())
    known = [json.loads(key) for key in setting["rows"]]
    rows = [Row(Concept(name), text, seed) for name, text, seed in known]
    facts = Ladder(copy, setting).facts(rows, setting["strengths"], fidelity=0.5)
    assert facts["best"] == {"0": 22, "0.125": 0, "0.25": 1, "0.5": 2, "1": 19, "2": 24}
    with pytest.raises(ValueError, match="got 2, the largest of 0.125 to 2"):
        best_fixed(facts["losses"])


def test_a_detector_that_sees_nothing_teaches_nothing(sd1: Any, tmp_path: Path) -> None:
    class Blind(Bright):
        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images) & False

    with pytest.raises(ValueError, match="in none of 6 pictures of the base model"):
        GIE.fit(sd1, CAT, TEXTS, detector=Blind(), out=tmp_path / "a.safetensors", **QUICK)
    assert not (tmp_path / "a.safetensors").exists()


def test_each_concept_has_prompts_and_a_judge_of_its_own(sd1: Any, tmp_path: Path) -> None:
    cats, drinks = Bright(), Bright()
    prompts = {"cat": TEXTS[:3], "alcohol": TEXTS[3:]}
    judges = {"cat": cats, "alcohol": drinks}
    GIE.fit(sd1, [CAT, ALCOHOL], prompts, detector=judges, out=tmp_path / "two.safetensors", **QUICK)
    assert cats.calls == drinks.calls == 3 and len(cats.pictures[0]) == 3
    with pytest.raises(ValueError, match=r"got differences in \['alcohol'\]"):
        GIE.fit(sd1, [CAT, ALCOHOL], {"cat": TEXTS}, detector=judges, out=tmp_path / "x.safetensors", **QUICK)


@pytest.mark.parametrize(
    ("prompts", "how", "error", "message"),
    [
        (TEXTS[:4], {}, ValueError, "at least 5 prompts"),
        ("a cat", {}, TypeError, "a sequence of texts"),
        (TEXTS, {"seeds": [1_000_000]}, ValueError, "Expected tuning seeds"),
        (TEXTS, {"strengths": [0]}, ValueError, "a strength above 0"),
        (TEXTS, {"strengths": [-1]}, ValueError, "`strengths`"),
        ({"cat": "a cat"}, {}, TypeError, "`prompts` to be a sequence of texts"),
        (TEXTS, {"batch": 0}, ValueError, "a whole number `batch` >= 1"),
        (TEXTS, {"patience": 0}, ValueError, "number `patience`"),
        (TEXTS, {"most_epochs": 0}, ValueError, "number `most_epochs`"),
        (TEXTS, {"fidelity": -1}, ValueError, "Expected `fidelity`"),
        (TEXTS, {"detector": {}}, ValueError, r"`detector` and `concepts` .* got differences in \['cat'\]"),
        (TEXTS, {"faithful": {}}, ValueError, r"`faithful` and `concepts` .* got differences in \['cat'\]"),
        (TEXTS, {"detector": torch.mean}, TypeError, "with a text `name`"),
        (TEXTS, {"out": Path(__file__).parent}, ValueError, "Expected `out` to be a file, got the folder"),
    ],
)
def test_bad_fits_are_found_before_anything_is_drawn(
    prompts: Any, how: dict[str, Any], error: type, message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        GIE.fit(None, CAT, prompts, **{"detector": Bright(), "out": tmp_path / "a", **how})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda found: "{", lambda found: "[]", lambda found: found.replace("features", "f")]
)
def test_a_damaged_ladder_is_named_with_its_cure(damage: Any, sd1: Any, tmp_path: Path) -> None:
    GIE.fit(sd1, CAT, TEXTS, detector=Bright(), out=tmp_path / "a", **QUICK)
    ladder = tmp_path / "a.ladder.json"
    ladder.write_text(damage(ladder.read_text()))
    with pytest.raises(ValueError, match="a.ladder.json is damaged.* Delete it, and the same call draws the ladder"):
        GIE.fit(sd1, CAT, TEXTS, detector=Bright(), out=tmp_path / "a", **QUICK)


def test_the_best_strength_is_the_least_loss_over_seeds(tmp_path: Path) -> None:
    rows = [Row(CAT, text, s) for text in ("draws it", "does not") for s in (1, 2)]
    ladder = Ladder(tmp_path / "l.json", {})
    scores = {
        rows[0]: {"0": (1, 1.0), "1": (1, 0.9), "2": (0, 0.6)},
        rows[1]: {"0": (1, 1.0), "1": (0, 0.9), "2": (0, 0.8)},
        rows[2]: {"0": (0, 1.0), "1": (0, 1.0), "2": (0, 0.8)},
        rows[3]: {"0": (0, 1.0), "1": (0, 1.0), "2": (0, 0.8)},
    }
    ladder.content["judged"] = {r.key: {"features": [[0.1, 0.2], [0.3, 0.4]], **of} for r, of in scores.items()}
    features, targets, groups = ladder.samples(rows, [1.0, 2.0], fidelity=1.0)
    assert targets.tolist() == [2.0] * 4 + [0.0] * 4  # of equals, the smallest
    assert groups == [0] * 4 + [1] * 4 and features.shape == (8, 2)
    assert ladder.samples(rows, [1.0, 2.0], fidelity=2.5)[1].tolist()[0] == 1.0  # loss 0.75 against 0.75: the smaller
    assert ladder.samples(rows, [1.0, 2.0], fidelity=9.0)[1].tolist()[0] == 0.0


def test_training_learns_what_the_features_say_and_ignores_their_scale() -> None:
    random = torch.Generator().manual_seed(1)
    signal = torch.rand(120, 3, generator=random)
    targets = 4 * signal[:, 0] + (signal[:, 1] > 0.5)
    losses = []
    for scale in (1.0, 1e-4):  # mean attention is small
        net, _, std, facts = train(scale * signal, targets, list(range(120)), 0.2, 100, 400, 0)
        assert facts["held_out"] == 24 and facts["held_out_loss"] < 0.2 * facts["held_out_loss_of_a_constant"]
        losses.append(facts["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert not any(p.requires_grad for p in net.parameters()) and float(std.min()) > 0
    _, _, std, _ = train(torch.zeros(20, 2), torch.ones(20), list(range(20)), 0.2, 5, 20, 0)
    assert torch.equal(std, torch.ones(2))  # a layer that never differs must not divide by zero
