"""Chroma, FLUX.2, Qwen-Image, Edit and Sana: EIUP against its definition, and what is particular to each family."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from families_literal import KINDS, Beside
from joint_literal import conditional, over, unconditional
from PIL import Image
from tiny import ALCOHOL, CAT, PROMPTS, change, latents, pipeline, untouched
from tiny.qwenimage_edit import picture
from tiny.sana import INSTRUCTION
from torch import Tensor

import efface
from efface import EIUP, GIE, SLD, NegativePrompt, registry
from efface.families import family as facts_of
from efface.families._parts import between, tokenizer_of
from efface.hooks import Prediction
from efface.testing import conformance
from efface.testing.conformance import Trial
from efface.testing.drawing import ready

JOINT = ("chroma", "flux2", "klein", "qwenimage", "qwenimage_edit")
ALL = (*JOINT, "sana")
GUIDED = ("chroma", "klein", "qwenimage", "qwenimage_edit")
NEUTRAL = (("a dog", "the moon"), ("a big cat",), ("a red night",))
PHRASES = (*ALCOHOL.phrases, *CAT.phrases)
NEGATIVE = ["a dog", "the big moon"]
pytestmark = pytest.mark.thinned("long")
RUN = 32  # columns of padding that one column stands for where positions count

double = functools.cache(lambda family: pipeline(family).to(torch.float64))
each_joint = pytest.mark.parametrize("family", JOINT)


def eiup(*concepts: Any, **fields: Any) -> EIUP:
    return EIUP(concepts or (ALCOHOL, CAT), **{"neutral": NEUTRAL, "strength": 1.5, **fields})


def negated(family: str, negative: list[str], pipe: Any = None) -> dict[str, Any]:
    """klein takes no negative prompt, but its embeddings."""
    if family != "klein":
        return {"negative_prompt": negative}
    return {"negative_prompt_embeds": encoded(pipe or double(family), negative)[0]}


# ---------------------------------------------------------------- the definition


@torch.no_grad()
def encoded(pipe: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Each text by the pipeline itself, and its mask."""
    kind, longest = type(pipe).__name__, {"max_sequence_length": 24 if "Chroma" in type(pipe).__name__ else 40}
    if kind == "ChromaPipeline":
        made = pipe.encode_prompt(list(texts), device="cpu", do_classifier_free_guidance=False, **longest)
        return made[0], made[2]
    more = {"image": [picture()] * len(texts)} if kind == "QwenImageEditPipeline" else {}
    made = pipe.encode_prompt(list(texts), device="cpu", **more, **longest)
    return made[0], made[1] if kind.startswith("QwenImage") else None


def beside(pipe: Any, group: Sequence[str]) -> Beside:
    """The mean of some texts. Padding is one column, of as many as there are, or of `RUN` where they have positions."""
    kind, words = type(pipe).__name__, max(len(text.split()) for text in group)
    if kind.startswith("QwenImage"):  # a word's column is its mean over the texts that have it; padding is not there
        states = [encoded(pipe, [text])[0][0] for text in group]
        n = max(map(len, states))
        mean = torch.stack([torch.stack([each[k] for each in states if k < len(each)]).mean(0) for k in range(n)])
        return Beside(mean, torch.ones(n), torch.arange(n), torch.ones(n))
    made, _ = encoded(pipe, group)
    mean, n = made.mean(0), made.shape[1]
    if kind == "ChromaPipeline":  # words, an end, padding that the mask shows, and others
        ends = [*range(words + 3), n]
        seen = torch.tensor([*[1.0] * (words + 2), 0.0])
    elif pipe.tokenizer.padding_side == "left":
        tokens = words + len(pipe.system_message.split()) + 4
        ends = [*range(0, n - tokens, RUN), *range(n - tokens, n + 1)]
        seen = torch.ones(len(ends) - 1)
    else:
        tokens = words + 5
        ends = [*range(tokens + 1), *range(RUN, n, RUN), n]
        seen = torch.ones(len(ends) - 1)
    pairs = list(itertools.pairwise(ends))
    parts, sizes = [mean[a:b].mean(0) for a, b in pairs], [float(b - a) for a, b in pairs]
    middles = [(a + b - 1) / 2 for a, b in pairs]
    return Beside(torch.stack(parts), torch.tensor(sizes), torch.tensor(middles), seen)


