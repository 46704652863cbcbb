"""ESD and SDD: their losses against independent references, and that what they learn is what they say."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import ALCOHOL, CAT, change
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from efface import CCRT, ESD, SDD, Concept, Delta
from efface.editors import _training
from efface.editors._denoiser import Denoiser, Points, trained
from efface.editors._training import run
from efface.families import family as facts

pytestmark = pytest.mark.thinned("long")

ROWS = 3
FLOOR = 1e-3  # text that hardly matters would make every loss small


@pytest.fixture
def scene(pipe: Any) -> tuple[Any, Denoiser, Points]:
    """A pipeline, its denoiser with three texts, and points at fixed times."""
    net = Denoiser(pipe, ["a cat", "beer", "wine glass"], "x", 4)
    x = torch.randn(ROWS, 4, 8, 8, generator=Generator().manual_seed(1))
    return pipe, net, Points(x, torch.tensor([100, 500, 900]), torch.tensor([1, 2, 1]))


def predict(pipe: Any, points: Points, texts: list[str]) -> Tensor:
    """The pipeline's own prediction, without a line of the code under test."""
    sdxl = hasattr(pipe, "text_encoder_2")
    found = []
    for k, text in enumerate(texts):
        encoded = pipe.encode_prompt(
            text or "a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        side = 0 if text else 1
        added = {}
        if sdxl:
            ids = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
            added = {"added_cond_kwargs": {"text_embeds": encoded[2 + side], "time_ids": ids}}
        with torch.no_grad():
            found.append(pipe.unet(points.x[k : k + 1], points.t[k], encoded[side], **added).sample)
    return torch.cat(found)


def learn(net: Denoiser, editor: Any, points: Points, **options: Any) -> Any:
    """A fit on the same points in every update."""
    return run(
        net,
        editor,
        lambda *_: points,
        lambda weights, batch, _: editor.loss(net, weights, batch),
        seed=0,
        name="test",
        identity={},
        **options,
    )


# ---------------------------------------------------------------- ESD


@pytest.mark.parametrize("eta", [0.5, 1.0, 3.0])
def test_esd_starts_at_one_plus_eta_squared_times_the_gap(eta: float, scene: Any) -> None:
    """(1 + eta)^2 MSE(concept, unconditional): one less in eta, as in the public code, would give eta^2."""
    pipe, net, points = scene
    concept, null = predict(pipe, points, ["a cat", "beer", "a cat"]), predict(pipe, points, [""] * ROWS)
    gap = float(mse_loss(concept, null))
    assert gap > FLOOR
    loss = ESD(eta=eta).loss(net, net.student(), points)
    assert float(loss.detach()) == pytest.approx((1 + eta) ** 2 * gap, rel=1e-3)


def test_esd_target_by_hand_and_from_a_text(scene: Any) -> None:
    pipe, net, points = scene
    null, concept = predict(pipe, points, [""] * ROWS), predict(pipe, points, ["a cat", "beer", "a cat"])
    texts, target = ESD(eta=2.0).target(net, points)
    assert texts.tolist() == [1, 2, 1]
    assert change(target, null - 2.0 * (concept - null)) < 1e-4
    within = predict(pipe, points, ["wine glass"] * ROWS)
    texts, target = ESD(eta=2.0, erase_from="wine glass").target(net, points)
    assert texts.tolist() == [3, 3, 3]  # the last text of the net
    assert change(target, within - 2.0 * (concept - null)) < 1e-4
    assert change(target, null - 2.0 * (concept - null)) > 0.1


def test_esd_at_eta_minus_one_has_nothing_to_learn(scene: Any) -> None:
    """The target is the concept's own prediction."""
    _, net, points = scene
    student = net.student()
    loss = ESD(eta=-1.0).loss(net, student, points)
    loss.backward()
    assert float(loss.detach()) < 1e-10
    reached = [w.grad.abs().max() for w in student.values() if w.grad is not None]
    ESD(eta=1.0).loss(net, student, points).backward()
    assert float(max(reached)) < 1e-3 * float(max(w.grad.abs().max() for w in student.values()))


@pytest.mark.long
@pytest.mark.parametrize("train", ["x", "u"])
def test_esd_moves_the_prediction_to_its_target(train: str) -> None:
    """At fixed points the loss falls below a tenth, by the weights it should be, and the delta carries it over."""
    pipe = tiny.untouched("small")
    net = Denoiser(pipe, ["a cat"], train, 4)
    x = torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(1))
    points = Points(x, torch.tensor([300, 700]), torch.tensor([1, 1]))
    editor = ESD(train=train, steps=60, lr=1e-2 if train == "x" else 1e-3, batch=2, reuse=1)  # type: ignore[arg-type]
    concept, null = predict(pipe, points, ["a cat"] * 2), predict(pipe, points, [""] * 2)
    state = learn(net, editor, points)
    assert state.losses[0] > FLOOR and state.losses[-1] < 0.1 * state.losses[0]
    assert set(state.shipped) == {f"unet.{name}" for name in trained(pipe.unet, train, facts(pipe).outer_layers)}
    with Delta.fitted(editor, pipe, net.change(state.shipped), CAT).apply(pipe):
        edited, drifted = predict(pipe, points, ["a cat"] * 2), predict(pipe, points, [""] * 2)
    assert mse_loss(edited, 2 * null - concept) < 0.12 * mse_loss(concept, 2 * null - concept)
    assert mse_loss(drifted, null) < mse_loss(edited, concept)
    assert torch.equal(predict(pipe, points, ["a cat"] * 2), concept)


