"""Run-time erasers on PixArt against their formulas, row by row, with text that is projected and masked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from test_conformance import each, refusal
from test_eiup import cleared, logits, mix, projected, softmax, written_out
from test_safree import written_out as by_formula
from tiny import ALCOHOL, CAT, PROMPT, WORDS, change, drawn, fitted, latents, pipeline, untouched
from torch import Tensor

from efface import EIUP, GIE, RECE, SAFREE, SLD, UCE, Concept, NegativePrompt
from efface._text import encode, pack

pytestmark = pytest.mark.thinned("long")

PROMPTS = (PROMPT, "a big red cat")  # 5 and 4 tokens: masked differently
FORMS = ("projected", "separate", "gated")


def embed(pipe: Any, text: str) -> Tensor:
    """The states of a text's words and its end token, without padding, as the layers get them: [L, D]."""
    ids = [pipe.tokenizer.get_vocab()[word] for word in text.split()] + [1]
    states = pipe.text_encoder(torch.tensor([ids])).last_hidden_state
    return pipe.transformer.caption_projection(states)[0].detach()


class Reference:
    """An attention processor that knows no padding: each text has the columns of its words and the end token alone."""

    def __init__(
        self,
        pipe: Any,
        form: str,
        erased: Sequence[str],
        strength: float,
        guidance: bool = True,
        neutral: Sequence[Sequence[str]] = (),
        negative: Sequence[str] = ("", ""),
    ) -> None:
        self.form, self.strength, self.guidance = form, strength, guidance
        self.prompts = [embed(pipe, text) for text in (*(negative if guidance else ()), *PROMPTS)]
        self.negative = [form == "projected" and text != "" for text in (negative if guidance else ())]
        self.empty = embed(pipe, "")
        self.erased = [embed(pipe, text) for text in erased]
        self.neutral = [mean([embed(pipe, text) for text in group]) for group in neutral]

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        out = []
        for k, (hidden, text) in enumerate(zip(hidden_states, self.prompts, strict=True)):
            plain = written_out(attn, hidden, text)
            if k < len(self.negative):
                out.append(self.clear(attn, hidden, plain) if self.negative[k] else plain)
            else:
                out.append(self.row(attn, hidden, text, plain))
        return attn.to_out[1](attn.to_out[0](torch.stack(out))) / attn.rescale_output_factor

    def clear(self, attn: Attention, hidden: Tensor, out: Tensor) -> Tensor:
        nothing, *neutral = (written_out(attn, hidden, text) for text in (self.empty, *self.neutral))
        erased = [written_out(attn, hidden, text) for text in self.erased]
        return cleared(min(self.strength, 1.0), out, nothing, erased, neutral)

    def row(self, attn: Attention, hidden: Tensor, text: Tensor, out: Tensor) -> Tensor:
        for erased in self.erased:
            own = erased[:-1]
            if self.form == "projected":
                of = [written_out(attn, hidden, text) for text in (self.empty, erased, *self.neutral)]
                out = projected(self.strength, out, *of[:2], of[2:])
            elif self.form == "separate":
                maps = softmax(logits(attn, hidden, erased))
                out = out - self.strength * mix(attn, maps[..., :-1], own)
            else:
                both = softmax(torch.cat([logits(attn, hidden, text), logits(attn, hidden, own)], -1))
                out = out - self.strength * mix(attn, both[..., len(text) :], own)
        return out


def mean(texts: Sequence[Tensor]) -> Tensor:
    """Column by column, of the texts that reach so far."""
    longest = max(map(len, texts))
    return torch.stack([torch.stack([text[k] for text in texts if len(text) > k]).mean(0) for k in range(longest)])


@contextlib.contextmanager
def reference(pipe: Any, *args: Any) -> Iterator[Reference]:
    made = Reference(pipe, *args)
    layers = {m: m.processor for name, m in pipe.transformer.named_modules() if name.endswith("attn2")}
    assert len(layers) == 2
    for layer in layers:
        layer.processor = made
    try:
        yield made
    finally:
        for layer, processor in layers.items():
            layer.processor = processor


_double = functools.cache(lambda family: pipeline(family).to(torch.float64))


