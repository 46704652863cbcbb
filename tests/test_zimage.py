"""Z-Image: lists, one stream of picture and text, texts that move the picture, and guidance that may end early."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch
from joint_literal import conditional, unconditional
from tiny import ALCOHOL, CAT, PROMPT, PROMPTS, change, latents, pipeline, untouched
from torch import Tensor
from zimage_literal import Literal

import efface
from efface import CRG, EIUP, SAFREE, SLD, NegativePrompt, registry
from efface._text import encode
from efface.families import family
from efface.hooks import Prediction
from efface.testing import conformance
from efface.testing.conformance import Trial
from efface.testing.drawing import ready

NEUTRAL = (("a dog", "the moon"), ("a big cat",))
TWENTY = "a big red dog at the pub and a night of the moon and wine"
FORTY = f"{TWENTY} and the cat and a glass of the red wine at the pub of the big dog and the moon"  # 40 with template
GUIDES = functools.partial(SLD, [ALCOHOL], warmup=0.0, threshold=10.0)


def eiup(**fields: Any) -> EIUP:
    return EIUP(fields.pop("concepts", (ALCOHOL, CAT)), **{"neutral": NEUTRAL, "strength": 1.5, **fields})


# ---------------------------------------------------------------- the definition


@pytest.mark.parametrize("width", [16, 32])
def test_pictures_equal_the_definition(width: int) -> None:
    """Captions of 20 and of 40 tokens in a batch, one of them with a negative prompt, longer than it; a picture of 32
    columns, and one of 16 that is padded."""
    pipe, strength, moved = pipeline("zimage").to(torch.float64), 1.5, list[Tensor]()
    prompts = (FORTY, TWENTY)

    def draw() -> Tensor:  # diffusers writes into the lists of a call
        return latents(pipe, prompts, num_inference_steps=1, height=16, width=width, negative_prompt=["", FORTY])

    def read(text: str) -> Tensor:
        found: Tensor = pipe.encode_prompt([text], do_classifier_free_guidance=False, max_sequence_length=64)[0][0]
        return found

    def mean(group: tuple[str, ...]) -> Tensor:
        states = [read(one) for one in group]
        return torch.stack(
            [torch.stack([s[k] for s in states if k < len(s)]).mean(0) for k in range(max(map(len, states)))]
        )

    with torch.no_grad():
        assert [len(read(text)) for text in prompts] == [40, 20]
        phrases = [(phrase,) for phrase in (*ALCOHOL.phrases, *CAT.phrases)]
        texts = [mean(group) for group in (("",), *NEUTRAL, *phrases)]
    edit = conditional(strength, moved)
    plain = draw()
    with eiup(strength=strength).apply(pipe):
        erased = draw()
    pipe.transformer.forward = Literal(
        pipe.transformer, texts, len(NEUTRAL), lambda _: [edit, edit, None, unconditional(strength)]
    )
    made = draw()
    assert change(erased, plain) > 1e-2 and change(made, erased) < 1e-5
    assert float((torch.cat(moved) > 0).double().mean()) > 0.2


# ---------------------------------------------------------------- rows and columns


@dataclasses.dataclass(frozen=True)
class Nothing(EIUP):
    """Carries the texts and changes nothing."""

    def edit(self, out: Tensor, cross: Any, prompts: Any) -> Tensor:
        cross.with_empty(prompts.text)
        return out


def first_step(pipe: Any, *erasers: Any) -> tuple[list[Tensor], Tensor]:
    """The denoiser's predictions, and what its first layer gives for all columns."""
    seen: list[Any] = []
    columns: list[Tensor] = []
    watches = [
        pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0])),
        pipe.transformer.layers[0].attention.register_forward_hook(lambda m, args, out: columns.append(out)),
    ]
    with contextlib.ExitStack() as on:
        for eraser in erasers:
            on.enter_context(eraser.apply(pipe))
        latents(pipe, [FORTY, TWENTY], num_inference_steps=1)
    for watch in watches:
        watch.remove()
    return seen[0], columns[0]


