"""The page on methods of one's own, and its example as a distribution that is installed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny import latents, pipeline

import efface
import efface.hooks
from efface import registry
from efface.models.emoji.weights import FOLDER

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/own_method"
PAGE = (ROOT / "docs/own_method.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder into which the example is installed as pip does it, without a build tool and a network."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "efface_dampen.py").write_text((EXAMPLE / "efface_dampen.py").read_text("utf-8"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    vars(efface).pop("Dampen", None)
    sys.modules.pop("efface_dampen", None)


def test_the_example_is_used_by_name_and_by_class(installed: Path) -> None:
    assert registry.methods("erasers")["dampen"] == "erasers" and "Dampen" in dir(efface)
    pipe = pipeline("sd1")
    base = latents(pipe, "a red cat")
    with efface.erase(pipe, "cat", method="dampen", strength=0.5) as by_name:
        erased = latents(pipe, "a red cat")
        assert by_name.config()["method"] == "dampen"
    assert not torch.equal(erased, base) and torch.equal(latents(pipe, "a red cat"), base)
    with efface.Dampen("cat", strength=0.5).apply(pipe) as by_class:
        assert torch.equal(latents(pipe, "a red cat"), erased)
    assert by_class.eraser == by_name.eraser
    assert Path(sys.modules["efface_dampen"].__file__ or "").parent == installed
    assert registry.name_of(efface.Dampen) == "dampen"


def test_without_the_example_nobody_knows_its_name() -> None:
    with pytest.raises(ValueError, match="Unknown method 'dampen'"):
        efface.erase(pipeline("sd1"), "cat", method="dampen")
    assert not hasattr(efface, "Dampen")


@pytest.mark.long
@pytest.mark.parametrize(
    "chosen", ["sd1 or survives or add_up", pytest.param("test", marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_tests_of_the_example_pass(installed: Path, chosen: str) -> None:
    """In a process that knows nothing of this repository's tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={installed}", "-k", chosen]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT / "src")])}
    (installed / "test_dampen.py").write_text((EXAMPLE / "test_dampen.py").read_text("utf-8"))
    done = subprocess.run(
        [*command, "test_dampen.py"], cwd=installed, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)


def test_the_page_shows_the_files_of_the_example() -> None:
    assert (EXAMPLE / "efface_dampen.py").read_text("utf-8") == BLOCKS[0]
    entry = re.search(r"^\[project\.entry-points.*?^$", (EXAMPLE / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert entry and entry[0] in PAGE
    lines = [line for line in BLOCKS[0].partition("@dataclass")[2].splitlines() if line.strip()]
    assert len(lines) <= 25


@pytest.mark.long
@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
def test_the_code_of_the_page_runs(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one program, from top to bottom; the first block is the module `efface_dampen`, which is installed."""
    monkeypatch.chdir(installed)
    names: dict[str, Any] = {"__name__": "page"}
    for code in BLOCKS[1:]:
        exec(compile(code, "docs/own_method.md", "exec"), names)
    assert {"Dampen", "pipe", "test_dampen"} <= names.keys()
    assert not names["report"].broken


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_page_is_linked(page: str) -> None:
    assert "(docs/own_method.md)" in (ROOT / page).read_text("utf-8")


@pytest.mark.parametrize("name", efface.hooks.__all__)
def test_public_names_of_hooks_are_documented(name: str) -> None:
    public = getattr(efface.hooks, name)
    if isinstance(public, type) and public.__module__.startswith("efface.hooks"):
        doc = inspect.getdoc(public) or ""
        headings = ("Args:\n", "Shapes: ", "Raises:\n", "Example:\n    >>> ")
        assert [heading for heading in headings if f"\n{heading}" not in doc] == []
        described = {n for line in re.findall(r"(?m)^    (\w[\w, ]*):", doc) for n in line.split(", ")}
        fields = {f.name for f in dataclasses.fields(public)} if dataclasses.is_dataclass(public) else set()
        assert fields <= described
        methods = [m for m in vars(public).values() if inspect.isfunction(m) and not m.__name__.startswith("_")]
        own = [m for m in methods if m.__module__.startswith("efface.hooks")]
        assert [m.__name__ for m in own if not inspect.getdoc(m)] == []


def test_the_base_class_says_that_it_is_provisional() -> None:
    assert "Provisional until version 1.0" in (inspect.getdoc(efface.hooks.Method) or "")
    assert "### Provisional API" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_a_layer_without_neutral_texts_says_what_is_missing() -> None:
    cross = efface.hooks.CrossAttention(
        Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4), torch.ones(1, 4, 8)
    )
    with pytest.raises(
        ValueError, match="has no neutral texts. Give `CrossAttention` neutral texts, the empty one first"
    ):
        cross.with_empty(efface.hooks.Text(torch.ones(1, 5, 6)))
