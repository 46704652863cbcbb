"""Runs are compared on equal rows only, one comparison is primary, and the others are adjusted together."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_judge import labelled
from test_report import Judge, make, rows
from typer.testing import CliRunner

import efface
from efface import Sample, Score, runs
from efface.cli import app
from efface.feedback import Store
from efface.intervals import difference, holm


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs need not survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: every third, every second, and every picture of a cat still shows it."""
    folder = tmp_path_factory.mktemp("runs")
    for name, hits in (("eiup", 3), ("sld", 2), ("nag", 1)):
        make(folder / name, name, hits)
    return folder


def test_pairs_are_compared_row_by_row_and_all_but_the_first_adjusted(made: Path) -> None:
    card = efface.compare([made / name for name in ("nag", "eiup", "sld")])
    pairs = [(each["a"], each["b"], each["primary"]) for each in card["comparisons"]]
    assert pairs == [("nag", "eiup", True), ("nag", "sld", False), ("eiup", "sld", False)]
    suite = [row for row in rows() if row.concept]
    shown = {hits: [int(rows().index(row) % hits == 0) for row in suite] for hits in (1, 2, 3)}
    for each, (a, b) in zip(card["comparisons"], ((1, 3), (1, 2), (3, 2)), strict=True):
        want = difference(shown[a], shown[b], [row.prompt for row in suite])
        assert each["difference"] == want.value and each["interval"] == list(want.interval) and each["p"] == want.p
    assert card["comparisons"][0]["difference"] == 0.5 and "p_holm" not in card["comparisons"][0]
    rest = card["comparisons"][1:]
    assert [each["p_holm"] for each in rest] == holm([each["p"] for each in rest])
    assert card["rows"] == 24 and card["prompts"] == 12 and card["comparisons"][0]["concepts"] == []
    assert card["notes"] == ["Ruined pictures were not told apart in nag, eiup, sld, so they may look erased."]
    kept = efface.compare([made / "nag", made / "eiup"], metric="retention")
    assert kept["rows"] == 36 and kept["comparisons"][0]["difference"] == 0


