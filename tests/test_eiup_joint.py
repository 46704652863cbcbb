"""EIUP and NAG in joint attention (SD 3/3.5, FLUX.1, CogView4), against their definition written out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
)
from joint_literal import Beside, Literal, conditional, unconditional
from PIL import Image
from test_nag import formula
from tiny import ALCOHOL, CAT, LIMIT, PROMPTS, change, drawn, latents, pipeline, untouched
from tiny.flux import flux
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import efface
from efface import EIUP, NAG, Concept
from efface.hooks import denoiser, edits, joint, prompts

pytestmark = pytest.mark.thinned("long")

ALL = ("sd3", "sd35", "flux", "cogview4")
each_family = pytest.mark.parametrize("family", ALL)
NEUTRAL = (("a dog", "the moon"), ("a big cat",), ("a red night",))
PHRASES = (*ALCOHOL.phrases, *CAT.phrases)
NEGATIVE = ["a dog", "the moon"]
CLOSE = {"sd3": 1e-9, "sd35": 1e-9, "flux": 1e-6, "cogview4": 1e-6}  # rotations are computed in float32
LENGTH = 24  # of T5's text, which `tiny.latents` asks for

double = functools.cache(lambda family: pipeline(family).to(torch.float64))


def eiup(*concepts: Any, **fields: Any) -> EIUP:
    return EIUP(concepts or (ALCOHOL, CAT), **{"neutral": NEUTRAL, "strength": 1.5, **fields})


# ---------------------------------------------------------------- the definition


@torch.no_grad()
def encoded(pipe: Any, texts: Sequence[str]) -> Tensor:
    """Each text by the pipeline itself."""
    if hasattr(pipe, "tokenizer_3"):
        return pipe.encode_prompt(list(texts), None, None, "cpu", max_sequence_length=LENGTH)[0]
    if hasattr(pipe, "tokenizer_2"):
        return pipe.encode_prompt(list(texts), device="cpu", max_sequence_length=LENGTH)[0]
    return pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, device="cpu")[0]


def beside(pipe: Any, group: Sequence[str]) -> Beside:
    """The mean of some texts, each encoder's padding as one column, of as many tokens as the longest has."""
    states, words = encoded(pipe, group).mean(0), max(len(text.split()) for text in group)
    n, kind = len(states), type(pipe).__name__
    if kind.startswith("CogView4"):  # padding in front
        parts = [states[: n - words - 2].mean(0, keepdim=True), states[n - words - 2 :]]
        return Beside(torch.cat(parts), torch.tensor([n - words - 2.0, *[1.0] * (words + 2)]))
    ends = [(0, words + 1, n)]  # T5: the words and an end
    if kind.startswith("StableDiffusion3"):  # CLIP: a start as well
        ends = [(0, words + 2, LIMIT), (LIMIT, LIMIT + (words + 1 if pipe.text_encoder_3 is not None else 0), n)]
    parts, weight = [], []
    for start, tokens, end in ends:
        parts += [states[start:tokens], states[tokens:end].mean(0, keepdim=True)]
        weight += [*[1.0] * (tokens - start), float(end - tokens)]
    return Beside(torch.cat(parts), torch.tensor(weight))


