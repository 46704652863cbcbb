"""A word is learned from judged pictures: only its embeddings move, rewards weigh pictures, all methods read it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from test_cli import call
from test_conformance import EFFECT, assert_same, snapshot
from test_rewards import WHAT, Red, draw, judge, red
from tiny import change, drawn, latents
from torch import Generator, Tensor

import efface
from efface import HFI, SDD, Concept, Tokens, api
from efface._text import encode
from efface.delta.embeddings import mean_row
from efface.delta.tokens import learning_words
from efface.detectors import _encoders
from efface.editors._inversion import Worded, normalised
from efface.editors._judged import Judged
from efface.feedback import Evidence, Session, Store, pool
from efface.feedback.reward import RewardModel

DRINKS = Concept("party drinks")
WORD = Concept("party drinks", ["<party-drinks>"])
QUICK = HFI(steps=6, lr=2e-2, batch=2)
SHORT: dict[str, Any] = {"steps": 2, "batch": 1, "sampler_steps": 2}
SIDE = 16  # pixels of a tiny pipeline's pictures


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


def pictures(n: int = 8, seed: int = 1_000_000) -> Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=Generator().manual_seed(seed))


def inverted(rewards: Tensor, seed: int = 1_000_000, fit: HFI = QUICK, shown: Tensor | None = None) -> Tensor:
    pipe = tiny.untouched("sd1")
    made = fit.invert(pipe, pictures(len(rewards)) if shown is None else shown, rewards, DRINKS, seed=seed)
    return made.embeddings["tokenizer"]


@pytest.fixture(scope="module")
def word() -> Tokens:
    return QUICK.invert(tiny.untouched("sd1"), pictures(), torch.linspace(0, 1, 8), DRINKS, seed=1_000_000)


# ---------------------------------------------------------------- the inversion


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_only_the_new_rows_move(family: str, pipe: Any) -> None:
    before, start = snapshot(pipe), mean_row(pipe, "party drinks", 2)
    fit = replace(QUICK, vectors=2)
    made = fit.invert(pipe, pictures(), torch.linspace(0, 1, 8), DRINKS, seed=1_000_000)
    assert_same(snapshot(pipe), before)  # every weight and table, bit for bit
    assert made.words == ("<party-drinks-1>", "<party-drinks-2>")
    assert made.embeddings.keys() == start.keys() and len(start) == (2 if family == "sdxl" else 1)
    for name, rows in made.embeddings.items():
        assert bool(((rows - start[name]).norm(dim=1) > 1e-3).all()), name  # all of them do move
    assert made.info["pictures"] == 7 and made.info["steps"] == 6  # a picture of reward 0 is left out


def test_a_pipeline_that_removes_words_in_angle_brackets_learns_none() -> None:
    """PixArt's cleaning of captions takes them for HTML, where its packages are installed."""
    with pytest.raises(ValueError, match="HFI needs prompts that keep learned words, but this PixArt"):
        QUICK.invert(tiny.untouched("pixart"), pictures(), torch.linspace(0, 1, 8), DRINKS)