@pytest.mark.parametrize("guidance_scale", [4.5, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_pictures_equal_the_formulas(form: str, guidance_scale: float) -> None:
    pipe = _double("pixart")
    erased = ("beer", "wine glass", "cat") if form == "projected" else ("beer wine glass", "cat")
    options = {"guidance_scale": guidance_scale}
    with EIUP([ALCOHOL, CAT], normalization=form, strength=1.5, neutral=()).apply(pipe):
        got = latents(pipe, PROMPTS, **options)
    with reference(pipe, form, erased, 1.5, guidance_scale > 1):
        want = latents(pipe, PROMPTS, **options)
    assert change(got, want) < 1e-9
    assert change(got, latents(pipe, PROMPTS, **options)) > 1e-2


def test_neutral_texts_of_different_lengths_are_averaged_where_they_have_tokens() -> None:
    pipe, neutral = _double("pixart"), (("a cat", "the big red moon of the night", "a"), ("a dog",))
    with EIUP([ALCOHOL], strength=1.0, neutral=neutral).apply(pipe):
        got = latents(pipe, PROMPTS)
    for groups, equal in ((neutral, True), (neutral[1:], False), ((neutral[0][:2], *neutral[1:]), False)):
        with reference(pipe, "projected", ("beer", "wine glass"), 1.0, True, groups):
            difference = change(got, latents(pipe, PROMPTS))
        assert difference < 1e-9 if equal else difference > 1e-6


@pytest.mark.parametrize("negative", [("a dog", "the big red moon"), ("a dog", "a dog"), ("", "a beer")])
def test_the_unconditional_text_is_masked_too(negative: tuple[str, str]) -> None:
    pipe = _double("pixart")
    with EIUP([ALCOHOL], strength=1.5, neutral=()).apply(pipe):
        got = latents(pipe, PROMPTS, negative_prompt=list(negative))
    for edited, equal in (([text != "" for text in negative], True), ([False] * 2, False)):
        with reference(pipe, "projected", ("beer", "wine glass"), 1.5, True, (), negative) as made:
            made.negative = edited
            difference = change(got, latents(pipe, PROMPTS, negative_prompt=list(negative)))
        assert difference < 1e-9 if equal else difference > 1e-6


def test_gies_features_are_the_maps_of_the_words_without_padding() -> None:
    pipe, seen = _double("pixart"), []

    class Watch(GIE):
        measures = True

        def weigh(self, features: Tensor, layers: tuple[str, ...]) -> Tensor:
            seen.append(features)
            return -features.mean(-1)

    with Watch([CAT]).apply(pipe):
        erased = latents(pipe, PROMPTS)
    (features,) = seen
    assert features.shape == (2, 1, 2) and bool((features > 0).all())
    maps: list[Tensor] = []
    text = embed(pipe, "cat")
    layers = [m for name, m in pipe.transformer.named_modules() if name.endswith("attn2")]
    watches = [
        m.register_forward_pre_hook(
            lambda module, args: maps.append(softmax(logits(module, args[0][-1], text))[..., 0].mean())
        )
        for m in layers
    ]
    plain = latents(pipe, PROMPTS)
    for watch in watches:
        watch.remove()
    torch.testing.assert_close(features[1, 0].double(), torch.stack(maps[:2]), rtol=1e-5, atol=1e-7)
    assert change(erased, plain) > 1e-3


def test_gie_is_separate_with_masks_too() -> None:
    pipe = _double("pixart")
    with GIE([ALCOHOL, CAT], strength=1.5).apply(pipe):
        got = latents(pipe, PROMPTS)
    with reference(pipe, "separate", ("beer wine glass", "cat"), 1.5):
        assert change(got, latents(pipe, PROMPTS)) < 1e-9


@each
def test_sigma_is_the_same(eraser: Any) -> None:
    eraser = fitted(eraser, untouched("pixart_sigma"))  # the same weights
    if refusal(eraser, untouched("pixart")):
        with pytest.raises(ValueError, match="PixArt"):
            eraser.apply(untouched("pixart_sigma"))
        return
    assert change(drawn("pixart_sigma", eraser), drawn("pixart", eraser)) < 1e-5
    assert change(drawn("pixart_sigma", eraser), drawn("pixart_sigma")) > 1e-3


def test_texts_are_measured_by_what_the_pipeline_encodes() -> None:
    """T5's tokenizer takes 512 tokens, the pipeline the first 120."""
    pipe = pipeline("pixart")
    assert len(encode(pipe, [" ".join(["cat"] * 119)]).text) == 1
    with pytest.raises(ValueError, match="is 121 tokens long, but the text encoder takes 120"):
        encode(pipe, [" ".join(["cat"] * 120)])
    assert [len(text.split()) for text in pack(pipe, ["cat"] * 200)] == [119, 81]
    made = encode(pipe, ["", "a Big cat"])
    assert made.mask is not None and made.mask.sum(1).tolist() == [1, 4]
    assert made.own == (slice(0, 0), slice(0, 3))
    lower = encode(pipe, ["a big cat"]).text
    assert torch.equal(lower[0], made.text[1])  # the pipeline writes prompts in small letters


def test_a_negative_prompt_is_diffusers_own() -> None:
    words = Concept("drinks", ("beer", "wine"))
    pipe = pipeline("pixart")
    with NegativePrompt([words]).apply(pipe):
        got = latents(pipe, PROMPTS, negative_prompt="a dog")
    assert torch.equal(got, latents(pipe, PROMPTS, negative_prompt=["beer, wine, a dog"] * 2))
    assert change(got, latents(pipe, PROMPTS, negative_prompt="a dog")) > 1e-3


def predictions(pipe: Any, prompts: Sequence[str], **options: Any) -> Tensor:
    """The transformer's first prediction of the conditional rows."""
    seen: list[Tensor] = []
    watch = pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    latents(pipe, tuple(prompts), num_inference_steps=1, **options)
    watch.remove()
    return seen[0][len(prompts) :]


def test_sld_predicts_the_concept_with_the_mask_of_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = _double("pixart"), []
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    with SLD(ALCOHOL).apply(pipe):
        predictions(pipe, PROMPTS)
    assert change(seen[0].prompt, predictions(pipe, PROMPTS)) < 1e-9
    assert change(seen[0].concept, predictions(pipe, ("beer, wine glass",) * 2)) < 1e-9
    lengths = [len(text.split()) for text in (*PROMPTS, "beer, wine glass")]
    assert len({*lengths}) == 3  # another row's mask would show


def test_safree_filters_the_tokens_of_a_text_without_a_start_token(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, read = _double("pixart"), []
    vocabulary = pipe.tokenizer.get_vocab()

    def states(words: Sequence[str]) -> Tensor:
        ids = [vocabulary.get(word, vocabulary["<unk>"]) for word in words] + [1]
        return pipe.text_encoder(torch.tensor([ids])).last_hidden_state[0].detach()

    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda *args, **kwargs: [read.append(kwargs), forward(*args, **kwargs)][1]
    )
    with SAFREE(ALCOHOL).apply(pipe):
        latents(pipe, PROMPTS, num_inference_steps=1)
    concept = torch.stack([states(phrase.split()).mean(0) for phrase in ALCOHOL.phrases])
    for got, prompt in zip(read[0]["encoder_hidden_states"][2:], PROMPTS, strict=True):
        words = prompt.split()
        without = [[*words[:i], "!", *words[i + 1 :]] for i in range(len(words))]
        masked = torch.stack([states(text).mean(0) for text in (words, *without)])
        edited, _, triggers = by_formula(states(words), masked, concept, 0, 0.01)
        assert 0 < sum(triggers) < len(words)
        assert change(got[: len(words) + 1], edited) < 1e-9 and change(edited, states(words)) > 1e-2


def test_what_cannot_be_done_is_refused() -> None:
    pipe = pipeline("pixart")
    with pytest.raises(
        ValueError, match=r"a strength of its own needs the guidance scale of the call, but .*\(PixArt\)"
    ):
        NegativePrompt([CAT], strength=3.0).apply(pipe)
    with pytest.raises(ValueError, match=r"official.* needs a causal text encoder, but .*\(PixArt\) has cross"):
        GIE([CAT], values="official").apply(pipe)
    with pytest.raises(ValueError, match="trajectories=2` needs the guidance scale of the call.*Use GIE without it"):
        GIE([CAT], trajectories=2).apply(pipe)
    assert "encode_prompt" not in vars(pipe) and set(WORDS) <= set(pipe.tokenizer.get_vocab())


def test_closed_form_edits_are_refused_where_the_text_is_projected_first() -> None:
    for editor in (UCE(), RECE(rounds=1)):
        with pytest.raises(ValueError, match="needs weights that read the encoded text, but this PixArtAlphaPipeline"):
            editor.fit(pipeline("pixart"), [CAT])
