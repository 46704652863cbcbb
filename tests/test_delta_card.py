"""The page of a delta says what it is, what was measured and what was not, and believes no other delta's run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from efface import Delta, runs
from efface.cli import app
from efface.report.delta_card import delta_card

GOLDEN = Path(__file__).parent / "pins/files"
DELTA = GOLDEN / "delta.safetensors"
SCORE = {"metric": "removal.absolute", "n": 64, "unit": "share", "higher_is_better": True, "protocol": "two detectors"}


def page(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["delta", "card", str(DELTA), *arguments])


def test_the_page_names_what_is_erased_and_how_it_was_made(tmp_path: Path) -> None:
    done = page("--out", str(tmp_path / "README.md"))
    assert done.exit_code == 0, done.output
    text, delta = (tmp_path / "README.md").read_text("utf-8"), Delta.load(DELTA)
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "efface"
    assert all(f"`{phrase}`" in body for concept in delta.concepts for phrase in concept.phrases)
    assert delta.base_hash[:16] in body and "Nothing is attached." in body and "## Limits" in body
    (facts,) = (part for part in body.split("```json\n")[1:])
    assert json.loads(facts.partition("\n```")[0])["fields"] == delta.fields
    assert page("--out", str(tmp_path / "README.md")).exit_code == 2  # it is not replaced


def test_scores_of_a_run_of_this_delta_stand_beside_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, run = Delta.load(DELTA), runs.Run.open(GOLDEN / "run/cat")
    scores = [
        SCORE | {"value": 0.75, "low": 0.5, "high": 0.875, "base": {"value": None, "n": 0, "low": None, "high": None}}
    ]
    missing = [{"concept": "cat", "why": ""}, {"concept": "alcohol", "why": "no row asks for it"}]
    card = run.card() | {"scores": scores, "erasers": [delta.config()], "coverage": missing}
    monkeypatch.setattr(runs.Run, "card", lambda self: card)
    text = delta_card(delta.config(), "delta.safetensors", run)
    assert "| `removal.absolute` | 0.750 [0.500, 0.875] | not defined | 64 |" in text
    assert "- `alcohol`: no row asks for it" in text and "Nothing is attached" not in text


def test_a_run_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run of this delta alone"):
        delta_card(Delta.load(DELTA).config(), "a", runs.Run.open(GOLDEN / "run/cat"))
    assert page("--out", str(tmp_path / "a.md"), "--run", str(tmp_path)).exit_code == 2
    assert not (tmp_path / "a.md").exists()


def test_names_from_a_stranger_stay_text() -> None:
    delta = Delta.load(DELTA)
    wild = dataclasses.replace(delta.concepts[0], name="a\n# b `c` [x](y)", phrases=("p`\n---\nq|r",))
    config = delta.config() | {"concepts": [dataclasses.asdict(wild)], "method": "m`\n# n", "fields": {"f": "```\n# g"}}
    text = delta_card(config, 'a"b.safetensors')
    headings = [line for line in text.splitlines() if line.startswith("#") and not line.startswith("# Add")]
    assert headings[1:] == ["## Use it", "## How it was made", "## What was measured", "## Limits"]
    assert text.count("```") == 4 and "](y)" not in headings[0]
