"""EIUP against its formulas, written out with explicit softmax and sharing no code with the package."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from tiny import ALCOHOL, CAT, LIMIT, PROMPTS, add_lora, bare, change, drawn, latents, pipeline
from torch import Tensor

from efface import EIUP, Concept, NegativePrompt
from efface.families.unet import SD
from efface.hooks import CrossAttention, ErasurePrompts
from efface.hooks.denoiser import Site

pytestmark = pytest.mark.thinned("long")

FORMS = ("projected", "swap", "separate", "gated")
PACKED, SINGLE = ("beer wine glass", "cat"), ("beer", "wine glass", "cat")
ERASED = {"projected": SINGLE, "swap": SINGLE, "separate": PACKED, "gated": PACKED}  # erasure prompts of ALCOHOL, CAT
THRESHOLD = 0.25  # so that gates of random models are open here and closed there
ANCHORS = {"alcohol": "a red moon", "cat": "the big pub"}
each_form = pytest.mark.parametrize("form", FORMS)
each_kind = pytest.mark.parametrize("form", [form for form in FORMS if form != "swap"])  # which hooks as "projected"


NEUTRAL = (("a dog", "the moon"), ("a big cat",))


def eiup(form: str = "projected", *concepts: Concept, **fields: Any) -> EIUP:
    concepts = concepts or (ALCOHOL,)
    if form == "swap":
        concepts = tuple(dataclasses.replace(c, anchor=ANCHORS[c.name]) for c in concepts)
        fields = {"threshold": THRESHOLD, **fields}
    return EIUP(concepts, normalization=form, **{"neutral": NEUTRAL, "strength": 1.0, **fields})


# ---------------------------------------------------------------- the formulas


def embed(pipe: Any, text: str) -> Tensor:
    """Text states [L, D] by looking every word up in the vocabulary. Its own tokens are columns 1, 2, ..."""
    states = []
    for suffix in ("", "_2") if hasattr(pipe, "text_encoder_2") else ("",):
        tokens, model = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
        vocabulary = tokens.get_vocab()
        ids = [0, *(vocabulary[f"{word}</w>"] for word in text.split()), 1]
        ids += [vocabulary[tokens.pad_token]] * (LIMIT - len(ids))
        out = model(torch.tensor([ids]), output_hidden_states=hasattr(pipe, "text_encoder_2"))
        states.append(out.hidden_states[-2] if hasattr(pipe, "text_encoder_2") else out.last_hidden_state)
    return torch.cat(states, -1)[0].detach()


def logits(attn: Attention, hidden: Tensor, text: Tensor) -> Tensor:
    """Image tokens [Q, C] against text [L, D]: [heads, Q, L]."""
    query, key = (x.chunk(attn.heads, -1) for x in (attn.to_q(hidden), attn.to_k(text)))
    return torch.stack([q @ k.T / k.shape[-1] ** 0.5 for q, k in zip(query, key, strict=True)])


def mix(attn: Attention, weights: Tensor, text: Tensor) -> Tensor:
    """Weights [heads, Q, L] times values, heads side by side: [Q, C]."""
    values = attn.to_v(text).chunk(attn.heads, -1)
    return torch.cat([w @ v for w, v in zip(weights, values, strict=True)], -1)


def softmax(x: Tensor) -> Tensor:
    x = (x - x.amax(-1, keepdim=True)).exp()
    return x / x.sum(-1, keepdim=True)


def written_out(attn: Attention, hidden: Tensor, text: Tensor) -> Tensor:
    return mix(attn, softmax(logits(attn, hidden, text)), text)


def direction(nothing: Tensor, erased: Tensor, neutral: Sequence[Tensor]) -> Tensor:
    """What a phrase adds, less its share of what neutral texts add."""
    d = erased - nothing
    if not neutral:
        return d
    shared = torch.stack([text - nothing for text in neutral], -1)
    return d - (shared @ torch.linalg.pinv(shared) @ d[..., None])[..., 0]


def cleared(share: float, out: Tensor, nothing: Tensor, erased: Sequence[Tensor], neutral: Sequence[Tensor]) -> Tensor:
    """The formula for unconditional rows: what they add to the empty text, less its projection on all phrases."""
    span = torch.stack([direction(nothing, text, neutral) for text in erased], -1)
    return out - share * (span @ torch.linalg.pinv(span) @ (out - nothing)[..., None])[..., 0]


def projected(strength: float, out: Tensor, nothing: Tensor, erased: Tensor, neutral: Sequence[Tensor]) -> Tensor:
    """The formula of the form "projected" for one phrase; all are attention outputs [Q, C]."""
    d = direction(nothing, erased, neutral)
    toward = torch.einsum("qc,qc->q", out - nothing, d) / torch.einsum("qc,qc->q", d, d)
    return out - strength * toward.clamp(min=0)[:, None] * d


def swapped(
    strength: float,
    out: Tensor,
    nothing: Tensor,
    erased: Sequence[Tensor],
    neutral: Sequence[Tensor],
    anchors: Sequence[Tensor],
    threshold: float = THRESHOLD,
) -> tuple[Tensor, Tensor]:
    """The formula of the form "swap", with the anchor of each phrase, and its gate [Q]; at least strength 1."""
    base, once, of = out, out, dict[int, Tensor]()
    for text, anchor in zip(erased, anchors, strict=True):
        base, before = projected(strength, base, nothing, text, neutral), once
        once = projected(1.0, once, nothing, text, neutral)
        of[id(anchor)] = of.get(id(anchor), 0.0) + ((once - before) ** 2).sum(-1)
    read = (once - out).norm(dim=-1) / (out - nothing).norm(dim=-1)
    gate = (5 * (read - threshold)).clamp(0, 1)
    texts = {id(anchor): anchor for anchor in anchors}
    anchor = torch.stack([texts[k] for k in of])[torch.stack([*of.values()]).argmax(0), torch.arange(len(out))]
    return base + gate[:, None] * (anchor - base), gate


class Reference:
    """An attention processor: row by row, concept by concept, in the order of the formulas of the brief."""

    def __init__(self, pipe: Any, form: str, strength: float, erased: Sequence[str], guidance: bool) -> None:
        self.form, self.strength, self.guidance = form, strength, guidance
        self.erased = [(embed(pipe, text), slice(1, 1 + len(text.split()))) for text in erased]
        self.neutral = [sum(embed(pipe, text) for text in group) / len(group) for group in NEUTRAL]
        anchors = {name: embed(pipe, text) for name, text in ANCHORS.items()}
        self.anchors = [anchors["cat" if text == "cat" else "alcohol"] for text in erased]
        self.gates: list[Tensor] = []
        empty = embed(pipe, "")
        zeros = guidance and getattr(pipe.config, "force_zeros_for_empty_prompt", False)
        self.empty = torch.zeros_like(empty) if zeros else empty

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> Tensor:
        rows = len(hidden_states)
        out = torch.stack(
            [
                self.row(attn, hidden, text, conditional=not self.guidance or row >= rows / 2)
                for row, (hidden, text) in enumerate(zip(hidden_states, encoder_hidden_states, strict=True))
            ]
        )
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor

    def row(self, attn: Attention, hidden: Tensor, text: Tensor, conditional: bool) -> Tensor:
        out = written_out(attn, hidden, text)
        other = text.shape != self.empty.shape or change(text, self.empty) > 1e-3
        if not conditional and self.form in ("projected", "swap") and other:
            nothing, *neutral = (written_out(attn, hidden, text) for text in (self.empty, *self.neutral))
            erased = [written_out(attn, hidden, text) for text, _ in self.erased]
            return cleared(min(self.strength, 1.0), out, nothing, erased, neutral)
        if self.form == "swap" and conditional and self.strength:
            nothing, *neutral = (written_out(attn, hidden, text) for text in (self.empty, *self.neutral))
            erased = [written_out(attn, hidden, text) for text, _ in self.erased]
            known = {id(text): written_out(attn, hidden, text) for text in dict.fromkeys(self.anchors)}
            anchors = [known[id(text)] for text in self.anchors]
            out, gate = swapped(self.strength, out, nothing, erased, neutral, anchors)
            self.gates.append(gate)
            return out
        for erased, own in self.erased if conditional else ():
            if self.form == "projected":
                of = [written_out(attn, hidden, text) for text in (self.empty, erased, *self.neutral)]
                out = projected(self.strength, out, *of[:2], of[2:])
            elif self.form == "separate":
                weights = softmax(logits(attn, hidden, erased))
                out = out - self.strength * mix(attn, weights[..., own], erased[own])
            else:
                both = softmax(torch.cat([logits(attn, hidden, text), logits(attn, hidden, erased[own])], -1))
                out = out - self.strength * mix(attn, both[..., len(text) :], erased[own])
        return out


@contextlib.contextmanager
def reference(
    pipe: Any, form: str, strength: float = 1.0, erased: Sequence[str] = (), guidance: bool = True
) -> Iterator[Reference]:
    """The pipeline with its cross-attention written out."""
    made = Reference(pipe, form, strength, erased or ERASED[form][:-1], guidance)
    layers = {m: m.processor for name, m in pipe.unet.named_modules() if name.endswith("attn2")}
    for layer in layers:
        layer.processor = made
    try:
        yield made
    finally:
        for layer, processor in layers.items():
            layer.processor = processor


@pytest.fixture
def double(family: str) -> Any:
    return _double(family)


_double = functools.cache(lambda family: pipeline(family).to(torch.float64))


@each_form
def test_pictures_equal_the_formulas(form: str, pipe: Any, family: str) -> None:
    with eiup(form, ALCOHOL, CAT, strength=1.5).apply(pipe):
        erased = latents(pipe, PROMPTS)
    with reference(pipe, form, 1.5, ERASED[form]):
        assert change(erased, latents(pipe, PROMPTS)) < 1e-5
    assert change(erased, drawn(family, prompt=PROMPTS)) > 0.1


def test_a_negative_prompt_is_edited_like_a_prompt_but_not_beyond(pipe: Any, family: str) -> None:
    """Both are measured from the empty text."""
    texts = {"negative_prompt": ["a dog", "the moon"]}
    with eiup("projected", ALCOHOL, CAT, strength=1.5).apply(pipe):
        erased, alike = latents(pipe, PROMPTS, **texts), latents(pipe, PROMPTS, negative_prompt=["a dog"] * 2)
    with reference(pipe, "projected", 1.5, SINGLE):
        assert change(erased, latents(pipe, PROMPTS, **texts)) < 1e-5
        assert change(alike, latents(pipe, PROMPTS, negative_prompt=["a dog"] * 2)) < 1e-5
    assert change(erased, latents(pipe, PROMPTS, **texts)) > 0.1


@pytest.mark.long
@pytest.mark.parametrize("how", ["embeddings", "rows", "images", "eraser", "compiled"])
def test_however_a_negative_prompt_is_given(how: str, sd1: Any, compile_options: dict[str, Any]) -> None:
    """Always the same formula."""
    eraser, call, beside = eiup(), {"negative_prompt": ["a dog", "the moon"]}, NegativePrompt(Concept("the moon"))
    if how == "embeddings":
        call = {"negative_prompt_embeds": sd1.encode_prompt(["a dog", "the moon"], "cpu", 1, False)[0]}
    elif how == "rows":
        eraser = eiup(rows=[[], [ALCOHOL]])
    elif how == "images":
        call["num_images_per_prompt"] = 2
    with contextlib.ExitStack() as on:
        if how == "eraser":
            call = {}
            on.enter_context(beside.apply(sd1))
        plain = latents(sd1, PROMPTS, **call)
        with reference(sd1, "projected"):
            want = latents(sd1, PROMPTS, **call)
        on.enter_context(eraser.apply(sd1))
        if how == "compiled":
            sd1 = pipeline()
            sd1.unet.compile(**compile_options)
            on.enter_context(eraser.apply(sd1))
        erased = latents(sd1, PROMPTS, **call)
    of = slice(1, None) if how == "rows" else slice(None)
    assert change(erased[of], want[of]) < 1e-5
    assert change(erased[of], plain[of]) > 1e-2
    if how == "rows":
        assert torch.equal(erased[:1], plain[:1])


@each_form
def test_pictures_without_guidance_equal_the_formulas(form: str, sd1: Any) -> None:
    with eiup(form).apply(sd1):
        erased = latents(sd1, PROMPTS, guidance_scale=1.0)
    with reference(sd1, form, guidance=False):
        assert change(erased, latents(sd1, PROMPTS, guidance_scale=1.0)) < 1e-5


@each_form
def test_every_layer_equals_the_formulas_to_1e_10(form: str, double: Any) -> None:
    seen: list[tuple[Attention, Tensor, Tensor, Tensor]] = []

    def see(attn: Attention, args: Any, kwargs: Any, out: Tensor) -> None:
        seen.append((attn, args[0], kwargs["encoder_hidden_states"], out))

    layers = [m for name, m in double.unet.named_modules() if name.endswith("attn2")]
    watches = [layer.register_forward_hook(see, with_kwargs=True) for layer in layers]
    with eiup(form, ALCOHOL, CAT, strength=1.5).apply(double):
        latents(double, PROMPTS, num_inference_steps=1)
    for watch in watches:
        watch.remove()
    assert {attn for attn, *_ in seen} == set(layers)
    explicit, plain = (Reference(double, form, strength, ERASED[form], True) for strength in (1.5, 0.0))
    for attn, hidden, text, out in seen:
        with torch.no_grad():
            want, without = explicit(attn, hidden, text), plain(attn, hidden, text)
        assert want.dtype == out.dtype == torch.float64
        assert float((out - want).abs().max()) < 1e-10
        assert change(out[2:], without[2:]) > 1e-2


@each_form
def test_zero_strength_is_plain_to_the_bit(form: str, pipe: Any, family: str) -> None:
    with eiup(form, ALCOHOL, CAT, strength=0.0).apply(pipe):
        assert torch.equal(latents(pipe, PROMPTS), drawn(family, prompt=PROMPTS))


def test_concepts_act_one_after_the_other(pipe: Any, family: str) -> None:
    with EIUP([ALCOHOL]).apply(pipe), EIUP([CAT]).apply(pipe):
        assert change(latents(pipe), drawn(family, EIUP([ALCOHOL, CAT]))) < 1e-5
    assert change(drawn(family, EIUP([CAT, ALCOHOL])), drawn(family, EIUP([ALCOHOL, CAT]))) > 1e-4


# ---------------------------------------------------------------- one edit, looked at closely


@dataclasses.dataclass(frozen=True)
class Edit:
    """One call of `EIUP.edit`."""

    eraser: EIUP
    out: Tensor
    cross: CrossAttention
    prompts: ErasurePrompts
    edited: Tensor


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Edit]]:
    """Draws with an eraser on and returns every edit that was made."""
    seen: list[Edit] = []
    original = EIUP.edit

    def spy(self: EIUP, out: Tensor, cross: CrossAttention, prompts: ErasurePrompts) -> Tensor:
        edited = original(self, out, cross, prompts)
        seen.append(Edit(self, out, cross, prompts, edited))
        return edited

    def draw(pipe: Any, eraser: EIUP, prompt: Any = PROMPTS, **options: Any) -> list[Edit]:
        monkeypatch.setattr(EIUP, "edit", spy)
        with eraser.apply(pipe):
            latents(pipe, prompt, **options)
        monkeypatch.setattr(EIUP, "edit", original)
        assert seen
        return seen

    return draw


Edits = Callable[..., list[Edit]]


def directions(edit: Edit) -> tuple[Tensor, Tensor, Tensor]:
    """What the layer puts out for the empty text [B, Q, C]; the last phrase's d; the neutral texts' part."""
    cross = edit.cross
    nothing, *shared, phrase = cross.with_empty(edit.prompts.text[-1:])
    shared = torch.stack(shared, -1) - nothing[..., None]
    d = phrase - nothing
    return nothing, d - (shared @ torch.linalg.pinv(shared) @ d[..., None])[..., 0], shared


@pytest.mark.parametrize(
    ("negative", "strength"), [(None, 1.0), (["a dog", "the pub"], 1.0), (["the pub", "a dog"], 2.5)]
)
def test_strength_1_leaves_nothing_of_the_concept(negative: Any, strength: float, edits: Edits, double: Any) -> None:
    """Nor does any larger strength in unconditional rows, which have neither more nor less than the empty text."""
    seen: dict[bool, list[int]] = {}
    for edit in edits(double, eiup("projected", CAT, strength=strength), negative_prompt=negative):
        nothing, d, _ = directions(edit)
        left, before = (((out - nothing) * d).sum(-1) for out in (edit.edited, edit.out))
        size, unconditional = (d * d).sum(-1), edit.cross.unconditional
        assert bool((left <= 1e-5 * size).all())
        if unconditional:
            assert bool((left >= -1e-5 * size).all())
        else:
            assert torch.equal(edit.edited[before < 0], edit.out[before < 0])
        if strength == 1:
            assert bool((left[before > 0] >= -1e-5 * size[before > 0]).all())
        counts = seen.setdefault(unconditional, [0, 0])
        counts[0] += int((before > 0).sum())
        counts[1] += int((before < 0).sum())
    assert set(seen) == ({False} if negative is None else {False, True})
    for positive, others in seen.values():
        assert 0.2 < positive / (positive + others) < 0.8


def test_what_ordinary_things_add_is_not_touched(edits: Edits, double: Any) -> None:
    """Whatever is taken out, and however strongly, is at right angles to what the neutral texts add."""
    changed = 0.0
    for edit in edits(double, eiup("projected", ALCOHOL, CAT, strength=3.0)):
        _, _, shared = directions(edit)
        taken = edit.out - edit.edited
        along = (taken[..., None] * shared).sum(-2).abs().amax(-1)
        assert bool((along <= 1e-8 * taken.norm(dim=-1) * shared.norm(dim=-2).amax(-1)).all())
        changed += float(taken.norm())
    assert changed > 1e-2


@pytest.mark.parametrize("neutral", ["", ("",), ((),), "a dog", ((3,),), (("",), 3), 3])
def test_neutral_texts_come_in_groups(neutral: Any) -> None:
    with pytest.raises(ValueError, match="groups of texts"):
        EIUP([CAT], neutral=neutral)
    assert EIUP([CAT], neutral=[["a dog", ""]]).neutral == (("a dog", ""),)
    assert EIUP([CAT], neutral=[]).neutral == ()


def test_the_empty_and_the_neutral_prompts_are_left_alone(sd1: Any) -> None:
    """The first adds nothing, and what the others add is no part of a concept."""
    for prompt in ("", "the moon"):
        erased = drawn("sd1", eiup(strength=2.0, neutral=(("the moon",),)), prompt=prompt)
        assert change(erased, drawn(prompt=prompt)) < 1e-5
    assert change(drawn("sd1", eiup(strength=2.0, neutral=()), prompt="the moon"), drawn(prompt="the moon")) > 1e-3


def test_a_concept_that_is_nothing_or_neutral_erases_nothing(edits: Edits, sd1: Any) -> None:
    for edit in edits(sd1, eiup(strength=2.0), num_inference_steps=1):
        empty, neutral = (ErasurePrompts(edit.cross.neutral[k : k + 1], (slice(1, 1),)) for k in (0, 1))
        for form in (form for form in FORMS if form != "swap"):  # which reads anchors, see test_eiup_swap.py
            unchanged = dataclasses.replace(edit.eraser, normalization=form).edit(edit.out, edit.cross, empty)
            assert change(unchanged, edit.out) < 1e-6, form
        assert change(edit.eraser.edit(edit.out, edit.cross, neutral), edit.out) < 1e-3
        assert change(edit.edited, edit.out) > 1e-2


@pytest.mark.parametrize("form", ["separate", "gated"])
def test_weights_add_up(form: str, edits: Edits, double: Any) -> None:
    for edit in edits(double, eiup(form), num_inference_steps=1):

        def at(strength: float, edit: Edit = edit) -> Tensor:
            with torch.no_grad():
                return dataclasses.replace(edit.eraser, strength=strength).edit(edit.out, edit.cross, edit.prompts)

        assert float((at(0.7) + at(1.1) - at(0.0) - at(1.8)).abs().max()) < 1e-10
        assert torch.equal(at(0.0), edit.out) and not torch.equal(at(0.7), edit.out)


@pytest.mark.parametrize("form", ["separate", "gated"])
def test_start_end_and_padding_tokens_carry_no_weight(form: str, edits: Edits, sd1: Any) -> None:
    for edit in edits(sd1, eiup(form), num_inference_steps=1):
        genuine = edit.cross.keys_values

        def with_other_values(columns: list[int], edit: Edit = edit, genuine: Any = genuine) -> Tensor:
            def keys_values(text: Tensor) -> tuple[Tensor, Tensor]:
                key, value = genuine(text)
                if text is edit.prompts.text.states:
                    value = value.index_fill(2, torch.tensor(columns), 100.0)
                return key, value

            edit.cross.keys_values = keys_values  # type: ignore[method-assign]
            return edit.eraser.edit(edit.out, edit.cross, edit.prompts)

        assert torch.equal(with_other_values([0, *range(4, LIMIT)]), edit.edited)
        for column in (1, 2, 3):
            assert not torch.equal(with_other_values([column]), edit.edited)


# ---------------------------------------------------------------- layers


def test_hooks_sit_on_the_cross_attention_layers_only(pipe: Any) -> None:
    layers = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]
    with eiup().apply(pipe):
        hooked = {name for name, module in pipe.unet.named_modules() if "forward" in vars(module)}
        assert all(pipe.unet.get_submodule(name).is_cross_attention for name in layers)
    assert hooked == {"", *(f"{name}.{part}" for name in layers for part in ("to_q", "to_out.0"))}
    assert len(layers) >= 4


SDXL_BASE = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}


@pytest.mark.parametrize(("config", "layers"), [({"cross_attention_dim": 768}, 16), (SDXL_BASE, 70)])
def test_layers_of_the_published_models(config: dict[str, Any], layers: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert len(Site(unet, SD).layers.cross) == layers


# ---------------------------------------------------------------- time


@each_form
def test_it_acts_inside_the_window_only(form: str, sd1: Any) -> None:
    steps: list[tuple[float, Any, Tensor]] = []

    def see(unet: Any, args: Any, kwargs: Any, out: Any) -> None:
        steps.append((1 - float(args[1]) / 1000, functools.partial(unet, *args, **kwargs), out[0]))

    watch = sd1.unet.register_forward_hook(see, with_kwargs=True)
    with eiup(form, window=(0.3, 0.7)).apply(sd1):
        latents(sd1, num_inference_steps=5)
    watch.remove()
    acted = {round(time, 1): not torch.equal(plain()[0], out) for time, plain, out in steps}
    assert acted == {0.2: False, 0.4: True, 0.6: True, 0.8: False, 1.0: False}


def test_windows(pipe: Any, family: str) -> None:
    def at(*window: float) -> Tensor:
        return drawn(family, eiup(window=window))

    assert torch.equal(at(0.0, 0.0), drawn(family))
    assert change(at(0.0, 0.8), at(0.0, 1.0)) > 1e-4
    assert change(at(0.0, 0.8), drawn(family)) > 1e-3
    assert EIUP.reconstruction([ALCOHOL], 2.0) == EIUP([ALCOHOL], 2.0, (0.0, 0.8), "separate")


# ---------------------------------------------------------------- together with other things


@each_kind
def test_attention_slicing_before_and_after(form: str) -> None:
    pipe, want = pipeline(), drawn("sd1", eiup(form))
    pipe.enable_attention_slicing("max")
    with eiup(form).apply(pipe):
        assert change(latents(pipe), want) < 1e-5
        pipe.disable_attention_slicing()
        assert torch.equal(latents(pipe), want)
        pipe.enable_attention_slicing("max")
        assert change(latents(pipe), want) < 1e-5
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    assert change(latents(pipe), drawn()) < 1e-5


@pytest.mark.long
@each_kind
@pytest.mark.parametrize("first", ["lora", "eraser"])
def test_a_lora_takes_part(first: str, form: str) -> None:
    pipe = pipeline()
    if first == "lora":
        add_lora(pipe)
    handle = eiup(form).apply(pipe)
    if first == "eraser":
        assert torch.equal(latents(pipe), drawn("sd1", eiup(form)))
        add_lora(pipe)
    early = bare(pipe)
    erased, half = latents(pipe), latents(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(early, bare(pipe))
    assert change(erased, drawn("sd1", eiup(form))) > 1e-2 and change(erased, half) > 1e-2
    handle.remove()
    assert change(erased, latents(pipe)) > 1e-2
    with reference(pipe, form):
        assert change(erased, latents(pipe)) < 5e-4  # float32; in float64 it is 1e-13
        assert change(half, latents(pipe, cross_attention_kwargs={"scale": 0.5})) < 1e-5
    handle = eiup(form).apply(pipe)
    assert torch.equal(latents(pipe), erased)
    pipe.unet.unload_lora()
    assert torch.equal(latents(pipe), drawn("sd1", eiup(form)))
    handle.remove()
    assert torch.equal(latents(pipe), drawn())
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


@each_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype: torch.dtype, form: str) -> None:
    pipe = pipeline().to(dtype)
    with eiup(form).apply(pipe):
        erased = latents(pipe)
    assert erased.dtype == dtype
    assert change(erased.float(), drawn("sd1", eiup(form))) < change(drawn(), drawn("sd1", eiup(form))) / 2


# ---------------------------------------------------------------- compiled

COMPILE = {
    "the pipeline's unet": lambda pipe, **how: setattr(pipe, "unet", torch.compile(pipe.unet, **how)),
    "in place": lambda pipe, **how: pipe.unet.compile(**how),
    "block by block": lambda pipe, **how: pipe.unet.compile_repeated_blocks(**how),
}


@pytest.fixture
def compile_options() -> Iterator[dict[str, Any]]:
    torch._dynamo.reset()
    # every block has hooks of its own, so each is compiled by itself
    with torch._dynamo.config.patch(recompile_limit=64):
        yield {"backend": "eager", "fullgraph": True}
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.parametrize("form", [form for form in FORMS if form != "projected"])
def test_the_other_forms_compile_too(form: str, compile_options: dict[str, Any]) -> None:
    pipe = pipeline("small")
    COMPILE["in place"](pipe, **compile_options)
    with eiup(form).apply(pipe):
        assert change(latents(pipe), drawn("small", eiup(form))) < 1e-5
    assert change(drawn("small", eiup(form)), drawn("small")) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "way"),
    [
        *(("compiled", way) for way in COMPILE),
        ("applied", "in place"),
        pytest.param("applied", "the pipeline's unet", marks=pytest.mark.slow),
        pytest.param("applied", "block by block", marks=pytest.mark.slow),
    ],
)
def test_compiled_without_a_graph_break(first: str, way: str, compile_options: dict[str, Any]) -> None:
    pipe = pipeline("small")
    eraser = EIUP(rows=[[ALCOHOL], []], window=(0.0, 0.5))

    def check(*erasers: EIUP) -> None:
        assert change(latents(pipe, PROMPTS), drawn("small", *erasers, prompt=PROMPTS)) < 1e-5

    assert change(drawn("small", eraser, prompt=PROMPTS), drawn("small", prompt=PROMPTS)) > 1e-2
    if first == "compiled":
        COMPILE[way](pipe, **compile_options)
        check()
    handle = eraser.apply(pipe)
    if first == "applied":
        COMPILE[way](pipe, **compile_options)
    check(eraser)
    handle.strength = 3.0
    check(dataclasses.replace(eraser, strength=3.0))
    handle.remove()
    check()


@pytest.mark.long
def test_a_lora_added_to_a_compiled_unet_takes_part(compile_options: dict[str, Any]) -> None:
    pipe, eager = pipeline("small"), pipeline("small")
    with eiup().apply(pipe), eiup().apply(eager):
        pipe.unet.compile(**compile_options)
        without = latents(pipe)
        add_lora(pipe)
        add_lora(eager)
        assert change(latents(pipe), latents(eager)) < 1e-5
        assert change(latents(pipe), without) > 1e-2
