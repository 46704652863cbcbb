"""The experiment on Geom-Erasing: what is drawn, where the badge is, what the card says, and when it must not judge."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import latents

import efface
from efface import Concept
from efface.delta.embeddings import tables as embeddings
from efface.editors._geometry import start
from efface.intervals import difference
from experiments import docs, geom_erasing, runner, tables
from experiments.catalogue import CATALOGUE
from experiments.geom_erasing import (
    AIMS,
    BOXES,
    CORNERS,
    NAME,
    PLAIN,
    ROWS,
    Plain,
    Watermarks,
    boxes,
    distance,
    pasted,
    places,
    resampled,
    words,
)
from experiments.outcome import rate
from experiments.runner import Plan
from experiments.worlds import CELLS, CONCEPTS, SEEDS, seeds, world

CARD = CATALOGUE["geom_erasing"]
BASE, WORDS, DATA = "base", *AIMS


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of few resamples."""
    monkeypatch.setattr(geom_erasing, "difference", partial(difference, draws=100))


# ---------------------------------------------------------------- what is drawn


def test_rows_are_paired_and_share_no_seed_and_no_icon_with_the_training() -> None:
    assert isinstance(CARD, Watermarks)
    plan = Plan(CARD.block, CARD.n)
    units = CARD.units(plan)
    of = {(unit.kind, unit.row): unit.setting for unit in units}
    assert CARD.names(units) == list(ROWS) and len({unit.digest for unit in units}) == len(units)
    base, training = of["cell", BASE], of["fit", "training pictures"]
    for name, row in ROWS.items():
        cell = of["cell", name]
        n = 512 if row.whole else 256
        assert cell["seeds"] == [base["seeds"][0], n] and cell["prompts"] == base["prompts"][:n]
        assert bool(cell["fit"]) == bool(row.fit)
    assert len(set(base["prompts"])) > 60 and not set(training["prompts"]) & set(base["prompts"])
    used = [of["cell", BASE], of["scenes", "clean scenes"], of["asked", WORDS], training]
    every = [seed for each in used for seed in range(each["seeds"][0], sum(each["seeds"]))]
    assert len(every) == len(set(every))
    assert all((seed in SEEDS["test"]) == (seed > 10_000) for seed in every)
    assert min(s for s in every if s > 10_000) > seeds("test", CONCEPTS[-1], CELLS[-1], 1).start
    assert {of["cell", name]["fit"] for name in ROWS if ROWS[name].fit == "data"} == {
        next(unit.digest for unit in units if unit.kind == "fit" and unit.row == "data")
    }


def test_plain_fine_tuning_and_data_removal_differ_in_words_alone() -> None:
    plain, data = (CARD.editors[name] for name in ("plain", "data"))
    assert isinstance(plain, Plain) and dataclasses.asdict(plain) == dataclasses.asdict(data)


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected the model 'emoji', whose watermark no text names, got 'emoji-128'"):
        CARD.units(Plan(CARD.block, CARD.n, "emoji-128"))
    with pytest.raises(ValueError, match="Expected n from 2 to 2000, got 2001"):
        CARD.units(Plan(CARD.block, 2001))


def test_an_update_keeps_what_a_row_is_compared_with() -> None:
    plan = Plan(CARD.block, CARD.n)
    again = CARD.redrawn(plan, CARD.units(plan), [DATA])
    assert {unit.row for unit in again if unit.kind == "cell"} == {BASE, PLAIN, DATA}
    assert {unit.row for unit in again if unit.kind == "asked"} == {DATA}
    assert {unit.row for unit in again if unit.kind == "scenes"} == {"clean scenes"}


# ---------------------------------------------------------------- the badge


def plain_pictures(n: int) -> torch.Tensor:
    """One colour each, with a disk of another one in the middle."""
    rng = torch.Generator().manual_seed(3)
    images = (0.6 + 0.4 * torch.rand(n, 3, 1, 1, generator=rng)).repeat(1, 1, 64, 64)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disk = (x - 32) ** 2 + (y - 32) ** 2 < 400
    return torch.where(disk, torch.rand(n, 3, 1, 1, generator=rng), images)