def written_out(family: str, strength: float, alone: bool = False, **call: Any) -> Tensor:
    """The pictures of the definition. Requires that every phrase changes some queries and leaves others.

    `alone` edits what is read of the texts alone.
    """
    pipe = double(family)
    texts = [beside(pipe, group) for group in (("",), *NEUTRAL, *((phrase,) for phrase in PHRASES))]
    prompts, moved = encoded(pipe, PROMPTS)[0], list[Tensor]()
    row = conditional(strength, moved)

    def edits(text: Tensor) -> list[Any]:
        if text.shape == prompts.shape and torch.equal(text, prompts):
            return [row] * len(text)
        return [unconditional(strength)] * len(text)

    pipe.transformer.forward = engine = KINDS[family](pipe.transformer, texts, len(NEUTRAL), edits)
    engine.alone = alone
    try:
        made = latents(pipe, PROMPTS, **call)
    finally:
        del pipe.transformer.forward
    size = torch.cat(moved)
    assert 0.2 < float((size > 0).double().mean()) < 0.8 and float(size[size > 0].median()) > 0.01
    return made


@each_joint
def test_pictures_equal_the_definition(family: str) -> None:
    """Prompts and negative prompts of several lengths, three phrases, two groups of neutral texts, all layers."""
    guided = family in GUIDED
    pipe, strength, call = double(family), 1.5 if guided else 4.0, {"num_inference_steps": 2}
    call |= negated(family, NEGATIVE) if guided else {}
    plain = latents(pipe, PROMPTS, **call)
    with eiup(strength=strength).apply(pipe):
        erased = latents(pipe, PROMPTS, **call)
    assert change(erased, plain) > 1e-2
    assert change(erased, written_out(family, strength, **call)) < 1e-6


# ---------------------------------------------------------------- what every method promises

GATED: dict[str, dict[str, Any]] = {
    "eiup": {"neutral": NEUTRAL},
    "crg": {"threshold": -1.0},
    "semantic_surgery": {"threshold": -1.0, "gamma": 0.5},
}
WORKS = {
    "chroma": ("crg", "eiup", "nag", "negative_prompt", "safree", "semantic_surgery", "sld"),
    "flux2": ("eiup", "nag", "safree", "semantic_surgery"),
    "klein": ("crg", "eiup", "nag", "negative_prompt", "safree", "semantic_surgery", "sld"),
    "qwenimage": ("crg", "eiup", "nag", "negative_prompt", "safree", "sld"),
    "qwenimage_edit": ("crg", "eiup", "nag", "negative_prompt", "safree", "sld"),
    "sana": ("adavd", "crg", "eiup", "gie", "nag", "negative_prompt", "safree", "semantic_surgery", "sld"),
}


@pytest.mark.long
@pytest.mark.parametrize("family", WORKS)
def test_erasers_keep_their_promises_or_refuse(family: str) -> None:
    """Fewer promises than in `test_conformance`: the mechanics are those of families with all of them."""
    pipe, _ = ready(family)
    trials = {
        name: Trial(registry.resolve(name)([ALCOHOL], **GATED.get(name, {})), family, pipe, steps=2)
        for name in registry.methods("erasers")
    }
    trials = {name: trial for name, trial in trials.items() if not conformance.refusal(trial)}
    assert {*WORKS[family]} <= trials.keys()
    for trial in trials.values():
        with trial.method.apply(pipe):
            trial.require_effect(trial.latents(), trial.drawn())
    conformance.come_off_shuffled([*trials.values()])
    conformance.off_is_the_base_model(trials["eiup"])
    if family in ("chroma", "qwenimage", "qwenimage_edit", "sana"):  # klein takes no negative prompt
        for name in ("eiup", "nag", "negative_prompt"):
            conformance.touches_unconditional_rows_only_if_declared(trials[name])
    note = f"not calibrated for {facts_of(pipe).name} (calibrated: emoji, emoji-128)"
    with eiup(strength=None).apply(pipe):
        assert note in str(efface.active(pipe))


# ---------------------------------------------------------------- rows and columns


