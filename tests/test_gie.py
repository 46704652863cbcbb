"""GIE against its formulas, written out with explicit softmax and sharing no code with the package; its adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from safetensors.torch import save_file
from test_eiup import embed, logits, mix, softmax, written_out
from tiny import ALCOHOL, CAT, LIMIT, PROMPT, PROMPTS, STEPS, batch, change, drawn, latents, pipeline
from torch import Tensor, nn

from efface import EIUP, GIE, Concept, load
from efface._hooks import layer_names, text_hash
from efface.erasers._adapter import Adapter, network
from efface.models.emoji.weights import FOLDER

ERASED = {"alcohol": "beer wine glass", "cat": "cat"}
LONG = ("a big red dog at the pub", "a cat of the night and the moon")


@dataclasses.dataclass(frozen=True)
class Weighed(GIE):
    """Weights of its own for each row and token, all of them different."""

    measures = True

    def weigh(self, features: Tensor, layers: tuple[str, ...]) -> Tensor:
        return -weights(*features.shape[:2])


def weights(rows: int, tokens: int) -> Tensor:
    return 0.3 + torch.arange(1.0, 1 + rows * tokens).reshape(rows, tokens) / 3


class Reference:
    """An attention processor: row by row, concept by concept, one explicit map after the other."""

    def __init__(self, pipe: Any, prompts: Sequence[str], erased: Sequence[str], *, official: bool = False) -> None:
        self.official, self.prompts, self.erased = official, prompts, erased
        self.texts = {text: embed(pipe, text) for text in erased}
        self.joined = {(p, e): embed(pipe, f"{p} {e}") for p in prompts for e in erased}

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> Tensor:
        first, rows = len(hidden_states) - len(self.prompts), []
        for k, (hidden, text) in enumerate(zip(hidden_states, encoder_hidden_states, strict=True)):
            rows.append(self.row(attn, hidden, text, k - first) if k >= first else written_out(attn, hidden, text))
        return attn.to_out[1](attn.to_out[0](torch.stack(rows))) / attn.rescale_output_factor

    def row(self, attn: Attention, hidden: Tensor, text: Tensor, row: int) -> Tensor:
        plain = softmax(logits(attn, hidden, text))
        out = mix(attn, plain, text)
        for erased in self.erased:
            n, m = len(self.prompts[row].split()), len(erased.split())
            maps = softmax(logits(attn, hidden, self.texts[erased]))
            if self.official:  # the columns of the code's edited row, in its own numbering
                official = self.joined[self.prompts[row], erased]
                base = [*range(n + 1), *range(n + 1, n + 2), *range(n + m + 2, LIMIT)]
                assert len(base) + m == LIMIT
                out = out - mix(attn, plain, text) + mix(attn, plain[..., base], official[base])
            for k in range(m):
                out = out - float(weights(len(self.prompts), m)[row, k]) * mix(
                    attn, maps[..., [k + 1]], self.texts[erased][[k + 1]]
                )
        return out


@contextlib.contextmanager
def replaced(pipe: Any, processor: Any, name: str = "attn2") -> Iterator[None]:
    layers = {m: m.processor for n, m in pipe.unet.named_modules() if n.endswith(name)}
    for layer in layers:
        layer.processor = processor
    try:
        yield
    finally:
        for layer, old in layers.items():
            layer.processor = old


_double = functools.cache(lambda family: pipeline(family).to(torch.float64))


@pytest.mark.parametrize("values", ["paper", "official"])
def test_pictures_equal_the_formulas_with_a_weight_for_each_token(values: str, family: str) -> None:
    pipe = _double(family)
    erased = list(ERASED.values())
    with Weighed([ALCOHOL, CAT], values=values).apply(pipe):
        got = latents(pipe, LONG)
    with replaced(pipe, Reference(pipe, LONG, erased, official=values == "official")):
        want = latents(pipe, LONG)
    assert want.dtype == got.dtype == torch.float64
    assert change(got, want) < 1e-9
    assert change(got, latents(pipe, LONG)) > 0.1
    with replaced(pipe, Reference(pipe, LONG, erased, official=values != "official")):
        assert change(got, latents(pipe, LONG)) > 1e-3


def test_a_fixed_weight_is_eiup_separate(pipe: Any, family: str) -> None:
    want = drawn(family, EIUP([ALCOHOL, CAT], strength=1.5, normalization="separate"), prompt=PROMPTS)
    assert change(drawn(family, GIE([ALCOHOL, CAT], strength=1.5), prompt=PROMPTS), want) < 1e-6
    assert change(want, drawn(family, prompt=PROMPTS)) > 0.1


def test_official_values_without_weights_are_not_plain(family: str) -> None:
    """Padding columns vanish and the end token carries the concept, which is why `off` sets the values as well."""
    none = drawn(family, GIE([ALCOHOL], strength=0.0, values="official"))
    assert change(none, drawn(family)) > 1e-3
    assert torch.equal(drawn(family, GIE([ALCOHOL], strength=0.0)), drawn(family))


def test_official_values_say_what_they_cannot_do(sd1: Any) -> None:
    official = GIE([ALCOHOL], values="official")
    with official.apply(sd1):
        with pytest.raises(ValueError, match=r"has 15 tokens \(expected 12 \+ 3, and at most 14\)"):
            latents(sd1, "a big red dog at the pub and a big red cat")
        with pytest.raises(ValueError, match="needs the text of each prompt"), torch.no_grad():
            sd1.unet(**batch())
        positive, negative = sd1.encode_prompt("a", "cpu", 1, True)
        with pytest.raises(ValueError, match="needs the text of each prompt"):
            latents(sd1, None, prompt_embeds=positive, negative_prompt_embeds=negative)
        latents(sd1)
    with pytest.raises(ValueError, match="`values`"):
        GIE([ALCOHOL], values="theirs")


@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
def test_official_values_need_a_causal_text_encoder() -> None:
    with pytest.raises(ValueError, match="emoji is bidirectional"):
        GIE(["alcohol"], values="official").apply(load("emoji"))


# ---------------------------------------------------------------- the adapter


def adapter(pipe: Any, **changes: Any) -> Adapter:
    """One whose answers are well apart; the layers as they run: down, middle, up."""
    layers = execution_order(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = network(len(layers))
        nn.init.constant_(net[4].bias, 1.0)
        mean, std = torch.rand(len(layers)) / 10, 0.02 + torch.rand(len(layers)) / 100
    given = {"net": net, "mean": mean, "std": std, "layers": layers, "model": text_hash(pipe), "text_encoder": "CLIP"}
    return Adapter(**(given | changes))


def execution_order(pipe: Any) -> tuple[str, ...]:
    names, order = {m: n for n, m in pipe.unet.named_modules() if n.endswith("attn2")}, []
    watches = [m.register_forward_pre_hook(lambda module, args: order.append(names[module])) for m in names]
    latents(pipe, num_inference_steps=1)
    for watch in watches:
        watch.remove()
    return tuple(order)


class Maps:
    """A processor that keeps the explicit maps of a text in the conditional rows, and draws the plain picture."""

    def __init__(self, text: Tensor, rows: int) -> None:
        self.text, self.rows, self.maps = text, rows, []

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        self.maps.append(torch.stack([softmax(logits(attn, h, self.text)) for h in hidden_states[-self.rows :]]))
        out = [written_out(attn, h, t) for h, t in zip(hidden_states, encoder_hidden_states, strict=True)]
        return attn.to_out[1](attn.to_out[0](torch.stack(out))) / attn.rescale_output_factor


def test_the_adapter_reads_each_tokens_attention_in_the_first_step(
    pipe: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(pipe)
    path = made.save(tmp_path / "adapter.safetensors")
    seen: list[tuple[Tensor, Tensor]] = []
    original = GIE.weigh

    def spy(self: GIE, features: Tensor, layers: tuple[str, ...]) -> Tensor:
        seen.append((features, original(self, features, layers)))
        return seen[-1][1]

    monkeypatch.setattr(GIE, "weigh", spy)
    calls: list[int] = []
    with GIE([ALCOHOL], adapter=path).apply(pipe):
        watch = pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
        erased = latents(pipe, PROMPTS)
        watch.remove()
    assert len(calls) == STEPS + 1 and len(seen) == 1
    maps = Maps(embed(pipe, ERASED["alcohol"]), len(PROMPTS))
    with replaced(pipe, maps):
        latents(pipe, PROMPTS)
    first = torch.stack([m.mean((1, 2)) for m in maps.maps[: len(made.layers)]], -1)[:, 1:4]  # [B, tokens, layers]
    features, predicted = seen[0]
    assert features.shape == (2, 3, len(made.layers))
    assert float((features - first).abs().max()) < 1e-6
    assert float(features.std(0).max()) > 1e-6  # rows differ, though little: random attention is nearly uniform
    x = (first - made.mean) / made.std
    for weight, bias in ((made.net[k].weight, made.net[k].bias) for k in (0, 2, 4)):
        x = x @ weight.T + bias
        x = x.relu() if len(weight) > 1 else x
    assert float((predicted + x[..., 0].clamp(min=0)).detach().abs().max()) < 1e-3
    assert bool((predicted <= 0).all()) and len(predicted.unique()) > 1
    assert change(erased, drawn(family, GIE([ALCOHOL]), prompt=PROMPTS)) > 1e-3
    reversed_ = dataclasses.replace(made, mean=made.mean.flip(0), std=made.std.flip(0))
    assert change(reversed_(features), made(features)) > 1e-2


def test_positive_weights_are_clamped(sd1: Any, tmp_path: Path) -> None:
    made = adapter(sd1)
    nn.init.zeros_(made.net[4].weight)
    nn.init.constant_(made.net[4].bias, -5.0)
    with GIE([ALCOHOL], adapter=made.save(tmp_path / "a.safetensors")).apply(sd1):
        assert torch.equal(latents(sd1), drawn())


def test_what_was_measured_stays_for_the_picture(sd1: Any, tmp_path: Path) -> None:
    """A strength set in the middle scales the weights of the first step; each call measures anew."""
    path = adapter(sd1).save(tmp_path / "a.safetensors")
    seen: list[Tensor] = []

    class Watched(Weighed):
        def weigh(self, features: Tensor, layers: tuple[str, ...]) -> Tensor:
            seen.append(features)
            return super().weigh(features, layers)

    def change_strength(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        handle.strength = 0.5
        return {}

    with Watched([ALCOHOL]).apply(sd1) as handle:
        latents(sd1, PROMPTS, callback_on_step_end=change_strength)
        assert len(seen) == 1
        latents(sd1, PROMPT)
        assert len(seen) == 2 and seen[1].shape[0] == 1
        with torch.no_grad():
            for rows in (1, 2):  # outside a pipeline every call is a first one
                sd1.unet(**batch(rows=rows))
        assert [len(s) for s in seen] == [2, 1, 1, 2]
    with GIE(rows=[[ALCOHOL], [CAT, ALCOHOL]], adapter=path).apply(sd1):
        together = latents(sd1, PROMPTS)
    for i, concepts in enumerate(([ALCOHOL], [CAT, ALCOHOL])):
        with GIE(concepts, adapter=path).apply(sd1):
            assert change(together[i], latents(sd1, PROMPTS[i], seed=i)[0]) < 1e-5
    assert torch.equal(latents(sd1), drawn())


def test_an_adapter_file_is_the_adapter(sd1: Any, tmp_path: Path) -> None:
    made = adapter(sd1)
    path = made.save(tmp_path / "deep" / "a.safetensors")
    found, features = Adapter.load(path), torch.rand(2, 3, len(made.layers))
    assert torch.equal(found(features), made(features))
    assert (found.layers, found.model, found.text_encoder) == (made.layers, made.model, "CLIP")
    assert found.layers != tuple(n for n in layer_names(sd1)) or len(found.layers) < 3
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["adapter"])["layers"] == list(made.layers)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    config = GIE([ALCOHOL], adapter=path)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["adapter"] == str(path)


def test_adapters_that_do_not_fit_are_refused(pipe: Any, sd1: Any, family: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = adapter(pipe)
    adapter(pipe, model="0123456789abcdef").save(path)
    with pytest.raises(ValueError, match=rf"fitted on the model 0123456789ab.*this pipeline is {text_hash(pipe)[:12]}"):
        GIE([ALCOHOL], adapter=path).apply(pipe)
    dataclasses.replace(made, layers=(*made.layers[:-1], "up.other")).save(path)
    with pytest.raises(ValueError, match=r"the first that differ are '.*' and '.*'"):
        GIE([ALCOHOL], adapter=path).apply(pipe)
    made.save(path)
    if family != "sd1":
        with pytest.raises(ValueError, match="fitted on"):
            GIE([ALCOHOL], adapter=path).apply(sd1)
    dataclasses.replace(made, layers=made.layers[::-1]).save(path)
    if len(made.layers) > 1:  # the names alone do not tell; the run does
        with GIE([ALCOHOL], adapter=path).apply(pipe), pytest.raises(ValueError, match="the first that differ"):
            latents(pipe)
    assert torch.equal(latents(pipe), drawn(family))


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: make one with GIE\.fit"):
        GIE([CAT], adapter=tmp_path / "none.safetensors")
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a GIE adapter"):
        GIE([CAT], adapter=path)
    save_file({"x": torch.zeros(1)}, path, {"efface": "gie adapter", "version": "1", "adapter": "{}"})
    with pytest.raises(ValueError, match="is a damaged GIE adapter"):
        GIE([CAT], adapter=path)
    path.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        GIE([CAT], adapter=path)


def test_a_compiled_denoiser_takes_fixed_weights_only() -> None:
    pipe = pipeline("small")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ValueError, match="compiled denoiser"):
        Weighed([Concept("cat")]).apply(pipe)
    GIE([Concept("cat")]).apply(pipe).remove()
