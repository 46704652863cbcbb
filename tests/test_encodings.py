"""Encodings of constant texts: kept across calls while all that decides them is the same, and never anything else."""

from __future__ import annotations

import ast
import contextlib
import gc
import inspect
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import ALCOHOL, CAT, PROMPTS, change, latents, pipeline
from tokenizers import normalizers
from torch import Tensor, nn

import efface
from efface import EIUP, Concept, Guard, SemanticSurgery, _encodings, _text, _unchanged, families
from efface._encodings import Encodings, held

TEXTS = ["a beer", "a big cat", ""]
NEGATIVE = ["the pub", "a red moon"]
SWAP = EIUP(Concept("alcohol", ALCOHOL.phrases, anchor="a red moon"), normalization="swap")


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Nothing is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_text, "kept", lambda pipe, encode, arguments, ids, make: make())
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of constant texts that were encoded."""
    found: list[int] = []
    original = _encodings.kept

    def counting(pipe: Any, encode: Any, arguments: Any, ids: Any, make: Callable[[], Any]) -> Any:
        def counted() -> Any:
            found.append(len(arguments["prompt"]))
            return make()

        return original(pipe, encode, arguments, ids, counted)

    monkeypatch.setattr(_text, "kept", counting)
    return found


def encoded(pipe: Any, texts: list[str] = TEXTS, **settings: Any) -> list[Tensor]:
    made = _text.encode(pipe, texts, constant=True, **settings)
    return [x for x in (made.text, made.pooled, made.mask) if x is not None]


def plain(pipe: Any, texts: list[str] = TEXTS, **settings: Any) -> list[Tensor]:
    with anew():
        return encoded(pipe, texts, **settings)


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(some, others, strict=True))


def entries(pipe: Any) -> Encodings | None:
    """What exists, without holding it."""
    reference = _encodings._OF.get(pipe)
    return None if reference is None else reference()


# ---------------------------------------------------------------- the same pictures


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_pictures_are_the_same_to_the_bit(family: str, made: list[int]) -> None:
    pipe = pipeline(family)
    guided = {"true_cfg_scale": 4.0} if family == "flux" else {}
    calls: list[dict[str, Any]] = [{}, {"negative_prompt": NEGATIVE, **guided}]
    eraser = SWAP if family != "flux" else EIUP([ALCOHOL, CAT], pooled=1.0)
    with anew(), eraser.apply(pipe):
        want = [latents(pipe, PROMPTS, num_inference_steps=2, **options) for options in calls]
    with eraser.apply(pipe):
        found = [latents(pipe, PROMPTS, num_inference_steps=2, **options) for options in calls]
        first = len(made)
        found += [latents(pipe, PROMPTS, num_inference_steps=2, **options) for options in calls]
    assert equal(found, want * 2) and change(want[0], want[1]) > 1e-4
    assert first > 1 and len(made) == first  # the second time, no constant text was encoded


def test_the_first_call_needs_no_more_than_applying(sd1: Any, made: list[int]) -> None:
    with EIUP(ALCOHOL).apply(sd1):
        assert made == [1, 12, 2]  # "" for the width and as a neutral text; the other neutral texts; two phrases
        latents(sd1, PROMPTS)
        latents(sd1, "another night")
        assert made == [1, 12, 2]


def test_a_concept_is_found_again_beside_others(sd1: Any, made: list[int]) -> None:
    """As in a server, whose batches mix policies in ever new ways."""
    guard = Guard({"kids": [ALCOHOL], "zoo": [CAT], "both": [CAT, ALCOHOL]})
    first = guard(sd1, PROMPTS[:2], ["kids", "zoo"], [1, 2], num_inference_steps=2)
    known = len(made)
    second = guard(sd1, PROMPTS[:2], ["both", "kids"], [1, 2], num_inference_steps=2)
    assert len(made) == known > 0
    kept = entries(sd1)
    assert kept is not None and len(kept) == 4  # "", the other neutral texts, and each concept
    with anew():
        again = guard(sd1, PROMPTS[:2], ["both", "kids"], [1, 2], num_inference_steps=2)
    assert torch.equal(second.again.pictures, again.again.pictures)  # type: ignore[arg-type]
    assert not torch.equal(first.again.pictures, second.again.pictures)  # type: ignore[arg-type]


def test_settings_of_a_call_count(made: list[int]) -> None:
    pipe = pipeline("sd3")
    with EIUP(ALCOHOL).apply(pipe):
        found = [latents(pipe, PROMPTS, max_sequence_length=length) for length in (32, 64, 32, 64)]
        assert made == [1, *[1, 12, 2] * 3]  # with 256 by default
        with anew():
            want = [latents(pipe, PROMPTS, max_sequence_length=length) for length in (32, 64)]
    assert equal(found, want * 2) and change(*want) > 1e-6


def test_methods_that_read_phrases_elsewhere_keep_them_too(made: list[int]) -> None:
    pipe = pipeline()
    for method in (SemanticSurgery([ALCOHOL, CAT]), efface.SAFREE([ALCOHOL, CAT]), efface.SLD(ALCOHOL)):
        with anew(), method.apply(pipe):
            want = latents(pipe, PROMPTS)
        with method.apply(pipe):
            latents(pipe, PROMPTS)
            before = len(made)
            assert torch.equal(latents(pipe, PROMPTS), want) and len(made) == before > 0
        made.clear()


def test_prompts_are_not_kept(sd1: Any) -> None:
    own = {"", *EIUP(ALCOHOL).neutral[0], *ALCOHOL.phrases}
    with EIUP(ALCOHOL).apply(sd1), SemanticSurgery(CAT).apply(sd1):
        latents(sd1, PROMPTS, negative_prompt=NEGATIVE)
        kept = entries(sd1)
        assert kept is not None
        texts = {text for (arguments, _, _) in kept._entries for text in _texts(arguments)}
    assert own < texts <= own | {"cat"}


def _texts(value: Any) -> Iterator[str]:
    """All texts in a key that are no names of arguments."""
    _, items = value
    for (_, name), each in items:
        if name.startswith(("prompt", "negative_prompt")):
            yield from (text for _, text in each[1]) if isinstance(each[1], tuple) else ()


# ---------------------------------------------------------------- what makes them new

Change = Callable[[Any], Any]


def _weights_of(pipe: Any, end: str) -> list[Tensor]:
    return [weight for name, weight in pipe.text_encoder.named_parameters() if name.endswith(end)]


def _added(pipe: Any) -> None:
    for weight in _weights_of(pipe, "fc1.weight"):
        weight.data += 0.3 * weight.data.flip(0)  # changes neither its address nor its version


def _swapped_rows(pipe: Any) -> None:
    for weight in _weights_of(pipe, "token_embedding.weight"):
        weight.data[:] = weight.data.flip(0).clone()


def _signs(pipe: Any) -> None:
    for weight in _weights_of(pipe, "fc2.weight"):
        weight.data[:, 1:5:2] *= -1  # the highest bits of an even number of words in each row and column


def _vector(pipe: Any) -> None:
    for vector in _weights_of(pipe, "layer_norm1.weight"):
        vector.data.copy_(torch.linspace(0, 2, len(vector)))
    encoded(pipe)
    for vector in _weights_of(pipe, "layer_norm1.weight"):
        vector.data.copy_(vector.data.roll(2))  # the same numbers in other places


def _replaced(pipe: Any) -> None:
    layer = pipe.text_encoder.text_model.encoder.layers[0] if hasattr(pipe.text_encoder, "text_model") else None
    layer = layer or pipe.text_encoder.encoder.layers[0]
    layer.mlp.fc1.weight = nn.Parameter(layer.mlp.fc1.weight.detach().flip(0))


def _loaded(pipe: Any) -> None:
    state = pipe.text_encoder.state_dict()
    pipe.text_encoder.load_state_dict({k: v.flip(0) if k.endswith("fc1.weight") else v for k, v in state.items()})


def _lora(pipe: Any) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(1_000_000)
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False))


def _fused(pipe: Any) -> None:
    _lora(pipe)
    for module in pipe.text_encoder.modules():
        if hasattr(module, "lora_A"):
            module.merge()


def _scale(pipe: Any) -> None:
    _lora(pipe)
    encoded(pipe)
    for module in pipe.text_encoder.modules():
        if hasattr(module, "lora_A"):
            module.set_scale("default", 3.0)


def _epsilon(pipe: Any) -> None:
    for module in pipe.text_encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5


def _hook(pipe: Any) -> None:
    pipe.text_encoder.register_forward_hook(lambda module, given, out: (2 * out[0], *tuple(out.values())[1:]))


def _forward(pipe: Any) -> None:
    norm = next(module for name, module in pipe.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    original = norm.forward
    norm.forward = lambda x: 2 * original(x)


def _other_encoder(pipe: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1_000_000)
        pipe.text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config).eval()


def _token(pipe: Any) -> None:
    pipe.tokenizer.add_tokens("beer")
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    pipe.text_encoder.get_input_embeddings().weight.data[-1] = 3.0


def _padding(pipe: Any) -> None:
    pipe.tokenizer.pad_token = "!"


def _rules(pipe: Any) -> None:
    pipe.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("beer", "wine")


CHANGES: dict[str, Change] = {
    "added to data": _added,
    "rows of data swapped": _swapped_rows,
    "signs of columns": _signs,
    "a vector": _vector,
    "replaced": _replaced,
    "loaded": _loaded,
    "lora": _lora,
    "fused lora": _fused,
    "lora's scale": _scale,
    "an attribute": _epsilon,
    "a hook": _hook,
    "a forward": _forward,
    "another encoder": _other_encoder,
    "a new token": _token,
    "padding": _padding,
    "the tokenizer's rules": _rules,
}


@pytest.mark.parametrize("how", CHANGES)
def test_whatever_decides_a_text_makes_it_new(how: str) -> None:
    pipe = pipeline()
    with EIUP(ALCOHOL).apply(pipe):
        before = encoded(pipe)
        assert equal(encoded(pipe), before)
        CHANGES[how](pipe)
        found = [encoded(pipe) for _ in range(2)]
        want = plain(pipe)
    assert all(equal(each, want) for each in found)
    assert change(want[0], before[0]) > 1e-3


def test_precision_casts_and_devices_make_it_new() -> None:
    pipe = pipeline()
    with EIUP(ALCOHOL).apply(pipe):
        before = encoded(pipe)
        with torch.autocast("cpu", torch.bfloat16):
            cast = encoded(pipe)
            assert equal(cast, plain(pipe)) and equal(encoded(pipe), cast)
        assert 1e-4 < change(cast[0].float(), before[0]) < 0.1
        assert equal(encoded(pipe), before)
        pipe.to(torch.float64)
        wide = encoded(pipe)
        assert equal(wide, plain(pipe)) and wide[0].dtype == torch.float64


@pytest.mark.parametrize(
    "what", ["training", "hook", "forward", "mode", "no module", "another encode_prompt", "quantised"]
)
def test_what_cannot_be_compared_is_not_kept(what: str, made: list[int]) -> None:
    pipe = pipeline()
    kept, modes = held(pipe), contextlib.ExitStack()
    encoded(pipe)
    assert len(kept) == 1
    if what == "training":
        pipe.text_encoder.train()
    elif what == "hook":
        next(pipe.text_encoder.children()).register_forward_pre_hook(lambda module, given: None)
    elif what == "forward":
        _forward(pipe)  # as offloading does
    elif what == "mode":
        modes.enter_context(torch.device("cpu"))
    elif what == "no module":
        vars(pipe)["text_encoder"] = CLIPTextModel(pipe.text_encoder)
    elif what == "another encode_prompt":
        pipe.encode_prompt = lambda *args, **options: type(pipe).encode_prompt(pipe, *args, **options)
    else:
        layer = next(module for module in pipe.text_encoder.modules() if isinstance(module, nn.Linear))
        layer.weight = Eight(layer.weight.detach())
    del made[:]
    with modes:
        first, second = encoded(pipe), encoded(pipe)
    assert len(made) == 2 and len(kept) == 0 and equal(first, second)


class CLIPTextModel:
    """A text encoder that is no module of torch."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.config, self.dtype, self.device = inner, inner.config, inner.dtype, inner.device

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)


