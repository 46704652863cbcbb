"""`efface new` writes methods that work, in a package and in a clone, and replaces nothing."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers import PixArtAlphaPipeline
from packaging.requirements import Requirement
from typer.testing import CliRunner

import efface
import efface.families
import efface.testing
import efface.testing.drawing
from efface import registry, scaffold
from efface.cli import app
from efface.testing import tiny as builders

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
    (package / "families").mkdir()
    (package / "testing/tiny").mkdir(parents=True)
    rooms = (".", "erasers", "families", "testing", "testing/tiny")
    for room in rooms:
        for file in (ROOT / "src/efface" / room).iterdir():
            place = package / room / file.name
            if file.name not in ("__init__.pyi", "__pycache__") and not place.exists():
                place.symlink_to(file)
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


def test_a_new_package_takes_this_version_of_efface(made: Path) -> None:
    (needed,) = tomllib.loads((made / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    requirement = Requirement(needed)
    assert requirement.name == "efface" and requirement.specifier.contains(efface.__version__)
    assert not requirement.specifier.contains("1000.0.0")


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


# ---------------------------------------------------------------- families


def new_family(clone: Path, pipeline: str = "PixArtAlphaPipeline", *options: str) -> dict[str, str]:
    """The text of each new file by its path in the clone."""
    given = ["new", "family", "trial", "--pipeline", pipeline, "--repository", str(clone), "--json", *options]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    return {Path(f).relative_to(clone).as_posix(): Path(f).read_text("utf-8") for f in json.loads(done.stdout)["files"]}


def test_a_new_family_passes_the_kit_once_filled(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PixArt, which Efface knows, and which is taken from the list of families. Three lines are filled in."""
    texts = new_family(clone, "PixArtAlphaPipeline", "--reads", "cross_text")
    assert list(texts) == [
        "src/efface/families/trial.py",
        "src/efface/testing/tiny/trial.py",
        "tests/test_trial.py",
        "docs/families/trial.md",
    ]
    facts = texts["src/efface/families/trial.py"].replace("\n)", '\n    projection="caption_projection",\n)')
    own: dict[str, Any] = {"__name__": "efface.families.trial", "__package__": "efface.families"}
    exec(facts, own)
    others = tuple(each for each in efface.families.FAMILIES if each.name != "PixArt")
    monkeypatch.setattr("efface.families._find.FAMILIES", (*others, own["TRIAL"]))
    tiny = ModuleType("efface.testing.tiny.trial")
    vars(tiny)["__package__"] = "efface.testing.tiny"
    exec(texts["src/efface/testing/tiny/trial.py"], vars(tiny))
    plain = {"use_resolution_binning": False, "clean_caption": False}
    vars(tiny).update(PIPELINES=(PixArtAlphaPipeline,), options=lambda pipe, given, prompts: plain | given)
    monkeypatch.setattr(builders, "FILES", [tiny])
    monkeypatch.setitem(builders.BUILDERS, "trial", tiny.BUILDERS["trial"])
    tests: dict[str, Any] = {"__name__": "test_trial"}
    exec(texts["tests/test_trial.py"], tests)
    tests["test_the_tiny_pipeline_draws_its_prompt"]()
    tests["test_the_family_is_known"]()
    (parametrized,) = tests["test_methods_keep_their_promises"].pytestmark
    chosen = [check for check in parametrized.args[1] if str(check).startswith(("restores-", "off_is", "rows_"))]
    assert len(chosen) >= 3
    for check in chosen:
        tests["test_methods_keep_their_promises"](check)
    wrong = dataclasses.replace(own["TRIAL"], offers=frozenset({"joint_text"}))  # it has no such layers
    monkeypatch.setattr("efface.families._find.FAMILIES", (*others, wrong))
    efface.testing.drawing.forget()
    with pytest.raises((AssertionError, ValueError, efface.testing.DoesNotApply)):
        tests["test_methods_keep_their_promises"](chosen[0])
    efface.testing.drawing.forget()


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("SanaPipeline", ('encoders=("Gemma2",)', 'width_names=("caption_channels",)', "fill(")),
        ("CogView4Pipeline", ("guidance_in_two_calls=True", 'returns=("text", "negative")', 'encoders=("Glm",)')),
        ("StableDiffusion3Pipeline", ('returns=("text", "negative", "pooled", "negative_pooled")', '"CLIPText"')),
        ("StableDiffusionPipeline", ('denoiser="unet"', 'returns=("text", "negative")')),
    ],
)
def test_what_diffusers_code_says_of_known_families_is_what_they_say(
    pipeline: str, said: tuple[str, ...], clone: Path
) -> None:
    texts = new_family(clone, pipeline)
    whole = texts["src/efface/families/trial.py"] + texts["src/efface/testing/tiny/trial.py"]
    assert [each for each in said if each not in whole] == []


def test_files_of_a_new_family_pass_the_linters(clone: Path) -> None:
    (clone / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    for pipeline, reads in (("CogView4Pipeline", "joint_text"), ("PixArtSigmaPipeline", "cross_text")):
        made = [clone / path for path in new_family(clone, pipeline, "--reads", reads) if path.endswith(".py")]
        for command in (["check", "--no-cache"], ["format", "--check", "--diff", "--no-cache"]):
            done = subprocess.run([*LINT, *command, *made], cwd=clone, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        for path in made:
            path.unlink()
        (clone / "docs/families/trial.md").unlink()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["trial", "--pipeline", "NoPipeline"], "a pipeline class of diffusers"),
        (["trial", "--pipeline", "UNet2DConditionModel"], "a pipeline class of diffusers"),
        (["trial", "--pipeline", "DDPMPipeline"], "with `encode_prompt`"),
        (["Trial", "--pipeline", "FluxPipeline"], "the name of a family"),
        (["flux", "--pipeline", "FluxPipeline"], "found"),
        (["trial", "--pipeline", "FluxPipeline", "--reads", "words"], "joint_text"),
        (["trial", "--pipeline", "FluxPipeline", "--repository", "."], "clone of Efface"),
    ],
)
def test_families_that_cannot_be_written_are_refused(
    options: list[str], words: str, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (clone / "src/efface/families").mkdir(exist_ok=True)
    where = [] if "--repository" in options else ["--repository", str(clone)]
    done = CliRunner().invoke(app, ["new", "family", *options, *where])
    assert done.exit_code == 2 and words in " ".join(done.output.split())


def test_a_folder_that_is_no_clone_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["new", "method", "soft_block", "--repository", str(tmp_path)])
    assert done.exit_code == 2 and "clone of Efface" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["new", "method", "soft_block", "--repository", ".", "--out", "x"])
    assert done.exit_code == 2 and "Give one of them" in " ".join(done.output.split())