def test_the_detectors_find_the_corner_of_a_pasted_badge() -> None:
    images = plain_pictures(24)
    made = pasted(images, 0.5, seed=5)
    dirty = torch.stack([torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255 for picture, _ in made])
    corners = [corner for _, corner in made]
    assert {-1, 0, 1, 2, 3} == set(corners)
    changed = (dirty - images).abs().amax(1) > 0.01
    for picture, corner in zip(changed, corners, strict=True):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        if corner >= 0:
            left, top, right, bottom = map(int, BOXES[corner])
            inside[top:bottom, left:right] = True
            assert picture[inside].float().mean() > 0.9
        assert not picture[~inside].any()
    seen, found = places(world("emoji").eyes, dirty)
    assert found == corners and all(eye == [int(corner >= 0) for corner in corners] for eye in seen)
    assert boxes(world("emoji").eyes, dirty) == [[BOXES[corner]] if corner >= 0 else [] for corner in corners]


def test_each_corner_has_words_of_its_own() -> None:
    tokens = efface.Tokens.fitted(
        None, tiny.untouched("sd1"), {"tokenizer": torch.randn(1, 32)}, ("<w>",), Concept(NAME), info={"name": NAME}
    )
    tokens = dataclasses.replace(tokens, fields={"grid": 4, "encoding": "bins"})
    texts = [words(tokens, corner) for corner in range(len(CORNERS))]
    assert len(set(texts)) == 4 and texts[0] == "watermark <watermark:0,0> <watermark:1,0> <watermark:2,0>"
    assert texts[3].endswith("<watermark:3,3>")


# ---------------------------------------------------------------- plain fine-tuning


def test_plain_fine_tuning_hears_nothing_of_places() -> None:
    """The words keep their start, while the weights move; the same settings move words if places are named."""
    pipe = tiny.pipeline("sd1")
    settings: dict[str, Any] = {"setting": "data", "grid": 2, "steps": 3, "batch": 4, "lr": 0.05, "lr_weights": 1e-3}
    examples = [(torch.rand(3, 16, 16), "a dog", [(0, 0, 7, 7)] if k % 2 else []) for k in range(4)]
    begin = start(2, embeddings(pipe)["tokenizer"])
    for kind, learns in ((Plain, False), (efface.GeomErasing, True)):
        made = kind(**settings).fit(pipe, Concept("cat"), examples=examples)
        assert made.delta is not None and any(bool(w.abs().max() > 0) for w in made.delta.weights.values())
        assert torch.equal(made.embeddings["tokenizer"], begin) != learns
        assert made.info["with the concept"] == 2 * learns and bool(made.info["used"]) == learns


def test_the_name_alone_is_the_plain_negative_prompt_after_model_removal() -> None:
    """So the card has one row for both."""
    pipe, name = tiny.pipeline("sd1"), efface.NegativePrompt(Concept("cat"))
    settings: dict[str, Any] = {"grid": 2, "steps": 3, "batch": 4, "lr": 0.05}
    examples = [(torch.rand(3, 16, 16), "a dog", [(0, 0, 7, 7)] if k % 2 else []) for k in range(4)]
    tokens = efface.GeomErasing(**settings).fit(pipe, Concept("cat"), examples=examples)
    plain = latents(pipe)
    with efface.stack(pipe, name):
        alone = latents(pipe)
    with efface.stack(pipe, tokens, name):
        assert torch.equal(latents(pipe), alone) and not torch.equal(alone, plain)
    with efface.stack(pipe, tokens, efface.NegativePrompt(tokens.concepts)):
        assert not torch.equal(latents(pipe), alone)


# ---------------------------------------------------------------- distances


