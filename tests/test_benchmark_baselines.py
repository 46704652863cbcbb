"""The literal baselines of the overhead benchmark are the mathematics that they claim to be, and the script runs."""

from __future__ import annotations

import importlib
import json
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

import efface

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("eiup_overhead")


@pytest.fixture
def scene(overhead: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two pictures; the prompt has 5 tokens, the concept 3."""
    monkeypatch.setattr(overhead, "PROMPT", tiny.PROMPT)
    random = torch.Generator().manual_seed(1)
    concept = efface.Concept("alcohol", ("beer wine glass",))
    return overhead.Scene(tiny.pipeline(), concept, torch.randn(2, 4, 8, 8, generator=random), torch.tensor(500))


@torch.no_grad()
def predict(overhead: ModuleType, scene: Any, variant: str) -> Tensor:
    with overhead.VARIANTS[variant](scene) as call:
        return call()


def test_one_trajectory_is_separate_eiup(overhead, scene) -> None:
    """Both keep all of the prompt's columns, so nothing sets them apart: insertion in front of the end token is no more
    than another order of the sum."""
    plain, literal = predict(overhead, scene, "plain"), predict(overhead, scene, "one trajectory")
    assert tiny.change(literal[2:], plain[2:]) > 0.1
    torch.testing.assert_close(literal, predict(overhead, scene, "eiup separate"), **CLOSE)


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
def test_two_trajectories_are_the_fused_form(overhead, scene, monkeypatch, copied: int) -> None:
    """The base rows are the plain model, the edit rows the formula. Values of the inserted columns come from the edit
    rows' text in the one and from the concept's in the other; they are the same."""
    monkeypatch.setattr("literal_gie.SELF_QUERIES", copied)  # the layers have 64 and 16
    plain, literal = predict(overhead, scene, "plain"), predict(overhead, scene, "two trajectories")
    torch.testing.assert_close(literal[:6], torch.cat([plain[:2], plain]), **CLOSE)
    assert tiny.change(literal[6:], plain[2:]) > 0.1
    assert tiny.change(literal[6:], predict(overhead, scene, "one trajectory")[2:]) > 1e-3
    with fused(scene, copied) as call:
        torch.testing.assert_close(literal, call(), **CLOSE)


def test_baselines_put_everything_back(overhead, scene) -> None:
    before, processors = predict(overhead, scene, "plain"), dict(scene.pipe.unet.attn_processors)
    for variant in ("one trajectory", "two trajectories"):
        predict(overhead, scene, variant)
        assert scene.pipe.unet.attn_processors == processors
        assert torch.equal(predict(overhead, scene, "plain"), before)


def test_a_variant_without_effect_fails(overhead, scene, monkeypatch) -> None:
    monkeypatch.setitem(overhead.VARIANTS, "eiup gated", overhead.plain)
    with pytest.raises(RuntimeError, match=r"'eiup gated' changes the prediction by 0\.0000"):
        overhead.calls(scene, ["plain", "eiup gated"], 1, 0)


def test_a_part_of_the_variants_leaves_the_others_as_they_were(overhead) -> None:
    def record(date: str, *variants: str) -> dict[str, object]:
        targets = [{"what": f"{v}, batch 8, time / plain", "value": len(date), "met": True} for v in variants]
        return {"date": date, "results": [{"variant": v, "ratio": date} for v in variants], "targets": targets}

    old, new = record("old", "plain", "eiup separate", "sld"), record("newer", "plain", "eiup separate", "gie")
    both = overhead.beside(new, old)
    assert [(row["variant"], row["ratio"], row.get("date")) for row in both["results"]] == [
        ("plain", "newer", None),
        ("eiup separate", "newer", None),
        ("gie", "newer", None),
        ("sld", "old", "old"),
    ]
    assert both["date"] == "newer" and [t["value"] for t in both["targets"]] == [5, 5, 5, 3]
    assert overhead.beside(record("third", "sld"), both)["results"][3] == {"variant": "sld", "ratio": "third"}
    assert overhead.beside(new, None) == new


def test_the_script_writes_its_record(overhead, tmp_path, monkeypatch, capsys) -> None:
    """Everything but the subprocesses, on a small model."""
    monkeypatch.setattr(overhead, "help_seconds", lambda: [0.1, 0.25, 0.7])
    monkeypatch.setattr(overhead, "memory", lambda *_: {v: {"peak": 100, "calls": 90} for v in overhead.VARIANTS})
    out = tmp_path / "results/overhead.json"
    out.parent.mkdir()
    out.write_text('{"emoji": 1}')
    overhead.main(["--model", "tiny", "--rounds", "2", "--batch", "1", "8", "--out", str(out)])
    few = ["--variants", "gie", "--no-memory"]
    overhead.main(["--model", "tiny", "--rounds", "2", "--batch", "1", *few, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["emoji"] == 1
    for record in found["tiny"].values():
        assert [row["variant"] for row in record["results"]] == list(overhead.VARIANTS)
    assert {row["variant"] for row in found["tiny"]["1"]["results"] if "date" not in row} == {"plain", "gie"}
    assert not any("date" in row for row in found["tiny"]["8"]["results"])
    record = found["tiny"]["8"]
    assert all(row["effect"] > 0.1 for row in record["results"] if row["variant"] != "plain")
    assert all(row["ratio"]["median"] == 1 for row in record["results"] if row["variant"] == "plain")
    assert all(row["seconds"]["min"] > 0 and row["memory"]["peak"]["ratio"] == 1 for row in record["results"])
    assert len(record["targets"]) == 1 + 4 * 3 + 6 and all(
        t["met"] == (t["value"] <= t["limit"]) for t in record["targets"]
    )
    assert "efface --help, seconds: 0.250, target 0.3: met" in capsys.readouterr().out


# ---------------------------------------------------------------- finetune_step.py


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("finetune_step")


@pytest.mark.parametrize("method", ["esd", "sdd"])
def test_the_naive_step_is_the_same_mathematics(method: str, step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same point of the same trajectory, and the same weights after an update there."""
    monkeypatch.setattr(step, "BATCH", 1)
    pipe = tiny.pipeline("small")
    naive = step.Naive(pipe, method)
    rng = torch.Generator().manual_seed(0)
    stop = torch.randint(step.K, (1,), generator=rng)
    assert stop > 2
    net = step.Denoiser(pipe, step.CONCEPT.phrases, "x", step.K)
    points = net.trajectory(torch.tensor([1]), stop[:, None], None, step.GUIDANCE, rng)
    x, t = step.Naive(pipe, method).point({})
    assert torch.allclose(x, points.x, **CLOSE) and t == points.t[0]
    naive.update()
    editor = {"esd": efface.ESD, "sdd": efface.SDD}[method](steps=1, lr=step.LR, batch=1, reuse=1, clip=0.0)
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


def test_the_step_script_writes_its_record(step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "K", 2)
    monkeypatch.setattr(step, "load", lambda model: tiny.pipeline("small"))
    out = tmp_path / "results/step.json"
    step.main(["--model", "tiny", "--rounds", "1", "--updates", "4", "--ccrt-steps", "1", "--out", str(out)])
    record = json.loads(out.read_text())["tiny"]
    assert [(r["method"], r["variant"]) for r in record["results"]] == [
        (m, v) for m in ("esd", "sdd") for v in ("naive", "efface, reuse 1", "efface, reuse 4")
    ]
    assert all(r["speedup"]["median"] == 1 for r in record["results"] if r["variant"] == "naive")
    assert record["ccrt"]["rows"] > 0 and record["ccrt"]["individuals"] > 2
