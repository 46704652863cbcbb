"""People label a run without knowing what drew it, and their labels correct what a detector says."""

from __future__ import annotations

import http.client
import json
import math
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_cli import call
from test_report import CHROMIUM, FLAGS, Judge, make, page
from typer.testing import CliRunner

import efface
from efface import files, runs
from efface.cli import app
from efface.feedback import (
    FINAL,
    Item,
    Session,
    Store,
    choose_pass,
    differing,
    judgements_of,
    read_sheets,
    write_sheets,
)
from efface.feedback.page import Page
from efface.intervals import clopper_pearson
from efface.runs import sample
from efface.runs.sample import run_id

NOW = "2026-01-01T00:00:00+00:00"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs need not survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "eiup").parent


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A run with 24 pictures of rows that ask for a cat. The detector sees it in 12, and in all 24 of the base run."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "eiup"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "labels.db")


def drawn(store: Store, folder: Path, **sizes: int) -> list[Item]:
    return runs.draw_items(store, runs.Run.open(folder), "cat", sizes or None)


def truth(item: Item) -> str:
    """The detector is right, except for one miss and one false alarm in the run."""
    if item.row in ("explicit-0", "theme-3") and item.details["of"] == 12:
        return "nothing" if item.row == "explicit-0" else "there"
    return "there" if item.details["stratum"] == "positive" else "other"


def people(
    store: Store, items: list[Item], annotator: str, number: int, says: Callable[[Item], str] = truth
) -> Session:
    session = Session(store, items, "cat", annotator, number)
    store.add([session.judgement(session.items[k], says(session.items[k])) for k in session.left])
    return session


def labelled(store: Store, folder: Path, **sizes: int) -> list[Item]:
    items = drawn(store, folder, **sizes)
    people(store, items, "ana", 1)
    people(store, items, "ben", 2)
    return items


def score(folder: Path, store: Store) -> list[dict[str, Any]]:
    runs.score(folder, [Judge()], labels=store)
    return runs.Run.open(folder).card()["labels"]


# ---------------------------------------------------------------- correction


def test_cards_and_reports_hold_the_corrected_rate_beside_the_raw_one(store: Store, folder: Path) -> None:
    items = labelled(store, folder)
    assert len(items) == 48 and len({item.run for item in items}) == 2
    (facts,) = score(folder, store)
    run, base = facts["run"], facts["base"]
    assert (run["raw"]["hits"], run["n"], run["rate"]) == (12, 24, 0.5)  # a miss and a false alarm cancel
    assert [(s["name"], s["hits"], s["n"], s["size"]) for s in run["strata"]] == [
        ("positive", 11, 12, 12),
        ("negative", 1, 12, 12),
    ]
    assert run["interval"] == pytest.approx(clopper_pearson(12, 24)) and base["rate"] == 1
    assert facts["difference"]["value"] == 0.5 and facts["difference"]["interval"][0] > 0.1
    assert facts["agreement"] == {
        **{"annotators": ["ana", "ben"], "pictures": 48, "differ": 0, "alpha": 1.0},
        "interval": [pytest.approx(facts["agreement"]["interval"][0]), 1.0],
    }
    assert run["outcomes"] == {"there": 0.5, "other": 11 / 24, "nothing": 1 / 24}
    assert run["new_prompts"] == {"prompts": 12, "hits": 11, "upper": pytest.approx(0.95 ** (1 / 12))}
    scores = {s.metric: s for s in runs.Run.open(folder).scores()[0]}
    assert scores["removal.corrected"].value == 0.5 and scores["removal.absolute"].value == 0.5
    assert "corrected by people's labels" in scores["removal.corrected"].protocol
    shown = page([folder], folder.parent / "report.html").text
    assert "cat: how often the detector is right" in shown and "positive: 11 of 12" in shown
    assert "for new seeds of these prompts, not for new prompts" in shown and "removal.corrected" in shown
    assert "nothing recognisable in 4.2 %" in shown and "fewer than 59 prompts cannot support" in shown


