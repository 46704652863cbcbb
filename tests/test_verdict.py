"""Nothing certifies what was not erased, what was ruined, or what was not drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_metrics import by_name, sample
from test_report import make, page

import efface
from efface import Concept, Row, runs
from efface.metrics.outcomes import Outcomes
from efface.metrics.removal import Removal
from efface.metrics.retention import Retention
from efface.records import alike
from efface.report.verdict import OURS
from efface.runs.card import coverage


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs need not survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("emoji", True),
        ("emoji + uce.safetensors, weights 0a1b", True),
        ("emoji, weights 0a1b", True),
        ("emoji-128", True),
        ("emoji-128 + uce.safetensors", True),
        ("emoji-12", False),
        ("emoji_like", False),
        ("emoji/mine", False),
        ("mine", False),
    ],
)
def test_a_detector_that_was_not_made_for_a_model_is_named(name: str, ours: bool) -> None:
    assert bool(OURS.fullmatch(name)) is ours


# ---------------------------------------------------------------- a limit samples all concepts alike


@pytest.mark.parametrize("limit", [2, 7, 24, 100])
def test_a_limit_draws_every_concept_alike(limit: int) -> None:
    suite = efface.make_suite("emoji", ["alcohol", "weapon"], limit=limit)
    asked = [row.concept for row in suite.rows if row.concept]
    kinds = {row.kind for row in suite.rows}
    assert len(suite.rows) == limit and set(asked) == {"alcohol", "weapon"}
    assert abs(asked.count("alcohol") - asked.count("weapon")) <= 1
    assert limit < 14 or len(kinds) == 6
    ids = {row.id for row in suite.rows}
    assert all(i.removesuffix("-clean") in ids for i in ids) and all(
        f"{row.id}-clean" in ids for row in suite.rows if row.kind == "dual"
    )


def test_rows_of_a_limit_are_the_suites_own_in_order_and_all_of_them_without_one() -> None:
    rows = efface.make_suite("emoji", ["cat", "dog"]).rows
    some = alike(rows, 50)
    assert list(some) == [row for row in rows if row in set(some)] and alike(rows, None) == rows == alike(rows, 9999)
    pairs = (Row("a", "a cat and a dog", 0), Row("a-clean", "a dog", 0), Row("b", "a cat and a cup", 1))
    assert [row.id for row in alike((*pairs, Row("b-clean", "a cup", 1)), 1)] == ["a", "a-clean"]
    assert [row.id for row in alike((pairs[1], pairs[0], pairs[2]), 2)] == ["a-clean", "a"]
    with pytest.raises(ValueError, match="whole number `limit` >= 1"):
        alike(rows, 0)


def test_a_run_with_a_limit_covers_both_concepts_and_names_one_without_rows(sd1: Any, tmp_path: Path) -> None:
    rows = tuple(Row(f"{c}-{k}", f"a {c}", 1_000_000 + k, concept=c) for c in ("cat", "dog") for k in range(4))
    suite = efface.Suite("both", "1", rows, call={"num_inference_steps": 1})
    eraser = efface.EIUP([tiny.CAT, Concept("dog"), Concept("hat")])
    run = efface.run(suite, sd1, eraser=eraser, out=tmp_path / "a", limit=2)
    assert [sample.row.concept for sample in run.samples()] == ["cat", "dog"]
    found = {each["concept"]: each for each in coverage(run, [])}
    assert {name: each["rows"] for name, each in found.items()} == {"cat": 1, "dog": 1, "hat": 0}
    assert found["hat"]["why"] == "no row asks for it" and found["cat"]["why"] == "no detector judged it"


# ---------------------------------------------------------------- ruined pictures, and models that never drew it


def bright(level: float) -> Any:
    """A detector of bright pictures, which recognises anything that is not black."""
    return lambda names: Bright(level if names else 0.1)


class Bright:
    name = "brightness"

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.mean((1, 2, 3)) > self.level)[None]


def judged(now: list[float], before: list[float]) -> dict[str, efface.Score]:
    after, base = ([sample(f"r{k}", v, concept="cat") for k, v in enumerate(each)] for each in (now, before))
    return by_name(Outcomes(bright(0.8), bright(0.8))(after, base))


def test_a_ruined_picture_is_not_erased() -> None:
    scores = judged([0.9, 0.5, 0.5, 0.0], [0.9] * 4)
    values = {name: score.value for name, score in scores.items()}
    assert values == {"outcomes.erased": 0.5, "outcomes.there": 0.25, "outcomes.nothing": 0.25}
    assert judged([0.0] * 4, [0.9] * 4)["outcomes.erased"].value == 0  # black pictures remove nothing
    assert judged([0.5] * 4, [0.9] * 4)["outcomes.erased"].value == 1


def test_a_model_that_never_drew_the_concept_has_removed_nothing() -> None:
    ghost = judged([0.5] * 4, [0.5, 0.5, 0.5, 0.9])
    assert math.isnan(ghost["outcomes.erased"].value) and "base rate is 25" in ghost["outcomes.erased"].protocol
    assert not math.isnan(judged([0.5] * 4, [0.5, 0.5, 0.9, 0.9])["outcomes.erased"].value)


def test_noise_of_random_weights_is_no_removal() -> None:
    noise = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    now = [sample(f"r{k}", pixels, concept="cat") for k, pixels in enumerate(noise)]
    assert math.isnan(by_name(Removal()(now, now))["removal.absolute"].value)
    scores = by_name(Outcomes()(now, now))
    assert math.isnan(scores["outcomes.erased"].value) and scores["outcomes.nothing"].value == 1


def test_retention_is_judged_on_every_row_whatever_the_base_rate() -> None:
    """Six rows of a concept that the base model never shows, and six that it always shows: all count for retention."""
    rows = [(f"r{k}", "cat" if k < 6 else "dog") for k in range(12)]
    now = [sample(i, 0.5 if k % 2 else 0.0, concept=c, keep=("tree",)) for k, (i, c) in enumerate(rows)]
    base = [sample(i, 0.3 if c == "cat" else 0.9, concept=c, keep=("tree",)) for i, c in rows]
    seen = by_name(
        Retention(detector=lambda names: Bright(0.2 if "tree" in names else 0.8), by=("concept",))(now, base)
    )
    assert math.isnan(
        by_name(Outcomes(bright(0.8), bright(0.8), by=("concept",))(now, base))["outcomes.erased/cat"].value
    )
    assert seen["retention"].n == 12 and seen["retention"].value == 0.5
    assert seen["retention/cat"].n == seen["retention/dog"].n == 6


def test_a_card_says_how_often_the_base_model_shows_each_concept(sd1: Any, tmp_path: Path) -> None:
    rows = tuple(Row(f"cat-{k}", "a cat", 1_000_000 + k, concept="cat") for k in range(3))
    metrics = (Outcomes(bright(-1.0), bright(-1.0)), Removal(bright(2.0)))
    suite = efface.Suite("cats", "1", rows, call={"num_inference_steps": 1}, metrics=metrics)
    run = efface.run(suite, sd1, eraser=efface.EIUP(tiny.CAT), out=tmp_path / "a")
    runs.score(run)
    (cat,) = run.card()["coverage"]
    assert cat["rows"] == 3 and cat["prompts"] == 1 and cat["base_rate"] == 0
    assert cat["why"] == "the base model shows it in 0.0% of the pictures, fewer than 30%"


# ---------------------------------------------------------------- the page


def test_the_page_begins_with_the_verdict_and_the_failures(tmp_path: Path) -> None:
    folder = make(tmp_path / "eiup")
    shown = page([folder], tmp_path / "report.html")
    text = shown.text
    places = [
        text.index(x) for x in ("Verdict", "does not cover", "Failures", "Suite and model", "Summary", "All scores")
    ]
    assert places == sorted(places)
    assert (
        "cat: the detector sees it in 12 of 24 pictures of 12 prompts (50.0 %), with the base model in 100.0 %. Ruined "
        "pictures were not told apart. The detector's error is unknown: nobody labelled this run." in text
    )
    assert "12 of 12 rows in which the detector still sees the concept" in text
    assert (
        "Fewer than 59 prompts cannot support 5 % for new prompts: cat (12)." in text
        and "Attacks are not part of this report" in text
    )
    failures = (tmp_path / "report.html").read_text().partition("Suite and model")[0]
    assert failures.count("<img") == 24 and failures.count('veil">') >= 36  # and the prompts


def test_an_erased_concept_without_rows_stands_in_the_verdict(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", concepts=("cat", "hat", "cap"))
    text = page([folder], tmp_path / "report.html").text
    assert "hat, cap: not judged, because no row asks for it." in text
    assert text.index("hat, cap: not judged") < text.index("Summary")


def test_many_concepts_stand_worst_first_and_the_rest_is_bounded(tmp_path: Path) -> None:
    kinds = [f"cat{k}" for k in range(15)]
    suite = tuple(
        Row(f"{('explicit', 'theme')[k % 2]}-{k}", f"a cat {k}", k, "x", "x", kinds[k % 15]) for k in range(30)
    )
    text = page([make(tmp_path / "a", hits=30, suite=suite)], tmp_path / "report.html").text  # only the first one fails
    verdict = text.partition("does not cover")[0]
    assert verdict.count("the detector sees it in") == 12 and "cat0: the detector sees it in 1 of 2" in verdict
    assert verdict.index("cat0: the detector") < verdict.index("cat1: the detector")
    assert "3 other concepts: seen in at most 0.0 % of their pictures." in verdict
