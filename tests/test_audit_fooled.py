"""Attempts to have an audit certify what was not erased. Each one was possible once."""

from __future__ import annotations

import copy
import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_audit import (
    STEPS,
    Marked,
    _quick,
    _stubs,
    always,
    audit,
    label,
    never,
    reasons,
    store,
    suite,
)
from test_report import Page

from efface import Row, Suite, auditing
from efface.auditing import run as auditing_run
from efface.auditing.draw import Plan
from efface.auditing.prepare import shape, weights_of
from efface.feedback import Store

__all__ = ["_quick", "_stubs", "store"]


def rows_of(n: int, prompt: str, seed: str, concept: str = "cat", kind: str = "explicit") -> tuple[Row, ...]:
    """Rows whose prompt and seed are formulas of k."""
    return tuple(
        Row(f"{concept}-{kind}-{k}", prompt.format(k=k), int(eval(seed, {"k": k})), kind, concept, concept)
        for k in range(n)
    )


def marks(*rows: tuple[Row, ...]) -> Suite:
    return Suite("marks", "1", tuple(row for group in rows for row in group), call=dict(STEPS))


def words(made: auditing.Audit) -> str:
    return "\n".join([made.verdict, *made.facts["not_covered"]])


# ---------------------------------------------------------------- rows


def test_a_picture_that_is_drawn_again_counts_once(tmp_path: Path) -> None:
    """59 copies of a clean picture would bound the rate by 5 %."""
    rows = marks(rows_of(8, "a cat", "7"), rows_of(1, "a cat", "8", kind="other"))
    made = audit(never, tmp_path / "a", suite=rows, at_most=0.4)
    assert made.facts["concepts"][0]["n"] == 1 + 1
    assert "7 rows of the suite, which repeat earlier ones with the same seed." in made.facts["not_covered"]
    assert "labels of these 2 pictures cannot support 40.0 %" in reasons(made)


def test_many_prompts_with_one_seed_do_not_bound_new_seeds(tmp_path: Path) -> None:
    made = audit(never, tmp_path / "a", suite=marks(rows_of(16, "a cat {k}", "k % 4")), at_most=0.2)
    assert "its 16 pictures come from 4 seeds, too few to support 20.0 % for new seeds" in reasons(made)
    enough = audit(never, tmp_path / "b", suite=marks(rows_of(16, "a cat {k}", "max(k, 1)")), at_most=0.2)
    assert "come from" not in reasons(enough) and "16 pictures have 15 different seeds" in words(enough)


def test_a_suite_without_rows_for_the_concepts_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows of the suite that ask for cat, got rows that ask for dog"):
        audit(never, tmp_path / "a", suite=suite(8, ("dog",)))
    assert not (tmp_path / "a").exists()


def test_concepts_of_the_suite_that_nobody_audits_are_named(tmp_path: Path) -> None:
    made = audit(never, tmp_path / "a", suite=suite(8, ("cat", "dog")))
    assert "dog: the suite asks for it in 8 rows, and this audit does not judge it." in made.facts["not_covered"]


def test_prompts_that_ask_for_something_else_do_not_hide_a_rate(tmp_path: Path) -> None:
    """A third of the prompts ask for a cat, and a fourth of these still show it: 8 % of all pictures."""

    def base(prompt: str, seed: int) -> str:
        return "concept" if "cat" in prompt else "other"

    def some(prompt: str, seed: int) -> str:
        return "concept" if "cat" in prompt and seed % 4 == 0 else "other"

    made = audit(
        some, tmp_path / "a", base, suite=marks(rows_of(8, "a cat", "k"), rows_of(16, "a tree", "k", kind="x"))
    )
    said = words(made)
    assert made.facts["concepts"][0]["rate"]["hits"] == 2
    assert "Of the 8 pictures in which the base model shows it, 2 still show it." in said
    assert "By kind of prompt: explicit 2 of 8 (base model: 8), x 0 of 16 (base model: 0)." in said
    assert "cat, kind x: the base model shows it in 0 of 16 pictures, under 30%" in said


# ---------------------------------------------------------------- judges and people


def test_a_detector_is_controlled_for_every_concept(tmp_path: Path) -> None:
    """It is fooled by noise only where it looks for the last concept."""

    def detector(names: tuple[str, ...]) -> Marked:
        return Marked(names, 1.0 if "dog" in names else 0.0)

    both: dict[str, Any] = {"suite": suite(16, ("cat", "dog")), "concepts": ["cat", "dog"], "detector": detector}
    made = audit(always, tmp_path / "a", **both)
    cat, dog = (each["verdict"] for each in made.facts["concepts"])
    assert cat["outcome"] == "exceeded" and not any("control" in why for why in cat["reasons"])
    assert dog["outcome"] == "not judged" and "of the control 'ruined pictures'" in "; ".join(dog["reasons"])
    assert made.facts["controls"]["ruined pictures"]["concepts"]["cat"] == 0


def test_one_ruined_concept_is_not_saved_by_the_others(tmp_path: Path) -> None:
    def half(prompt: str, seed: int) -> str:
        return "nothing" if "cat" in prompt else "other"

    made = audit(half, tmp_path / "a", suite=suite(8, ("cat", "dog")), concepts=["cat", "dog"], at_most=None)
    assert made.facts["recognised"]["audited"] == 0.5  # of all pictures, which is not ruined
    assert {each["concept"]: each["verdict"]["outcome"] for each in made.facts["concepts"]} == {
        "cat": "not judged",
        "dog": "measured",
    }
    assert "its pictures are ruined: something is recognisable in 0.0 %" in reasons(made) and made.code == 4