def written_out(
    pipe: Any,
    strength: float = 1.5,
    negative: Any = None,
    phrases: Sequence[str] = PHRASES,
    row: Any = None,
    alone: bool = False,
    **options: Any,
) -> Tensor:
    """The pictures of the definition. Requires that every phrase changes some queries and leaves others.

    `row` is another edit of the conditional rows; `alone` edits what is read of the texts alone.
    """
    texts = [beside(pipe, group) for group in (("",), *NEUTRAL, *((phrase,) for phrase in phrases))]
    prompts, moved = encoded(pipe, PROMPTS), list[Tensor]()
    row = row or conditional(strength, moved)

    def edits(text: Tensor) -> list[Any]:
        made: list[Any] = []
        for k, states in enumerate(text):
            is_prompt = any(torch.equal(states, one) for one in prompts) if len(text) == 2 else k >= len(text) / 2
            made.append(row if is_prompt else None if negative is None else unconditional(strength))
        return made

    pipe.transformer.forward = engine = Literal(pipe.transformer, texts, len(NEUTRAL), edits)
    engine.alone = alone
    try:
        made = latents(pipe, PROMPTS, **({} if negative is None else {"negative_prompt": negative}), **options)
    finally:
        del pipe.transformer.forward
    size = torch.cat(moved) if moved else torch.tensor([0.0, 1.0])
    assert 0.2 < float((size > 0).double().mean()) < 0.8 and float(size[size > 0].median()) > 0.01
    return made


@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["", "negative"])
@each_family
def test_pictures_equal_the_definition(family: str, negative: Any) -> None:
    """Three phrases, two groups of neutral texts, all layers, three steps; also with edited unconditional rows."""
    pipe, call = double(family), {} if negative is None else {"negative_prompt": negative}
    plain = latents(pipe, PROMPTS, **call)
    with eiup().apply(pipe):
        erased = latents(pipe, PROMPTS, **call)
    assert change(erased, plain) > 1e-2
    assert change(erased, written_out(pipe, negative=negative)) < CLOSE[family]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_large_pictures_equal_the_definition(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more queries than the prompt has columns, the prompt's part is subtracted from the stock attention."""
    pipe, size, found = double(family), {"height": 32, "width": 32, "num_inference_steps": 1}, list[bool]()
    original = joint.without
    monkeypatch.setattr(joint, "without", lambda *a: [made := original(*a), found.append(made is not None)][0])
    plain = latents(pipe, PROMPTS, **size)
    with eiup().apply(pipe):
        erased = latents(pipe, PROMPTS, **size)
    assert found[0]  # later layers may have prompts with a large share
    assert change(erased, plain) > 1e-2
    assert change(erased, written_out(pipe, **size)) < CLOSE[family]


@each_family
def test_nag_equals_its_formula_in_joint_attention(family: str) -> None:
    """Z- is the layer's output with the concept's text, which is carried, in place of the prompt."""
    pipe = double(family)

    def nag(out: Tensor, nothing: Tensor, neutral: Sequence[Tensor], erased: Sequence[Tensor]) -> Tensor:
        return formula(out, erased, 5.0, 2.5, 0.5)[0]

    with NAG([ALCOHOL, CAT]).apply(pipe):
        made = latents(pipe, PROMPTS, negative_prompt=NEGATIVE)
    want = written_out(pipe, phrases=("beer wine glass", "cat"), row=nag, **{"negative_prompt": NEGATIVE})
    assert change(made, want) < CLOSE[family]
    assert change(made, latents(pipe, PROMPTS, negative_prompt=NEGATIVE)) > 1e-2


def test_where_the_prompt_has_nearly_all_of_the_softmax_it_is_not_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the same; in float32, subtracting 1 - 1e-6 would leave rounding errors alone."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1_000_000))
    query, key, value = draw(1, 2, 64, 8), draw(1, 2, 72, 8), draw(1, 2, 72, 8)
    for more in (0.0, 30.0):
        ahead = torch.cat([key[:, :, :8] * 0 + more * query.mean(2, keepdim=True), key[:, :, 8:]], 2)
        all_keys = joint.Inputs(query, ahead, value)
        some, others = (joint.Inputs(query, *all_keys.at(at)[1:]) for at in (slice(0, 8), slice(8, None)))
        both = joint.with_mass(all_keys, 0.35)
        share = (joint.with_mass(some, 0.35)[1] - both[1]).exp().amax()
        found = joint.without(joint.with_mass(some, 0.35), *both)
        assert (share > 0.9) == (found is None)
        if found is not None:
            want = joint.with_mass(others, 0.35)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, want, strict=True))