def test_the_figure_and_the_command_show_the_same(made: Path, tmp_path: Path) -> None:
    words = ["compare", *(str(made / name) for name in ("nag", "eiup", "sld")), "--figure", str(tmp_path / "a.svg")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "+50.0" in done.stdout and "primary" in done.stdout and "Holm" in done.stdout
    assert "nag − eiup (primary)" in (tmp_path / "a.svg").read_text()
    card = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert card["comparisons"][0]["difference"] == 0.5
    bad = CliRunner().invoke(app, ["compare", str(made / "nag"), str(made / "sld"), "--figure", "a.png"])
    assert bad.exit_code == 2 and "named .svg" in bad.output
    assert CliRunner().invoke(app, ["compare", str(made / "nag")]).exit_code == 2


@dataclasses.dataclass(frozen=True)
class Strict(Judge):
    """Says of a picture without a cat whether it is ruined."""

    ruined: bool = False
    kept_by: str = ""

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        scores = {score.metric: score for score in super().__call__(samples, base)}
        gone = scores["removal.absolute"].per_sample or {}
        scores["retention"] = dataclasses.replace(scores["retention"], protocol=self.kept_by or self.protocol)
        nothing = {row: value * self.ruined for row, value in gone.items()}
        erased = {row: value * (not self.ruined) for row, value in gone.items()}
        return [
            *scores.values(),
            self.share("outcomes.nothing", nothing, False),
            self.share("outcomes.erased", erased, True),
        ]


def test_a_run_that_ruins_pictures_wins_no_comparison_in_silence(tmp_path: Path) -> None:
    pair = [
        make(tmp_path / "sld", "sld", 3, judge=Strict()),
        make(tmp_path / "bad", "bad", 99, judge=Strict(ruined=True)),
    ]
    card = efface.compare(pair)
    assert card["comparisons"][0]["difference"] > 0  # the detector sees fewer cats in ruined pictures
    assert "without the concept: sld 0.0 %, bad 95.8 %. `--metric erased`" in card["notes"][0]
    erased = efface.compare(pair, metric="erased")["comparisons"][0]
    assert erased["difference"] == 0.5 and erased["interval"][0] > 0
    with pytest.raises(ValueError, match="to be scored by `outcomes`, got other scores"):
        efface.compare([pair[0], make(tmp_path / "nag", "nag", 1)], metric="erased")
    other = make(tmp_path / "other", "nag", 3, judge=Strict(kept_by="another detector"))
    with pytest.raises(ValueError, match="one detector judged, got another detector and mean red"):
        efface.compare([pair[0], other], metric="retention")


def test_a_difference_is_shown_for_each_concept(tmp_path: Path) -> None:
    both = tuple(dataclasses.replace(row, concept="dog") if row.kind == "theme" else row for row in rows())
    pair = [make(tmp_path / name, name, hits, suite=both) for name, hits in (("nag", 1), ("eiup", 2))]
    (apart,) = efface.compare(pair)["comparisons"]
    found = {each["concept"]: (each["rows"], each["difference"]) for each in apart["concepts"]}
    even = [k % 2 == 0 for k, row in enumerate(both) if row.concept == "dog"]
    assert found["dog"] == (12, 1 - sum(even) / 12) and found.keys() == {"cat", "dog"}
    assert sum(n * value for n, value in found.values()) / 24 == pytest.approx(apart["difference"])
    done = CliRunner().invoke(app, ["compare", *map(str, pair)], env={"COLUMNS": "160"})
    assert done.exit_code == 0 and "  dog" in done.stdout and "nag - eiup" in done.stdout


def test_runs_that_have_only_a_part_in_common_are_compared_on_it_with_a_note(made: Path, tmp_path: Path) -> None:
    some = make(tmp_path / "sld", "sld", 2, suite=rows()[:18])
    card = efface.compare([made / "eiup", some])
    assert card["rows"] == 12
    assert card["notes"][0] == "Only the 12 rows that all runs share are compared (eiup: 24, sld: 12)."
    seeds = tuple(dataclasses.replace(row, seed=row.seed + 900) for row in rows())
    with pytest.raises(ValueError, match="equal rows and seeds, got none in common"):
        efface.compare([made / "eiup", make(tmp_path / "seeds", "sld", suite=seeds)])


def test_runs_that_must_not_be_compared_are_refused(made: Path, tmp_path: Path) -> None:
    record = runs.Run.open(made / "eiup").record
    others: dict[str, dict[str, Any]] = {
        "sampling": {"call": {"guidance_scale": 3}},
        "model's text_hash": {"model": record["model"] | {"text_hash": "0b"}},
        "one detector judged": {"judge": Judge("another detector")},
    }
    for k, (why, changed) in enumerate(others.items()):
        with pytest.raises(ValueError, match=why):
            efface.compare([made / "eiup", make(tmp_path / f"{k}", "sld", **changed)])
    with pytest.raises(ValueError, match="`metric` to be one of"):
        efface.compare([made / "eiup", made / "sld"], metric="beauty")
    card = make(tmp_path / "dogs", "sld") / "card.json"
    card.write_text(card.read_text().replace('"name": "cats"', '"name": "dogs"'))
    with pytest.raises(ValueError, match="the same suite, got 'cats' in eiup and 'dogs' in sld"):
        efface.compare([made / "eiup", tmp_path / "dogs"])


def test_labels_correct_the_difference(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "runs")
    some = make(tmp_path / "some", "sld", 2, suite=rows()[:18])
    with Store(tmp_path / "labels.db") as store:
        for name in ("eiup", "nag"):
            labelled(store, tmp_path / "runs" / name)
        card = efface.compare([tmp_path / "runs" / name for name in ("nag", "eiup")], labels=store)
        (cat,) = card["comparisons"][0]["corrected"]
        low, high = cat["interval"]
        assert cat["difference"] == 0.5 and low < 0.5 < high and low > 0
        labelled(store, some)
        part = efface.compare([tmp_path / "runs/nag", some], labels=store)  # labels are of rows that it lacks
        assert part["comparisons"][0]["corrected"] == [] and "Labels correct no difference" in part["notes"][-1]
        with pytest.raises(ValueError, match="Expected labels of"):
            efface.compare([tmp_path / "runs" / name for name in ("nag", "sld")], labels=store)
        with pytest.raises(ValueError, match="for the metric 'residual' only"):
            efface.compare([made / "nag", made / "eiup"], metric="retention", labels=store)