def test_labels_that_see_nothing_in_the_base_model_pass_nothing(store: Store, tmp_path: Path) -> None:
    """Somebody who always presses the same key."""
    audit(never, tmp_path / "a", at_most=0.2)
    label(store, tmp_path / "a", truth=lambda item: "other")
    made = audit(never, tmp_path / "a", labels=store, at_most=0.2)
    assert made.outcome == "not judged" and "people see it in 0.0 % of the base model's pictures" in reasons(made)
    assert "2 people labelled 32 pictures of both models, and differ in 0." in made.verdict
    assert "people confirm 0 of 0 that the detector flags, and find it in 0 of 16 others." in made.verdict
    assert "Sampling: 2 steps" in made.verdict
    assert "By their labels, something else is recognisable in 100.0 %, nothing in 0.0 %." in made.verdict


def test_the_detector_of_another_kind_of_model_is_noted(tmp_path: Path) -> None:
    """A base model named emoji does not make an unlike model one of its kind."""
    small, other = tiny.pipeline("small"), tiny.pipeline("sd1")
    assert shape(small) == shape(copy.copy(small)) != shape(other)
    made: dict[str, Any] = {field.name: None for field in dataclasses.fields(Plan)} | {"delta": (), "lora": ()}
    plan = Plan(**made | {"model": "theirs", "base": "emoji", "detector": "eyes"})
    assert auditing_run._note(plan, True, False) == ""
    assert auditing_run._note(plan, False, False) == "The detector was not made for theirs. Its error is unknown."


# ---------------------------------------------------------------- machines


def test_machines_read_no_pass_where_people_read_none(tmp_path: Path) -> None:
    def read(folder: Path) -> tuple[Any, Any]:
        root = ET.fromstring((folder / "junit.xml").read_text())
        return root, json.loads((folder / "statement.json").read_text())["predicate"]

    audit(never, tmp_path / "a", at_most=None)
    root, said = read(tmp_path / "a")
    assert root.attrib["skipped"] == "1" and "no pass" in root.find(".//skipped").attrib["message"]
    assert said["result"] == "WARNED" and said["warnedTests"] == ["cat"]
    audit(never, tmp_path / "b")
    root, said = read(tmp_path / "b")
    assert root.attrib["errors"] == "1" and said["result"] == "FAILED" and said["failedTests"] == ["cat, not judged"]


def test_an_audit_that_ends_early_leaves_no_earlier_verdict(store: Store, tmp_path: Path) -> None:
    audit(never, tmp_path / "a", at_most=None)
    files = [tmp_path / "a" / name for name in ("audit.json", "audit.html", "junit.xml", "statement.json")]
    assert all(file.is_file() for file in files)
    audit(never, tmp_path / "b", suite=suite(8))
    label(store, tmp_path / "b", negative=8)
    with pytest.raises(ValueError, match="Expected labels of"):
        audit(never, tmp_path / "a", labels=store)
    assert not any(file.exists() for file in files) and (tmp_path / "a/audited/run.json").is_file()


def test_weights_that_are_not_in_memory_are_told_apart_by_their_files(tmp_path: Path) -> None:
    pipe = tiny.pipeline("small")
    away = copy.copy(pipe)
    away.register_modules(unet=copy.deepcopy(pipe.unet).to("meta"))
    (tmp_path / "model").mkdir()
    found = set()
    for content in (b"one", b"two"):
        (tmp_path / "model/weights.safetensors").write_bytes(content)
        found.add(weights_of(away, str(tmp_path / "model"), ()))
    assert len(found) == 2 and all(len(each) == 64 for each in found)
    assert weights_of(pipe, str(tmp_path / "model"), ()) not in found
    with pytest.raises(ValueError, match="got one that is offloaded"):
        weights_of(away, away, ())


# ---------------------------------------------------------------- an earlier audit


def test_a_concept_that_left_the_audit_is_not_compared_and_not_passed(tmp_path: Path) -> None:
    both = suite(8, ("cat", "dog"))
    audit(never, tmp_path / "then", at_most=None, suite=both, concepts=["cat", "dog"])
    options: dict[str, Any] = {"at_most": None, "since": tmp_path / "then"}
    cats = audit(never, tmp_path / "cats", suite=suite(8), **options)
    assert cats.facts["since"]["lost"] == ["dog"] and cats.code == 4
    assert cats.facts["headline"].startswith("Not compared with the earlier audit: dog. Measured: cat.")
    assert "dog is not compared with the earlier audit, because this audit does not look for it." in cats.verdict
    assert "cat: the rate changed by 0.0 % [" in cats.verdict
    root = ET.fromstring((cats.folder / "junit.xml").read_text())
    assert root.attrib["errors"] == "1" and "dog, regression" in ET.tostring(root, encoding="unicode")
    said = json.loads((cats.folder / "statement.json").read_text())["predicate"]
    assert said["result"] == "FAILED" and said["failedTests"] == ["dog, regression not judged"]
    text = Page((cats.folder / "audit.html").read_text()).text
    assert text.index("dog is not compared") < text.index("Failures")
    moved = tuple(
        dataclasses.replace(row, seed=row.seed + 50 * (row.concept == "dog" or row.id == "cat-1")) for row in both.rows
    )
    seeds = audit(never, tmp_path / "seeds", suite=marks(moved), concepts=["cat", "dog"], **options)
    assert seeds.code == 4 and "dog is not compared with the earlier audit, because no row is in both" in seeds.verdict
    assert "cat: 7 of its 8 earlier rows are in this audit." in seeds.verdict


def test_an_audit_is_not_compared_with_itself(tmp_path: Path) -> None:
    audit(never, tmp_path / "a", at_most=None)
    with pytest.raises(ValueError, match="got .*a, which is this audit's own"):
        audit(never, tmp_path / "a", at_most=None, since=tmp_path / "a/../a")