def test_a_distance_sees_a_shift_and_equal_rows_differ_by_nothing() -> None:
    rng = np.random.default_rng(0)
    clean, near = ([rng.normal(size=(160, 8)) for _ in range(2)] for _ in range(2))
    far = [near[0] + 0.5, near[1]]  # the first detector sees it, and the worse one counts
    own, other = ([resampled(x, y, 40) for x, y in zip(row, clean, strict=True)] for row in (near, far))
    found, shifted = distance(own), distance(other)
    assert found["interval"][0] < 0 < found["interval"][1] and shifted["interval"][0] > 0
    assert shifted["kid"] > 10 * abs(found["kid"])
    more = distance([a - b for a, b in zip(other, own, strict=True)])
    less = distance([a - b for a, b in zip(own, other, strict=True)])
    assert more["interval"][0] > 0 and less == {"kid": 0.0, "interval": [0.0, 0.0]}  # the second sees no difference
    close = resampled(near[0] + 1e-3, clean[0], 40)  # rows with the same resamples: what they share cancels
    assert width(distance([close - own[0]])) < width(distance([close])) / 20


def width(found: dict[str, Any]) -> float:
    low, high = found["interval"]
    return float(high - low)


# ---------------------------------------------------------------- the card


def card(plain: int, data: int, **more: Any) -> dict[str, Any]:
    """A card of four rows with so many watermarks in 512 pictures of 64 prompts."""
    n, prompts = more.get("n", 512), [f"icon {k}" for k in range(64)]
    counts = {BASE: 40, WORDS: 40, PLAIN: plain, DATA: data}
    rows, pictures = [], {}
    for name, count in counts.items():
        marks, icons = "1" * count + "0" * (512 - count), "1" * 400 + "0" * 112
        pictures[name] = {NAME: [marks[:n]] * 2, "icon": [icons[:n]] * 2}
        seen = rated(marks[:n], prompts)
        far = {"kid": more.get("kid", -0.5), "interval": [-1.0, 0.1], "n": n, "clean": 480}
        rows.append(
            {"row": name, NAME: seen, "corners": {"counts": [1, 2, 3, 4]}, "distance": far, "distance against": far}
        )
    found = {"pictures": 148, "with the badge": 111, "place found": 147}
    made = {"form": 2, "rows": rows, "pictures": pictures, "training pictures": found, "columns": dict(CARD.columns)}
    made |= {"cells": {"one icon": {"prompts": prompts}}}
    return made | CARD.derived(made)


def rated(digits: str, prompts: list[str]) -> dict[str, Any]:
    return rate(list(map(int, digits)), [prompts[k % len(prompts)] for k in range(len(digits))])


def line(made: dict[str, Any], row: str) -> str:
    return next(each for each in made["verdict"] if each.startswith(f"Aim for {row}:"))


def cells(made: dict[str, Any], row: str) -> list[str]:
    text = next(each for each in tables.of_card(made).splitlines() if each.startswith(f"| `{row}`"))
    return [each.strip() for each in text.strip("| \n").split("|")]


def test_data_removal_is_judged_only_if_plain_fine_tuning_learned_the_watermark() -> None:
    """No watermark at all is no success if nothing would have drawn one."""
    failed, held = card(plain=153, data=0), card(plain=154, data=0)
    assert not failed["control holds"] and held["control holds"]  # 30 % of 512
    assert "Not judged: plain fine-tuning draws the watermark in 29.9 %" in line(failed, DATA)
    assert "met" not in line(failed, DATA).split("Not judged")[1]
    assert "It fails, so no row of data removal is judged." in failed["verdict"][2]
    for name in (BASE, WORDS, PLAIN, DATA):
        assert (cells(failed, name)[1] == "not judged") == (name == DATA)
        assert cells(held, name)[1] != "not judged"
    assert "Watermark met: 0.0 %" in line(held, DATA) and "Distance met: -0.50 [-1.00, 0.10]" in line(held, DATA)
    assert "It holds." in held["verdict"][2]


def test_the_verdict_says_by_how_much_an_aim_is_missed() -> None:
    missed = card(plain=400, data=31, kid=0.75)
    assert "Watermark missed by 4.1 points: 6.1 %" in line(missed, DATA)
    assert "Distance missed by 0.75: +0.75" in line(missed, DATA)
    assert "Watermark missed by 5.8 points: 7.8 %" in line(missed, WORDS)
    assert "Watermark met: 2.0 %" in line(card(plain=400, data=10), DATA)  # 10 of 512
    assert "missed" in line(card(plain=400, data=11), DATA)


