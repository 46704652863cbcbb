"""Labels by looking: sheets hide what drew a picture, answers return to it, the card finds what the detectors miss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from efface.files import sha256, write_json
from efface.judged import Corrected, Stratum
from experiments import docs, judge, labels, tables
from experiments.code import ROOT
from experiments.legend import legend
from experiments.outcome import Outcome
from experiments.runner import FORM, Unit
from experiments.worlds import world

N = 12
CELLS = {"explicit": "a cigarette", "theme": "a smoke break", "bystander": "a rocket"}
ERASERS: dict[str, list[dict[str, Any]]] = {"base": [], "eiup": [{"method": "eiup"}], "esd": [{"delta": "f" * 64}]}
MISSES = 3  # pictures of `eiup` with the concept that both detectors call something else
SHARE = {"base": 1.0, "eiup": 0.5, "esd": 0.25}
FACTS = {
    "model": {"name": "emoji-128", "text_hash": "0" * 64},
    "detector": {"name": "emoji-128 eyes, the worse of two"},
    "data_sha256": "1" * 64,
}
EXPERIMENT = Outcome(name="leaderboard", question="Which?", cap=1.0, arms={}, primary=(("eiup", "esd", "residual"),))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These labels need not survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def unit(folder: Path, row: str, cell: str, n: int = N, code: str = "new") -> tuple[Unit, dict[str, Any]]:
    """A unit as the runner leaves it. The first pictures show the concept, and the first of those are missed."""
    there = [k < SHARE[row] * n for k in range(n)]
    said = [2 if each else 1 for each in there]
    if (row, cell) == ("eiup", "explicit"):
        said[:MISSES] = [1] * MISSES
    pictures = np.random.default_rng([*f"{row}, {cell}, {code}".encode()]).integers(0, 256, (n, 8, 8, 3), np.uint8)
    setting = {**FACTS, "concept": "smoking", "cell": cell, "seeds": [2_000_000 + 100 * len(cell), n]}
    setting |= {"prompts": [CELLS[cell], "an ad"] * (n // 2), "erasers": ERASERS[row], "code": code}
    made = Unit(row, setting, dict, 1.0, float)
    raw = {"outcome": [said, said], "retained": [[1] * n] * 2, "object": [[1] * n] * 2}
    raw |= {"sha256": [sha256(each.tobytes()) for each in pictures]}
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    save_file({"images": torch.tensor(pictures)}, folder / f"pictures/{made.digest}.safetensors")
    found = {"setting": setting, "raw": raw, "core_seconds": 1.0, "date": "2026-01-01"}
    write_json(folder / f"{made.digest}.json", found)
    return made, found


def units(place: Path, rows: Sequence[str]) -> list[tuple[Unit, dict[str, Any]]]:
    """A folder of units, as a run leaves it that goes on."""
    found = [unit(place / "work/leaderboard", row, cell) for row in rows for cell in CELLS]
    write_json(place / "work/leaderboard/0123.estimate.json", {"hours": 1.0})
    return found


def drawn(place: Path, rows: Sequence[str] = tuple(ERASERS)) -> dict[str, Any]:
    """A folder of units, and the card of them."""
    found = units(place, rows)
    card = {"form": FORM, "experiment": "leaderboard", "question": "Which?", "date": "2026-01-01", "block": "test"}
    card |= {"n": N, **FACTS, "code": {"commit": "abc", "efface": "0"}, "columns": dict(EXPERIMENT.columns)}
    card |= {"command": "a command", "machine": "one", "core_hours": {"cap": 1.0, "estimate": 1.0, "spent": 1.0}}
    card |= EXPERIMENT.rows(None, found)  # type: ignore[arg-type]
    card |= EXPERIMENT.derived(card)
    (place / "results").mkdir(exist_ok=True)
    write_json(place / "results/leaderboard.json", card)
    return card


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("icons") / "icons.npz"
    np.savez(file, **{"108": np.zeros((1, len(world("emoji-128").icons), 1, 108, 108, 4), np.uint8)})
    return file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    drawn(tmp_path)
    return tmp_path


def of(place: Path) -> labels.Labelling:
    return labels.Labelling(place / "work/leaderboard")


def truth(folder: Path, entry: dict[str, str]) -> str:
    found = json.loads((folder / f"{entry['run']}.json").read_text())["setting"]
    row = next(row for row, erasers in ERASERS.items() if erasers == found["erasers"])
    return "1" if int(entry["row"]) < SHARE[row] * N else "2"


def answer(place: Path, says: Callable[[Path, dict[str, str], str], str] = lambda folder, entry, true: true) -> None:
    """Fills in all sheets. `says`: from the sheets' folder, the picture and its true answer to the answer."""
    for folder in sorted((place / "work/leaderboard/labels").glob("batch-*/*-pass-*")):
        items = json.loads((folder / "sheets.json").read_text())["items"]
        for file in folder.glob("answers-*.csv"):
            lines = file.read_text().splitlines()
            for k, line in enumerate(lines):
                number = line.partition(",")[0]
                if number.isdecimal():
                    entry = items[int(number) - 1]
                    lines[k] = f"{number},{says(folder, entry, truth(place / 'work/leaderboard', entry))}"
            file.write_text("\n".join(lines) + "\n")