# ---------------------------------------------------------------- what stays


@dataclasses.dataclass(frozen=True)
class Nothing(EIUP):
    """Carries the texts and changes nothing."""

    def edit(self, out: Tensor, cross: Any, prompts: Any) -> Tensor:
        cross.with_empty(prompts.text)
        return out


@pytest.mark.parametrize("size", [16, 32])
@each_family
def test_carried_texts_touch_neither_prompt_nor_picture(
    family: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in float32: prompt and picture, conditional rows and others."""
    pipe, options = untouched(family), {"height": size, "width": size}
    lengths = []
    original = joint.attended
    monkeypatch.setattr(edits, "attended", lambda *a: [lengths.append(a[0].columns), original(*a)][1])
    plain = latents(pipe, PROMPTS, negative_prompt=NEGATIVE, **options)
    with Nothing((ALCOHOL, CAT)).apply(pipe):
        assert torch.equal(latents(pipe, PROMPTS, negative_prompt=NEGATIVE, **options), plain)
    assert min(lengths) > 10
    with eiup().apply(pipe):
        assert change(latents(pipe, PROMPTS, negative_prompt=NEGATIVE, **options), plain) > 1e-2


def attentions(pipe: Any, *erasers: Any, **options: Any) -> list[Tensor]:
    """The prompt's columns of each joint layer's output in the first denoiser call."""
    found: list[Tensor] = []
    watches = [
        m.register_forward_hook(lambda _, args, out: found.append(out if isinstance(out, Tensor) else out[1]))
        for name, m in pipe.transformer.named_modules()
        if name.rpartition(".")[2] in ("attn", "attn1")
    ]
    with contextlib.ExitStack() as on:
        for eraser in erasers:
            on.enter_context(eraser.apply(pipe))
        latents(pipe, PROMPTS, num_inference_steps=1, **options)
    for watch in watches:
        watch.remove()
    return found


@each_family
def test_the_prompts_columns_are_those_of_the_base_model(family: str) -> None:
    """Bit for bit in the first layer, behind which the picture differs; so are the picture's unconditional rows."""
    pipe = untouched(family)
    plain, erased = attentions(pipe), attentions(pipe, eiup())
    n = plain[0].shape[1]
    own = erased[0][:, :n] if family.startswith("sd") else erased[0][:, -n:]
    assert erased[0].shape[1] > n and torch.equal(own, plain[0])
    assert change(erased[1][:, -n:], plain[1][:, -n:]) > 1e-3


@each_family
def test_unconditional_rows_without_a_negative_prompt_stay(family: str) -> None:
    """To the bit, also at a large strength; and rows without concepts."""
    pipe = untouched(family)
    base, erased = denoised(pipe), denoised(pipe, eiup(strength=16.0))
    assert torch.equal(erased[:2], base[:2])
    for k in (2, 3):
        assert change(erased[k], base[k]) > 1e-2
    some = denoised(pipe, eiup(rows=[[ALCOHOL], []]))
    assert torch.equal(some[[0, 1, 3]], base[[0, 1, 3]]) and change(some[2], base[2]) > 1e-2


def denoised(pipe: Any, *erasers: Any) -> Tensor:
    """The denoiser's first prediction of two prompts: unconditional rows, then conditional ones."""
    seen: list[Tensor] = []
    watch = pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with contextlib.ExitStack() as on:
        for eraser in erasers:
            on.enter_context(eraser.apply(pipe))
        latents(pipe, PROMPTS, num_inference_steps=1)
    watch.remove()
    return seen[0] if len(seen[0]) == 4 else torch.cat(seen[1::-1])


@each_family
def test_a_text_that_equals_the_empty_one_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its direction is rounding; the prompt itself as erasure prompt is not."""
    pipe = double(family)
    plain = latents(pipe, PROMPTS)
    original = prompts.Applied.texts
    for text, least, most in (("", 0.0, 1e-7), (PROMPTS[0], 1e-2, 10.0)):
        monkeypatch.setattr(
            prompts.Applied, "texts", lambda self, pipe, text=text: [(of, text) for of, _ in original(self, pipe)[:1]]
        )
        with eiup(CAT).apply(pipe):
            assert least <= change(latents(pipe, PROMPTS), plain) <= most


@pytest.mark.parametrize("embeds", [True, False], ids=["dev", "schnell"])
def test_flux_without_true_guidance(embeds: bool) -> None:
    """Distilled models have conditional rows alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = flux(guidance_embeds=embeds).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    alone = {"negative_prompt": None, "guidance_scale": 1.0}
    plain = latents(pipe, PROMPTS, **alone)
    with eiup(strength=4.0).apply(pipe) as handle:
        erased = latents(pipe, PROMPTS, **alone)
        assert handle.record == {"calls": 3, "rows": {"0": 3, "1": 3}, "exempt": {}, "layers": 2}
    assert change(erased, plain) > 1e-2
    assert change(erased, written_out(pipe, strength=4.0, **alone)) < CLOSE["flux"]


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_embeddings_and_prompts_that_differ_between_encoders_act(family: str) -> None:
    pipe = pipeline(family)
    made = (
        pipe.encode_prompt(list(PROMPTS), None, None, "cpu", max_sequence_length=LENGTH)
        if family == "sd3"
        else (pipe.encode_prompt(list(PROMPTS), device="cpu", max_sequence_length=LENGTH))
    )
    pooled = made[2 if family == "sd3" else 1]
    given = {"prompt_embeds": made[0], "pooled_prompt_embeds": pooled}
    given |= {f"negative_{name}": value for name, value in given.items()}
    two = {"prompt_2": ["a dog", "the moon"]}
    with eiup().apply(pipe):
        erased, other = latents(pipe, None, **given), latents(pipe, PROMPTS, **two)
        assert change(erased, latents(pipe, PROMPTS, negative_prompt=list(PROMPTS))) < 1e-5
    assert change(erased, latents(pipe, None, **given)) > 1e-2
    assert change(other, latents(pipe, PROMPTS, **two)) > 1e-2


def test_skipped_layers_are_the_pipelines_choice() -> None:
    """SD 3.5's skip-layer guidance leaves layers out of one more call; the others are edited there too."""
    pipe, options = pipeline("sd3"), {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.5}
    plain = latents(pipe, PROMPTS, **options)
    with eiup().apply(pipe) as handle:
        assert change(latents(pipe, PROMPTS, **options), plain) > 1e-2
        assert handle.record["calls"] > 3


@pytest.mark.parametrize(
    ("kind", "family", "options"),
    [
        (FluxKontextPipeline, "flux", {"_auto_resize": False, "max_area": 256}),
        (FluxImg2ImgPipeline, "flux", {"strength": 1.0}),
        (StableDiffusion3Img2ImgPipeline, "sd3", {"strength": 1.0}),
    ],
)
def test_pictures_beside_the_prompt(kind: Any, family: str, options: dict[str, Any]) -> None:
    """Kontext's reference picture has columns of its own; they count as the picture's."""
    pipe = kind(**pipeline(family).components)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (16, 16), (200, 30, 40))
    call = {"prompt": PROMPTS[0], "image": picture, "height": 16, "width": 16, "num_inference_steps": 2, **options}

    def draw() -> Tensor:
        seed = torch.Generator().manual_seed(1_000_000)
        return pipe(**call, generator=seed, output_type="latent", max_sequence_length=LENGTH).images

    plain = draw()
    with eiup().apply(pipe) as handle:
        assert change(draw(), plain) > 1e-2
        assert handle.record["rows"] == {"0": 2}
    assert torch.equal(draw(), plain)


