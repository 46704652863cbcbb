"""Which rows are conditional, how texts are encoded, what is refused, and what stays behind on a pipeline: nothing."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from diffusers import (
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionPipelineSafe,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import ERASERS
from tiny import (
    ALCOHOL,
    CAT,
    LIMIT,
    PROMPT,
    PROMPTS,
    WORDS,
    bare,
    batch,
    change,
    drawn,
    fitted,
    latents,
    pipeline,
    untouched,
)
from tokenizers import normalizers
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from efface import EIUP, GIE, SAFREE, SLD, Concept, NegativePrompt
from efface._text import SITES, encode, pack
from efface.core import ConceptsField, Converted, RowsField
from efface.hooks import CrossAttention, ErasurePrompts, Method

pytestmark = pytest.mark.thinned("long")

ERASER = EIUP([ALCOHOL])


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The prompt rows of every edit, as they come."""
    seen: list[Tensor] = []
    original = EIUP.edit

    def spy(self: EIUP, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        if not cross.unconditional:
            assert len(out) == len(cross.query) == len(cross.prompt)
            seen.append(cross.prompt.states)
        return original(self, out, cross, prompts)

    monkeypatch.setattr(EIUP, "edit", spy)
    return seen


# ---------------------------------------------------------------- which rows are conditional


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_the_prompts_rows_are_conditional(guidance: float, pipe: Any, edited: list[Tensor]) -> None:
    want, *_ = pipe.encode_prompt(
        list(PROMPTS), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    with ERASER.apply(pipe):
        latents(pipe, PROMPTS, guidance_scale=guidance, negative_prompt=["a dog", "the moon"])
    assert edited and all(torch.equal(rows, want) for rows in edited)


def test_a_bare_call_is_conditional_throughout(pipe: Any, family: str, edited: list[Tensor]) -> None:
    plain = [bare(pipe, family, rows) for rows in (2, 3)]
    with ERASER.apply(pipe):
        erased = [bare(pipe, family, 2)]
        latents(pipe, PROMPT)
        edited.clear()
        erased.append(bare(pipe, family, 3))
        assert edited and all(torch.equal(rows, batch(family, 3)["encoder_hidden_states"]) for rows in edited)
    for e, p in zip(erased, plain, strict=True):
        assert all(change(row, of) > 1e-3 for row, of in zip(e, p, strict=True))


def test_guidance_may_be_switched_off_midway(sd1: Any, edited: list[Tensor]) -> None:
    def switch_off(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 0:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][1:]
        return tensors

    options = {"callback_on_step_end": switch_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with ERASER.apply(sd1):
        erased = latents(sd1, **options)
    assert len(edited) == 4 * tiny.STEPS and all(torch.equal(rows, edited[0]) for rows in edited)
    assert change(erased, latents(sd1, **options)) > 1e-3


@pytest.mark.parametrize("eraser", [ERASER, EIUP([ALCOHOL], normalization="separate")], ids=["projected", "separate"])
@pytest.mark.parametrize("text", ["", "a red cat"])
def test_guidance_in_two_calls_edits_each_call_as_its_rows_in_one(text: str, eraser: EIUP, sd1: Any) -> None:
    with eraser.apply(sd1):
        positive, negative = sd1.encode_prompt(PROMPT, "cpu", 1, True, text)
        # what `encode_prompt` returned tells the rows: nobody has to say them
        call = batch(rows=1)
        erased = [
            sd1.unet(**{**call, "encoder_hidden_states": text}).sample.detach()
            for text in (negative, positive, negative, positive)
        ]
        both = sd1.unet(
            **{
                **{name: torch.cat([x, x]) if x.ndim else x for name, x in batch(rows=1).items()},
                "encoder_hidden_states": torch.cat([negative, positive]),
            }
        ).sample
    plain = [bare(sd1, rows=1, encoder_hidden_states=text) for text in (negative, positive)]
    if text and eraser.touches_uncond:
        assert change(erased[0], plain[0]) > 1e-3
    else:
        assert torch.equal(erased[0], plain[0])
    assert change(erased[1], plain[1]) > 1e-3
    assert torch.equal(erased[0], erased[2]) and torch.equal(erased[1], erased[3])
    assert change(torch.cat(erased[:2]), both) < 1e-5


def test_rows_that_encode_prompt_did_not_make_are_an_error(pipe: Any, family: str) -> None:
    def add_rows(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0)}

    with ERASER.apply(pipe), pytest.raises(RuntimeError, match="cannot identify the conditional rows"):
        latents(pipe, callback_on_step_end=add_rows, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_embeddings_given_by_the_user(pipe: Any, family: str) -> None:
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    made = pipe.encode_prompt(list(PROMPTS), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    given_by_user = dict(zip(names, made, strict=False))
    with ERASER.apply(pipe):
        erased = latents(pipe, None, **given_by_user)
    assert change(erased, drawn(family, ERASER, prompt=PROMPTS)) < 1e-6
    with EIUP(rows=[[], [ALCOHOL]]).apply(pipe):
        erased = latents(pipe, None, **given_by_user)
    assert torch.equal(erased[0], drawn(family, prompt=PROMPTS)[0])
    assert change(erased[1], drawn(family, prompt=PROMPTS)[1]) > 1e-3


# ---------------------------------------------------------------- changes while on


def test_changes_act_at_the_next_denoiser_call(sd1: Any) -> None:
    plain = bare(sd1)
    with EIUP(rows=[[ALCOHOL], []]).apply(sd1) as handle:
        first = bare(sd1)
        handle.strength = 2.0
        second = bare(sd1)
        handle.rows = [[], [ALCOHOL]]
        third = bare(sd1)
        with EIUP(rows=[[CAT], []]).apply(sd1):
            fourth = bare(sd1)
        handle.rows = [[ALCOHOL]]
        with pytest.raises(ValueError, match="`rows` has 1 entries, but the call has 2 prompts"):
            bare(sd1)
    for one, other in ((first, plain), (second, plain), (second, first)):
        assert change(one[0], other[0]) > 1e-3 and torch.equal(one[1], other[1])
    assert torch.equal(third[0], plain[0]) and change(third[1], plain[1]) > 1e-3
    assert change(fourth[0], third[0]) > 1e-3 and torch.equal(fourth[1], third[1])


@pytest.mark.parametrize(("family", "options"), [("sd1", {}), ("sdxl", {"clip_skip": 1})])
def test_changes_act_in_the_middle_of_a_call(family: str, pipe: Any, options: dict[str, Any]) -> None:
    rows = [[ALCOHOL], []]
    with EIUP(rows=rows, strength=0.0).apply(pipe) as handle:

        def switch_on(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            handle.strength = 1.0 if step == 0 else 0.0
            return {}

        late = latents(pipe, PROMPTS, callback_on_step_end=switch_on, **options)
    assert torch.equal(late, drawn(family, EIUP(rows=rows, strength=1.0, window=(0.5, 0.9)), prompt=PROMPTS, **options))
    assert change(late[0], drawn(family, prompt=PROMPTS, **options)[0]) > 1e-3


@pytest.mark.parametrize(
    "eraser", [GIE([ALCOHOL], values="official"), ERASER, SLD([ALCOHOL]), NegativePrompt([ALCOHOL])]
)
def test_rows_of_the_wrong_length_are_refused_in_the_middle_of_a_call(eraser: Any, sd1: Any) -> None:
    def change_rows(*_: Any) -> dict[str, Tensor]:
        with pytest.raises(ValueError, match="`rows` has 3 entries, but the call has 2 prompts"):
            handle.rows = [[ALCOHOL]] * 3
        return {}

    with eraser.apply(sd1) as handle:
        erased = latents(sd1, PROMPTS, callback_on_step_end=change_rows)
        assert torch.equal(erased, drawn("sd1", eraser, prompt=PROMPTS))


def test_a_refused_change_changes_nothing(sd1: Any) -> None:
    with ERASER.apply(sd1) as handle:
        with pytest.raises(ValueError, match="tokens long"):
            handle.rows = [[Concept("cat " * 20)]]
        assert handle.rows is None and torch.equal(latents(sd1), drawn("sd1", ERASER))


# ---------------------------------------------------------------- texts


def test_encode_gives_what_the_pipeline_gives_and_where_the_words_stand(pipe: Any) -> None:
    texts = ["", "cat", "a night at the pub"]
    made = encode(pipe, texts)
    want = pipe.encode_prompt(texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert torch.equal(made.text, want[0]) and made.text.shape[:2] == (3, LIMIT)
    assert (made.pooled is None) if len(want) == 2 else torch.equal(made.pooled, want[2])
    columns = [list(range(LIMIT))[own] for own in made.own]
    assert columns == [[], [1], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("family", "options"), [("sd1", {}), ("sdxl", {}), ("sdxl", {"clip_skip": 1})])
def test_concepts_are_encoded_as_the_prompt_is(
    pipe: Any, family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: EIUP, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        assert torch.allclose(cross.prompt.states, prompts.text.states, atol=1e-6)
        return out

    monkeypatch.setattr(EIUP, "edit", check)
    with EIUP([CAT]).apply(pipe):
        latents(pipe, "cat", **options)
        with pytest.raises(AssertionError):
            latents(pipe, "cat dog", **options)


def test_a_word_may_be_several_tokens_and_look_like_the_end_token(sd1: Any) -> None:
    # ca t dog, the padding token of others, three unknown bytes
    assert encode(sd1, ["catdog", "!", "☃ cat"]).own == (slice(1, 4), slice(1, 2), slice(1, 5))


def phrases() -> st.SearchStrategy[list[str]]:
    phrase = st.lists(st.sampled_from(WORDS), min_size=1, max_size=LIMIT - 2).map(" ".join)
    return st.lists(phrase, min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(phrases())
def test_packing_is_greedy_in_order_and_fits(given_phrases: list[str]) -> None:
    pipe = untouched("sd1")
    packed = pack(pipe, given_phrases)
    assert " ".join(packed) == " ".join(given_phrases)
    assert all(len(text.split()) <= LIMIT - 2 for text in packed)
    starts = {" ".join(given_phrases[:k]): given_phrases[k] for k in range(1, len(given_phrases))}
    for k in range(1, len(packed)):
        phrase = starts[" ".join(packed[:k])]  # no phrase is torn apart
        assert len(packed[k - 1].split()) + len(phrase.split()) > LIMIT - 2  # and it did not fit any more


def test_a_concept_of_several_prompts_acts_with_each(pipe: Any, family: str) -> None:
    long, rest = "a big red glass of wine and a big red glass of beer", "the moon"
    assert pack(pipe, [long, rest]) == [long, rest]
    both = drawn(family, EIUP([Concept("x", (long, rest))]))
    assert torch.equal(both, drawn(family, EIUP([Concept("x", (long,)), Concept("y", (rest,))])))
    assert change(both, drawn(family, EIUP([Concept("x", (long,))]))) > 1e-3


def test_the_limit_is_the_encoders(pipe: Any) -> None:
    fits = "cat " * (LIMIT - 2)
    EIUP([Concept(fits)]).apply(pipe).remove()
    with pytest.raises(ValueError, match=rf"'{fits}cat' is {LIMIT + 1} tokens long, but .* takes {LIMIT}"):
        EIUP([Concept("x", ("dog", f"{fits}cat"))]).apply(pipe)


def test_a_phrase_without_tokens_is_an_error(sd1: Any) -> None:
    with pytest.raises(ValueError, match=r"' ' has no tokens"):
        encode(sd1, ["cat", "  "])
    pipe = pipeline()  # with a tokenizer that drops what cannot be seen, as BERT's does
    rules = pipe.tokenizer.backend_tokenizer
    rules.normalizer = normalizers.Sequence([normalizers.Replace("\u200b", ""), rules.normalizer])
    with pytest.raises(ValueError, match=r"'\\u200b' has no tokens"):
        EIUP([Concept("\u200b")]).apply(pipe)


def test_tokenizers_have_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("sdxl")
    pipe.tokenizer_2.add_tokens("cat")  # now one token there, whatever follows
    pipe.text_encoder_2.resize_token_embeddings(len(pipe.tokenizer_2))
    with pytest.raises(ValueError, match="tokenizers split .* differently"):
        encode(pipe, ["catdog cat", "nightcat"])


# ---------------------------------------------------------------- the negative prompt


@pytest.mark.parametrize("user", [None, "a dog", ["a dog", "the moon"]])
def test_the_negative_prompt_is_diffusers_own(user: Any, pipe: Any, family: str) -> None:
    words = "beer, wine glass"
    with NegativePrompt([ALCOHOL]).apply(pipe):
        erased = latents(pipe, PROMPTS, negative_prompt=[user] * 2 if isinstance(user, str) else user)
    texts = [words] * 2 if user is None else [f"{words}, {text}" for text in ([user] * 2 if user == "a dog" else user)]
    assert torch.equal(erased, latents(pipe, PROMPTS, negative_prompt=texts))
    assert change(erased, drawn(family, prompt=PROMPTS)) > 1e-3


@pytest.mark.parametrize("user", [None, "a dog"])
def test_one_prompt_one_negative_prompt(user: Any, pipe: Any) -> None:
    with NegativePrompt([CAT]).apply(pipe):
        erased = latents(pipe, PROMPT, negative_prompt=user, num_images_per_prompt=2)
    want = latents(pipe, PROMPT, negative_prompt=f"cat, {user}" if user else "cat", num_images_per_prompt=2)
    assert torch.equal(erased, want)


def test_negative_prompts_add_up(sd1: Any) -> None:
    with NegativePrompt([ALCOHOL]).apply(sd1), NegativePrompt([CAT]).apply(sd1):
        both = latents(sd1)
    assert torch.equal(both, latents(sd1, negative_prompt="cat, beer, wine glass"))


def test_both_negative_prompts_of_sdxl() -> None:
    pipe = pipeline("sdxl")
    with NegativePrompt([CAT]).apply(pipe):
        erased = latents(pipe, negative_prompt="a dog", negative_prompt_2="the moon")
    assert torch.equal(erased, latents(pipe, negative_prompt="cat, a dog", negative_prompt_2="cat, the moon"))


def test_a_long_negative_prompt_is_cut_behind_the_phrases(sd1: Any) -> None:
    """What is over the limit is cut, and that must not be the concept."""
    long = "a big red dog at the pub and the moon of the night"
    with NegativePrompt([ALCOHOL]).apply(sd1):
        erased = latents(sd1, negative_prompt=long)
    assert torch.equal(erased, latents(sd1, negative_prompt=f"beer, wine glass, {long}"))
    assert change(erased, latents(sd1, negative_prompt=long)) > 1e-3
    many = Concept("many", ("cat",) * 8)
    with pytest.raises(ValueError, match="do not fit into one negative prompt"):
        NegativePrompt([many]).apply(sd1)
    with pytest.raises(ValueError, match="do not fit into one negative prompt"):
        NegativePrompt(rows=[[CAT], [many]]).apply(sd1)
    NegativePrompt([many], strength=5.0).apply(sd1).remove()


def test_negative_prompts_by_row(pipe: Any) -> None:
    with NegativePrompt(rows=[[ALCOHOL, CAT], []]).apply(pipe):
        erased = latents(pipe, PROMPTS, negative_prompt=["a dog", "the moon"])
    assert torch.equal(erased, latents(pipe, PROMPTS, negative_prompt=["beer, wine glass, cat, a dog", "the moon"]))


def test_negative_embeddings_cannot_be_added_to(sd1: Any) -> None:
    positive, negative = sd1.encode_prompt(PROMPT, "cpu", 1, True)
    with NegativePrompt([CAT]).apply(sd1):
        with pytest.raises(ValueError, match="Give the text"):
            latents(sd1, negative_prompt_embeds=negative)
        erased = latents(sd1, None, prompt_embeds=positive)
    assert torch.equal(erased, drawn("sd1", NegativePrompt([CAT])))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("other", [object(), None, tiny.picture_model()])
def test_not_a_pipeline_is_a_type_error(other: Any) -> None:
    for eraser in (ERASER, NegativePrompt([CAT])):
        with pytest.raises(TypeError, match="Expected a diffusers text-to-image pipeline .* got"):
            eraser.apply(other)


def test_a_denoiser_without_cross_attention_is_an_error() -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    pipe = tiny.stable_diffusion(tiny.tokenizer(), 32, tiny.denoiser(32, **blocks))
    with pytest.raises(ValueError, match="EIUP needs cross-attention layers or joint attention layers, but"):
        ERASER.apply(pipe)
    assert "encode_prompt" not in vars(pipe) and "forward" not in vars(pipe.unet)
    NegativePrompt([CAT]).apply(pipe).remove()


def test_layers_are_told_by_what_they_are_and_not_by_their_names() -> None:
    """With `only_cross_attention` the layers called attn1 read the text as well."""
    pipe = tiny.stable_diffusion(tiny.tokenizer(), 32, tiny.denoiser(32, only_cross_attention=True))
    named = dict(pipe.unet.named_modules())
    cross = {name for name, module in named.items() if getattr(module, "is_cross_attention", False)}
    assert any(name.endswith("attn1") for name in cross)
    with ERASER.apply(pipe):
        hooked = {name for name in named if hasattr(named[name], "to_q") and "forward" in vars(named[name].to_q)}
    assert hooked == cross


@pytest.mark.parametrize(
    "eraser", [ERASER, SLD([CAT]), SAFREE([CAT]), NegativePrompt([CAT]), NegativePrompt([CAT], 3.0)]
)
def test_an_encoder_of_another_model_is_refused_with_both_widths(eraser: Any) -> None:
    unet = tiny.stable_diffusion(tiny.tokenizer(), 32, tiny.denoiser(48))
    transformer = pipeline("pixart")
    transformer.register_modules(text_encoder=T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=8, num_layers=1)))
    for pipe, made, read in ((unet, 32, 48), (transformer, 16, 24)):
        with pytest.raises(ValueError, match=f"returns states of width {made}, but its denoiser reads width {read}"):
            eraser.apply(pipe)
        assert "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize("kind", [StableDiffusionInstructPix2PixPipeline, StableDiffusionPipelineSafe])
def test_a_pipeline_that_does_not_tell_its_rows_is_a_type_error(kind: Any, sd1: Any) -> None:
    parts = {name: part for name, part in sd1.components.items() if name != "image_encoder"}
    pipe = kind(**parts, requires_safety_checker=False)
    for eraser in (ERASER, SLD([CAT]), SAFREE([CAT]), NegativePrompt([CAT])):
        with pytest.raises(TypeError, match=f"{kind.__name__} has no `encode_prompt`, .*. Use a pipeline with it"):
            eraser.apply(pipe)


def test_pipelines_that_add_rows_of_their_own_are_refused(sd1: Any) -> None:
    pipe = StableDiffusionPAGPipeline(**sd1.components, requires_safety_checker=False, pag_applied_layers="mid")
    for eraser in (ERASER, SLD([CAT]), SAFREE([CAT]), NegativePrompt([CAT])):
        with pytest.raises(
            ValueError, match="PAGPipeline adds rows to each denoiser call .* Use the pipeline without PAG"
        ):
            eraser.apply(pipe)
    assert "encode_prompt" not in vars(pipe) and sd1.unet not in SITES


def test_fused_projections_are_refused_with_the_cure() -> None:
    pipe = pipeline()
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"`pipe.unet.unfuse_qkv_projections\(\)`"):
        ERASER.apply(pipe)
    pipe.unet.unfuse_qkv_projections()
    with ERASER.apply(pipe):
        assert change(latents(pipe), drawn("sd1", ERASER)) < 1e-5


@pytest.mark.parametrize("eraser", [EIUP([ALCOHOL]), GIE([ALCOHOL]), SLD([ALCOHOL])], ids=["eiup", "gie", "sld"])
def test_texts_of_another_width_are_refused_with_both_widths(eraser: Any, sd1: Any) -> None:
    positive, negative = (torch.cat([x, x[..., :8]], -1) for x in sd1.encode_prompt(PROMPT, "cpu", 1, True))
    with eraser.apply(sd1), pytest.raises(ValueError, match="has width 40, but .* returns width 32"):
        latents(sd1, None, prompt_embeds=positive, negative_prompt_embeds=negative)
    if eraser.edits_attention:
        mixed = tiny.stable_diffusion(tiny.tokenizer(), 48, tiny.denoiser(32))
        with pytest.raises(ValueError, match="of width 48, but its denoiser reads width 32"):
            eraser.apply(mixed)
        assert "encode_prompt" not in vars(mixed)


@pytest.mark.parametrize("eraser", [EIUP([ALCOHOL]), GIE([ALCOHOL])], ids=["eiup", "gie"])
def test_a_model_that_was_moved_encodes_anew_or_says_so(eraser: Any) -> None:
    """In a call of the pipeline the erasure prompts follow; a denoiser called by itself cannot."""
    pipe = pipeline()
    with eraser.apply(pipe):
        pipe.to(torch.float64)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
        with pytest.raises(
            ValueError, match=r"are torch.float32 on cpu, .* torch.float64 on cpu\. .* apply the eraser"
        ):
            bare(pipe, **wide)
        got = latents(pipe)
        assert change(bare(pipe, **wide), bare(pipeline().to(torch.float64), **wide)) > 1e-3
    moved = pipeline().to(torch.float64)
    with eraser.apply(moved):
        assert torch.equal(got, latents(moved))


def test_other_text_encoders_are_not_taken_for_clip() -> None:
    pipe = pipeline()
    pipe.text_encoder = pipeline("pixart").text_encoder
    with pytest.raises(TypeError, match="of a tested family .* with the text encoders of its family"):
        ERASER.apply(pipe)


def test_a_prompt_that_is_cut_is_told_and_what_was_cut(sd1: Any) -> None:
    long = " ".join(["a big red dog"] * 4)
    with ERASER.apply(sd1):
        with pytest.warns(UserWarning, match="longer than the text encoder's limit, which ignores 'red dog'"):
            latents(sd1, long)
        with pytest.warns(UserWarning, match="ignores 'red dog'"):
            latents(sd1, negative_prompt=long)
        latents(sd1, negative_prompt="a big red dog")  # no warning, which would be an error
    latents(sd1, long)


def test_a_word_of_textual_inversion_is_all_of_its_vectors() -> None:
    pipe = pipeline()
    pipe.load_textual_inversion(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), token="<thing>")
    assert encode(pipe, ["a <thing>", "cat"]).own == (slice(1, 5), slice(1, 2))
    with pytest.raises(ValueError, match="is 17 tokens long, but the text encoder takes 16"):
        encode(pipe, ["<thing> " * 5])
    plain = latents(pipe, "a <thing>")
    with SAFREE(Concept("thing", ("<thing>",))).apply(pipe):
        assert change(latents(pipe, "a <thing>"), plain) > 1e-3


# ---------------------------------------------------------------- nothing stays behind


def test_the_unet_can_be_copied_afterwards(sd1: Any) -> None:
    with ERASER.apply(sd1):
        pass
    assert torch.equal(bare(sd1), copy.deepcopy(sd1.unet)(**batch()).sample)


def test_what_others_put_on_the_pipeline_stays(sd1: Any) -> None:
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    pipe = pipeline()
    query = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2.to_q"))
    pipe.encode_prompt = by_hand = counted("text", pipe.encode_prompt)
    pipe.unet.forward = unet_forward = counted("unet", pipe.unet.forward)
    query.forward = query_forward = counted("query", query.forward)
    with pytest.raises(TypeError, match="missing"):
        by_hand()
    with ERASER.apply(pipe):
        calls.clear()
        assert torch.equal(latents(pipe), drawn("sd1", ERASER))
        assert {"text", "unet", "query"} == set(calls)
    assert pipe.encode_prompt is by_hand and pipe.unet.forward is unet_forward and query.forward is query_forward
    assert "maybe_free_model_hooks" not in vars(pipe)
    assert torch.equal(latents(pipe), drawn())


@pytest.mark.long
def test_a_dropped_pipeline_is_freed_though_an_eraser_is_on() -> None:
    pipe = pipeline()
    handle = ERASER.apply(pipe)
    latents(pipe)
    seen = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert seen() is None
    with pytest.raises(ValueError, match="pipeline of this eraser was deleted"):
        handle.strength = 2.0
    handle.remove()


@pytest.mark.thinned("long")
@pytest.mark.parametrize(("name", "kind"), [*((name, "sd1") for name in ERASERS), ("eiup", "sd3"), ("eiup", "pixart")])
def test_a_removed_eraser_holds_no_tensors_before_any_garbage_collection(name: str, kind: str) -> None:
    def bytes_of_tensors() -> int:
        every = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
        return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in every}.values())

    pipe = pipeline(kind)
    eraser = fitted(ERASERS[name], pipe)

    def drawing() -> tuple[int, int]:
        handle = eraser.apply(pipe)
        latents(pipe)
        held = bytes_of_tensors()
        handle.remove()
        return held, bytes_of_tensors()

    drawing()  # encodings that are kept across calls
    gc.collect()
    gc.disable()
    try:
        before = bytes_of_tensors()
        held, after = drawing()
    finally:
        gc.enable()
    assert held > before and after - before <= 64  # the cycle of the hooks holds a number or two


def test_pipelines_that_share_a_denoiser_share_its_erasers() -> None:
    first = pipeline()
    second = StableDiffusionPipeline(**first.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    on_first, on_second = EIUP([ALCOHOL]).apply(first), EIUP([CAT]).apply(second)
    for pipe in (first, second):
        assert torch.equal(latents(pipe), drawn("sd1", EIUP([ALCOHOL]), EIUP([CAT])))
    on_first.remove()
    for pipe in (first, second):
        assert torch.equal(latents(pipe), drawn("sd1", EIUP([CAT])))
    on_second.remove()
    for pipe in (first, second):
        assert "encode_prompt" not in vars(pipe) and torch.equal(latents(pipe), drawn())
    assert first.unet not in SITES


def test_around_has_to_go_on_to_the_methods_behind_it(sd1: Any) -> None:
    @dataclasses.dataclass(frozen=True)
    class Plain(Method):
        """Draws the base model instead of what the other methods make."""

        concepts: tuple[Any, ...]

        def around(self, call: Any, forward: Any) -> Any:
            return (call.plain(None, lambda *_: None),)

    with Plain([CAT]).apply(sd1), pytest.raises(RuntimeError, match=r"`around` of a method \(Plain\) did not call"):
        latents(sd1)
    with ERASER.apply(sd1), Plain([CAT]).apply(sd1), pytest.raises(RuntimeError, match="Call it once"):
        latents(sd1)
    assert torch.equal(latents(sd1), drawn())


@dataclass(frozen=True)
class Needless(Method):
    """Edits cross-attention, and does not say that it needs any."""

    edits_attention: ClassVar[bool] = True
    concepts: ConceptsField = Converted(())
    strength: float = 1.0
    rows: RowsField = Converted(None)

    def edit(self, out: Tensor, cross: Any, prompts: Any) -> Tensor:
        return out * 2


@pytest.mark.parametrize("family", ["flux", "sd3", "cogview4"])
def test_a_method_that_edits_layers_a_pipeline_lacks_is_refused_whatever_it_says_it_needs(family: str) -> None:
    with pytest.raises(ValueError, match="Needless needs cross-attention layers, but this"):
        Needless(ALCOHOL).apply(pipeline(family))


def test_a_self_attention_layer_that_is_called_outside_of_a_step_is_an_error(sd1: Any) -> None:
    layer = next(m for n, m in sd1.unet.named_modules() if n.endswith("attn1"))
    with GIE(ALCOHOL, trajectories=2).apply(sd1), pytest.raises(RuntimeError, match="ran outside of a denoiser call"):
        layer(torch.zeros(1, 4, layer.to_q.in_features))


def test_a_shallow_copy_of_a_guarded_pipeline_that_is_gone_says_so() -> None:
    pipe = pipeline()
    handle = ERASER.apply(pipe)
    twin = copy.copy(pipe)
    del pipe
    gc.collect()
    with pytest.raises(RuntimeError, match="`encode_prompt` belongs to a deleted pipeline with erasers"):
        twin.encode_prompt(PROMPT, "cpu", 1, True)
    handle.remove()


def test_a_method_of_a_deep_copy_that_is_gone_says_so() -> None:
    pipe = pipeline()
    with ERASER.apply(pipe):
        encode = copy.deepcopy(pipe).encode_prompt
        gc.collect()
        with pytest.raises(RuntimeError, match="`encode_prompt` belongs to a deleted pipeline"):
            encode(PROMPT, "cpu", 1, True)


def test_a_compiled_denoiser_that_is_called_alone_does_not_guess_its_rows() -> None:
    pipe = pipeline("small")
    torch._dynamo.reset()
    pipe.unet.compile(backend="eager")
    text = pipe.encode_prompt(PROMPT, "cpu", 1, True)[0]
    with ERASER.apply(pipe), pytest.raises(RuntimeError, match="outside of a pipeline call"):
        pipe.unet(torch.zeros(1, pipe.unet.config.in_channels, 8, 8), 500, text)
