"""Unusual inputs of EIUP in joint attention: encoders, embeddings, lengths, guidance and weights that differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import ALCOHOL, CAT, PROMPTS, change, latents, pipeline, untouched
from torch import Tensor, nn

from efface import EIUP, ESD, UCE

LENGTH = 24
NEUTRAL = (("a dog", "the moon"), ("a big cat",))


def eiup(**fields: Any) -> EIUP:
    return EIUP((ALCOHOL, CAT), **{"neutral": NEUTRAL, "strength": 1.5, **fields})


@dataclasses.dataclass(frozen=True)
class Nothing(EIUP):
    """Carries the texts and changes nothing."""

    def edit(self, out: Tensor, cross: Any, prompts: Any) -> Tensor:
        cross.with_empty(prompts.text)
        return out


def acts(pipe: Any, prompt: Any, **options: Any) -> Tensor:
    """The pictures with EIUP, which differ from the base model's; carried texts alone change no bit."""
    plain = latents(pipe, prompt, **options)
    with Nothing((ALCOHOL, CAT), neutral=NEUTRAL).apply(pipe):
        assert torch.equal(latents(pipe, prompt, **options), plain)
    with eiup().apply(pipe) as handle:
        made = latents(pipe, prompt, **options)
        assert set(handle.record["rows"]) == {"0", "1"}
    assert change(made, plain) > 1e-2
    return made


@pytest.mark.long
def test_sd3_reads_a_third_prompt_and_does_without_t5() -> None:
    """The third prompt is that of T5."""
    pipe = pipeline("sd3")
    three = {"prompt_2": ["a dog", "the moon"], "prompt_3": ["the pub", "a glass of wine"]}
    assert change(acts(pipe, PROMPTS, **three), acts(pipe, PROMPTS)) > 1e-2
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    acts(pipe, PROMPTS)


def test_t5_alone_is_refused() -> None:
    """SD 3 without CLIP, FLUX.1 without its CLIP."""
    for family, lost in (("sd3", ("text_encoder", "text_encoder_2")), ("flux", ("text_encoder",))):
        pipe = pipeline(family)
        for part in lost:
            setattr(pipe, part, None)
            setattr(pipe, part.replace("text_encoder", "tokenizer"), None)
        with pytest.raises(ValueError, match="has no `text_encoder` .*Load the pipeline with all its text encoders"):
            eiup().apply(pipe)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_embeddings_of_other_lengths_than_the_concepts_text_act(family: str) -> None:
    """diffusers itself refuses a prompt and a negative prompt of different lengths there."""
    pipe, negatives = pipeline(family), ("a dog", "the moon")
    if family == "sd3":
        made = pipe.encode_prompt(
            list(PROMPTS), None, None, "cpu", negative_prompt=list(negatives), max_sequence_length=10
        )
        found = made[0], made[2], made[1], made[3]
    else:
        found = tuple(
            each
            for texts in (PROMPTS, negatives)
            for each in pipe.encode_prompt(list(texts), device="cpu", max_sequence_length=12)[:2]
        )
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    call = dict(zip(names, found, strict=True))
    acts(pipe, None, **call)
    with pytest.raises(ValueError, match="must have the same shape"):
        acts(pipe, None, **{**call, "negative_prompt_embeds": found[2][:, :-2]})


@pytest.mark.parametrize("family", ["qwenimage", "cogview4"])
def test_a_prompt_and_a_negative_prompt_may_differ_in_length(family: str) -> None:
    """They have calls of their own."""
    acts(
        pipeline(family), PROMPTS, negative_prompt=["a dog", "the moon of the night at the pub of the cat and the dog"]
    )


@pytest.mark.long
def test_embeddings_with_their_mask_draw_as_the_prompts_do() -> None:
    pipe = pipeline("qwenimage")
    call: dict[str, Any] = {}
    for before, texts in (("", PROMPTS), ("negative_", ("a dog", "the moon of the night"))):
        text, mask = pipe.encode_prompt(list(texts), device="cpu")
        call |= {f"{before}prompt_embeds": text, f"{before}prompt_embeds_mask": mask}
    want = acts(pipe, PROMPTS, negative_prompt=["a dog", "the moon of the night"])
    assert change(acts(pipe, None, **call), want) < 1e-5


def test_a_negative_prompt_without_true_guidance_is_not_read() -> None:
    """FLUX.1 dev has its guidance distilled in; diffusers ignores the negative prompt, and the edit is the same."""
    pipe = pipeline("flux")
    alone: dict[str, Any] = {"guidance_scale": 1.0}
    made = acts(pipe, PROMPTS, negative_prompt=["a dog", "the moon"], **alone)
    assert torch.equal(acts(pipe, PROMPTS, negative_prompt=None, **alone), made)


class Small(nn.Module):
    """A linear layer whose weight is stored in eight bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("how", ["layers", "casting"])
def test_quantised_weights_act_at_run_time_and_are_refused_by_editors(how: str, family: str) -> None:
    pipe = pipeline(family)
    if how == "casting":
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    else:
        for block in pipe.transformer.transformer_blocks:
            for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
                setattr(block.attn, name, Small(getattr(block.attn, name)))
        pipe.transformer.context_embedder = Small(pipe.transformer.context_embedder)
    made = acts(pipe, PROMPTS)
    whole = untouched(family)
    with eiup().apply(whole):
        assert 0 < change(made, latents(whole, PROMPTS)) < 0.5
    for editor in (ESD(steps=1), UCE(weights="input")):
        with pytest.raises(ValueError, match="quantised"):
            editor.fit(pipe, CAT)