# ---------------------------------------------------------------- what cannot be seen ends the call


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ((query @ key.mT) * query.shape[-1] ** -0.5).softmax(-1) @ value


class Mine:
    """A processor with another attention function."""

    def __init__(self, inner: Any, attend: Any) -> None:
        self.inner, self.attend = inner, attend

    def __call__(self, attn: Any, hidden_states: Any, *others: Any, **given: Any) -> Any:
        original = F.scaled_dot_product_attention
        try:
            F.scaled_dot_product_attention = lambda query, key, value, **_: self.attend(original, query, key, value)
            return self.inner(attn, hidden_states, *others, **given)
        finally:
            F.scaled_dot_product_attention = original


UNSEEN = {
    "another function": lambda stock, q, k, v: explicit(q, k, v),
    "twice": lambda stock, q, k, v: 0.5 * (stock(q, k, v) + stock(q, k, v)),
    "a mask": lambda stock, q, k, v: stock(q, k, v, attn_mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)),
    "causal": lambda stock, q, k, v: stock(q, k, v, is_causal=True),
    "fewer columns": lambda stock, q, k, v: F.pad(stock(*(x[:, :, 1:] for x in (q, k, v))), (0, 0, 1, 0)),
    "fewer rows": lambda stock, q, k, v: torch.cat(
        [stock(*(x[:1] for x in (q, k, v))), stock(*(x[1:] for x in (q, k, v)))]
    ),
}
SAID = {
    "another function": r"1 of \d joint attention layers did not .*scaled_dot_product_attention.*backend \"native\"",
    "twice": r"1 of \d joint attention layers did not .*one call",
    "a mask": "from all columns to all columns, got `attn_mask`",
    "causal": "from all columns to all columns, got `is_causal`",
    "fewer columns": r"from all columns to all columns, got \d+ columns",
    "fewer rows": r"runs on 1 rows, but the denoiser call has \d",
}