@dataclasses.dataclass(frozen=True)
class Nothing(EIUP):
    """Carries the texts and changes nothing."""

    def edit(self, out: Tensor, cross: Any, prompts: Any) -> Tensor:
        cross.with_empty(prompts.text)
        return out


def predictions(pipe: Any, family: str, *erasers: Any, negative: Any = NEGATIVE) -> tuple[Tensor, Tensor]:
    """The denoiser's first predictions of two prompts, the unconditional ones first; and what its first joint layer
    gives for the prompts."""
    seen: list[Tensor] = []
    columns: list[Tensor] = []
    call = {} if negative is None or family not in GUIDED else negated(family, negative, pipe)
    watches = [
        pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0])),
        pipe.transformer.transformer_blocks[0].attn.register_forward_hook(lambda m, args, out: columns.append(out[1])),
    ]
    with contextlib.ExitStack() as on:
        for eraser in erasers:
            on.enter_context(eraser.apply(pipe))
        latents(pipe, PROMPTS, num_inference_steps=1, **call)
    for watch in watches:
        watch.remove()
    return torch.cat(seen[1::-1]), columns[0]


@each_joint
def test_carried_texts_touch_neither_prompt_nor_picture(family: str) -> None:
    """To the bit, in float32 and under a mask; nor does an edit touch the prompt's columns of the first layer."""
    pipe = untouched(family)
    (plain, base), (carried, _) = predictions(pipe, family), predictions(pipe, family, Nothing((ALCOHOL, CAT)))
    erased, columns = predictions(pipe, family, eiup())
    assert torch.equal(carried, plain) and change(erased, plain) > 1e-3
    assert columns.shape[1] > base.shape[1] and torch.equal(columns[:, -base.shape[1] :], base)


@pytest.mark.parametrize("family", GUIDED)
def test_unconditional_rows_change_exactly_if_their_prompt_is_not_empty(family: str) -> None:
    """Also where the empty one is padded to the other's length; and rows without concepts stay."""
    pipe = untouched(family)
    for negative in (["", ""], ["", "a big red dog"]):
        (base, _), (erased, _) = (predictions(pipe, family, *on, negative=negative) for on in ([], [eiup()]))
        assert torch.equal(erased[0], base[0]) and torch.equal(erased[1], base[1]) == (not negative[1])
        assert all(change(erased[k], base[k]) > 1e-3 for k in (2, 3))
    some, _ = predictions(pipe, family, eiup(rows=[[], [CAT]]), negative=["", ""])
    base, _ = predictions(pipe, family, negative=["", ""])
    assert torch.equal(some[:3], base[:3]) and change(some[3], base[3]) > 1e-3


@pytest.mark.parametrize("family", ["qwenimage", "sana"])
def test_a_row_of_a_batch_is_the_row_alone(family: str) -> None:
    """Beside prompts of other lengths, which pad and mask it."""
    pipe, _ = ready(family)
    conformance.a_row_is_the_row_alone(Trial(EIUP(ALCOHOL), family, pipe, steps=1))


@pytest.mark.parametrize("family", [*GUIDED, "sana"])
def test_each_prediction_is_the_denoisers_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLD's concept is longer than one prompt and shorter than the other, so masks and lengths differ."""
    pipe, seen = double(family), list[Prediction]()
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    with SLD(efface.Concept("x", ("a red dog", "wine"))).apply(pipe):
        latents(pipe, PROMPTS, num_inference_steps=1)
    found: list[Tensor] = []
    watch = pipe.transformer.register_forward_hook(lambda module, args, out: found.append(out[0]))
    for prompt in (PROMPTS[0], PROMPTS[1], "a red dog, wine"):
        for seed in (0, 1):
            latents(pipe, prompt, seed=seed, num_inference_steps=1)
    watch.remove()
    if family == "sana":  # unconditional rows first, in one call
        found = [row[None] for call in found for row in (call[1], call[0])]
    for k in (0, 1):
        assert change(seen[0].prompt[k], found[4 * k + 2 * k][0]) < 1e-9
        assert change(seen[0].negative[k], found[4 * k + 2 * k + 1][0]) < 1e-9
        assert change(seen[0].concept[k], found[8 + 2 * k][0]) < 1e-9
    assert change(seen[0].concept, seen[0].prompt) > 1e-3