def test_equal_rewards_are_plain_textual_inversion() -> None:
    """The reference is written out here: the loss of the denoiser, AdamW, and no rewards at all."""
    pipe, shown, seed = tiny.untouched("sd1"), pictures(), 1_000_000
    texts = ["<party-drinks>", "a photo of <party-drinks>"]
    alphas = pipe.scheduler.alphas_cumprod
    with torch.no_grad():
        clean = pipe.vae.encode(2 * shown - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    with learning_words(pipe, ["<party-drinks>"], mean_row(pipe, "party drinks")) as learned:
        adam = torch.optim.AdamW(learned.embeddings.values(), lr=2e-2, weight_decay=0)
        rng = Generator().manual_seed(seed)
        for _ in range(6):
            n, k = (torch.randint(most, (2,), generator=rng) for most in (8, 2))
            t = torch.randint(1000, (2,), generator=rng)
            noise = torch.randn(2, *clean.shape[1:], generator=rng)
            a = alphas[t].view(2, 1, 1, 1)
            text = encode(pipe, texts, differentiable=True).text[k]
            made = pipe.unet(a.sqrt() * clean[n] + (1 - a).sqrt() * noise, t, text).sample
            adam.zero_grad()
            torch.nn.functional.mse_loss(made, noise).backward()
            adam.step()
        plain = learned.embeddings["tokenizer"].detach().clone()
    with pytest.warns(UserWarning, match="All 8 pictures have the same reward.*plain textual inversion"):
        equal = [inverted(torch.full((8,), value)) for value in (0.3, 1.0)]
    assert torch.equal(equal[0], equal[1]) and torch.allclose(equal[0], plain, atol=1e-5)
    assert float((equal[0] - inverted(torch.linspace(0, 1, 8))).norm()) > 1e-3  # others are not


def test_reward_zero_on_half_is_training_on_the_other_half() -> None:
    half = torch.tensor([1.0, 0.8, 0.6, 0.4])
    whole = inverted(torch.cat([half, torch.zeros(4)]))
    assert torch.equal(whole, inverted(half, shown=pictures()[:4]))
    assert float((whole - inverted(torch.cat([half, torch.full((4,), 0.2)]))).norm()) > 1e-3


def test_the_loss_is_the_mean_of_reward_times_error() -> None:
    pipe = tiny.untouched("sd1")
    clean = torch.randn(2, *tiny.latents(pipe).shape[1:], generator=Generator().manual_seed(1_000_000))
    with torch.enable_grad(), learning_words(pipe, ["<a>"], mean_row(pipe, "a dog")) as learned:
        losses, slopes = [], []
        for rewards in ([1.0, 1.0], [2.0, 0.0], [0.0, 2.0]):
            net = Worded(pipe, learned, ["<a>"], clean, torch.tensor(rewards), "auto")
            points = net.draw(2, Generator().manual_seed(3))
            points = replace(points, prompt=torch.tensor([0, 1]))
            loss = net.loss(points)
            (slope,) = torch.autograd.grad(loss, list(learned.embeddings.values()))
            losses.append(float(loss.detach()))
            slopes.append(slope)
    assert abs(losses[1] - losses[2]) > 1e-3  # the two pictures differ
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)
    assert torch.allclose(slopes[0], (slopes[1] + slopes[2]) / 2, atol=1e-6) and float(slopes[0].norm()) > 1e-6


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([0.5, -0.1], r"`rewards` >= 0 with at least one above 0, got \[-0.1"),
        ([0.0, 0.0], r"`rewards` >= 0 with at least one above 0, got \[0.0, 0.0\]"),
        ([0.5, float("nan")], "`rewards` to be finite floats"),
    ],
)
def test_rewards_that_would_harm_are_refused(rewards: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalised(torch.tensor(rewards))
    with pytest.raises(ValueError, match=message):
        inverted(torch.tensor(rewards))


def test_an_interrupted_fit_continues_to_the_same_word(tmp_path: Path) -> None:
    pipe, rewards, path = tiny.untouched("sd1"), torch.linspace(0, 1, 8), tmp_path / "fit.checkpoint"
    first = QUICK.invert(pipe, pictures(), rewards, DRINKS, seed=1_000_000, checkpoint=path)
    again = QUICK.invert(pipe, pictures(), rewards, DRINKS, seed=1_000_000, checkpoint=path)
    assert again.hash == first.hash and path.exists()
    with pytest.raises(ValueError, match="is the checkpoint of another fit"):
        QUICK.invert(pipe, pictures(), rewards.flip(0), DRINKS, seed=1_000_000, checkpoint=path)


def test_pictures_of_another_size_and_bad_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="Use pictures of the size that the model draws"):
        inverted(torch.linspace(0, 1, 4), shown=torch.rand(4, 3, 2 * SIDE, 2 * SIDE))
    with pytest.raises(ValueError, match=r"Expected one reward per picture, got \[3\] for 8 pictures"):
        QUICK.invert(tiny.untouched("sd1"), pictures(), torch.ones(3), DRINKS)
    with pytest.raises(ValueError, match="Expected one concept, got 2"):
        QUICK.invert(tiny.untouched("sd1"), pictures(), torch.ones(8), [DRINKS, Concept("other")])
    for fields, message in (
        ({"top": 0}, "`top`"),
        ({"lr": 0}, "`lr` > 0"),
        ({"templates": ("a photo",)}, '`templates` with one separate "{}"'),
        ({"removal": "esdd"}, "esd"),
        ({"removal": "hfi"}, "`removal` to be an editor of weights, got 'hfi'"),
        ({"removal": "latent_directions"}, "`removal` to be an editor of weights"),
        ({"precision": "half"}, "`precision`"),
    ):
        with pytest.raises(ValueError, match=message):
            HFI(**fields)