@pytest.mark.parametrize("how", UNSEEN)
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_attention_that_efface_cannot_see_is_an_error(family: str, how: str) -> None:
    pipe = pipeline(family)
    layer = pipe.transformer.transformer_blocks[-1].attn
    layer.set_processor(Mine(layer.processor, UNSEEN[how]))
    plain = latents(pipe, PROMPTS)
    with eiup().apply(pipe), pytest.raises(RuntimeError, match=SAID[how]):
        latents(pipe, PROMPTS)
    assert torch.equal(latents(pipe, PROMPTS), plain)


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_layer_that_does_not_run_is_an_error(family: str) -> None:
    pipe = pipeline(family)
    block = pipe.transformer.transformer_blocks[0]
    block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    with eiup().apply(pipe), pytest.raises(RuntimeError, match="1 of 2 joint attention layers"):
        latents(pipe, PROMPTS)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_fused_projections_act(family: str) -> None:
    pipe = pipeline(family)
    want = drawn(family, eiup())
    pipe.transformer.fuse_qkv_projections()
    with eiup().apply(pipe):
        assert change(latents(pipe), want) < 1e-5
    assert change(want, drawn(family)) > 1e-2


def compiled(blocks: bool, **options: Any) -> Any:
    torch._dynamo.reset()
    pipe = pipeline("sd3")
    for module in pipe.transformer.transformer_blocks if blocks else (pipe.transformer,):
        module.compile(backend="eager", **options)
    return pipe


@pytest.mark.long
@pytest.mark.parametrize("blocks", [True, False])
def test_one_graph_of_a_compiled_denoiser_is_refused(blocks: bool) -> None:
    pipe = compiled(blocks, fullgraph=True)
    said = "_fused_sdp_choice" if blocks else "compiled in one graph. Compile it without `fullgraph=True`"
    with eiup().apply(pipe), pytest.raises(Exception, match=said):
        latents(pipe)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [True, False])
def test_a_compiled_denoiser_acts_where_the_compiler_may_leave_the_graph(blocks: bool) -> None:
    pipe = compiled(blocks)
    with eiup().apply(pipe):
        assert change(latents(pipe), drawn("sd3", eiup())) < 1e-6
    torch._dynamo.reset()