def test_carried_texts_touch_neither_prompt_nor_picture() -> None:
    """To the bit, with rows of several lengths under a mask; nor does an edit touch the prompt's columns."""
    pipe = untouched("zimage")
    (plain, base), (carried, beside) = first_step(pipe), first_step(pipe, Nothing((ALCOHOL, CAT)))
    assert beside.shape[1] > base.shape[1] and all(map(torch.equal, carried, plain))
    erased, columns = first_step(pipe, eiup())
    picture = 32  # columns
    assert [change(a, b) > 1e-3 for a, b in zip(erased, plain, strict=True)] == [True, True, False, False]
    assert torch.equal(erased[2], plain[2]) and torch.equal(erased[3], plain[3])  # empty negative prompts
    assert torch.equal(columns[:, picture : base.shape[1]], base[:, picture:])
    assert change(columns[:2, :picture], base[:2, :picture]) > 1e-3
    off, _ = first_step(pipe, eiup(strength=0.0), GUIDES(sld_guidance_scale=0.0))
    assert all(map(torch.equal, off, plain))
    some, _ = first_step(pipe, eiup(rows=[[], [CAT]], concepts=()))
    assert torch.equal(some[0], plain[0]) and change(some[1], plain[1]) > 1e-3


def test_each_prediction_is_the_denoisers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative, prompt and concept, each with another number of tokens."""
    pipe, seen = pipeline("zimage"), list[Prediction]()
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [seen.append(made), original(self, made)][1])
    phrases = ("a red dog", "wine")
    with SLD(efface.Concept("x", phrases)).apply(pipe):
        latents(pipe, [FORTY, PROMPT], num_inference_steps=2, negative_prompt=["", TWENTY])
    monkeypatch.undo()
    found: list[Tensor] = []
    watch = pipe.transformer.register_forward_hook(lambda module, args, out: found.append(-out[0][0]))
    for text in (FORTY, "", PROMPT, TWENTY, ", ".join(phrases)):
        for k in (0, 1):
            latents(pipe, text, seed=k, num_inference_steps=2, guidance_scale=0.0)
    watch.remove()
    for k, places in enumerate(((0, 4, 16), (10, 14, 18))):
        for part, place in zip((seen[0].prompt, seen[0].negative, seen[0].concept), places, strict=True):
            assert change(part[k], found[place]) < 1e-5
    assert [made.guidance_scale for made in seen] == [6.0, 6.0]  # w in u + w (c - u)


def test_a_negative_prompts_own_strength_is_its_share_of_the_step() -> None:
    """-s (e_n - e_u) is added to the guided prediction."""
    pipe, found = pipeline("zimage"), list[Tensor]()
    once = {"num_inference_steps": 1, "guidance_scale": 2.0}
    plain = latents(pipe, **once)
    watch = pipe.transformer.register_forward_hook(lambda module, args, out: found.append(-out[0][0]))
    for text in ("cat", ""):
        latents(pipe, text, **{**once, "guidance_scale": 0.0})
    watch.remove()
    with NegativePrompt([CAT], strength=1.5).apply(pipe):
        changed = latents(pipe, **once) - plain
    assert change(changed, (1.5 * (found[0] - found[1]))[None, :, 0]) < 1e-4


def test_guidance_that_ends_early_is_recorded() -> None:
    pipe = pipeline("zimage")
    call = {"cfg_truncation": 0.3, "num_inference_steps": 4}
    plain = latents(pipe, PROMPTS, **call)
    for eraser in (GUIDES(), NegativePrompt([CAT]), CRG([CAT], threshold=-1.0)):
        with eraser.apply(pipe) as handle:
            assert change(latents(pipe, PROMPTS, **call), plain) > 1e-3
            record = handle.record
        assert record["exempt"] == {"no guidance in this step": 2} and record["rows"] == {"0": 2, "1": 2}
    with eiup().apply(pipe) as handle:
        assert change(latents(pipe, PROMPTS, **call), plain) > 1e-3
        assert handle.record["rows"] == {"0": 4, "1": 4} and not handle.record["exempt"]
    assert torch.equal(latents(pipe, PROMPTS, **call), plain)


# ---------------------------------------------------------------- what every method promises

WORKS = ("crg", "eiup", "nag", "negative_prompt", "safree", "sld")
GATED: dict[str, dict[str, Any]] = {"eiup": {"neutral": NEUTRAL}, "crg": {"threshold": -1.0}}


@pytest.mark.long
def test_erasers_keep_their_promises_or_refuse() -> None:
    pipe, _ = ready("zimage")
    trials = {
        name: Trial(registry.resolve(name)([ALCOHOL], **GATED.get(name, {})), "zimage", pipe, steps=2)
        for name in registry.methods("erasers")
    }
    trials = {name: trial for name, trial in trials.items() if not conformance.refusal(trial)}
    assert {*trials} == {*WORKS}
    for trial in trials.values():
        with trial.method.apply(pipe):
            trial.require_effect(trial.latents(), trial.drawn())
    conformance.come_off_shuffled([trials[name] for name in ("eiup", "negative_prompt", "safree")])
    conformance.off_is_the_base_model(trials["eiup"])
    conformance.a_row_is_the_row_alone(Trial(EIUP(ALCOHOL), "zimage", pipe, steps=1))
    with eiup(strength=None).apply(pipe):
        assert "not calibrated for Z-Image (calibrated: emoji, emoji-128)" in str(efface.active(pipe))


def test_a_prompt_in_a_list_is_read_as_it_was_written() -> None:
    """diffusers writes the template into the list."""
    pipe, given = pipeline("zimage"), [PROMPT]
    with SAFREE([ALCOHOL], validation=None).apply(pipe):
        assert torch.equal(latents(pipe, given), latents(pipe, PROMPT))
    assert given == [PROMPT] or "<|im_start|>" in given[0]
    made = encode(pipe, ["a dog", "a big red dog"], max_sequence_length=64)
    assert made.own == (slice(2, 4), slice(2, 6)) and made.mask is not None and made.mask.sum(1).tolist() == [7, 9]


def test_direct_calls_and_embeddings_act(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of direct calls the rows are declared, and times are the denoiser's, which grow."""
    pipe, times = pipeline("zimage"), list[float]()
    plain = latents(pipe, num_inference_steps=1)
    with eiup().apply(pipe):
        want = latents(pipe, num_inference_steps=1)
        texts, negative = pipe.encode_prompt(PROMPT, max_sequence_length=64)
        given = {"prompt_embeds": texts, "negative_prompt_embeds": negative, "num_inference_steps": 1}
        assert change(latents(pipe, None, **given), want) < 1e-6 and change(want, plain) > 1e-3
        x = [torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1_000_000))] * 2
        with efface.conditional_rows(pipe, [False, True]), torch.no_grad():
            erased = pipe.transformer(x, torch.zeros(2), [*negative, *texts]).sample
    original = SLD.guide
    monkeypatch.setattr(SLD, "guide", lambda self, made: [times.append(float(made.time)), original(self, made)][1])
    for time in (0.0, 0.75):
        with GUIDES().apply(pipe), efface.conditional_rows(pipe, [False, True]), torch.no_grad():
            pipe.transformer(x, torch.full((2,), time), [*negative, *texts])
    with torch.no_grad():
        base = pipe.transformer(x, torch.zeros(2), [*negative, *texts]).sample
    assert times == [0.0, 0.75]
    assert change(erased[1], base[1]) > 1e-3 and change(erased[0], base[0]) < 1e-5