def labelled(place: Path, icons: Path, **how: Any) -> dict[str, Any]:
    """The card after two passes."""
    of(place).write(icons)
    answer(place, **how)
    of(place).read(say=lambda _: None)
    return shipped(place)


def shipped(place: Path) -> dict[str, Any]:
    card = json.loads((place / "results/leaderboard.json").read_text())
    labels.ship(card, of(place), place / "results" / labels.FILE)
    write_json(place / "results/judge.json", made := judge.judged(place / "results"))
    return made


def test_sheets_mix_all_rows_in_another_order_per_pass_and_name_none(place: Path, icons: Path) -> None:
    made = of(place).write(icons)
    assert [path.name for path in made] == ["smoking-pass-1", "smoking-pass-2"]
    first, second = (json.loads((path / "sheets.json").read_text())["items"] for path in made)
    whole = [item["picture"] for item in first]
    assert len(whole) == len(set(whole)) == 3 * 2 * N  # no bystander
    assert set(whole) == {item["picture"] for item in second}
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 60
    rows = [json.loads((place / f"work/leaderboard/{e['run']}.json").read_text())["setting"]["erasers"] for e in first]
    for k in range(0, len(first), 24):
        assert all(erasers in rows[k : k + 24] for erasers in ERASERS.values())
    written = [p for p in made[0].parent.rglob("*") if p.suffix in (".csv", ".json", ".txt")]
    text = " ".join(path.read_text() for path in written)
    assert len(written) == 8 and not any(word in text for word in ("eiup", "esd", "smoke break", "explicit", "2000"))
    sheet = Image.open(made[0] / "sheet-01.png")
    assert sheet.size == (8 + 144 * 8, 8 + 164 * 6)
    pixels = of(place).session(1, list(of(place).units.values()), "smoking", 1).items[0].read()
    assert sheet.getpixel((8 + 68 - 8, 28 + 60)) == pixels.getpixel((3, 3))  # each pixel is a block of 17


def test_a_batch_holds_what_was_drawn_since_the_last_one(tmp_path: Path, icons: Path) -> None:
    units(tmp_path, ["base"])
    of(tmp_path).write(icons)
    with pytest.raises(ValueError, match="that are in no batch yet, got none"):
        of(tmp_path).write(icons)
    drawn(tmp_path)
    of(tmp_path).write(icons)
    sizes = {number: len(units) for number, units in of(tmp_path).batches().items()}
    assert sizes == {1: 2, 2: 4}
    answer(tmp_path)
    assert of(tmp_path).read(say=lambda _: None) == 2 * 6 * N and of(tmp_path).read(say=lambda _: None) == 0
    assert shipped(tmp_path)["labelled"] == 6 * N


def test_the_card_finds_the_planted_errors_of_a_detector(place: Path, icons: Path) -> None:
    folder = place / "work/leaderboard"
    stale = [unit(folder, "eiup", "theme", code=f"old {k}")[0].digest for k in range(3)]  # labelled, not of the card
    assert min(stale) < unit(folder, "eiup", "theme")[0].digest < max(stale)
    card = labelled(place, icons)
    assert len(of(place).given()) == 2 * 9 * N and card["labelled"] == 6 * N
    rows = {row["row"]: row for row in card["rows"]}
    found = rows["eiup"]
    assert (found["misses"]["hits"], found["misses"]["n"]) == (MISSES, N + MISSES)
    assert found["precision"]["rate"] == 1 and found["precision"]["n"] == N - MISSES
    assert (found["residual"]["looking"]["hits"], found["residual"]["looking"]["n"]) == (N, 2 * N)
    assert found["residual"]["difference"]["value"] == pytest.approx(MISSES / (2 * N))
    assert rows["esd"]["misses"]["hits"] == 0 and rows["esd"]["residual"]["difference"]["value"] == 0
    leaderboard = json.loads((place / "results/leaderboard.json").read_text())
    for row in leaderboard["rows"]:
        assert rows[row["row"]]["residual"]["detector"]["rate"] == row["residual"]["rate"]
        low, high = rows[row["row"]]["residual"]["looking"]["interval"]
        assert low <= SHARE[row["row"]] <= high
    assert card["missed icons"][0] | {"interval": 0} == {
        "name": "cigarette",
        "rate": 2 / 11,  # of 6 + 3 + 2 pictures whose prompt names it; the missed ones are numbers 0, 1 and 2
        "hits": 2,
        "n": 11,
        "interval": 0,
    }
    assert card["comparisons"][0]["difference"] == pytest.approx(0.25)
    assert card["agreement"]["alpha"] == 1 and card["agreement"]["differ"] == 0
    assert "not by people" in card["verdict"][0] and "not people" in card["annotator"]


