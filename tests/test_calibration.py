"""Calibration finds the smallest strength that does it, says so when none does, and goes on where it stopped.

The pipeline is a stand-in with a known answer: the concept of picture `seed` goes at strength `(seed % 100) / 50`, its
other content at three times that.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import efface
from efface import calibration
from efface.calibration import same_picture
from efface.intervals import Rate, wilson
from efface.pictures import likeness

CAT = efface.Concept("cat", keep=("a dog",))
FAST = {"n": 100, "first_seed": 1_000, "refine": 0, "batch": 30, "kept": None}


class Pipe:
    """Pictures with the concept in the red channel and the rest in the green one."""

    def __init__(self, rest: float = 3.0, shows: float = 1.0) -> None:
        self.strength, self.rest, self.shows, self.drawn, self.stop = 0.0, rest, shows, 0, 10**9

    def __call__(self, prompt: list[str], *, generator: list[torch.Generator], **call: Any) -> Any:
        assert set(call) == {"num_inference_steps", "output_type"}
        self.drawn += len(prompt)
        if self.drawn > self.stop:
            raise KeyboardInterrupt
        at = torch.tensor([g.initial_seed() % 100 for g in generator]) / 50
        concept = (at >= self.strength) & (at < 2 * self.shows)
        rest = at * self.rest >= self.strength if self.strength else torch.ones(len(at), dtype=torch.bool)
        images = torch.zeros(len(prompt), 3, 16, 16)
        images[:, 0], images[:, 1] = concept.float()[:, None, None], rest.float()[:, None, None]
        return SimpleNamespace(images=images)


@dataclass(frozen=True)
class Weaken:
    strength: float = 1.0

    def apply(self, pipe: Pipe) -> Any:
        pipe.strength = self.strength
        return SimpleNamespace(remove=lambda: setattr(pipe, "strength", 0.0))


@dataclass(frozen=True)
class Fixed:
    alpha: float = 1.0
    apply = Weaken.apply


class Red:
    name = "red"

    def __call__(self, images: Tensor) -> Tensor:
        seen = images[:, 0].mean((1, 2)) > 0.5
        return torch.stack([seen, seen & (torch.arange(len(seen)) % 2 == 0)])  # the second judge is half blind


def green(erased: Tensor, plain: Tensor) -> Tensor:
    assert bool((plain[:, 1] == 1).all())
    return erased[:, 1].mean((1, 2)) > 0.5


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efface.api.model_hash", lambda pipe: "0" * 64)
    monkeypatch.setattr("efface.delta.present", lambda pipe: {"scheduler": {"class": "None"}, "rest": pipe.rest})


def calibrate(pipe: Pipe, **settings: Any) -> calibration.Calibration:
    return efface.calibrate(pipe, Weaken(), CAT, Red(), **{**FAST, "kept": green, **settings})


def test_the_smallest_strength_that_reaches_both_goals() -> None:
    found = calibrate(Pipe(rest=100.0), strengths=[4.0, 1.0, 2.0], target=0.03, keep=0.95)
    assert [p.strength for p in found.points] == [1.0, 2.0]  # 4 is not needed
    assert found.strength == found.best.strength == 2.0
    assert (found.points[0].left, found.points[1].left) == (Rate(50, 100), Rate(0, 100))
    assert found.points[1].kept == Rate(99, 100)
    assert found.plain == Rate(50, 100)  # by the judge that sees less, while 100 were there
    assert "Strength 2: residual rate 0.0 % [0.0, 3.7]" in str(found)


def test_refining_halves_the_gap_below() -> None:
    found = calibrate(Pipe(rest=100.0), strengths=[1.0, 2.0], target=0.25, refine=3)
    assert [p.strength for p in found.points] == [1.0, 1.25, 1.375, 1.5, 2.0]
    assert found.strength == 1.5 and found.best.left == Rate(25, 100)
    assert calibrate(Pipe(rest=100.0), strengths=[2.0], target=1.0, refine=2).strength == 0.5  # down towards 0


def test_when_nothing_reaches_it_the_best_trade_off_is_named() -> None:
    found = calibrate(Pipe(rest=1.0), strengths=[0.25, 0.5, 1.0, 2.0], target=0.03, keep=0.9)
    assert found.strength is None
    lacks = {p.strength: (p.left.rate - 0.03) + max(0.9 - p.kept.rate, 0) for p in found.points}
    assert found.best.strength == min(lacks, key=lambda s: lacks[s]) and len(found.points) == 4
    said = "No strength from 0.25 to 2 reaches residual rate <= 3 %, retention >= 90 %. The best trade-off is"
    assert said in str(found)
    assert found.record()["strength"] is None


def test_it_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    settings = {"strengths": [0.5, 1.0, 2.0], "target": 0.03, "keep": 0.5, "refine": 1}
    whole, pipe = calibrate(Pipe(), **settings), Pipe()
    pipe.stop = 500  # in the second strength
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, **settings, out=tmp_path / "c")
    assert pipe.strength == 0.0
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"setting.json", "plain.json", "strength-0.5.json"}
    pipe = Pipe()
    assert calibrate(pipe, **settings, out=tmp_path / "c") == whole
    assert pipe.drawn == 100 + 3 * 200  # plain pictures of the other prompts once more, and three strengths
    again = Pipe()
    assert calibrate(again, **settings, out=tmp_path / "c") == whole
    assert again.drawn == 0
    record = json.loads((tmp_path / "c/calibration.json").read_text())
    assert record["strength"] == whole.strength and record["model"] == "0" * 64
    assert len(record["best"]["left"]["interval"]) == 2
    with pytest.raises(
        ValueError, match="(?s)call.num_inference_steps: null there, 3 here.*present.rest: 3.0 there.*Name a new folder"
    ):
        calibrate(Pipe(rest=2.0), **settings, out=tmp_path / "c", num_inference_steps=3)
    with pytest.raises(ValueError, match=r"(?s)prompts\[0\]: .*n: 100 there, 50 here"):
        calibrate(Pipe(), **settings, out=tmp_path / "c", n=50, prompts=["a lion"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no calibration"):
        calibrate(Pipe(), **settings, out=tmp_path / "mine")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_seed": 9_900}, "Expected tuning seeds"),
        ({"first_seed": 1_000_000}, "Expected tuning seeds"),
        ({"strengths": [0.0, 1.0]}, "Expected `strengths`"),
        ({"strengths": []}, "Expected `strengths`"),
        ({"target": 3}, "Expected `target`"),
        ({"keep": -0.1}, "Expected `keep`"),
        ({"strengths": 1.0}, "Expected `strengths`"),
        ({"n": 0}, "Expected a whole number `n` >= 1, got 0"),
        ({"refine": -1}, "number `refine` >= 0"),
        ({"batch": 0}, "number `batch` >= 1"),
        ({"plot": True}, "Expected `out` for the plot"),
        ({"prompts": "a cat"}, r"`prompts` to be a sequence of texts, .* Write \('a cat',\)"),
        ({"keep_prompts": "a dog"}, "`keep_prompts` to be a sequence of texts"),
        ({"detector": green}, "a detector with a text `name`"),
        ({"detector": Red}, "Expected a detector"),
        ({"concept": ["cat", "alcohol"]}, "Expected one concept, got 2"),
        (
            {"concept": "cat", "eraser": efface.EIUP("alcohol")},
            "EIUP erases 'alcohol', but the judged concept is 'cat'",
        ),
        ({"eraser": efface.EIUP(rows=[["cat"]])}, "EIUP erases by rows, but"),
        ({"eraser": efface.EIUP}, r"got the class EIUP. Write for example EIUP\('alcohol'\)"),
        ({"eraser": "eiup"}, "got 'eiup'. Pass method names to efface.erase"),
        ({"eraser": [Weaken()]}, r"got \[Weaken.*\. Apply them one by one"),
        ({"out": __file__}, "Expected `out` to be a folder, got the file"),
    ],
)
def test_bad_settings_are_found_before_anything_is_drawn(settings: dict[str, Any], message: str) -> None:
    pipe, given = Pipe(), {"eraser": Weaken(), "concept": CAT, "detector": Red(), **FAST, "kept": green, **settings}
    with pytest.raises((ValueError, TypeError), match=message):
        efface.calibrate(pipe, **given)
    assert pipe.drawn == 0


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"left": [[1, 0]]}', '{"left": [["a"], 3]}', '{"left": []}'])
@pytest.mark.parametrize("file", ["setting", "plain", "strength-1"])
def test_a_damaged_file_is_named_with_its_cure(file: str, damage: str, tmp_path: Path) -> None:
    settings = {"strengths": [1.0], "n": 10, "out": tmp_path / "c"}
    calibrate(Pipe(), **settings)
    (tmp_path / f"c/{file}.json").write_text(damage)
    with pytest.raises(ValueError, match=rf"{file}\.json.*\. Delete it|Name a new folder") as error:
        calibrate(Pipe(), **settings)
    assert file in str(error.value) or damage.startswith('{"')


def test_what_cannot_be_told_is_said() -> None:
    with pytest.raises(ValueError, match=r"shows 'cat' in 10 of 100 pictures, fewer than 30%"):
        calibrate(Pipe(shows=0.2))
    with pytest.raises(ValueError, match="counts none of the base model's pictures"):
        calibrate(Pipe(), kept=lambda erased, plain: torch.full((1, len(plain)), -1))
    with pytest.raises(ValueError, match="no prompts for the retention of 'dog'"):
        efface.calibrate(Pipe(), Weaken(), efface.Concept("dog"), Red())
    with pytest.raises(ValueError, match="Fixed has no `strength`"):
        efface.calibrate(Pipe(), Fixed(), CAT, Red())


def test_entries_below_zero_do_not_count() -> None:
    def half(erased: Tensor, plain: Tensor) -> Tensor:
        return torch.where(torch.arange(len(plain)) % 2 == 0, green(erased, plain).int(), -1)[None]

    assert calibrate(Pipe(), kept=half, strengths=[1.0]).points[0].kept.n == 50


def test_a_plot_is_a_picture_and_its_absence_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    calibrate(Pipe(), strengths=[0.5, 1.0], out=tmp_path, plot=True)
    assert Image.open(tmp_path / "calibration.png").size == (550, 440)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    pipe = Pipe()
    with pytest.raises(ImportError, match=r'pip install "efface\[bench\]"'):
        calibrate(pipe, out=tmp_path / "new", plot=True)
    assert pipe.drawn == 0 and not (tmp_path / "new").exists()


# ---------------------------------------------------------------- what it counts with


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_solves_its_equation(counts: tuple[int, int]) -> None:
    """An end p of the interval is where the rate is Z standard errors of p away."""
    hits, n = counts
    low, high = wilson(hits, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= hits / n <= high
        for end in {low, high} - {0.0, 1.0}:
            assert (hits / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-6, abs=1e-12)
        mirrored = wilson(n - hits, n)
        assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_wilson_knows_the_textbook_and_its_bounds() -> None:
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)  # Newcombe 1998, table I, method 3
    assert wilson(0, 0) == (0.0, 1.0)
    for hits, n in ((-1, 3), (4, 3)):
        with nullcontext(), pytest.raises(ValueError, match="number `hits`"):
            wilson(hits, n)


def test_likeness_knows_a_picture_again_and_not_another() -> None:
    random = torch.Generator().manual_seed(1)
    a, b = torch.rand(4, 3, 16, 16, generator=random), torch.rand(4, 3, 16, 16, generator=random)
    assert float(likeness(a, a).min()) > 0.999 and float(likeness(a, b).max()) < 0.3
    assert float(likeness(a, 0.5 * a + 0.2).min()) > 0.999  # light and contrast do not matter
    assert torch.equal(likeness(a, torch.ones_like(a)), torch.zeros(4))  # a blank picture is like nothing
    assert same_picture(a, a).tolist() == [[True] * 4] and not same_picture(a, b).any()