# ---------------------------------------------------------------- refusals


def test_what_does_not_work_is_refused_with_the_reason() -> None:
    pipe = pipeline("zimage")
    texts, negative = pipe.encode_prompt(PROMPT, max_sequence_length=64)
    given = {"prompt_embeds": texts, "negative_prompt_embeds": negative}
    with eiup().apply(pipe), pytest.raises(RuntimeError, match="differ from the output of `encode_prompt`"):
        latents(pipe, None, **given)
    for eraser in (eiup(), GUIDES()):
        with (
            eraser.apply(pipe),
            pytest.raises(ValueError, match="Leave `num_images_per_prompt` out, and give each"),
        ):
            latents(pipe, num_images_per_prompt=2)
    with GUIDES().apply(pipe), pytest.raises(ValueError, match=r"Set `guidance_scale` above 0 \(for direct"):
        latents(pipe, guidance_scale=0.0)
    x = [torch.zeros(4, 1, 8, 8)]
    more, said = {"controlnet_block_samples": {0: torch.zeros(1)}}, "got `controlnet_block_samples`. Use that pipeline"
    with eiup().apply(pipe), efface.conditional_rows(pipe, [True]), pytest.raises(ValueError, match=said):
        pipe.transformer(x, torch.zeros(1), texts, **more)
    pipe.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="tokenizer of a ZImagePipeline to pad on the right, got 'left'"):
        eiup().apply(pipe)
    assert family(untouched("zimage")).guided(1.0) == {"guidance_scale": 0.0}
    assert family(untouched("zimage")).protocol({"guidance": 3.0, "steps": 2}) == {"guidance_scale": 2.0, "steps": 2}
