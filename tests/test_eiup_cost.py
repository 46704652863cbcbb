"""What EIUP computes in a step: keys and values of constant texts once, and no more arithmetic than is stated."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from tiny import ALCOHOL, CAT, PROMPTS, add_lora, bare, change, drawn, latents, pipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import efface
from efface import EIUP, GIE, NAG, Concept, Delta, _text, _unchanged
from efface.erasers import _keys, _terms
from efface.hooks import CrossAttention, ErasurePrompts, Text
from efface.hooks.batch import Batch
from efface.hooks.edits import edited
from efface.hooks.prompts import Applied
from efface.hooks.sites import site

NEGATIVE = ["the pub", "a red moon"]
METHODS: dict[str, Callable[[], Any]] = {
    "projected": lambda: EIUP([ALCOHOL, CAT]),
    "swap": lambda: EIUP(Concept("alcohol", ALCOHOL.phrases, anchor="a red moon"), normalization="swap"),
    "separate": lambda: EIUP(ALCOHOL, normalization="separate"),
    "gated": lambda: EIUP(ALCOHOL, normalization="gated"),
    "nag": lambda: NAG(ALCOHOL),
    "gie": lambda: GIE(ALCOHOL),
}
each_method = pytest.mark.parametrize("method", METHODS)


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Keys and values are computed at each use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_keys, "_weights", lambda attn: ())
        yield


def fresh(pipe: Any, method: Any, *args: Any, **options: Any) -> Tensor:
    """What another application draws, which keeps nothing."""
    with anew(), method.apply(pipe):
        return latents(pipe, *args, **options)


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of texts whose keys and values were computed."""
    seen: list[int] = []
    original = CrossAttention.keys_values

    def counting(self: CrossAttention, states: Tensor) -> Any:
        seen.append(len(states))
        return original(self, states)

    with monkeypatch.context() as patch:
        patch.setattr(CrossAttention, "keys_values", counting)
        yield seen


# ---------------------------------------------------------------- keys and values