# ---------------------------------------------------------------- what each family has of its own


def test_chroma_takes_embeddings_of_another_length_with_their_mask() -> None:
    pipe = pipeline("chroma")
    made = pipe.encode_prompt(list(PROMPTS), list(NEGATIVE), "cpu", max_sequence_length=12)
    call = dict(zip(("prompt_embeds", "prompt_attention_mask"), (made[0], made[2]), strict=True))
    call |= dict(zip(("negative_prompt_embeds", "negative_prompt_attention_mask"), (made[3], made[5]), strict=True))
    plain = latents(pipe, None, **call)
    for eraser in (eiup(), SLD([ALCOHOL], warmup=0.0, threshold=10.0)):
        with eraser.apply(pipe):
            assert change(latents(pipe, None, **call), plain) > 1e-2


def test_a_mask_that_tells_the_pictures_columns_apart_is_an_error() -> None:
    """One that hides a part of the picture, and one that hides texts, which the denoiser of today only weights."""
    pipe = pipeline("chroma")
    seen: list[Any] = []
    watch = pipe.transformer.register_forward_pre_hook(lambda m, args, given: seen.append(given), with_kwargs=True)
    latents(pipe, num_inference_steps=1)
    watch.remove()
    given, masks = seen[0], [seen[0]["attention_mask"].clone(), seen[0]["attention_mask"].bool()]
    masks[0][:, -1] = 0
    with eiup().apply(pipe), efface.conditional_rows(pipe, [True]), torch.no_grad():
        pipe.transformer(**given)
        for mask in masks:
            with pytest.raises(RuntimeError, match="from all columns to all columns, got `attn_mask`"):
                pipe.transformer(**{**given, "attention_mask": mask})


@pytest.mark.parametrize("family", ["flux2", "klein"])
def test_pictures_beside_the_prompt_of_flux2_count_as_the_picture(family: str) -> None:
    pipe, picture = pipeline(family), Image.new("RGB", (64, 64), (200, 30, 40))
    plain = latents(pipe, image=picture)
    assert change(plain, latents(pipe)) > 1e-2
    with eiup(strength=4.0).apply(pipe) as handle:
        assert change(latents(pipe, image=picture), plain) > 1e-3
        assert handle.record["rows"] == {"0": 3} and handle.record["layers"] == 2
    assert torch.equal(latents(pipe, image=picture), plain)


def test_a_distilled_klein_has_no_guidance() -> None:
    pipe = pipeline("klein")
    pipe.register_to_config(is_distilled=True)
    for eraser in (SLD(CAT), NegativePrompt(CAT)):
        with pytest.raises(ValueError, match=r"needs guidance, but this Flux2KleinPipeline \(FLUX.2 klein\) has joint"):
            eraser.apply(pipe)
    plain = latents(pipe)
    with eiup().apply(pipe):
        assert change(latents(pipe), plain) > 1e-3


def test_fused_projections_act() -> None:
    pipe = pipeline("flux2")
    with eiup().apply(pipe):
        want = latents(pipe)
        pipe.transformer.fuse_qkv_projections()
        assert change(latents(pipe), want) < 1e-5