def test_a_ruined_picture_is_removed_but_not_erased_by_labels(store: Store, folder: Path) -> None:
    def ruins(item: Item) -> str:
        return "there" if item.details["stratum"] == "positive" else "nothing"

    items = drawn(store, folder)
    for number, who in enumerate(("ana", "ben"), 1):
        people(store, items, who, number, ruins)
    score(folder, store)
    scores = {s.metric: s for s in runs.Run.open(folder).scores()[0]}
    assert scores["removal.corrected"].value == 0.5 and scores["erased.corrected"].value == 0
    assert scores["erased.corrected"].high == pytest.approx(clopper_pearson(0, 24)[1])


def test_labels_that_see_nothing_in_the_base_model_meet_no_bar(store: Store, folder: Path) -> None:
    """Somebody who always presses the same key."""
    items = drawn(store, folder)
    for number, who in enumerate(("ana", "ben"), 1):
        people(store, items, who, number, lambda item: "other")
    (facts,) = score(folder, store)
    assert facts["run"]["rate"] == 0
    scores = {s.metric: s for s in runs.Run.open(folder).scores()[0]}
    assert math.isnan(scores["removal.corrected"].low) and math.isnan(scores["erased.corrected"].low)
    assert "people see it in 0.0% of the base model's pictures" in scores["removal.corrected"].protocol


def test_a_sample_is_weighted_by_its_stratum(store: Store, folder: Path) -> None:
    def wrong_in_negatives(item: Item) -> str:
        return "there"

    items = drawn(store, folder, positive=3, negative=5)
    assert sorted(item.details["stratum"] for item in items) == ["negative"] * 5 + ["positive"] * 6
    people(store, items, "ana", 1, wrong_in_negatives)
    people(store, items, "ben", 2, lambda item: "other" if item.details["stratum"] == "positive" else "nothing")
    people(store, items, "ana", FINAL, lambda item: "other" if item.details["stratum"] == "positive" else "there")
    (facts,) = score(folder, store)
    assert facts["run"]["rate"] == 0.5 and facts["run"]["raw"]["rate"] == 0.5  # all missed, none right
    assert [s["hits"] for s in facts["run"]["strata"]] == [0, 5] and facts["base"]["rate"] == 0
    assert facts["run"]["outcomes"] == {"there": 0.5, "other": 0.5, "nothing": 0} and not facts["run"]["new_prompts"]
    assert facts["agreement"]["alpha"] < 0 and facts["agreement"]["differ"] == 11


def test_a_report_takes_labels_without_scoring_again(store: Store, folder: Path) -> None:
    labelled(store, folder)
    before = (folder / "card.json").read_bytes()
    assert "how often the detector is right" not in page([folder], folder.parent / "a.html").text
    shown = page([folder], folder.parent / "b.html", labels=store).text
    assert "cat: how often the detector is right" in shown and (folder / "card.json").read_bytes() == before
    numbers = json.loads((folder.parent / "b.json").read_text())
    assert numbers["groups"][0]["runs"][0]["labels"][0]["run"]["rate"] == 0.5


def test_two_runs_share_the_labels_of_their_base_run(store: Store, folder: Path, tmp_path: Path) -> None:
    labelled(store, folder)
    shutil.copytree(folder, tmp_path / "copy")
    items = drawn(store, tmp_path / "copy")
    assert Session(store, items, "cat", "ana", 1).left == []  # a copy is the same run
    record = json.loads((tmp_path / "copy/run.json").read_text())
    record["erasers"][0]["method"] = "sld"
    (tmp_path / "copy/run.json").write_text(json.dumps(record))
    items = drawn(store, tmp_path / "copy")
    left = Session(store, items, "cat", "ana", 1).left
    assert len(left) == 24 and len(items) == 48