def test_a_third_pass_decides_only_where_two_differ(place: Path, icons: Path) -> None:
    wrong: list[str] = []

    def says(folder: Path, entry: dict[str, str], true: str) -> str:
        if folder.name.endswith("2") and true == "2" and len(wrong) < 5:
            wrong.append(entry["picture"])
            return "1"
        return true

    card = labelled(place, icons, says=says)
    assert (card["agreement"]["differ"], card["open"], len(wrong)) == (5, 5, 5)
    before = card["pooled"]["false alarms"]["n"], sum(r["residual"]["looking"]["hits"] for r in card["rows"])
    (folder,) = of(place).write_third()
    listed = {item["picture"] for item in json.loads((folder / "sheets.json").read_text())["items"]}
    assert listed == set(wrong) and of(place).write_third() == []
    answer(place, lambda folder, entry, true: "1" if "-2" in folder.name and entry["picture"] in wrong else true)
    of(place).read(say=lambda _: None)
    card = shipped(place)
    assert (card["agreement"]["differ"], card["open"], card["third pass"]) == (5, 0, 5)
    assert sum(r["residual"]["looking"]["hits"] for r in card["rows"]) == before[1] - 5  # one sight of two had counted


WRONG: dict[str, tuple[Callable[[str], str], str]] = {
    "no answer": (lambda text: text.replace("\n7,1\n", "\n7,\n").replace("\n7,2\n", "\n7,\n"), "got none to 7"),
    "a lost line": (lambda text: text.replace("\n7,1\n", "\n").replace("\n7,2\n", "\n"), "got none to 7"),
    "a number of another sheet": (lambda text: text.replace("\n7,", "\n60,"), "a number from 1 to 48 in line"),
    "another answer": (lambda text: text.replace("\n7,1\n", "\n7,4\n").replace("\n7,2\n", "\n7,4\n"), "1, 2 or 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_answers_with_a_mistake_are_refused_and_others_are_kept(name: str, place: Path, icons: Path) -> None:
    of(place).write(icons)
    answer(place)
    file = place / "work/leaderboard/labels/batch-01/smoking-pass-1/answers-01.csv"
    change, message = WRONG[name]
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=message):
        of(place).read(say=lambda _: None)
    stored = [each.number for each in of(place).given()]
    assert stored.count(2) == 6 * N and stored.count(1) <= 6 * N - 48


def test_answers_and_labels_of_other_pictures_are_refused(place: Path, icons: Path) -> None:
    labelled(place, icons)
    copy = place / "work/leaderboard/labels"
    shutil.copytree(copy / "batch-01/smoking-pass-1", copy / "batch-01/weapon-pass-1")
    with pytest.raises(ValueError, match="holds sheets of another batch, concept or pass"):
        of(place).read(say=lambda _: None)
    shutil.rmtree(copy / "batch-01/weapon-pass-1")
    file = place / "results" / labels.FILE
    lines = file.read_text().splitlines()
    entry = json.loads(lines[1])
    entry["sha256"][0] = "0" * 64
    file.write_text("\n".join([lines[0], json.dumps(entry), *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match="got labels of other pictures"):
        judge.judged(place / "results")
    entry["passes"]["1"] = "1"
    file.write_text("\n".join([lines[0], json.dumps(entry)]) + "\n")
    with pytest.raises(ValueError, match="line 2 is damaged.* more or fewer digits"):
        judge.judged(place / "results")
    digest = next(iter(of(place).units))
    path = place / f"work/leaderboard/{digest}.json"
    found = json.loads(path.read_text())
    found["raw"]["sha256"][0] = "0" * 64
    write_json(path, found)
    with pytest.raises(ValueError, match="that the labels are of, got others"):
        of(place).read(say=lambda _: None)


def test_a_changed_picture_reaches_no_sheet(place: Path, icons: Path) -> None:
    for path in (place / "work/leaderboard/pictures").glob("*.safetensors"):
        images = load_file(path)["images"].clone()
        images[0, 0, 0, 0] ^= 1
        save_file({"images": images}, path)
    with pytest.raises(ValueError, match="is not the one that the detectors judged"):
        of(place).write(icons)
    assert of(place).batches() == {}


def test_a_row_that_is_labelled_in_part_gets_the_corrected_rate(place: Path, icons: Path) -> None:
    labelled(place, icons)
    file = place / "results" / labels.FILE
    head, *lines = map(json.loads, file.read_text().splitlines())
    for line in lines:
        if line["row"] == "eiup":
            said = line["passes"]["2"]
            line["passes"]["2"] = "".join("-" if k in (0, 5, 7, 9) else digit for k, digit in enumerate(said))
    kept = [line for line in lines if line["row"] != "esd"]
    file.write_text("".join(f"{json.dumps(each)}\n" for each in (head, *kept)))
    card = judge.judged(place / "results")
    rows = {row["row"]: row for row in card["rows"]}
    part = rows["eiup"]["residual"]
    pictures = [
        each
        for each in judge.seen(json.loads((place / "results/leaderboard.json").read_text()), kept)
        if each.row == "eiup"
    ]
    strata = []
    for name, said in (("positive", 2), ("negative", 1)):
        some = [each for each in pictures if each.detectors[0] == said]
        looked = [each for each in some if each.label]
        strata.append(Stratum(name, len(some), len(looked), sum(each.there for each in looked)))
    assert part["labelled"] == 16 and part["looking"]["corrected"]
    assert part["looking"]["rate"] == pytest.approx(Corrected(tuple(strata)).rate)
    assert strata[1].there and part["looking"]["rate"] > part["detector"]["rate"]
    assert rows["esd"]["residual"]["looking"] is None and rows["esd"]["misses"]["rate"] is None
    assert "corrected rates" in card["verdict"][-1]
    text = tables.of_card(card)
    assert "| `esd` | 25.0 %" in text and "- | - | - | - |" in text


def test_the_leaderboard_shows_what_looking_says_of_its_own_pictures(place: Path, icons: Path) -> None:
    labelled(place, icons)
    leaderboard = json.loads((place / "results/leaderboard.json").read_text())
    text = docs.ranking(place)
    assert "| residual, all prompts, by looking |" in text and "[labels that ship]" in text
    found, _ = docs.with_labels(leaderboard, place)
    assert [row["looked"]["rate"] for row in found["rows"]] == [SHARE[row["row"]] for row in found["rows"]]
    leaderboard["pictures"]["eiup"]["smoking, explicit"]["sha256"] = "0" * 64
    found, note = docs.with_labels(leaderboard, place)
    assert ["looked" in row for row in found["rows"]] == [True, False, True] and "Not labelled: eiup." in note
    for cells in leaderboard["pictures"].values():
        for cell in cells.values():
            cell.pop("sha256")
    found, note = docs.with_labels(leaderboard, place)
    assert "looked" not in found["columns"] and "The labels are of other pictures" in note
    words = docs.labelled(place)
    assert "cigarette (2 of 11)" in words and "Krippendorff's alpha 1.000" in words
    (place / "results/judge.json").unlink()
    assert docs.with_labels(leaderboard, place) == (leaderboard, "")
    assert "Without a card so far" in docs.labelled(place)


def test_a_legend_needs_the_icons_of_the_training(tmp_path: Path, icons: Path) -> None:
    assert legend("weapon", icons)[:4] == b"\x89PNG"
    with pytest.raises(FileNotFoundError, match="There are no icons at .* Run `npm ci` in recipes/emoji"):
        legend("weapon", tmp_path / "none.npz")


SHIPPED = ROOT / "results" / labels.FILE


@pytest.mark.skipif(not SHIPPED.exists(), reason="no labels ship yet")
def test_the_labels_that_ship_are_of_the_leaderboard_that_ships() -> None:
    assert SHIPPED.stat().st_size < 700_000
    head, lines = labels.read_labels(SHIPPED)
    leaderboard = json.loads((ROOT / "results/leaderboard.json").read_text())
    card = json.loads((ROOT / "results/judge.json").read_text())
    pictures = judge.seen(leaderboard, lines)
    assert card["of"]["pictures"] == judge.hashes(leaderboard) and all(card["of"]["pictures"].values())
    assert card["labelled"] == sum(bool(each.label) for each in pictures) and "not people" in head["annotator"]
    assert card["pooled"]["misses"] == judge.errors(pictures)["misses"]


@pytest.mark.long
@pytest.mark.skipif(not SHIPPED.exists(), reason="no labels ship yet")
def test_the_card_follows_from_the_labels_that_ship() -> None:
    card, again = json.loads((ROOT / "results/judge.json").read_text()), judge.judged()
    for each in (card, again):
        del each["date"], each["code"]
    assert json.loads(json.dumps(again)) == card