# ---------------------------------------------------------------- every method reads the word


@pytest.mark.parametrize("method", ["eiup", "sld", "negative_prompt", "safree", "nag"])
def test_run_time_methods_read_the_word_and_refuse_without_it(method: str, sd1: Any, word: Tokens) -> None:
    literal, eraser = (api.build(method, concept) for concept in (DRINKS, WORD))
    with pytest.raises(ValueError, match="Expected the learned word '<party-drinks>' to be on this pipeline"):
        eraser.apply(sd1)
    with word.apply(sd1) as handle:
        plain = latents(sd1)
        assert torch.equal(plain, drawn())  # a word alone changes no picture
        with eraser.apply(sd1):
            erased = latents(sd1)
            with pytest.raises(ValueError, match=r"reads the word '<party-drinks>'"):
                handle.remove()
        with literal.apply(sd1):
            named = latents(sd1)
    assert change(erased, plain) > EFFECT and change(erased, named) > EFFECT / 10
    assert torch.equal(latents(sd1), drawn())


@pytest.mark.parametrize(
    "editor",
    [efface.ESD(lr=1e-2, **SHORT), SDD(lr=1e-2, ema=0.5, **SHORT), efface.UCE()],
    ids=["esd", "sdd", "uce"],
)
def test_editors_learn_from_the_word_and_their_weights_do_without_it(editor: Any, sd1: Any, word: Tokens) -> None:
    with pytest.raises(ValueError, match="Expected the learned word '<party-drinks>' to be on this pipeline"):
        editor.fit(sd1, WORD)
    with word.apply(sd1):
        delta = editor.fit(sd1, WORD, seed=1_000_000)
        with delta.apply(sd1):
            beside = latents(sd1)
    with delta.apply(sd1):
        assert torch.equal(latents(sd1), beside)  # the weights hold all that was learned
    assert change(beside, drawn()) > EFFECT
    literal = editor.fit(sd1, DRINKS, seed=1_000_000)
    with literal.apply(sd1):
        assert change(latents(sd1), beside) > EFFECT / 10
    assert delta.info["words"] == {"<party-drinks>": word.hash} and "words" not in literal.info


def test_a_removal_stage_travels_with_the_word(sd1: Any, tmp_path: Path) -> None:
    fit = replace(QUICK, removal="uce")
    made = fit.invert(sd1, pictures(), torch.linspace(0, 1, 8), DRINKS, seed=1_000_000)
    assert made.delta is not None and made.delta.method == "uce"
    made.save(tmp_path / "word.safetensors")
    with api.load_delta(tmp_path / "word.safetensors").apply(sd1):
        assert change(latents(sd1), drawn()) > EFFECT
    assert torch.equal(latents(sd1), drawn())


def test_the_word_belongs_to_its_text_encoder(word: Tokens) -> None:
    other = copy.deepcopy(tiny.untouched("sd1"))
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ValueError, match="base model|weights"):
        word.apply(other)
    with pytest.raises(ValueError, match="no such text encoder|every text encoder|width"):
        word.apply(tiny.untouched("sdxl"))