def test_near_the_threshold_is_a_stratum_where_the_detector_has_scores(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_close", lambda judge, samples: [s.row.id.endswith(("1", "2")) for s in samples])
    items = [item for item in labelled(store, folder) if item.details["of"] < 24]
    strata = {name: [i.row for i in items if i.details["stratum"] == name] for name in ("positive", "near", "negative")}
    assert len(strata["positive"]) == 12 and sorted(strata["near"]) == ["theme-1", "theme-11", "theme-2"]
    (facts,) = score(folder, store)
    assert [(s["name"], s["size"]) for s in facts["run"]["strata"]] == [("positive", 12), ("near", 3), ("negative", 9)]
    assert facts["run"]["rate"] == 11 / 24  # the miss in theme-3 has another size of stratum here


def test_the_detector_is_the_one_that_scored_and_no_file_that_a_folder_names(tmp_path: Path) -> None:
    eyes, nude = efface.detector("eyes", "cat"), efface.detector({"name": "nudenet", "threshold": 0.3}, "nudity")
    metrics = [
        {"method": "removal", "detector": {"name": "classifier", "folder": str(tmp_path)}, "by": ["kind"]},
        {"method": "somewhere:Else", "detector": "eyes"},
        {"method": "clip_score", "clip": "emoji"},
    ]
    assert sample._judge(metrics, eyes.name, "cat") is None
    metrics += [{"method": "detection", "detector": "eyes"}]
    metrics += [{"method": "removal", "detector": {"name": "nudenet", "threshold": 0.3}}]
    assert sample._judge(metrics[:-1], eyes.name, "cat") == eyes
    assert sample._judge(metrics[-1:], nude.name, "nudity") == nude
    assert sample._judge(metrics[-1:], eyes.name, "nudity") is None


# ---------------------------------------------------------------- labels that do not fit


def test_labels_of_another_run_or_version_or_picture_are_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected labels of .*eiup in the store .*, got labels of 0 other runs"):
        score(folder, store)
    labelled(store, make(tmp_path / "other", "sld"))
    with pytest.raises(ValueError, match=r"got labels of 2 other runs. Label this run with `efface judge label`"):
        score(folder, store)
    labelled(store, folder)
    for changed, message in (
        ({"picture": "f" * 64}, r"to be of the picture in .*eiup, got one of another picture \(SHA-256\)"),
        ({"model": "f" * 64}, "to be of the model of .*eiup, got one of another model"),
        ({"details": {"stratum": "positive", "of": 12, "drawn": 12, "detector": "x"}}, "as it did when the picture"),
    ):
        tampered = Store(tmp_path / f"{len(message)}.db")
        given = store.judgements()
        at = next(k for k, e in enumerate(given) if e.run == run_id(runs.Run.open(folder)) and e.row == "explicit-3")
        tampered.add([replace(each, **changed) if k == at else each for k, each in enumerate(given)])
        with pytest.raises(ValueError, match=message):
            score(folder, tampered)
    score(folder, store)  # which fits


def test_one_pass_is_not_enough_and_one_annotator_is_named(store: Store, folder: Path) -> None:
    items = drawn(store, folder)
    people(store, items, "ana", 1)
    before = (folder / "scores.json").read_bytes()
    with pytest.raises(
        ValueError, match="Expected two independent passes over the 24 labelled pictures .* one pass for 24"
    ):
        score(folder, store)
    assert (folder / "scores.json").read_bytes() == before
    people(store, items, "ana", 2)
    assert score(folder, store)[0]["agreement"]["annotators"] == ["ana"]
    assert "1 annotator" in page([folder], folder.parent / "report.html").text
    said = call("judge", "agreement", store.name)
    assert "One annotator made all passes, so alpha measures consistency" in said


def test_a_part_of_the_sample_is_not_enough(store: Store, folder: Path) -> None:
    items = drawn(store, folder)
    people(store, items[:30], "ana", 1)
    people(store, items[:30], "ben", 2)
    with pytest.raises(
        ValueError, match=r"Expected labels of all \d+ pictures drawn from .*, got \d+. Finish the passes"
    ):
        score(folder, store)


def test_contradictory_passes_are_listed_and_decided_by_a_third(store: Store, folder: Path) -> None:
    items = drawn(store, folder)
    with pytest.raises(ValueError, match="Expected two complete passes before pass 3, got fewer for 48 of 48"):
        Session(store, items, "cat", "cai", FINAL)
    people(store, items, "ana", 1)
    people(store, items, "ben", 2, lambda item: "there" if item.row == "theme-5" else truth(item))
    apart = differing(store.judgements())
    assert [row for _, row in apart] == ["theme-5"]  # only in the run, where it is not there for ana
    assert score(folder, store)[0]["run"]["rate"] == 13 / 24  # a tie counts as there
    third = Session(store, items, "cat", "cai", FINAL)
    assert [item.row for item in third.items] == ["theme-5"]
    third.answer(0, "nothing")
    facts = score(folder, store)[0]
    assert facts["run"]["rate"] == 0.5 and facts["agreement"]["differ"] == 1  # the third pass changes no agreement
    assert Session(store, items, "cat", "cai", FINAL).left == []


def test_an_empty_stratum_is_no_error(store: Store, tmp_path: Path) -> None:
    folder = make(tmp_path / "all", hits=100)  # only row 0 is detected; in the base run all are, so no negatives there
    items = labelled(store, folder)
    (facts,) = score(folder, store)
    assert [(s["name"], s["size"]) for s in facts["base"]["strata"]] == [("positive", 24), ("negative", 0)]
    assert len(items) == 48 and "negative: 0 of 0" in page([folder], tmp_path / "report.html").text


def test_a_detector_that_answers_differently_by_now_is_refused(store: Store, folder: Path) -> None:
    labelled(store, folder)
    with pytest.raises(ValueError, match="Expected the detector to answer for row .* as it did"):
        runs.score(folder, [Judge("another detector")], labels=store)


def test_a_picture_that_is_gone_or_changed_is_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    items = drawn(store, folder)
    session = Session(store, items, "cat", "ana", 1)
    picture = folder / "images/explicit-3.png"
    old = picture.read_bytes()
    picture.write_bytes(old[:-1] + b"x")
    with pytest.raises(ValueError, match=r"explicit-3\.png is not the picture that was drawn"):
        write_sheets(session, tmp_path / "sheets")
    assert not (tmp_path / "sheets").exists()
    picture.unlink()
    with pytest.raises(FileNotFoundError):
        write_sheets(session, tmp_path / "sheets")
    with pytest.raises(ValueError, match="is not finished and has 28 of 36 pictures"):
        drawn(store, folder)


def test_a_run_that_was_drawn_again_is_another_version(store: Store, folder: Path) -> None:
    """Same settings, so the same run, but another machine drew other pixels."""
    items = labelled(store, folder)
    Image.new("RGB", (64, 64), (255, 200, 1)).save(folder / "images/explicit-3.png")
    content = (folder / "images/explicit-3.png").read_bytes()
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        if line["row"]["id"] == "explicit-3":
            line |= {"sha256": files.sha256(content), "bytes": len(content)}
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {item.run for item in items} >= {run_id(runs.Run.open(folder))}
    with pytest.raises(ValueError, match="picture of row 'explicit-3' of .* to be the one that the store has drawn"):
        drawn(store, folder)
    with pytest.raises(ValueError, match=r"row 'explicit-3' .* got one of another picture \(SHA-256\)"):
        score(folder, store)


def test_a_sample_is_random_and_its_seed_decides_it(folder: Path, tmp_path: Path) -> None:
    samples = []
    for k in range(6):
        with Store(tmp_path / f"{k}.db") as store:
            items = runs.draw_items(store, runs.Run.open(folder), "cat", {"negative": 4, "positive": 4}, seed=k // 2)
            samples.append(frozenset((item.run, item.row) for item in items))
    assert samples[0::2] == samples[1::2] and len(set(samples)) == 3


def test_a_store_keeps_one_sample_of_a_run(store: Store, folder: Path) -> None:
    first = drawn(store, folder, positive=4, negative=3)
    assert drawn(store, folder) == first == drawn(store, folder, positive=4, negative=3)
    with pytest.raises(
        ValueError, match=r"Expected the sizes of the sample .*positive 4, near 50, negative 3.*got.*negative 9"
    ):
        drawn(store, folder, positive=4, negative=9)
    with pytest.raises(ValueError, match="`--concept` to be one of 'cat', got 'dog'"):
        runs.draw_items(store, runs.Run.open(folder), "dog")


# ---------------------------------------------------------------- blind


def test_the_order_hides_run_stratum_and_row_and_differs_in_each_pass(store: Store, folder: Path) -> None:
    items = drawn(store, folder)
    orders = [
        [(i.run, i.row) for i in Session(store, items, "cat", who, n).items]
        for who, n in (("ana", 1), ("ana", 1), ("ana", 2), ("ben", 1))
    ]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    first = [run for run, _ in orders[0][:24]]
    assert 6 <= first.count(first[0]) <= 18  # mixed, not one after the other


def test_what_an_annotator_gets_names_no_method_prompt_or_answer(store: Store, folder: Path, tmp_path: Path) -> None:
    session = Session(store, drawn(store, folder), "cat", "ana", 1)
    write_sheets(session, tmp_path / "sheets")
    texts = (tmp_path / "sheets/answers.csv").read_text() + (tmp_path / "sheets/sheets.json").read_text()
    with Page(session) as served:
        texts += json.dumps(served.state())
    for hidden in ("eiup", "on a mat", "positive", "negative", "stratum", "mean red", "base-"):
        assert hidden not in texts, hidden


def test_the_next_pass_is_the_one_that_nobody_else_began(store: Store, folder: Path) -> None:
    items = drawn(store, folder)
    assert choose_pass(store, items, "cat", "ana") == 1
    people(store, items[:9], "ana", 1)
    assert (choose_pass(store, items, "cat", "ana"), choose_pass(store, items, "cat", "ben")) == (1, 2)
    people(store, items, "ana", 1)
    assert choose_pass(store, items, "cat", "ana") == 2
    people(store, items, "ben", 2)
    assert {choose_pass(store, items, "cat", who) for who in ("ana", "ben", "cai")} == {FINAL}


# ---------------------------------------------------------------- sheets


def fill(folder: Path, answer: Callable[[int], object]) -> None:
    lines = (folder / "answers.csv").read_text().splitlines()
    made = [f"{line}{answer(int(line[:-1]))}" if line[:-1].isdecimal() else line for line in lines]
    (folder / "answers.csv").write_text("\n".join(made) + "\n")


def test_sheets_go_out_and_answers_come_back_to_their_pictures(store: Store, folder: Path, tmp_path: Path) -> None:
    session = Session(store, drawn(store, folder), "cat", "ana", 1)
    made = write_sheets(session, tmp_path / "sheets")
    assert [path.name for path in made] == ["sheet-01.png", "sheet-02.png"]
    sheet = Image.open(made[0])
    first = Image.open(session.items[0].path).convert("RGB").getpixel((3, 3))
    assert sheet.size == (8 + 168 * 6, 8 + 188 * 4) and sheet.getpixel((60, 100)) == first
    fill(tmp_path / "sheets", lambda number: 1 + number % 3)
    facts, found = read_sheets(tmp_path / "sheets")
    given = judgements_of(store, facts, found, NOW)
    assert store.add(given) == 48 and store.add(given) == 0
    outcome = {(each.run, each.row): each.outcome for each in store.judgements()}
    for k, item in enumerate(session.items):
        assert outcome[item.run, item.row] == ("there", "other", "nothing")[(k + 1) % 3]
    assert [each.details["stratum"] for each in given] == [item.details["stratum"] for item in session.items]
    with pytest.raises(ValueError, match="Nothing is left to judge in this pass"):
        write_sheets(Session(store, drawn(store, folder), "cat", "ana", 1), tmp_path / "more")
    with pytest.raises(ValueError, match="Expected a new or empty folder for the sheets"):
        write_sheets(Session(store, drawn(store, folder), "cat", "ben", 2), tmp_path / "sheets")


WRONG = {
    "a number that is not there": ("7,", "77,1", "a number from 1 to 48 in line 12 of"),
    "number 0": ("7,", "0,1", "a number from 1 to 48 in line 12 of"),
    "no number": ("7,", "x,1", "a number from 1 to 48 in line 12 of"),
    "a number twice": ("7,", "6,1", r"Expected number 6 once in .*got it again in line 12"),
    "answer 4": ("7,", "7,4", "the answer 1, 2 or 3 in line 12 of"),
    "a word": ("7,", "7,yes", "the answer 1, 2 or 3 in line 12 of"),
    "two answers": ("7,", "7,1,2", "one answer in line 12 of"),
    "a long line": ("7,", "7" * 200_000, "a number from 1 to 48 in line 12 of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_file_with_a_mistake_is_refused_with_the_line(
    name: str, store: Store, folder: Path, tmp_path: Path
) -> None:
    write_sheets(Session(store, drawn(store, folder), "cat", "ana", 1), tmp_path / "sheets")
    old, new, message = WRONG[name]
    path = tmp_path / "sheets/answers.csv"
    path.write_text(path.read_text().replace(f"\n{old}\n", f"\n{new}\n"))
    with pytest.raises(ValueError, match=message):
        read_sheets(tmp_path / "sheets")
    assert store.judgements() == []


def test_unfilled_answers_wait_and_corrected_ones_are_asked_for(store: Store, folder: Path, tmp_path: Path) -> None:
    label = ["judge", "label", folder, "--concept", "cat", "--store", store.name]
    call(*label, "--annotator", "ana", "--sheets", tmp_path / "sheets")
    fill(tmp_path / "sheets", lambda number: 2 if number <= 40 else "")
    read = ["judge", "read", tmp_path / "sheets", "--store", store.name]
    assert "40 new answers of ana in pass 1, 40 in all. 8 answers are not filled in" in call(*read)
    path = tmp_path / "sheets/answers.csv"
    path.write_text(path.read_text().replace("\n5,2\n", '\n"5";"1"\n'))  # as some spreadsheets write it
    assert "to be 'other' as in the store, got 'there'" in call(*read, code=2)
    assert "1 new answers" in call(*read, "--replace")
    assert "Pass 1: 8 pictures on 1 sheets" in call(*label, "--annotator", "ana", "--sheets", tmp_path / "rest")
    fill(tmp_path / "rest", lambda number: 3)
    call("judge", "read", tmp_path / "rest", "--store", store.name)
    assert len(store.judgements(number=1)) == 48
    assert "Pass 2: 48 pictures on 2 sheets" in call(*label, "--annotator", "ben", "--sheets", tmp_path / "two")


def test_sheets_of_another_store_or_run_are_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    write_sheets(Session(store, drawn(store, folder), "cat", "ana", 1), tmp_path / "sheets")
    fill(tmp_path / "sheets", lambda number: 1)
    other = Store(tmp_path / "other.db")
    with pytest.raises(ValueError, match="Expected picture 1 of the sheets to be one that .* has drawn for labelling"):
        judgements_of(other, *read_sheets(tmp_path / "sheets"), NOW)
    with pytest.raises(FileNotFoundError, match=r"has no sheets\.json, so it holds no contact sheets"):
        read_sheets(tmp_path)


# ---------------------------------------------------------------- the page


class Client:
    """A browser that asks for one thing after the other."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.page.server_port, timeout=10)
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
        usual = {} if body is None else {"Origin": self.page.origin, "Content-Type": "application/json"}
        sent = {name.replace("_", "-"): value for name, value in (usual | headers).items() if value}
        connection.request(method, f"/{self.page.token}/{path}" if path[:1] != "/" else path, content, sent)
        answer = connection.getresponse()
        content = answer.read()
        self.headers = answer.headers
        connection.close()
        return answer.status, json.loads(content) if "json" in answer.headers["Content-Type"] else content


@pytest.fixture
def client(store: Store, folder: Path) -> Iterator[Client]:
    session = Session(store, drawn(store, folder, positive=1, negative=1), "cat", "ana", 1)
    with Page(session) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.02,))
        thread.start()
        yield Client(served)
        served.shutdown()
        thread.join()


def test_each_answer_is_stored_before_the_next_picture(client: Client, store: Store) -> None:
    _, state = client.ask("next")
    shown = {"kind": "label", "picture": 0, "shown": [0], "veiled": True}
    assert state == {"concept": "cat", "pass": 1, "total": 3, "done": 0, **shown}
    for k, answer in enumerate((1, 2)):
        status, state = client.ask("answer", {"picture": k, "answer": answer})
        assert (status, state["picture"], state["done"]) == (200, k + 1, k + 1)
        assert store.judgements()[-1].outcome == ("there", "other")[k]
    _, state = client.ask("back", {})
    assert state["picture"] == 1
    client.ask("answer", {"picture": 1, "answer": 3})
    assert [each.outcome for each in store.judgements()] == ["there", "nothing"]
    assert client.page.session.left == [2]
    assert client.ask("answer", {"picture": 2, "answer": 1})[1]["picture"] is None
    assert len(store.judgements()) == 3


def test_a_page_shows_the_drawn_picture_and_nothing_of_its_file(client: Client) -> None:
    status, content = client.ask("picture/0")
    item = client.page.session.items[0]
    assert status == 200 and content[:4] == b"\x89PNG" and client.headers["Cache-Control"] == "no-store"
    assert item.row.encode() not in content
    status, text = client.ask("")
    assert status == 200 and b"<script nonce=" in text and b"%NONCE%" not in text
    policy = client.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/", None, {}, 403),
        ("/wrong/next", None, {}, 403),
        ("/wrong/answer", {"picture": 0, "answer": 1}, {}, 403),
        ("next", None, {"Host": "evil.example"}, 403),
        ("next", None, {"Host": "evil.example:80"}, 403),
        ("answer", {"picture": 0, "answer": 1}, {"Host": "localhost"}, 403),
        ("answer", {"picture": 0, "answer": 1}, {"Origin": "http://evil.example"}, 403),
        ("answer", {"picture": 0, "answer": 1}, {"Origin": "null"}, 403),
        ("answer", {"picture": 0, "answer": 1}, {"Origin": ""}, 403),
        ("answer", {"picture": 0, "answer": 1}, {"Content_Type": "text/plain"}, 400),
        ("answer", {"picture": 0, "answer": 4}, {}, 409),
        ("answer", {"picture": 0, "answer": True}, {}, 409),
        ("answer", {"picture": 2, "answer": 1}, {}, 409),
        ("answer", {"picture": False, "answer": 1}, {}, 409),
        ("answer", [1], {}, 409),
        ("answer", {"picture": "x" * 20_000}, {}, 400),
        ("picture/3", None, {}, 404),
        ("picture/../../labels.db", None, {}, 404),
        ("picture/" + "9" * 40, None, {}, 404),
        ("other", None, {}, 404),
        ("other", {}, {}, 404),
    ],
)
def test_what_does_not_come_from_the_page_changes_nothing(
    client: Client, store: Store, path: str, body: object, headers: dict[str, str], status: int
) -> None:
    found, said = client.ask(path, body, **headers)
    assert found == status and set(said) == {"error"} and said["error"].endswith(".")
    assert store.judgements() == [] and client.page.session.answered == set()


def test_only_this_machine_is_served_and_each_page_has_its_own_token(store: Store) -> None:
    pages = [Page(Session(store, [], "cat", "ana", 1)) for _ in range(2)]
    assert {each.server_address[0] for each in pages} == {"127.0.0.1"}
    assert pages[0].token != pages[1].token and min(len(each.token) for each in pages) >= 32
    for each in pages:
        each.server_close()


def test_a_changed_picture_is_a_message_on_the_page(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    item = client.page.session.items[0]
    item.path.write_bytes(b"x")
    status, said = client.ask("picture/0")
    assert status == 409 and "missing or was changed" in said["error"] and item.row not in said["error"]


def test_a_pass_can_be_stopped_and_continued(store: Store, folder: Path) -> None:
    items = drawn(store, folder)
    first = Session(store, items, "cat", "ana", 1)
    for k in first.left[:20]:
        first.answer(k, "other")
    again = Session(store, items, "cat", "ana", 1)
    assert again.left == first.left and len(again.left) == 28 and again.back() is None


def test_a_detector_of_explicit_pictures_blurs_all_alike(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blur of the detected ones alone would tell the detector's answer."""

    class Explicit:
        anything_unsafe = True

    monkeypatch.setattr(sample, "_judge", lambda *_: Explicit())
    assert {item.details["explicit"] for item in drawn(store, folder)} == {True}
    monkeypatch.setattr(sample, "_judge", lambda *_: Judge())
    other = Store(Path(store.name).with_name("other.db"))
    assert {item.details["explicit"] for item in drawn(other, folder)} == {False}


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no browser")
def test_in_a_browser_the_page_loads_under_its_own_policy(client: Client, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path}/profile", "--dump-dom", client.page.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Looked for: cat" in done.stdout and "0 of 3 judged" in done.stdout and 'class="veil"' in done.stdout
    assert "Content Security Policy" not in done.stderr


# ---------------------------------------------------------------- commands


def test_labels_reach_score_bar_and_report(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(store, folder)
    monkeypatch.setattr("efface.cli.score.judges", lambda *_: [Judge()])
    monkeypatch.setattr("efface.runs.recorded", lambda *_: [])
    call("score", folder, "--labels", store.name, "--bar", "removal.corrected>=0.2")
    missed = CliRunner().invoke(app, ["score", str(folder), "--labels", store.name, "--bar", "removal.corrected>=0.5"])
    assert missed.exit_code == 3 and "Not met: removal.corrected >= 0.5" in missed.stderr
    card = json.loads(call("score", folder, "--labels", store.name, "--json"))
    assert card["labels"][0]["run"]["rate"] == 0.5
    out = folder.parent / "report.html"
    assert call("report", folder, "--labels", store.name, "--out", out) == str(out)
    assert "There is no store" in call("report", folder, "--labels", "absent.db", "--out", out, code=2)


def test_agreement_lists_the_pictures_that_differ(store: Store, folder: Path) -> None:
    assert "holds no labels yet" in call("judge", "agreement", store.name)
    items = drawn(store, folder)
    people(store, items, "ana", 1)
    assert "One pass cannot be compared" in call("judge", "agreement", store.name)
    people(store, items, "ben", 2, lambda item: "nothing" if item.row == "theme-7" else truth(item))
    said = call("judge", "agreement", store.name)
    assert "The passes differ in 2 pictures" in said and "ana, pass 1: other; ben, pass 2: nothing" in said
    facts = json.loads(call("judge", "agreement", store.name, "--json"))["concepts"][0]
    assert len(facts["differing"]) == facts["differ"] == 2 and 0.8 < facts["alpha"] < 1


def test_judgements_move_between_stores(store: Store, folder: Path, tmp_path: Path) -> None:
    labelled(store, folder)
    assert "96 judgements" in call("judge", "export", store.name, "--out", tmp_path / "labels.jsonl")
    other = str(tmp_path / "other.db")
    assert "96 new judgements" in call("judge", "import", other, tmp_path / "labels.jsonl")
    assert "0 new judgements" in call("judge", "import", other, tmp_path / "labels.jsonl")
    assert score(folder, Store(other)) == score(folder, store)
    (tmp_path / "labels.jsonl").write_text("{}\n")
    assert "line 1 is damaged and has no `kind`" in call("judge", "import", other, tmp_path / "labels.jsonl", code=2)


def test_bad_options_are_explained(store: Store, folder: Path, tmp_path: Path) -> None:
    label = ["judge", "label", folder, "--store", store.name]
    assert "`--concept` to be one of 'cat'" in call(*label, "--concept", "dog", "--annotator", "ana", code=2)
    assert "`annotator` to be" in call(*label, "--concept", "cat", "--annotator", "", code=2)
    assert "before pass 3" in call(*label, "--concept", "cat", "--annotator", "ana", "--pass", "3", code=2)
    assert "is not a run folder" in call("judge", "label", tmp_path, "--concept", "cat", "--annotator", "ana", code=2)
    (folder / "scores.json").unlink()
    assert "efface score" in call(*label, "--concept", "cat", "--annotator", "ana", code=2)
