"""The literal baselines of the experiments are the mathematics that they claim to be."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

import efface
from experiments.literal import denoiser_calls as calls
from experiments.literal import finetune

CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two pictures; the prompt has 5 tokens, the concept 3."""
    monkeypatch.setattr(calls, "PROMPT", tiny.PROMPT)
    random = torch.Generator().manual_seed(1)
    concept = efface.Concept("alcohol", ("beer wine glass",))
    return calls.Scene(tiny.pipeline(), concept, torch.randn(2, 4, 8, 8, generator=random), torch.tensor(500))


@torch.no_grad()
def predict(scene: Any, variant: str) -> Tensor:
    with calls.CALLS[variant](scene) as call:
        return call()


def test_one_trajectory_is_separate_eiup(scene) -> None:
    """Both keep all of the prompt's columns, so nothing sets them apart: insertion in front of the end token is no more
    than another order of the sum."""
    plain, literal = predict(scene, "plain"), predict(scene, "one trajectory")
    assert tiny.change(literal[2:], plain[2:]) > 0.1
    torch.testing.assert_close(literal, predict(scene, "eiup separate"), **CLOSE)


class Fused:
    """Two trajectories without a map: `SDPA(q_base, K_P, V~) + SDPA(q_edit, K_E, W V_E)` in cross-attention, where V~
    is 0 in the dropped columns, and `SDPA(q_base, k_base, v_edit)` in self-attention of up to `copied` queries."""

    def __init__(self, concept: Tensor, n: int, m: int, copied: int) -> None:
        self.concept, self.n, self.m, self.copied = concept, n, m, copied

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any):
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(text)), heads(attn.to_v(text))
        rows = len(query) // 4
        base, edit = slice(2 * rows, 3 * rows), slice(3 * rows, None)
        out = F.scaled_dot_product_attention(query, key, value)
        if encoder_hidden_states is None:
            if query.shape[2] <= self.copied:
                out[edit] = F.scaled_dot_product_attention(query[base], key[base], value[edit])
        else:
            concept = self.concept.expand(rows, -1, -1)
            kept, own = value[base].clone(), torch.zeros(concept.shape[1], 1)
            kept[:, :, self.n + 2 : self.n + 2 + self.m] = 0
            own[1 : self.m + 1] = -1.0
            out[edit] = F.scaled_dot_product_attention(query[base], key[base], kept)
            out[edit] += F.scaled_dot_product_attention(
                query[edit], heads(attn.to_k(concept)), own * heads(attn.to_v(concept))
            )
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@contextmanager
def fused(scene: Any, copied: int):
    """As the variant, in the test's own words."""
    concept, _ = scene.pipe.encode_prompt("beer wine glass", "cpu", 1, False)
    scene.pipe.unet.set_attn_processor(Fused(concept, n=5, m=3, copied=copied))
    uncond, cond = scene.texts()
    yield scene.call(uncond, uncond, cond, cond)


@pytest.mark.parametrize("copied", [256, 16])
@torch.no_grad()
def test_two_trajectories_are_the_fused_form(scene, monkeypatch, copied: int) -> None:
    """The base rows are the plain model, the edit rows the formula. Values of the inserted columns come from the edit
    rows' text in the one and from the concept's in the other; they are the same."""
    monkeypatch.setattr("experiments.literal.gie.SELF_QUERIES", copied)  # the layers have 64 and 16
    plain, literal = predict(scene, "plain"), predict(scene, "two trajectories")
    torch.testing.assert_close(literal[:6], torch.cat([plain[:2], plain]), **CLOSE)
    assert tiny.change(literal[6:], plain[2:]) > 0.1
    assert tiny.change(literal[6:], predict(scene, "one trajectory")[2:]) > 1e-3
    with fused(scene, copied) as call:
        torch.testing.assert_close(literal, call(), **CLOSE)


def test_baselines_put_everything_back(scene) -> None:
    before, processors = predict(scene, "plain"), dict(scene.pipe.unet.attn_processors)
    for variant in ("one trajectory", "two trajectories"):
        predict(scene, variant)
        assert scene.pipe.unet.attn_processors == processors
        assert torch.equal(predict(scene, "plain"), before)


# ---------------------------------------------------------------- the three-chain step


@pytest.mark.parametrize("method", ["esd", "sdd"])
def test_the_naive_step_is_the_same_mathematics(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same point of the same trajectory, and the same weights after an update there."""
    monkeypatch.setattr(finetune, "BATCH", 1)
    pipe = tiny.pipeline("small")
    naive = finetune.Naive(pipe, method)
    rng = torch.Generator().manual_seed(0)
    stop = torch.randint(finetune.K, (1,), generator=rng)
    assert stop > 2
    net = finetune.Denoiser(pipe, finetune.CONCEPT.phrases, "x", finetune.K)
    points = net.trajectory(torch.tensor([1]), stop[:, None], None, finetune.GUIDANCE, rng)
    x, t = finetune.Naive(pipe, method).point({})
    assert torch.allclose(x, points.x, **CLOSE) and t == points.t[0]
    naive.update()
    editor = {"esd": efface.ESD, "sdd": efface.SDD}[method](steps=1, lr=finetune.LR, batch=1, reuse=1, clip=0.0)
    state = step_of(net, editor, points)
    for name, w in state.student.items():
        apart = (naive.student[name.removeprefix("unet.")] - w).abs() > 1e-7  # of moves of 1e-5
        assert apart.float().mean() < 0.02  # Adam's first move is the sign of a gradient, which may be rounding
        assert not torch.equal(w, net.base[name])


def step_of(net: Any, editor: Any, points: Any) -> Any:
    from efface.editors._training import run

    def loss(weights: Any, batch: Any, _: Any) -> Tensor:
        return editor.loss(net, weights, batch)

    return run(net, editor, lambda *_: points, loss, seed=0, name="test", identity={})
