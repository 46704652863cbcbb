"""`efface new` writes methods that work, in a package and in a clone, and replaces nothing."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import efface
from efface import registry, scaffold
from efface.cli import app

ROOT = Path(__file__).parents[1]
LINT = [str(Path(sys.executable).with_name("ruff"))]


def new(*arguments: str) -> list[Path]:
    done = CliRunner().invoke(app, ["new", "method", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return [Path(file) for file in json.loads(done.stdout)["files"]]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new package, as pip installs it."""
    folder = tmp_path / "package"
    new("soft_block", "--out", str(folder))
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, entries),) = project["entry-points"].items()
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *(f"{k} = {v}" for k, v in entries.items())]))
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield folder
    vars(efface).pop("SoftBlock", None)
    for name in ("efface_soft_block", "test_soft_block"):
        sys.modules.pop(name, None)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of Efface whose other files are links to this one's."""
    package = tmp_path / "clone/src/efface"
    (package / "erasers").mkdir(parents=True)
    for folder, into in ((ROOT / "src/efface", package), (ROOT / "src/efface/erasers", package / "erasers")):
        for file in folder.iterdir():
            if file.name not in ("erasers", "__init__.pyi", "__pycache__"):
                (into / file.name).symlink_to(file)
    (package / "__init__.pyi").write_text((ROOT / scaffold.PUBLIC).read_text("utf-8"))
    return tmp_path / "clone"


def test_a_new_package_is_used_by_name_and_passes_its_own_tests(made: Path) -> None:
    """Of the conformance kit, the promises that need one family; all of them are a slow test."""
    assert registry.methods("erasers")["soft_block"] == "erasers"
    assert registry.resolve("soft_block") is efface.SoftBlock
    tests = importlib.import_module("test_soft_block")
    tests.test_strengths_add_up()
    promises = ("restores-sd1", "off_is_the_base_model-sd1", "refuses_what_it_cannot_do-flux", "says_where")
    (parametrized,) = tests.test_soft_block_keeps_the_promises.pytestmark
    chosen = [check for check in parametrized.args[1] if str(check).startswith(promises)]
    assert len(chosen) == len(promises)
    for check in chosen:
        tests.test_soft_block_keeps_the_promises(check)


def test_the_tests_of_a_new_method_find_a_broken_one(made: Path) -> None:
    tests = importlib.import_module("test_soft_block")
    tests.SoftBlock.edit = lambda self, out, cross, prompts: out * 1.01
    with pytest.raises(AssertionError):
        tests.test_strengths_add_up()


@pytest.mark.long
@pytest.mark.parametrize(
    "chosen", ["add_up or config_survives or says", pytest.param("test", marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_new_method_in_a_clone_passes_its_tests(clone: Path, chosen: str) -> None:
    assert [file.relative_to(clone).as_posix() for file in new("soft_block", "--repository", str(clone))] == [
        "src/efface/erasers/soft_block.py",
        "tests/test_soft_block.py",
        "docs/methods/soft_block.md",
    ]
    environment = {**os.environ, "PYTHONPATH": str(clone / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={clone}", "-k", chosen]
    done = subprocess.run(
        [*command, "tests/test_soft_block.py"], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_the_list_of_public_names_gets_one_line_in_its_place(clone: Path) -> None:
    before = (clone / scaffold.PUBLIC).read_text("utf-8").splitlines()
    new("soft_block", "--repository", str(clone))
    after = (clone / scaffold.PUBLIC).read_text("utf-8").splitlines()
    (line,) = set(after) - set(before)
    assert line == "from .erasers.soft_block import SoftBlock as SoftBlock" and len(after) == len(before) + 1
    assert after[after.index(line) - 1] < line < after[after.index(line) + 1]
    assert [each for each in after if each != line] == before


def test_new_files_pass_the_linters(clone: Path) -> None:
    new("soft_block", "--repository", str(clone))
    (clone / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        files = [str(clone / "src/efface/erasers/soft_block.py"), str(clone / "tests")]
        done = subprocess.run([*LINT, *command, *files], cwd=clone, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_docstring_of_a_new_method_says_all_that_ours_do(made: Path) -> None:
    from efface.testing.conformance.words import undocumented

    cls = registry.resolve("soft_block")
    assert undocumented(cls) == []
    assert [test for test in doctest.DocTestFinder().find(cls, "SoftBlock") if test.examples]


@pytest.mark.parametrize(
    "name", ["", "Soft", "soft block", "1soft", "soft__block", "../soft", "class", "json", "eiup", "a" * 41]
)
def test_names_that_cannot_be_used_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"[Nn]ame|text"):
        scaffold.package(name)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced(tmp_path: Path, clone: Path) -> None:
    (tmp_path / "README.md").write_text("precious")
    with pytest.raises(ValueError, match="found .*README.md"):
        scaffold.package("soft_block", tmp_path).write()
    assert (tmp_path / "README.md").read_text() == "precious" and not (tmp_path / "pyproject.toml").exists()
    (clone / "docs/methods").mkdir(parents=True)
    (clone / "docs/methods/soft_block.md").symlink_to("nowhere")
    listed = (clone / scaffold.PUBLIC).read_text("utf-8")
    with pytest.raises(ValueError, match="soft_block.md"):
        scaffold.in_clone("soft_block", clone).write()
    assert (clone / scaffold.PUBLIC).read_text("utf-8") == listed


def test_a_file_that_cannot_be_written_leaves_no_others(tmp_path: Path) -> None:
    (tmp_path / "tests").write_text("a file where a folder must be")
    found = scaffold.package("soft_block", tmp_path)
    broken = scaffold.Scaffold("soft_block", "SoftBlock", tmp_path, {**found.texts, "tests/late.py": ""}, "", ())
    with pytest.raises(OSError, match="tests"):
        broken.write()
    assert [path.name for path in tmp_path.iterdir()] == ["tests"]


def test_a_folder_that_is_no_clone_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["new", "method", "soft_block", "--repository", str(tmp_path)])
    assert done.exit_code == 2 and "clone of Efface" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["new", "method", "soft_block", "--repository", ".", "--out", "x"])
    assert done.exit_code == 2 and "Give one of them" in " ".join(done.output.split())