@pytest.mark.slow
def test_a_word_learned_from_pictures_draws_them_and_erases_them() -> None:
    """Twelve pictures of a cat with reward 1, twelve of other things with reward 0. The start is a word for neither."""
    pipe, cat = efface.load("emoji"), efface.detector("eyes", "cat")
    pipe.set_progress_bar_config(disable=True)

    def shown(prompts: list[str], first: int) -> Tensor:
        return api.draw(pipe, prompts, range(first, first + len(prompts)), num_inference_steps=20)

    pictures_ = shown(["a cat"] * 12 + ["a rocket", "a pizza", "a house"] * 4, 100)  # training: tuning seeds
    rewards = cat(pictures_).all(0).float()
    assert float(rewards[:12].mean()) > 0.8 and float(rewards[12:].sum()) == 0
    fit = HFI(initial="thing", steps=150)
    made = fit.invert(pipe, pictures_, rewards, Concept("it"), seed=100)
    prompts, others = ["a cat"] * 8, ["a rocket", "a pizza"] * 4
    before = cat(shown(prompts, 1_000_000)).all(0).float().mean()
    assert float(before) > 0.8 and not cat(shown(["a photo of a thing"] * 8, 1_000_100)).all(0).any()
    with made.apply(pipe):
        drawn_ = cat(shown(["a photo of <it>"] * 8, 1_000_100)).all(0).float().mean()
        with efface.EIUP(Concept("it", ["<it>"])).apply(pipe):
            after = cat(shown(prompts, 1_000_000)).any(0).float().mean()
            kept = shown(others, 1_000_200)
    assert float(drawn_) > 0.6 and float(after) <= float(before) / 2
    for name, place in (("rocket", 0), ("pizza", 1)):
        assert float(efface.detector("eyes", name)(kept[place::2]).all(0).float().mean()) > 0.7


