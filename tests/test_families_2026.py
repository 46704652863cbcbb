"""Chroma, FLUX.2, Qwen-Image and Sana: EIUP against its definition, and what is particular to each family."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families_literal import KINDS, Beside
from joint_literal import conditional, unconditional
from tiny import ALCOHOL, CAT, PROMPT, PROMPTS, change, latents, pipeline, untouched
from torch import Tensor

from efface import EIUP, registry
from efface.testing import conformance
from efface.testing.conformance import DoesNotApply, Trial
from efface.testing.drawing import ready

JOINT = ("chroma", "flux2", "klein", "qwenimage")
ALL = (*JOINT, "sana")
GUIDED = ("chroma", "klein", "qwenimage")
NEUTRAL = (("a dog", "the moon"), ("a big cat",), ("a red night",))
PHRASES = (*ALCOHOL.phrases, *CAT.phrases)
NEGATIVE = ["a dog", "the big moon"]
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
    made = pipe.encode_prompt(list(texts), device="cpu", **longest)
    return made[0], made[1] if kind == "QwenImagePipeline" else None


def beside(pipe: Any, group: Sequence[str]) -> Beside:
    """The mean of some texts. Padding is one column, of as many as there are, or of `RUN` where they have positions."""
    kind, words = type(pipe).__name__, max(len(text.split()) for text in group)
    if kind == "QwenImagePipeline":  # a word's column is its mean over the texts that have it; padding is not there
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
        ends = [*range(tokens), *range(tokens, n, 1)[:1], *range(RUN, n, RUN), n]
        seen = torch.ones(len(ends) - 1)
    parts = [mean[a:b].mean(0) for a, b in zip(ends, ends[1:], strict=False)]
    sizes = [float(b - a) for a, b in zip(ends, ends[1:], strict=False)]
    middles = [(a + b - 1) / 2 for a, b in zip(ends, ends[1:], strict=False)]
    return Beside(torch.stack(parts), torch.tensor(sizes), torch.tensor(middles), seen)


def written_out(family: str, strength: float, **call: Any) -> Tensor:
    """The pictures of the definition. Requires that every phrase changes some queries and leaves others."""
    pipe = double(family)
    texts = [beside(pipe, group) for group in (("",), *NEUTRAL, *((phrase,) for phrase in PHRASES))]
    prompts, moved = encoded(pipe, PROMPTS)[0], list[Tensor]()
    row = conditional(strength, moved)

    def edits(text: Tensor) -> list[Any]:
        if text.shape == prompts.shape and torch.equal(text, prompts):
            return [row] * len(text)
        return [unconditional(strength)] * len(text)

    pipe.transformer.forward = KINDS[family](pipe.transformer, texts, len(NEUTRAL), edits)
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

GATED: dict[str, dict[str, Any]] = {"crg": {"threshold": -1.0}, "semantic_surgery": {"threshold": -1.0, "gamma": 0.5}}
WORKS = {
    "chroma": ("crg", "eiup", "nag", "negative_prompt", "safree", "semantic_surgery", "sld"),
    "flux2": ("eiup", "nag", "safree", "semantic_surgery"),
    "klein": ("crg", "eiup", "nag", "negative_prompt", "safree", "semantic_surgery", "sld"),
    "qwenimage": ("crg", "eiup", "nag", "negative_prompt", "safree", "sld"),
    "sana": ("adavd", "crg", "eiup", "gie", "nag", "negative_prompt", "safree", "semantic_surgery", "sld"),
}


@pytest.mark.parametrize("family", WORKS)
def test_erasers_keep_their_promises_or_refuse(family: str) -> None:
    """Fewer promises than in `test_conformance`: the mechanics are those of families with all of them."""
    pipe, _ = ready(family)
    promises = [conformance.restores, conformance.off_is_the_base_model]
    promises += [conformance.touches_unconditional_rows_only_if_declared] if family != "klein" else []
    acted = []
    for name in registry.methods("erasers"):
        trial = Trial(registry.resolve(name)([ALCOHOL], **GATED.get(name, {})), family, pipe, steps=2)
        if conformance.refusal(trial):
            continue
        acted.append(name)
        for promise in promises if name in ("eiup", "nag", "negative_prompt") else promises[:1]:
            with contextlib.suppress(DoesNotApply):
                promise(trial)
    assert set(WORKS[family]) <= {*acted}