def test_a_text_that_is_not_carried_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(EIUP):
        def edit(self, out: Tensor, cross: Any, given: Any) -> Tensor:
            getattr(cross, "would_be" if self.strength == 1 else "keys_values")(
                given.text[:1] if self.strength == 1 else given.text.states
            )
            return out

    pipe = pipeline("flux")
    for strength, said in ((1.0, "does not carry this text. Use"), (2.0, "has no keys without the picture. Use")):
        with Other((CAT,), strength=strength).apply(pipe), pytest.raises(ValueError, match=said):
            latents(pipe)


@pytest.mark.parametrize("form", ["separate", "gated"])
def test_the_papers_forms_need_cross_attention(form: str) -> None:
    with pytest.raises(
        ValueError, match=f'^EIUP with .*`normalization="{form}"`.*needs cross-attention.*Use EIUP without'
    ):
        EIUP([CAT], normalization=form).apply(untouched("flux"))


# ---------------------------------------------------------------- cost

SEVEN = ("a big red cat", "a red dog", "the moon", "wine glass", "beer", "a glass of wine", "pub")
SIZES: dict[str, Any] = {  # FLUX.1 and SD 3.5 Large in width, with the text of tiny encoders
    "flux": lambda: FluxTransformer2DModel(
        num_layers=1, num_single_layers=2, joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=True
    ),
    "sd3": lambda: SD3Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=38,
        joint_attention_dim=48,
        caption_projection_dim=64 * 38,
        pooled_projection_dim=40,
    ),
}
INPUTS: dict[str, dict[str, tuple[int, ...]]] = {  # 4,096 columns of the picture
    "flux": {
        "hidden_states": (1, 4096, 64),
        "encoder_hidden_states": (1, 512, 24),
        "pooled_projections": (1, 16),
        "timestep": (1,),
        "guidance": (1,),
        "img_ids": (4096, 3),
        "txt_ids": (512, 3),
    },
    "sd3": {
        "hidden_states": (2, 16, 128, 128),
        "encoder_hidden_states": (2, 77 + 256, 48),
        "pooled_projections": (2, 40),
        "timestep": (2,),
    },
}


@pytest.mark.parametrize(
    ("family", "phrases", "form", "most"),
    [
        ("flux", 1, "projected", 1.025),
        ("flux", 7, "projected", 1.035),
        ("sd3", 1, "projected", 1.015),
        ("sd3", 7, "projected", 1.03),
        ("flux", 7, "text", 1.035),
        ("sd3", 7, "text", 1.03),
        ("flux", 7, "oblique", 1.035),
    ],
)
def test_a_step_costs_little_more(
    family: str, phrases: int, form: Any, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations of blocks of the published width, counted and not computed: guidance on, no negative prompt."""
    pipe = pipeline(family)
    with torch.device("meta"):
        pipe.transformer = SIZES[family]()
        arguments = {name: torch.empty(shape) for name, shape in INPUTS[family].items()}
    pipe.to("meta")

    def kernel(inputs: Any, scale: float) -> Any:
        return F.scaled_dot_product_attention(*inputs, scale=scale), inputs.query[..., 0]

    monkeypatch.setattr(joint, "attention", kernel)
    monkeypatch.setattr(joint, "large", lambda share: False)
    monkeypatch.setattr(denoiser, "negated_rows", lambda *_: {})

    def count() -> int:
        rows = [False, True][-len(arguments["timestep"]) :]
        with FlopCounterMode(display=False) as counter, torch.no_grad(), efface.conditional_rows(pipe, rows):
            pipe.transformer(**arguments)
        return counter.get_total_flops()

    base = count()
    with EIUP(Concept("several", SEVEN[:phrases]), normalization=form).apply(pipe):
        ratio = count() / base
    assert 1.005 < ratio < most