@each_joint
def test_attention_that_efface_cannot_see_is_an_error(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return ((query @ key.mT) * query.shape[-1] ** -0.5).softmax(-1) @ value

    pipe = pipeline(family)
    with eiup().apply(pipe):
        monkeypatch.setattr(F, "scaled_dot_product_attention", other)
        with pytest.raises(RuntimeError, match=r"2 of 2 joint attention layers did not .*backend \"native\""):
            latents(pipe)


@pytest.mark.parametrize("family", ["flux2", "qwenimage"])
def test_a_cache_is_refused(family: str) -> None:
    pipe = pipeline(family)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with eiup().apply(pipe), pytest.raises(RuntimeError, match="has a cache"):
        latents(pipe)


def test_a_text_is_found_in_its_template_and_its_tokenizer_in_a_processor() -> None:
    assert between([1, 2, 7, 8, 3], [1, 2, 3]) == slice(2, 4)
    assert between([1, 2, 2, 3, 3], [1, 2, 3]) == slice(2, 4)  # a text of template tokens
    holder = type("ProcessorMixin", (), {"tokenizer": 5})()
    assert tokenizer_of(type("Pipe", (), {"tokenizer": holder})(), "tokenizer") == 5
    for name, text in (("flux2", "a dog"), ("klein", "a dog"), ("qwenimage", "a dog"), ("sana", "a dog")):
        pipe = untouched(name)
        settings = {"complex_human_instruction": INSTRUCTION} if name == "sana" else {}
        found = facts_of(pipe).read(pipe, "tokenizer", text, settings)
        words = tokenizer_of(pipe, "tokenizer")
        assert [found.ids[k] for k in range(found.own.start, found.own.stop)] == words.convert_tokens_to_ids(
            ["a", "dog"]
        )


# ---------------------------------------------------------------- Sana


@dataclasses.dataclass(frozen=True)
class Same(EIUP):
    """Asks each layer for the prompt that it reads."""

    def edit(self, out: Tensor, cross: Any, prompts: Any) -> Tensor:
        again = cross.would_be(cross.prompt)
        assert change(torch.stack([again[k, k] for k in range(len(out))]), cross.output) < 1e-5
        return out + 1


@pytest.mark.parametrize("family", ["sana", "sana15"])
def test_a_layer_of_sana_would_give_what_it_gives(family: str) -> None:
    """Projected, normalised and masked text, after an instruction; in 1.5, norms across heads."""
    pipe = pipeline(family)
    with Same(CAT).apply(pipe):
        assert change(latents(pipe, PROMPTS), latents(pipeline(family), PROMPTS)) > 1e-2


class Literal:
    """A processor of Sana's cross-attention with explicit softmax over the columns that the mask shows."""

    def __init__(self, texts: Sequence[tuple[Tensor, Tensor]], neutral: int, strength: float) -> None:
        self.texts, self.neutral, self.row = texts, neutral, conditional(strength, [])

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Tensor:
        def attended(states: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
            q, k, v = (
                each.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for each in (attn.to_q(hidden), attn.to_k(states), attn.to_v(states))
            )
            return over(q, (k, v, seen.double()))

        made = []
        for row, (hidden, text, mask) in enumerate(
            zip(hidden_states, encoder_hidden_states, attention_mask, strict=True)
        ):
            out = attended(text[None], mask[0] > -1, hidden[None])[0]
            nothing, *rest = (attended(states[None], seen, hidden[None])[0] for states, seen in self.texts)
            second = row >= len(hidden_states) / 2
            made.append(self.row(out, nothing, rest[: self.neutral], rest[self.neutral :]) if second else out)
        return attn.to_out[0](torch.stack(made)) / attn.rescale_output_factor


@torch.no_grad()
def test_sana_equals_the_definition() -> None:
    """Phrases follow the instruction, as the prompt does; the empty text is that of the unconditional rows."""
    pipe = double("sana")
    net, (neutral, strength) = pipe.transformer, ((("a dog",), ("a big cat",)), 1.5)

    def read(text: str, instruction: Any) -> tuple[Tensor, Tensor]:
        states, mask, *_ = pipe.encode_prompt(
            text, False, device="cpu", max_sequence_length=24, complex_human_instruction=instruction
        )
        return net.caption_norm(net.caption_projection(states))[0], mask[0].bool()

    plain = latents(pipe, PROMPTS)
    with eiup(neutral=neutral, strength=strength).apply(pipe):
        erased = latents(pipe, PROMPTS)
    texts = [read("", None), *(read(t, INSTRUCTION) for (t,) in neutral), *(read(p, INSTRUCTION) for p in PHRASES)]
    layers = {block.attn2: block.attn2.processor for block in net.transformer_blocks}
    for layer in layers:
        layer.set_processor(Literal(texts, len(neutral), strength))
    made = latents(pipe, PROMPTS)
    for layer, processor in layers.items():
        layer.set_processor(processor)
    assert change(erased, plain) > 1e-2 and change(made, erased) < 1e-5


def test_linear_self_attention_is_not_mixed_by_softmax() -> None:
    with pytest.raises(ValueError, match=r"^GIE with `trajectories=2` needs softmax self-attention layers, but .*Sana"):
        GIE(CAT, trajectories=2).apply(untouched("sana"))
