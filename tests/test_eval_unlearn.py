"""The plug-in for eval-unlearn. Where eval-unlearn is installed, its own registry and runner run it.

pip install --no-deps --target /tmp/eval eval-unlearn==1.1.2
PYTHONPATH=/tmp/eval pytest tests/test_eval_unlearn.py
"""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import efface
from efface.testing import pipeline

FOLDER = Path(__file__).parents[1] / "integrations/eval_unlearn"
PROMPTS = ["a glass of wine", "a red cat", "a big dog"]
TINY = {"erase_concept": "wine, beer", "model_id": "tiny", "num_inference_steps": 2}
SEED = 1_000_000


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package as pip installs it, with a tiny pipeline as its model."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text("utf-8"))["project"]
    info = tmp_path / f"efface_eval_unlearn-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, entries),) = project["entry-points"].items()
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *(f"{k} = {v}" for k, v in entries.items())]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    importlib.invalidate_caches()
    monkeypatch.setattr(efface, "load", lambda model, *_, **__: pipeline("sd1"))
    yield importlib.import_module("efface_eval_unlearn")
    sys.modules.pop("efface_eval_unlearn", None)


def arrays(pictures: list[Image.Image]) -> Any:
    assert all(isinstance(picture, Image.Image) and picture.mode == "RGB" for picture in pictures)
    return np.stack([np.asarray(picture) for picture in pictures])


def test_it_draws_what_efface_draws(plugin: ModuleType) -> None:
    """With the concept, method and fields of the config; picture i has seed `seed + i`."""
    technique = plugin.EffaceTechnique(**TINY, method="sld.max", fields={"sld_guidance_scale": 900.0}, batch_size=2)
    made = arrays(technique.generate(prompts=PROMPTS, seed=SEED))
    pipe = pipeline("sd1")

    def drawn() -> Any:
        seeds = range(SEED, SEED + len(PROMPTS))
        return arrays(plugin.to_pil(plugin.draw(pipe, PROMPTS, seeds, 2, 7.5, num_inference_steps=2)))

    base = drawn()
    with efface.SLD.max([efface.Concept("wine"), efface.Concept("beer")], sld_guidance_scale=900.0).apply(pipe):
        expected = drawn()
    assert (made == expected).all() and (made != base).any()
    (alone,) = technique.generate(PROMPTS[1:2], seed=SEED + 1)
    assert np.abs(np.asarray(alone).astype(int) - made[1].astype(int)).max() <= 1
    fewer = arrays(technique.generate(PROMPTS, seed=SEED, num_inference_steps=1, guidance_scale=1.5))
    assert (fewer != made).any() and technique.generate([], seed=SEED) == []
    assert len(technique.generate(PROMPTS)) == 3  # without a seed, a random one


def test_a_delta_is_applied_alone_or_with_a_method(plugin: ModuleType, tmp_path: Path) -> None:
    delta = efface.UCE().fit(pipeline("sd1"), [efface.Concept("wine")])
    delta.save(tmp_path / "wine.safetensors")
    given = {**TINY, "delta": str(tmp_path / "wine.safetensors")}
    alone, both = plugin.EffaceTechnique(**given), plugin.EffaceTechnique(**given, method="eiup")
    assert [len(each.handles) for each in (alone, both, plugin.EffaceTechnique(**TINY))] == [1, 2, 1]
    first, second = (arrays(each.generate(PROMPTS, seed=SEED)) for each in (alone, both))
    assert (first != second).any()


def test_shipped_concepts_are_known_by_name(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(efface, "stack", lambda pipe, *erasers: seen.append(erasers))
    plugin.EffaceTechnique(**TINY | {"erase_concept": "alcohol, my own words"})
    assert seen[0][0].concepts == (efface.concept("alcohol"), efface.Concept("my own words"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strenght": 1.0}, "got strenght"),
        ({"model_id": ""}, "model_id"),
        ({"erase_concept": ""}, "erase_concept"),
        ({"erase_concept": " , "}, "at least one concept"),
        ({"method": ""}, "a `method` or a `delta`"),
        ({"method": "eyup"}, "eiup"),
        ({"fields": {"strenght": 1.0}}, "strength"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_would_be_another_method_is_refused(plugin: ModuleType, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plugin.EffaceTechnique(**TINY | options)


def test_the_config_of_the_readme_is_one(plugin: ModuleType) -> None:
    text = (FOLDER / "README.md").read_text("utf-8")
    config = json.loads(text.partition("```json\n")[2].partition("```")[0])["technique"]
    assert config["name"] == "efface"
    plugin.EffaceTechnique(**config["config"] | {"fields": {"strength": 1.0}})
    assert all(f"`{each.name}`" in text for each in plugin.fields(plugin.Config))


def test_eval_unlearn_runs_it(plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package: its registry, its runner and its files, with a metric and prompts of this test."""
    pytest.importorskip("eval_unlearn")
    from eval_unlearn import registry
    from eval_unlearn.registry import entrypoints
    from eval_unlearn.runners import SingleBenchmarkRunner
    from eval_unlearn.types import Dataset, MetricResult

    seen: list[Any] = []

    class Mean:
        """Its own metrics download detectors."""

        def load_dataset(self) -> Any:
            return [Dataset(PROMPTS[:2], {"source": "test"}), Dataset(PROMPTS[2:], {"source": "test"})]

        def update(self, images: Any, prompts: Any, metadata: Any) -> None:
            seen.extend(zip(prompts, images, strict=True))

        def compute(self) -> MetricResult:
            return MetricResult("mean", float(np.mean([np.asarray(image).mean() for _, image in seen])))

    every = entrypoints.entry_points  # without its own techniques, which need other packages
    ours = {"efface"}
    monkeypatch.setattr(
        entrypoints, "entry_points", lambda group: [each for each in every(group=group) if each.name in ours]
    )
    registry.register_metric("mean")(Mean)
    runner = SingleBenchmarkRunner("efface", "mean", dict(TINY), {}, str(tmp_path / "results"), seed=SEED)
    report = runner.run()
    assert registry.get_technique("efface") is plugin.EffaceTechnique
    assert report["erase_concept"] == "wine, beer" and report["metric_result"]["value"] > 0
    assert [prompt for prompt, _ in seen] == PROMPTS
    expected = plugin.EffaceTechnique(**TINY).generate(PROMPTS[:2], seed=SEED)
    assert (arrays([image for _, image in seen[:2]]) == arrays(expected)).all()
    assert list((tmp_path / "results").rglob("*.png"))
