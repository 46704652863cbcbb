"""Six-CD and I2P with harmless prompts of the 128-pixel model: all categories and pairs, through a run and an audit."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_suites import I2P_HEADER, write
from torch import Tensor

import efface
from efface import Concept, Suite, runs
from efface.metrics.outcomes import Outcomes
from efface.metrics.removal import Removal
from efface.models.emoji128.eyes import load_eyes
from efface.suites.i2p import CATEGORIES, I2P
from efface.suites.six_cd import SixCD

OBJECTS = {
    "celebrity": ("Panda", "Robot"),
    "character": ("frog", "elephant"),
    "object": ("pizza", "guitar"),
    "artstyle": ("rocket", "cactus"),
}
"""An icon that the model draws for each concept of a category."""
GENERAL = {"harm": "banana", "nudity": "penguin"}
KEPT = ("camera", "key", "crown", "balloon", "bus", "rose", "banjo", "top hat", "bicycle", "red apple")
REST = dict(zip((*GENERAL, *OBJECTS), (f"a {each}" for each in KEPT), strict=False))
"""What the pairs of a category show besides the concept."""
STEPS, SEED = 5, 1_000_000


@functools.cache
def eyes() -> Any:
    return load_eyes()


@dataclasses.dataclass(frozen=True)
class Icons:
    """The detectors of the 128-pixel model, for stand-ins: a category shows its icon. Without names: any icon."""

    names: tuple[str, ...] = ()
    name = "the detectors of emoji-128"

    def __call__(self, images: Tensor) -> Tensor:
        if not self.names:
            found: Tensor = eyes().icons(images).any(-1)
            return found
        meant = {**GENERAL, **dict.fromkeys(CATEGORIES, "penguin")}
        seen = [eyes().concept(images, meant.get(name, name.lower())) for name in self.names]
        return torch.stack(seen).any(0)


def six_cd(folder: Path) -> Path:
    """Files of the shape of Six-CD."""
    six = folder / "six_cd"
    for category, icon in GENERAL.items():
        alone = [(k, SEED + k, f"a {icon}") for k in range(2)]
        write(six / f"{category}.csv", "case_number evaluation_seed prompt", *alone)
        shown = [(k, SEED + k, f"a {icon} and {REST[category]}") for k in range(2)]
        write(six / f"dual_{category}_malicious.csv", "case_number evaluation_seed prompt", *shown)
    for category, names in OBJECTS.items():
        write(six / f"concepts_{category}.csv", "id concept", *enumerate(names))
        pairs = [(k, SEED + k, name, f"a {name} and {REST[category]}") for k, name in enumerate(names)]
        write(six / f"dual_{category}_malicious.csv", "case_number evaluation_seed target prompt", *pairs)
    for category in (*GENERAL, *OBJECTS):
        clean = [(k, SEED + k, REST[category]) for k in range(2)]
        write(six / f"dual_{category}_clean.csv", "case_number evaluation_seed prompt", *clean)
    write(
        six / "benign.csv",
        "case_number prompt evaluation_seed",
        *[(k, f"a {each}", SEED + k) for k, each in enumerate(KEPT)],
    )
    templates = {"artstyle": ["a {artist}"], "celebrity_character_object": ["a {name}"]}
    (six / "templates.json").write_text(json.dumps(templates))
    return folder


def judged(suite: Suite) -> Suite:
    """With the detectors and the encoder of the embedded models, and few steps."""
    metrics = [Outcomes(Icons, Icons), Removal(Icons)]
    metrics += [runs.make_metric(m.name, encoder="emoji") for m in suite.metrics if "clip" in m.name]
    return dataclasses.replace(suite, metrics=tuple(metrics), call=suite.call | {"num_inference_steps": STEPS})


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = efface.load("emoji-128")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.slow
def test_six_cd_is_drawn_scored_and_audited_whole(pipe: Any, tmp_path: Path) -> None:
    loaded = SixCD(images=1).load((), six_cd(tmp_path))
    suite = judged(loaded)
    kinds = Counter((row.kind, row.category) for row in suite.rows)
    every = (*GENERAL, *OBJECTS)
    assert all(kinds["dual", each] == kinds["clean", each] == 2 for each in every) and kinds["benign", "benign"] == 10
    assert all(kinds["natural" if each in GENERAL else "explicit", each] == 2 for each in every)
    everything = {name for names in OBJECTS.values() for name in names} | set(GENERAL)
    assert {row.concept for row in suite.rows} - {""} == everything
    targets = [Concept(name, (GENERAL.get(name, name.lower()),)) for name in sorted(everything)]
    run = efface.run(suite, pipe, eraser=efface.api.build("negative_prompt", targets), out=tmp_path / "run", batch=16)
    scores = {score.metric: score for score in runs.score(run)}
    fits = {name: scores[f"in_prompt_clip{name}"] for name in ("", ".base", ".ceiling", ".floor", ".normalised")}
    assert all(each.n == 12 and each.value == each.value for each in fits.values()), fits  # all pairs; none is NaN
    assert fits[".floor"].value < fits[".ceiling"].value and scores["clip_score"].n == 10
    covered = {each["concept"]: each for each in run.card()["coverage"]}
    assert covered.keys() == everything

    options: dict[str, Any] = {"suite": suite, "detector": Icons, "recognises": Icons, "at_most": 0.05, "batch": 16}
    made = efface.audit(pipe, targets, base=pipe, out=tmp_path / "audit", **options)
    by_concept = {each["concept"]: each for each in made.facts["concepts"]}
    assert by_concept.keys() == everything
    asked = Counter(row.concept for row in suite.rows)
    assert all(facts["n"] == asked[name] > 0 for name, facts in by_concept.items())  # a dual row asks too
    shown = [facts["rate"]["rate"] >= 0.5 for facts in by_concept.values()]
    assert sum(shown) >= 6, by_concept  # the effect: the model draws what the stand-ins ask for
    assert {facts["verdict"]["outcome"] for facts in by_concept.values()} <= {"exceeded", "not judged"}
    assert made.code in (3, 4) and (tmp_path / "audit/audit.html").is_file()


@pytest.mark.slow
def test_i2p_is_drawn_scored_and_audited_by_category(pipe: Any, tmp_path: Path) -> None:
    lines = [
        (f"a penguin, number {k}", category, "0.0", SEED + k, "5", "128", "128", k + 1)
        for k, category in enumerate(CATEGORIES)
    ]
    write(tmp_path / "i2p/i2p.csv", I2P_HEADER, *lines)
    suite = judged(I2P(images=2).load((), tmp_path))
    assert Counter(row.concept for row in suite.rows) == dict.fromkeys(CATEGORIES, 2)
    assert {row.call["guidance"] for row in suite.rows} == {5.0}
    run = efface.run(suite, pipe, eraser=efface.EIUP(Concept("penguin")), out=tmp_path / "run", batch=16)
    scores = {score.metric: score for score in runs.score(run)}
    assert scores.keys() >= {"outcomes.erased", "removal.absolute"} and scores["outcomes.erased"].n == 14
    targets = [Concept(name) for name in CATEGORIES]
    options: dict[str, Any] = {"suite": suite, "detector": Icons, "recognises": Icons, "batch": 16}
    made = efface.audit(pipe, targets, base=pipe, out=tmp_path / "audit", **options)
    assert [each["n"] for each in made.facts["concepts"]] == [2] * 7
    assert sum(each["rate"]["rate"] > 0 for each in made.facts["concepts"]) >= 4  # the effect
    categories: Sequence[Any] = made.facts["hazards"]
    assert any(each["scheme"].startswith("I2P") for each in categories), categories
