"""Every docstring example runs and prints what it says; so does the Python code of README and model card."""

import doctest
import functools
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import typing_sample

import efface
from efface.models.emoji.eyes import ConceptEyes
from efface.models.emoji.weights import FOLDER

MODULES = ["efface", *(m.name for m in pkgutil.walk_packages(efface.__path__, "efface."))]
EXAMPLES = [
    test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples
]

LONG = {"attack", "audit", "AttackResult", "CCRT", "check", "HFI", "GIE.fit", "LatentDirections", "calibrate"}


def marked(example: doctest.DocTest) -> Any:
    long = any(example.name.endswith(f".{name}") for name in LONG)
    return pytest.param(example, marks=[pytest.mark.long] if long else [])


def test_public_names_have_examples() -> None:
    shown = {test.name.rpartition(".")[2] for test in EXAMPLES}
    without = {"Detector", "Editor", "Eraser", "Metric", "__version__"}  # protocols
    assert set(efface.__all__) - without <= shown


@pytest.mark.thinned("long")
@pytest.mark.parametrize("example", [marked(each) for each in EXAMPLES], ids=lambda test: test.name)
def test_example(example: doctest.DocTest) -> None:
    needs_weights = any("load(" in e.source and "emoji" in (e.source + example.name) for e in example.examples)
    if needs_weights and not (FOLDER / "model.json").exists():
        pytest.skip("the emoji weights are not trained yet")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    out: list[str] = []
    runner.run(example, out=out.append)
    assert runner.failures == 0, "".join(out)


ROOT = Path(__file__).parents[1]
PAGES = (
    *(ROOT / name for name in ("README.md", "docs/usage.md", "docs/evaluation.md", "docs/guard.md", "docs/hfi.md")),
    Path(efface.__file__).parent / "models/emoji/MODEL_CARD.md",
)
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{k}", marks=[pytest.mark.slow if "calibrate(" in code else pytest.mark.long])
    for page in PAGES
    for k, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL), 1)
]


@functools.cache
def embedded(model: str) -> Any:
    pipe = efface.load(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pages_have_code() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
@pytest.mark.parametrize("code", BLOCKS)
def test_code_of_a_page_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block has what the text around it names: `efface`, a pipeline and a detector."""
    pipe = embedded("emoji")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(efface, "load", {"emoji": pipe, "emoji-128": embedded("emoji-128")}.__getitem__)
    exec(compile(code, "page", "exec"), {"efface": efface, "pipe": pipe, "ConceptEyes": ConceptEyes})


@pytest.mark.long
@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
def test_the_typed_program_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typing_sample.main(tmp_path)
    assert "['eiup', 'sld', 'negative_prompt']" in capsys.readouterr().out