def test_esd_draws_points_of_every_phrase_with_the_student(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    trajectory = Denoiser.trajectory

    def spy(self: Denoiser, prompt: Tensor, stops: Tensor, weights: Any, guidance: float, rng: Any) -> Points:
        name = next(iter(weights))
        drawn.append((prompt.tolist(), stops.tolist(), guidance, not torch.equal(weights[name], self.base[name])))
        return trajectory(self, prompt, stops, weights, guidance, rng)

    monkeypatch.setattr(Denoiser, "trajectory", spy)
    settings: dict[str, Any] = {"lr": 1e-3, "batch": 3, "reuse": 2, "sampler_steps": 4, "guidance": 2.0}
    ESD(steps=10, **settings).fit(sd1, [ALCOHOL, CAT])
    assert {row for prompts, *_ in drawn for row in prompts} == {1, 2, 3}
    assert {stop for _, stops, *_ in drawn for row in stops for stop in row} == {0, 1, 2, 3}
    assert [moved for *_, moved in drawn] == [False, True, True, True, True]
    assert {guidance for _, _, guidance, _ in drawn} == {2.0}
    drawn.clear()
    ESD(steps=2, erase_from="a dog", **settings).fit(sd1, [ALCOHOL, CAT])
    assert {row for prompts, *_ in drawn for row in prompts} == {4}  # x_t shows the text that it is erased from


@pytest.mark.parametrize("drawn_by", ["student", "frozen"])
def test_esd_draws_points_with_the_student_or_the_frozen_model(
    drawn_by: Any, sd1: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what either of them sees; the two part after the first update."""
    seen: list[Points] = []
    points = ESD.points

    def spy(self: ESD, net: Denoiser, prompts: Tensor, weights: Any, rng: Any) -> Points:
        state, drawn = rng.get_state(), points(self, net, prompts, weights, rng)
        after = rng.get_state()
        ways: list[Any] = []
        for way in (weights, None):
            rng.set_state(state)
            prompt = prompts[torch.randint(len(prompts), (self.batch,), generator=rng)]
            stops = torch.randint(4, (self.reuse, self.batch), generator=rng)
            ways.append(net.trajectory(prompt, stops, way, 3.0, rng).x)
        rng.set_state(after)
        assert torch.equal(drawn.x, ways[drawn_by == "frozen"])
        seen.append(drawn)
        return drawn if len(seen) == 1 or not torch.equal(*ways) else pytest.fail("both draw the same")

    monkeypatch.setattr(ESD, "points", spy)
    monkeypatch.setattr("torch.randint", lambda *a, **k: torch.ones(a[-1], dtype=torch.long) * (a[0] - 1))
    settings: dict[str, Any] = {"lr": 1e-2, "batch": 2, "reuse": 2, "sampler_steps": 4}
    ESD(steps=6, drawn_by=drawn_by, **settings).fit(sd1, CAT)
    assert len(seen) == 3


def test_esd_has_the_strengths_of_the_authors_code(scene: Any) -> None:
    """Their `negative_guidance` g is eta + 1 without `erase_from`, and eta with it."""
    pipe, net, points = scene
    texts = {"null": [""] * ROWS, "concept": ["a cat", "beer", "a cat"], "within": ["wine glass"] * ROWS}
    null, concept, within = (predict(pipe, points, some) for some in texts.values())
    for g in (1.0, 2.0):
        assert change(ESD(eta=g - 1).target(net, points)[1], concept - g * (concept - null)) < 1e-4
        of = ESD(eta=g, erase_from="wine glass").target(net, points)[1]
        assert change(of, within - g * (concept - null)) < 1e-4


def test_presets_are_the_papers() -> None:
    code = ESD.code_2025()
    assert (code.eta, code.steps, code.lr, code.sampler_steps, code.guidance) == (1.0, 200, 5e-5, 50, 3.0)
    assert (ESD.paper().drawn_by, code.drawn_by, ESD().drawn_by) == ("student", "frozen", "student")
    assert all(editor.biases for editor in (ESD.paper(), code, SDD.paper(), CCRT.paper()))
    assert (SDD.paper().prompt_roles, SDD.paper("readme").prompt_roles) == ("code", "readme")
    assert (CCRT.paper().search_guidance, CCRT.paper().guidance, CCRT().search_guidance) == (3.0, 3.0, 1.0)
    esd, sdd = ESD.paper("u", eta=3), SDD.paper()
    assert (esd.train, esd.eta, esd.steps, esd.lr, esd.sampler_steps, esd.guidance) == ("u", 3, 1000, 1e-5, 50, 3.0)
    assert (sdd.prompt_roles, sdd.ema, sdd.steps, sdd.clip, sdd.weight_decay) == ("code", 0.999, 1500, 1.0, 1e-4)
    assert (esd.batch, esd.reuse, sdd.batch, sdd.reuse) == (1, 1, 1, 1)


# ---------------------------------------------------------------- SDD


def test_sdd_starts_at_the_gap_and_its_target_has_no_gradient(scene: Any) -> None:
    pipe, net, points = scene
    concept, null = predict(pipe, points, ["a cat", "beer", "a cat"]), predict(pipe, points, [""] * ROWS)
    student = net.student()
    loss = SDD().loss(net, student, points)
    assert float(loss.detach()) == pytest.approx(float(mse_loss(concept, null)), rel=1e-3)
    assert float(loss.detach()) > FLOOR
    loss.backward()
    grads = [w.grad.clone() for w in student.values()]
    for w in student.values():
        w.grad = None
    mse_loss(net(points.x, points.t, points.prompt, student), null).backward()
    for grad, w in zip(grads, student.values(), strict=True):
        assert torch.allclose(grad, w.grad, rtol=1e-2, atol=1e-5)


def test_sdd_without_a_prompt_is_at_rest(scene: Any) -> None:
    _, net, points = scene
    rest = Points(points.x, points.t, torch.zeros_like(points.prompt))
    state = learn(net, SDD(steps=3, lr=1e-2, batch=ROWS, reuse=1), rest, ema=0.5)
    assert state.losses == [0.0, 0.0, 0.0]
    assert all(torch.equal(state.shipped[name], w) for name, w in net.base.items())


def test_sdd_ships_the_average_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """theta_bar_n = m^n theta_0 + (1 - m) sum m^(n-i) theta_i; m = 0 is the student, m = 1 the original."""
    net = Denoiser(tiny.untouched("small"), ["a cat", "beer"], "x", 4)
    x = torch.randn(ROWS, 4, 8, 8, generator=Generator().manual_seed(1))
    points = Points(x, torch.tensor([100, 500, 900]), torch.tensor([1, 2, 1]))
    update, snapshots, name = _training._update, [], next(iter(net.base))

    def record(state: Any, *args: Any) -> None:
        update(state, *args)
        snapshots.append(state.student[name].detach().clone())

    monkeypatch.setattr(_training, "_update", record)
    editor = SDD(steps=4, lr=1e-2, batch=ROWS, reuse=1)
    state, m, n = learn(net, editor, points, ema=0.7), 0.7, 4
    expected = m**n * net.base[name] + (1 - m) * sum(m ** (n - 1 - i) * w for i, w in enumerate(snapshots))
    assert torch.allclose(state.shipped[name], expected, atol=1e-6)
    assert change(state.shipped[name], net.base[name]) > 1e-3
    assert change(state.shipped[name], state.student[name].detach()) > 1e-3
    student = learn(net, editor, points, ema=0.0)
    assert torch.equal(student.shipped[name], student.student[name])
    assert torch.equal(student.student[name], state.student[name])
    assert torch.equal(learn(net, editor, points, ema=1.0).shipped[name], net.base[name])


def test_sdd_loss_falls_on_cross_attention_alone() -> None:
    net = Denoiser(tiny.untouched("small"), ["a cat"], "x", 4)
    x = torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(1))
    points = Points(x, torch.tensor([300, 700]), torch.tensor([1, 1]))
    state = learn(net, SDD(steps=40, lr=5e-3, batch=2, reuse=1), points, ema=0.5)
    assert state.losses[0] > FLOOR and state.losses[-1] < 0.3 * state.losses[0]
    assert all(".attn2." in name for name in state.shipped)


@pytest.mark.parametrize("roles", ["readme", "code"])
def test_sdd_prompts_take_turns(roles: Any, sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """readme: one concept shown, all removed; code: the other way round. What does not fit one prompt becomes two."""
    words = ["red cat", "red dog", "red moon", "big cat", "big dog", "big moon", "wine glass", "beer glass"]
    texts: list[str] = []
    shown: list[list[str]] = []
    removed: list[list[str]] = []
    init, trajectory, loss = Denoiser.__init__, Denoiser.trajectory, SDD.loss

    def see_texts(self: Denoiser, pipe: Any, given: Any, *args: Any) -> None:
        texts.extend(["", *given])
        init(self, pipe, given, *args)

    def see_shown(self: Denoiser, prompt: Tensor, *args: Any) -> Points:
        shown.append([texts[row] for row in prompt])
        return trajectory(self, prompt, *args)

    def see_removed(self: SDD, net: Denoiser, weights: Any, points: Points) -> Tensor:
        removed.append([texts[row] for row in points.prompt])
        return loss(self, net, weights, points)

    monkeypatch.setattr(Denoiser, "__init__", see_texts)
    monkeypatch.setattr(Denoiser, "trajectory", see_shown)
    monkeypatch.setattr(SDD, "loss", see_removed)
    editor = SDD(prompt_roles=roles, steps=8, lr=1e-4, batch=2, reuse=2, sampler_steps=2)
    editor.fit(sd1, [Concept("many", tuple(words))])
    joined = texts[9:]
    assert len(joined) == 2 and ", ".join(joined).split(", ") == words
    one, all_of_them = (shown, removed) if roles == "readme" else (removed, shown)
    assert {text for row in all_of_them for text in row} == set(joined)
    assert [len(row) for row in shown] == [2] * 4 and [len(row) for row in removed] == [2] * 8
    flat = [text for row in one for text in row]
    assert flat == [words[k % 8] for k in range(len(flat))]


def test_sdd_average_arrives_within_the_fit(sd1: Any) -> None:
    assert SDD(steps=200).resolved(sd1).ema == pytest.approx(0.975)
    assert SDD(steps=1500).resolved(sd1).ema == 0.999
    assert SDD(steps=200, ema=0.5).resolved(sd1).ema == 0.5
    assert SDD(steps=0).resolved(sd1).ema == 0.0
    with pytest.raises(ValueError, match=r"`ema` in \[0, 1\]"):
        SDD(ema=1.5)
    with pytest.raises(ValueError, match="prompt_roles"):
        SDD(prompt_roles="paper")  # type: ignore[arg-type]


@pytest.mark.parametrize("editor", [ESD, SDD])
def test_defaults_come_from_the_family(editor: Any) -> None:
    tuned, other = editor().resolved(tiny.untouched("sd1")), editor.defaults["emoji"]
    assert None not in (tuned.steps, tuned.lr, tuned.batch, tuned.reuse, tuned.sampler_steps)
    assert editor(train="u").resolved(tiny.untouched("sd1")).lr == pytest.approx(tuned.lr / 3)
    assert editor(train="u", lr=0.1).resolved(tiny.untouched("sd1")).lr == 0.1
    assert editor.defaults[""].keys() == other.keys()
