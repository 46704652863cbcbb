"""What every editor promises, on every family. New editors are found by walking: they need no line here.

An editor whose fit is slow gives, in QUICK, fields that make it short.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from test_conformance import EFFECT, assert_same, snapshot
from tiny import ALCOHOL, CAT, change, drawn, latents

import efface
from efface import EIUP, Delta, Directions, Steering, Tokens, api, registry
from efface.delta import active

pytestmark = pytest.mark.thinned("long")

SHORT: dict[str, Any] = {"steps": 4, "lr": 1e-2, "batch": 2, "reuse": 2, "sampler_steps": 3}
DATA = tempfile.TemporaryDirectory()
for _k, _boxes in enumerate([[[0, 0, 7, 7]], []]):
    Image.new("RGB", (16, 16), ("white", "black")[_k]).save(f"{DATA.name}/{_k}.png")
    with Path(DATA.name, "metadata.jsonl").open("a") as _file:
        print(json.dumps({"file_name": f"{_k}.png", "text": "a dog", "boxes": _boxes}), file=_file)
LEARNS = {"steps": 4, "batch": 2, "lr": 1e-2, "lr_weights": 1e-2}
QUICK: dict[str, dict[str, Any]] = {
    "esd": SHORT,
    "sdd": {**SHORT, "ema": 0.5},
    "latent_directions": {"steps": 3, "lr": 0.05, "batch": 2, "pictures": 4, "sampler_steps": 2},
    "geom_erasing": {**LEARNS, "grid": 2, "setting": "data", "data": DATA.name, "negative": "name"},
    "casteer": {"subjects": ["dog", "moon"], "template": "{subject} {concept}", "sampler_steps": 2},
    "midsteer": {"neutral": ["dog", "moon"], "pictures": 1, "sampler_steps": 2},
    "gloce": {"preserve": ["dog"], "pictures": 2, "sampler_steps": 2, "observed": (0, 1), "window": (0, 1)},
    "mace": {"templates": ["red {}"], "steps": 3, "lr": 1e-2, "batch": 2, "pictures": 2, "sampler_steps": 2},
    "receler": {"steps": 3, "lr": 1e-1, "inner_steps": 1, "slots": 2, "width": 4, "reuse": 2, "sampler_steps": 3},
    "ccrt": {**SHORT, "steps": 2, "keep": 2, "generations": 1, "template": "{}"},
}
SLOW = ("ccrt",)
WORDS = ("geom_erasing",)  # their results are words, with a delta
# their results are run-time erasers, which a fit refuses
RUN_TIME = ("latent_directions", "casteer", "midsteer", "gloce", "receler")
ALONE = ("hfi",)  # its words change no picture by themselves: tests/test_hfi.py
EDITORS = {
    name: registry.resolve(name)(**QUICK.get(name, {})) for name in registry.methods("editors") if name not in ALONE
}
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EDITORS]
)


@functools.cache
def fitted(name: str, family: str = "sd1", concept: Any = ALCOHOL) -> Any:
    return EDITORS[name].fit(tiny.untouched(family), [concept])


def test_there_are_editors() -> None:
    assert {"uce", "rece", "esd", "sdd", "ccrt", "latent_directions", "geom_erasing"} <= EDITORS.keys()


@each
def test_fit_leaves_the_pipeline_as_found(name: str, pipe: Any, family: str) -> None:
    before = snapshot(pipe)
    delta = EDITORS[name].fit(pipe, [ALCOHOL])
    assert_same(snapshot(pipe), before)
    assert delta.hash == fitted(name, family).hash  # the same again
    assert [c.name for c in delta.concepts] == [ALCOHOL.name] and delta.after == {}


@each
def test_so_does_a_fit_that_is_interrupted(name: str, sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = snapshot(sd1)
    for kind in (Delta, Directions, Steering, Tokens):
        monkeypatch.setattr(kind, "fitted", stop)
    with pytest.raises(KeyboardInterrupt):
        EDITORS[name].fit(sd1, [ALCOHOL])
    assert_same(snapshot(sd1), before)


@each
def test_its_delta_comes_off_to_the_bit_also_after_an_exception(name: str, pipe: Any, family: str) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before, delta = snapshot(pipe), fitted(name, family)
    with delta.apply(pipe):
        erased = latents(pipe)
    assert change(erased, drawn(family)) > EFFECT
    assert_same(snapshot(pipe), before)
    with pytest.raises(KeyboardInterrupt), delta.apply(pipe):
        latents(pipe, callback_on_step_end=stop)
    assert_same(snapshot(pipe), before)
    assert torch.equal(latents(pipe), drawn(family))


@each
def test_config_and_delta_survive_json_and_a_file(name: str, sd1: Any, tmp_path: Path) -> None:
    editor, delta = EDITORS[name], fitted(name)
    if hasattr(editor, "resolved"):  # None stands for the family's value, and the record has that
        editor = editor.resolved(tiny.untouched("sd1"))
    config = delta.config()
    assert json.loads(json.dumps(config)) == config
    assert config["method"] == name and config["concepts"][0]["name"] == "alcohol"
    assert name in WORDS or config["concepts"][0]["phrases"] == ["beer", "wine glass"]
    later = getattr(type(editor), "added", ())  # fields of later versions, left out at their defaults
    assert config["fields"].keys() == {f.name for f in dataclasses.fields(editor)} - {*later}
    assert type(editor)(**config["fields"]) == editor
    delta.save(tmp_path / "delta.safetensors")
    read = api.load_delta(tmp_path / "delta.safetensors")
    assert read.config() == config and torch.equal(drawn("sd1", read), drawn("sd1", delta))


@pytest.mark.long
@each
def test_a_fit_on_top_of_an_earlier_one_belongs_on_top(name: str, sd1: Any) -> None:
    earlier = fitted(name)
    if name in RUN_TIME:
        with earlier.apply(sd1), pytest.raises(ValueError, match=r"is applied to the pipeline.*handle.remove"):
            EDITORS[name].fit(sd1, [CAT])
        return
    with earlier.apply(sd1):
        later = EDITORS[name].fit(sd1, [CAT])
        on = earlier.delta if name in WORDS else earlier
        assert active(sd1) == [on]
        with later.apply(sd1):
            both = latents(sd1)
    assert later.after == {on.hash: 1.0} and later.base_hash == earlier.base_hash
    with pytest.raises(ValueError, match="Apply that one first"):
        later.apply(sd1)
    assert change(both, drawn("sd1", earlier)) > EFFECT and later.hash != fitted(name, concept=CAT).hash


@each
def test_it_stacks_with_run_time_erasers(name: str, sd1: Any) -> None:
    delta, eraser = fitted(name), EIUP([CAT])
    handles = efface.stack(sd1, eraser, delta)
    both = latents(sd1)
    handles[0].remove()
    assert torch.equal(latents(sd1), drawn("sd1", delta))
    handles[1].remove()
    assert torch.equal(latents(sd1), drawn())
    assert change(both, drawn("sd1", delta)) > EFFECT and change(both, drawn("sd1", eraser)) > EFFECT


@each
@pytest.mark.parametrize(
    ("concepts", "words"),
    [([], "at least one concept"), ("beeer", "not a shipped concept"), ([efface.Concept("cat " * 20)], "tokens long")],
)
def test_bad_concepts_are_errors(name: str, concepts: Any, words: str, sd1: Any) -> None:
    with pytest.raises(ValueError, match=words):
        EDITORS[name].fit(sd1, concepts)


# ---------------------------------------------------------------- presets


def test_a_preset_of_an_editor_is_had_by_name() -> None:
    for name in registry.methods("editors"):
        for preset, make in registry.presets(registry.resolve(name)).items():
            fields = {"attributes": ["a man", "a woman"]} if preset == "debias_2023" else {}
            assert api.editor(f"{name}.{preset}", **fields) == make(**fields), (name, preset)
    assert api.editor("esd.paper", eta=2.0, steps=3) == dataclasses.replace(efface.ESD.paper(eta=2.0), steps=3)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("esd.papre", {}, r"esd has no preset 'papre'\. Did you mean 'paper'\? Its presets: paper, code_2025\."),
        ("esd.paper", {"setps": 3}, r"esd has no field 'setps'\. Did you mean 'steps'"),
        ("esd.paper", {"drawn_by": "nobody"}, "`drawn_by` to be one of 'student', 'frozen'"),
        ("uce.debias_2023", {}, "Expected `attributes` with the preset uce.debias_2023, got none. Give it by --set"),
        ("eiup.paper", {}, "'eiup', which is one of the erasers"),
    ],
)
def test_a_wrong_preset_is_told(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        api.editor(name, **fields)