# ---------------------------------------------------------------- from judgements to the word


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 24 judged pictures: those with much red are scary. An encoder sees the red."""
    monkeypatch.setattr(_encoders, "encoder", lambda name: Red())
    draw(tmp_path / "pool", *range(5, 245, 10), side=SIDE)
    with Store(tmp_path / "labels.db") as store:
        session = Session(store, pool(tmp_path / "pool"), WHAT, "ana", 1, kind="binary")
        judge(session, lambda path: "yes" if red(path) > 120 else "no")
    return tmp_path


def test_a_fit_takes_the_pictures_with_the_highest_rewards(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Judged] = []
    real = HFI._inverted
    monkeypatch.setattr(
        HFI, "_inverted", lambda self, pipe, found, *more: seen.append(found) or real(self, pipe, found, *more)
    )
    draw(judged / "pool", 255, side=SIDE)  # which nobody judged
    fit = HFI(str(judged / "pool"), str(judged / "labels.db"), encoder="red", top=6, steps=2, batch=2)
    made = fit.fit(tiny.untouched("sd1"), Concept(WHAT), seed=1_000_000)
    reds = [round(float(each[0].mean()) * 255) for each in seen[0].pictures]
    assert len(reds) == 6 and min(reds) > 150 and 255 in reds and float(seen[0].rewards.min()) > 0.5
    facts = made.info["reward"]
    assert facts["binary"]["auc"] > 0.9 and facts["judged"] == 24 and facts["of"] == 25
    assert "One annotator judged" in facts["notes"][0] and made.words == ("<scary-things>",)
    assert facts["annotators"] == 1 and "ana" not in str(made.config())  # a file names nobody


def test_a_reward_model_from_its_file_must_be_of_the_same_concept_and_encoder(judged: Path) -> None:
    items = pool(judged / "pool")
    features = _encoders.embedded(Red(), [item.path for item in items])
    with Store(judged / "labels.db") as store:
        evidence = Evidence.of(store.judgements(), WHAT)
    RewardModel.fit(evidence, [i.picture for i in items], features, encoder="red").save(judged / "r.safetensors")
    fit = HFI(str(judged / "pool"), str(judged / "r.safetensors"), encoder="red", steps=1, batch=1)
    sd1 = tiny.untouched("sd1")
    assert fit.fit(sd1, Concept(WHAT)).words == ("<scary-things>",)
    with pytest.raises(ValueError, match="Expected a reward model of the concept 'drinks', got one of 'scary things'"):
        fit.fit(sd1, Concept("drinks"))
    with pytest.raises(ValueError, match="Expected a reward model of the encoder 'blue', got one of 'red'"):
        replace(fit, encoder="blue").fit(sd1, Concept(WHAT))


def test_feedback_that_predicts_nothing_and_missing_parts_are_refused(judged: Path, tmp_path: Path) -> None:
    fit = HFI(str(judged / "pool"), str(judged / "labels.db"), encoder="red", steps=1, batch=1)
    sd1 = tiny.untouched("sd1")
    with Store(judged / "labels.db") as store:  # ben says the opposite of ana about every picture
        session = Session(store, pool(judged / "pool"), WHAT, "ben", 1, kind="binary")
        judge(session, lambda path: "no" if red(path) > 120 else "yes")
        session = Session(store, pool(judged / "pool"), "odd", "ana", 1, kind="binary")
        judge(session, lambda path: "yes" if red(path) // 10 % 2 else "no")
    with pytest.raises(ValueError, match="tells pictures apart, got equal answers"):
        fit.fit(sd1, Concept(WHAT))
    with pytest.raises(ValueError, match="Expected judgements that predict held-out ones better than chance, got odd"):
        fit.fit(sd1, Concept("odd"))
    with pytest.raises(ValueError, match="`concept` to be one of 'odd', 'scary things', got 'drinks'"):
        fit.fit(sd1, Concept("drinks"))
    with pytest.raises(ValueError, match="Expected `pictures`, the folder with the judged pictures"):
        replace(fit, pictures="").fit(sd1, Concept(WHAT))
    with pytest.raises(FileNotFoundError, match="There is no store"):
        replace(fit, feedback=str(tmp_path / "absent.db")).fit(sd1, Concept(WHAT))


def test_pictures_of_two_sizes_are_refused(judged: Path) -> None:
    Image.new("RGB", (8, 8), (250, 0, 0)).save(judged / "pool/small.png")
    fit = HFI(str(judged / "pool"), str(judged / "labels.db"), encoder="red", steps=1, batch=1)
    with pytest.raises(ValueError, match="Expected pictures of one size, got 16 x 16 and 8 x 8"):
        fit.fit(tiny.untouched("sd1"), Concept(WHAT))


@pytest.mark.long
def test_the_command_line_goes_from_judgements_to_an_eraser(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load", lambda *_, **__: copy.deepcopy(tiny.untouched("sd1")))
    out, change_ = judged / "word.safetensors", judged / "no-scary.safetensors"
    of = ["--set", f"pictures={judged / 'pool'}", "--set", f"feedback={judged / 'labels.db'}", "--set", "encoder=red"]
    quick = ["--set", "steps=2", "--set", "batch=2"]
    assert "<scary-things>" in call("fit", "hfi", "--phrase", WHAT, *of, *quick, "--out", out)
    esd = ["fit", "esd", "--phrase", "<scary-things>", *quick, "--set", "sampler_steps=2", "--out", change_]
    assert "Expected the learned word '<scary-things>'" in call(*esd, code=2)
    call(*esd, "--after", out)
    erase = ["erase", "a cat", "--images", "1", "--steps", "2", "--method", "sld", "--phrase"]
    assert "Expected the learned word" in call(*erase, "<scary-things>", "--out", judged / "a", code=2)
    call(*erase, "<scary-things>", "--delta", out, "--out", judged / "b")
    alone = ["erase", "a cat", "--delta", out, "--out", judged / "d"]
    assert "Expected a method that reads '<scary-things>', got none, so nothing would be erased" in call(*alone, code=2)
    call(*erase[:-1], "--delta", out, "--out", judged / "c")  # the file names its word
    both = [json.loads((judged / name / "record.json").read_text())["eraser"][1] for name in "bc"]
    assert [each["method"] for each in both] == ["sld", "sld"]
    assert [each["concepts"][0]["phrases"] for each in both] == [["<scary-things>"]] * 2