def test_an_aim_needs_enough_pictures_and_something_to_remove() -> None:
    few = card(plain=400, data=0, n=511)
    assert all("Not judged: n = 511, 512 are needed." in line(few, name) for name in AIMS)
    made = card(plain=400, data=0)
    for row in made["rows"]:
        if row["row"] == BASE:
            row[NAME] = rated("1" * 10 + "0" * 502, made["cells"]["one icon"]["prompts"])
    again = CARD.derived(made)
    assert "Not judged: base itself draws the watermark in 2.0 %" in line(again, WORDS)


def test_rows_are_compared_in_pairs_by_the_less_favourable_detector() -> None:
    made = card(plain=400, data=0)
    made["pictures"][WORDS] = {
        NAME: ["1" * 20 + "0" * 492, "1" * 30 + "0" * 482],
        "icon": ["1" * 410 + "0" * 102, "1" * 390 + "0" * 122],
    }
    again = CARD.derived(made)
    (row,) = (each for each in again["rows"] if each["row"] == WORDS)
    assert row["retention"]["difference"] == -10 / 512 and cells(made | again, WORDS)[3].startswith("-2.0 [")
    found = {(each["row"], each["against"]): each for each in again["comparisons"]}
    assert found[WORDS, BASE]["difference"] == -10 / 512 and "p, Holm" not in found[WORDS, BASE]
    assert found[DATA, PLAIN]["difference"] == -400 / 512 and found[PLAIN, BASE]["difference"] == 360 / 512
    assert all("p, Holm" in each for each in again["comparisons"] if each["row"] not in AIMS)
    assert cells(made | again, BASE)[3].startswith("78.1 % [")


def test_the_page_says_how_to_draw_the_card_or_shows_it(tmp_path: Path) -> None:
    assert docs.implicit(tmp_path) == "Without a card so far: `python -m experiments geom_erasing`."
    (tmp_path / "results").mkdir()
    head = {
        "question": "?",
        "model": {"name": "emoji"},
        "block": "test",
        "n": 512,
        "date": "2026-01-01",
        "command": "c",
    }
    head |= {"code": {"commit": "0" * 40}, "machine": "m", "core_hours": {"spent": 1, "estimate": 1, "cap": 1}}
    head |= {"detector": {"name": "eyes"}}
    (tmp_path / "results/geom_erasing.json").write_text(json.dumps(card(plain=400, data=0) | head))
    text = docs.implicit(tmp_path)
    assert "Aim for data removal, all words" in text and "| `data removal, all words` |" in text


# ---------------------------------------------------------------- end to end


@pytest.mark.long
def test_the_experiment_runs_from_training_pictures_to_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = (BASE, "esd", WORDS, "model removal, two passes", PLAIN, DATA)
    monkeypatch.setattr(geom_erasing, "ROWS", {name: ROWS[name] for name in some})
    monkeypatch.setattr(geom_erasing, "DRAWS", 20)
    short = {"steps": 2, "batch": 2}
    editors = {
        "esd": efface.ESD(steps=1, sampler_steps=2, batch=1),
        "model": efface.GeomErasing(**short),
        "plain": Plain(setting="data", **short),
        "data": efface.GeomErasing(setting="data", **short),
    }
    trial = dataclasses.replace(CARD, editors=editors, pictures=8, asked=4, n=20)
    plan = Plan("selection", 20, folder=tmp_path, call={"num_inference_steps": 2, "guidance": 7.5})
    made = runner.run(trial, plan, tmp_path / "card.json", "a command", say=lambda _: None)
    assert made is not None and [row["row"] for row in made["rows"]] == list(some)
    assert all(row[NAME]["n"] == (20 if ROWS[row["row"]].whole else 10) for row in made["rows"])
    found = made["training pictures"]
    assert 1 <= found["with the badge"] <= found["pictures"] <= 8
    assert all(row["distance"]["clean"] == made["clean scenes"] for row in made["rows"])
    sums = [of["sha256"] for row, of in made["pictures"].items() if not ROWS[row].twice]
    assert len(set(sums)) == len(sums)  # no row draws another row's pictures