def test_texts_are_projected_once_in_a_layer_over_steps_and_calls(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = len(site(sd1).layers.cross)
    with EIUP(ALCOHOL).apply(sd1), counted(monkeypatch) as seen:
        first = latents(sd1, PROMPTS)
        assert len(seen) == layers and set(seen) == {4}  # the empty text, a neutral one and two phrases
        assert torch.equal(latents(sd1, PROMPTS), first) and len(seen) == layers
        compared: list[Any] = []
        original = _unchanged.sums
        with monkeypatch.context() as patch:
            patch.setattr(_text, "kept", lambda pipe, encode, arguments, ids, make: make())
            patch.setattr(_unchanged, "sums", lambda weights: compared.append(weights) or original(weights))
            latents(sd1, "another prompt", num_inference_steps=5)
        assert len(compared) == layers  # once in a call, not in each step
        latents(sd1, PROMPTS, negative_prompt=NEGATIVE)
        assert len(seen) == layers
    with anew(), EIUP(ALCOHOL).apply(sd1), counted(monkeypatch) as seen:
        latents(sd1, PROMPTS, num_inference_steps=3)
        assert len(seen) == 3 * layers  # what it would be


@pytest.mark.long
@each_method
def test_pictures_are_the_same_to_the_bit(method: str, sd1: Any) -> None:
    made = METHODS[method]()
    calls = ({}, {"negative_prompt": NEGATIVE})
    with made.apply(sd1):
        kept = [latents(sd1, PROMPTS, **options) for options in calls * 2]
    want = [fresh(sd1, made, PROMPTS, **options) for options in calls]
    assert all(torch.equal(*pair) for pair in zip(kept, want * 2, strict=True))
    assert change(want[0], latents(sd1, PROMPTS)) > 1e-3


Change = Callable[[Any], Any]


def _double(pipe: Any) -> None:
    pipe.to(torch.float64)


def _added(pipe: Any) -> None:
    for name, weight in pipe.unet.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weight.data += 0.1 * weight.data.flip(0)  # changes neither its address nor its version


def _swapped_rows(pipe: Any) -> None:
    for name, weight in pipe.unet.named_parameters():
        if name.endswith("attn2.to_v.weight"):
            weight.data[:] = weight.data.flip(0).clone()  # the same numbers in other places


def _fused(pipe: Any) -> None:
    add_lora(pipe)
    pipe.fuse_lora()
    pipe.unet.unload_lora()


def _replaced(pipe: Any) -> None:
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            module.to_v.weight = torch.nn.Parameter(module.to_v.weight.detach().flip(0))


def _loaded(pipe: Any) -> None:
    state = pipe.unet.state_dict()
    pipe.unet.load_state_dict({k: v.flip(0) if k.endswith("attn2.to_v.weight") else v for k, v in state.items()})


CHANGES: dict[str, Change] = {
    "added to data": _added,
    "rows of data swapped": _swapped_rows,
    "fused lora": _fused,
    "lora": add_lora,
    "replaced": _replaced,
    "loaded": _loaded,
    "float64": _double,
}


@pytest.mark.long
@pytest.mark.parametrize("how", CHANGES)
def test_changed_weights_make_new_keys_and_values(how: str) -> None:
    """The effect on the texts alone: pictures from the kept ones would differ."""
    pipe = pipeline()
    with EIUP(ALCOHOL).apply(pipe):
        latents(pipe, PROMPTS)
        direct = bare(pipe)
        CHANGES[how](pipe)
        found = latents(pipe, PROMPTS)
        after = bare(pipe) if how != "float64" else None
    assert torch.equal(found, fresh(pipe, EIUP(ALCOHOL), PROMPTS))
    if after is not None:
        assert change(after, direct) > 1e-3
        with anew(), EIUP(ALCOHOL).apply(pipe):
            assert torch.equal(after, bare(pipe))


def test_direct_calls_compare_the_weights_each_time() -> None:
    """Also after a pipeline call that failed, with texts that were encoded outside of one."""
    pipe = pipeline()

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyError

    with EIUP(ALCOHOL).apply(pipe):
        with pytest.raises(KeyError):
            latents(pipe, PROMPTS, callback_on_step_end=stop)
        pipe.encode_prompt(list(PROMPTS), "cpu", 1, False)
        before = bare(pipe)
        assert torch.equal(bare(pipe), before)
        _added(pipe)
        after = bare(pipe)
        with anew():
            assert torch.equal(bare(pipe), after)
    assert change(after, before) > 1e-3


def test_a_delta_that_changes_in_the_middle_of_a_drawing_counts(sd1: Any) -> None:
    delta = efface.UCE().fit(sd1, CAT)

    def draw() -> tuple[Tensor, Tensor]:
        handles: list[Any] = []

        def now(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                handles.append(delta.apply(pipe))
            return given

        with EIUP(ALCOHOL).apply(sd1):
            latents(sd1, PROMPTS)
            found = latents(sd1, PROMPTS, num_inference_steps=3, callback_on_step_end=now)
            handles[0].remove()
            return found, latents(sd1, PROMPTS, num_inference_steps=3)

    (during, after), before = draw(), drawn("sd1", EIUP(ALCOHOL), prompt=PROMPTS, num_inference_steps=3)
    with anew():
        assert all(torch.equal(a, b) for a, b in zip((during, after), draw(), strict=True))
    assert torch.equal(after, before) and change(during, before) > 1e-3
    assert isinstance(delta, Delta)


@pytest.mark.long
def test_other_concepts_and_settings_make_new_ones_and_old_ones_are_dropped(sd1: Any) -> None:
    with EIUP(ALCOHOL).apply(sd1) as handle:
        kept: _keys.Keys = site(sd1).applied[0].memory[_keys.NAME]
        latents(sd1, PROMPTS)
        layers = len(kept)
        for rows in ([[ALCOHOL], [CAT]], [[CAT], []], [[ALCOHOL, CAT], [CAT]]) * 2:
            handle.rows = rows
            found = latents(sd1, PROMPTS)
            with anew():
                assert torch.equal(latents(sd1, PROMPTS), found)
        assert len(kept) <= layers * 2 * (_keys.AGE + 1) and len(kept._texts) <= 12


def test_no_more_is_kept_than_the_bound(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with EIUP(ALCOHOL).apply(sd1):
        want, kept = latents(sd1, PROMPTS), site(sd1).applied[0].memory[_keys.NAME]
        whole = kept.size
    monkeypatch.setattr(_keys, "MOST", whole // 2)
    with EIUP(ALCOHOL).apply(sd1):
        assert torch.equal(latents(sd1, PROMPTS), want)
        assert 0 < site(sd1).applied[0].memory[_keys.NAME].size <= whole // 2


def test_two_pipelines_in_two_threads_keep_their_own() -> None:
    pipes = [pipeline(), pipeline()]
    _added(pipes[1])
    alone = [fresh(pipe, EIUP(ALCOHOL), PROMPTS) for pipe in pipes]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def draw(k: int) -> None:
        with EIUP(ALCOHOL).apply(pipes[k]):
            found[k] += [latents(pipes[k], PROMPTS) for _ in range(3)]

    threads = [threading.Thread(target=draw, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert change(*alone) > 1e-3
    assert all(len(found[k]) == 3 and all(torch.equal(x, alone[k]) for x in found[k]) for k in (0, 1))


def test_gradients_reach_weights_whose_keys_were_kept(sd1: Any) -> None:
    weight = dict(sd1.unet.named_parameters())["mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"]
    with EIUP(ALCOHOL).apply(sd1):
        latents(sd1, PROMPTS)
        sums = []
        for patch in (contextlib.nullcontext, anew):
            with patch(), torch.enable_grad(), efface.conditional_rows(sd1, [True, True]):
                out = sd1.unet(**batch()).sample
            sums.append(torch.autograd.grad(out.square().sum(), weight)[0])
    assert torch.equal(*sums) and float(sums[0].abs().sum()) > 0


def batch() -> dict[str, Any]:
    import tiny

    return dict(tiny.batch())


# ---------------------------------------------------------------- arithmetic


def one_after_the_other(
    out: Tensor, nothing: Tensor, neutral: Sequence[Tensor], phrases: Sequence[Tensor], strength: float
) -> Tensor:
    """The formula of the class, phrase by phrase and query by query."""
    shared = torch.stack([text - nothing for text in neutral], -1)
    edited = out
    for text in phrases:
        d = text - nothing
        d = d - (shared @ torch.linalg.pinv(shared) @ d[..., None])[..., 0]
        share = ((edited - nothing) * d).sum(-1) / (d * d).sum(-1)
        edited = edited - strength * share.clamp(min=0)[..., None] * d
    return edited - out


@pytest.mark.parametrize("phrases", [1, 7, 35])
@pytest.mark.parametrize("neutral", [1, 2])
def test_many_phrases_at_once_are_one_after_the_other(phrases: int, neutral: int) -> None:
    torch.manual_seed(1_000_000)
    common = torch.randn(2, 5, 64, dtype=torch.float64)  # phrases of a concept are alike
    texts = torch.randn(1 + neutral + phrases, 2, 5, 64, dtype=torch.float64)
    texts[1 + neutral :] += 2 * common
    out = texts[0] + common + torch.randn(2, 5, 64, dtype=torch.float64)
    want = one_after_the_other(out, texts[0], [*texts[1 : 1 + neutral]], [*texts[1 + neutral :]], 2.25)
    found = _terms.projected(out, texts, neutral, phrases, 2.25)
    assert change(found, want) < 1e-10 and float(want.norm() / out.norm()) > 0.1
    narrow = _terms.projected(out.float(), texts.float(), neutral, phrases, 2.25)
    assert change(narrow.double(), want) < 1e-5


@pytest.mark.long
def test_large_layers_are_edited_in_parts(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some queries at a time, with a text that differs between the rows too."""
    plain = latents(sd1, PROMPTS)
    for options in ({}, {"negative_prompt": NEGATIVE}):
        for made in (EIUP([ALCOHOL, CAT]), METHODS["swap"]()):
            with made.apply(sd1):
                whole = latents(sd1, PROMPTS, **options)
                monkeypatch.setattr(_keys, "PART", 4000)
                parts = latents(sd1, PROMPTS, **options)
                monkeypatch.undo()
            assert change(parts, whole) < 1e-5 and change(whole, plain) > 1e-3


SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)}
LIMITS = {1: 1.02, 7: 1.05, 35: 1.10}  # the largest FLOPs of a step with guidance, times the base model's


@pytest.fixture(scope="module")
def step() -> tuple[UNet2DConditionModel, int]:
    """Stable Diffusion 1.5's denoiser without weights, and the FLOPs of a step with guidance."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(layers_per_block=2, **SD15)
        given = torch.empty(2, 4, 64, 64), torch.empty(()), torch.empty(2, 77, 768)
    with torch.no_grad(), FlopCounterMode(display=False) as base:
        unet(*given)
    return unet, base.get_total_flops()


def flops(unet: UNet2DConditionModel, phrases: int, form: str = "projected") -> int:
    """FLOPs of EIUP's edits in a step at 512 x 512 with guidance, once the keys and values are known."""
    eraser = EIUP(Concept("c", tuple(f"phrase {k}" for k in range(phrases))), strength=2.25, normalization=form)
    anchors = 3 if form == "swap" else 0
    with torch.device("meta"):
        text, neutral, empty = [Text(torch.empty(n, 77, 768)) for n in (phrases, 2 + anchors, 1)]
    memory = {"anchor_of": {(): tuple(k % 3 for k in range(phrases))}}
    total, texts = 0, 1 + 1 + anchors + phrases
    layers = [(name, m) for name, m in unet.named_modules() if name.endswith("attn2")]
    for name, attn in layers:
        assert isinstance(attn, Attention)
        width = attn.to_q.out_features
        size = {320: 4096, 640: 1024}.get(width, 64 if name.startswith("mid") else 256)
        with torch.device("meta"):
            out, known = torch.empty(1, size, width), torch.empty(texts, attn.heads, 77, width // attn.heads)
        cross = CrossAttention(attn, out, out, name, memory, None, neutral, empty)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as count:
            patch.setattr(_keys, "keys_values", lambda *_, known=known: (known, known))
            eraser.edit(out, cross, ErasurePrompts(text, (slice(1, 2),) * phrases))
        total += count.get_total_flops()
    assert len(layers) == 16
    return total


@pytest.mark.long
@pytest.mark.parametrize("phrases", LIMITS)
def test_flops_of_a_step_of_sd15(phrases: int, step: tuple[UNet2DConditionModel, int]) -> None:
    unet, base = step
    added = flops(unet, phrases)
    least = 2 + phrases  # texts, each read by 16 layers
    assert base > 1.5e12 and added > 3.5e9 * least  # the count sees the attention of all texts
    assert 1 + added / base <= LIMITS[phrases]


def flops_of_tenants(unet: UNet2DConditionModel, phrases: int, tenants: int, erasers: int) -> int:
    """As `flops`, for a batch with a picture of each tenant, whose concepts differ. The tenants take turns with the
    erasers, as policies with different settings do."""
    concepts = [Concept(f"c{k}", tuple(f"phrase {k} {n}" for n in range(phrases))) for k in range(tenants)]
    acting = []
    with torch.device("meta"):
        prompt, empty = Text(torch.empty(tenants, 77, 768)), Text(torch.empty(1, 77, 768))
        for j in range(erasers):
            mine = [concept if k % erasers == j else None for k, concept in enumerate(concepts)]
            texts = phrases * len(own := [concept for concept in mine if concept])
            text, neutral = Text(torch.empty(texts, 77, 768)), Text(torch.empty(2, 77, 768))
            every = ErasurePrompts(text, (slice(1, 2),) * texts, which=tuple(range(texts)))
            method = EIUP(strength=1.0, rows=[[concept] if concept else [] for concept in mine])
            applied = Applied(method, tuple((c,) for c in own for _ in range(phrases)), (every,), neutral)
            applied.place(1, tenants)
            acting.append((applied, 1.0))
    batch = Batch(tenants, 2 * tenants, 2 * tenants, prompt, empty, 0.5, None, None, True)

    def known(cross: CrossAttention, texts: Sequence[Text], sources: Any) -> tuple[Tensor, Tensor]:
        made = cross.query.new_empty(
            sum(map(len, texts)), cross.attn.heads, 77, cross.query.shape[-1] // cross.attn.heads
        )
        return made, made

    total = 0
    for name, attn in unet.named_modules():
        if name.endswith("attn2") and isinstance(attn, Attention):
            width = attn.to_q.out_features
            size = {320: 4096, 640: 1024}.get(width, 64 if name.startswith("mid") else 256)
            out = torch.empty(2 * tenants, size, width, device="meta")
            with torch.no_grad(), pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as count:
                patch.setattr(_keys, "keys_values", known)
                assert edited(batch, acting, CrossAttention(attn, out, name=name), out) is not out
            total += count.get_total_flops()
    return total


@pytest.mark.thinned("long")
@pytest.mark.parametrize("erasers", [1, 2])
@pytest.mark.parametrize("phrases", [1, 7, pytest.param(35, marks=pytest.mark.long)])
def test_each_row_of_a_mixed_batch_pays_for_its_own_concept(
    phrases: int, erasers: int, step: tuple[UNet2DConditionModel, int]
) -> None:
    """Four tenants in one batch, in one eraser or in two: what one picture of one tenant costs, per picture."""
    unet, base = step
    added = flops_of_tenants(unet, phrases, 4, erasers)
    assert added == 4 * flops(unet, phrases)
    assert 1 + added / (4 * base) <= LIMITS[phrases]