class Eight(nn.Parameter):
    """As libraries that quantise weights have them."""


def test_a_change_while_a_text_is_encoded_is_not_taken_for_its_state() -> None:
    pipe = pipeline()
    kept, weights = held(pipe), _weights_of(pipe, "fc1.weight")

    def make() -> Any:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(2)
        return (torch.ones(1),)

    given = {"prompt": [""]}
    assert _encodings.kept(pipe, pipe.encode_prompt, given, [[0, 1]], make)[0] == 1 and len(kept) == 0
    assert _encodings.kept(pipe, pipe.encode_prompt, given, [[0, 1]], lambda: (torch.zeros(1),))[0] == 0


def test_the_weights_are_summed_once_in_a_call(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[Any] = []
    original = _unchanged.sums
    parameters = len(list(sd1.text_encoder.parameters()))
    with SWAP.apply(sd1), EIUP(CAT).apply(sd1):
        latents(sd1, PROMPTS)
        monkeypatch.setattr(_unchanged, "sums", lambda x: summed.append([*x]) or original(x))
        latents(sd1, PROMPTS, negative_prompt=NEGATIVE)
    assert [len(each) for each in summed].count(parameters + 1) == 1  # and the buffer with the positions


def test_all_that_encode_prompt_reads_of_a_pipeline_is_compared() -> None:
    """Also after an update of diffusers: its methods of this call, and the attributes that they read."""
    told = {"config", "device", "dtype", "components", "hf_device_map"}  # made of what is compared
    for family in ("sd1", "sdxl", "sd3", "flux", "pixart", "sana", "chroma", "cogview4", "qwenimage"):
        pipe = pipeline(family)
        names: set[str] = set()
        read(type(pipe), "encode_prompt", set(), names)
        state = _encodings._state(pipe, _text.own_encode(pipe))
        compared = {each[0] for each in state.facts if isinstance(each, tuple) and isinstance(each[0], str)}
        parts = {name for name in names if name.startswith(("tokenizer", "text_encoder"))}
        others = {name for name in names - parts if name in vars(pipe)} - compared
        assert parts and others <= {families.family(pipe).denoiser} | told


def read(kind: type, name: str, seen: set[str], found: set[str]) -> None:
    """The attributes of `self` in a method and in those that it calls."""
    made = inspect.getattr_static(kind, name, None)
    function = made.fget if isinstance(made, property) else made
    if name in seen or not inspect.isfunction(function):
        found.add(name)
        return
    seen.add(name)
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            read(kind, node.attr, seen, found)


# ---------------------------------------------------------------- copies, bounds, lifetime, threads


def test_nobody_can_write_into_what_is_kept(sd1: Any) -> None:
    kept, want = held(sd1), plain(sd1)
    for _ in range(3):  # also what the first use got
        found = encoded(sd1)
        assert equal(found, want) and len(kept) == 1
        for each in found:
            each.zero_()


def test_no_more_than_the_bound_is_kept_and_the_oldest_goes_first(
    sd1: Any, monkeypatch: pytest.MonkeyPatch, made: list[int]
) -> None:
    kept = held(sd1)
    encoded(sd1, ["a cat"])
    one = kept.size
    assert one > 0
    monkeypatch.setattr(_encodings, "MOST", 2 * one)
    for text in ("a cat", "a dog", "a cat", "a pub"):
        encoded(sd1, [text])
    assert len(kept) == 2 and kept.size == 2 * one and len(made) == 3
    encoded(sd1, ["a cat"])
    assert len(made) == 3
    encoded(sd1, ["a dog"])  # was the oldest
    assert len(made) == 4
    assert equal(encoded(sd1, ["a moon"] * 3), plain(sd1, ["a moon"] * 3)) and kept.size <= 2 * one


@pytest.mark.long
def test_they_go_with_the_last_eraser_or_guard() -> None:
    pipe = pipeline()
    first, second = EIUP(ALCOHOL).apply(pipe), EIUP(CAT).apply(pipe)
    latents(pipe)
    first.remove()
    assert entries(pipe)
    second.remove()
    gc.collect()
    assert entries(pipe) is None
    guard = Guard({"kids": [ALCOHOL], "zoo": [CAT]})
    guard(pipe, PROMPTS, ["kids", "zoo"], [1, 2], num_inference_steps=1)
    assert entries(pipe)
    del guard
    gc.collect()
    assert entries(pipe) is None


def test_a_guard_encodes_the_texts_of_its_policies_once(made: list[int]) -> None:
    pipe = pipeline()
    guard = Guard({"kids": [ALCOHOL], "zoo": [CAT]})

    def draw() -> Tensor:
        found = guard(pipe, PROMPTS, ["kids", "zoo"], [1, 2], num_inference_steps=2)
        assert [row.outcome for row in found.rows] == ["drawn", "drawn"] and found.again is not None
        return found.again.pictures

    first = draw()
    before = len(made)
    second = draw()
    assert len(made) == before == 4 and torch.equal(first, second)
    with anew():
        assert torch.equal(draw(), first)


def test_threads_share_a_guard(made: list[int]) -> None:
    pipe, found = pipeline(), {}
    guard = Guard({"kids": [ALCOHOL], "zoo": [CAT]})

    def draw(k: int, tenant: str) -> Any:
        return guard(pipe, PROMPTS[:1], [tenant], [k], num_inference_steps=1).again.pictures

    def work(k: int, tenant: str) -> None:
        found[k] = [draw(k, tenant) for _ in range(3)]

    with anew():
        want = [draw(k, tenant) for k, tenant in enumerate(("kids", "zoo"))]
    threads = [threading.Thread(target=work, args=(k, tenant)) for k, tenant in enumerate(("kids", "zoo"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and change(*want) > 1e-3  # "", the other neutral texts, and two concepts
    assert all(len(found[k]) == 3 and all(torch.equal(x, want[k]) for x in found[k]) for k in (0, 1))
