"""Every docstring example runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import efface
from efface.models.emoji.weights import FOLDER

MODULES = ["efface", *(m.name for m in pkgutil.walk_packages(efface.__path__, "efface."))]
EXAMPLES = [
    test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples
]


def test_public_names_have_examples() -> None:
    shown = {test.name.rpartition(".")[2] for test in EXAMPLES}
    without = {"Detector", "Editor", "Eraser", "Metric", "__version__"}  # protocols
    assert set(efface.__all__) - without <= shown


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_example(example: doctest.DocTest) -> None:
    needs_weights = any("load(" in e.source and "emoji" in (e.source + example.name) for e in example.examples)
    if needs_weights and not (FOLDER / "model.json").exists():
        pytest.skip("the emoji weights are not trained yet")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    out: list[str] = []
    runner.run(example, out=out.append)
    assert runner.failures == 0, "".join(out)
