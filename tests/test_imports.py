"""Imports run one way, `import efface` is light, and public names are what they say."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import efface

ROOT = Path(efface.__file__).parent

# What each part may import, besides itself. `efface` is the package's own `__init__`.
FACTS = {"registry", "core", "families"}
INSIDE = {
    "_weights",
    "_text",
    "_masking",
    "_attention",
    "_method",
    "_prompts",
    "_guidance",
    "_layers",
    "_hooks",
    "_forward",
    "_records",
    "_watch",
}  # of diffusers
HOOKS = FACTS | INSIDE | {"delta"}
MAY_IMPORT: dict[str, set[str]] = {
    "registry": set(),
    "core": {"registry"},
    "families": {"registry", "core"},
    "_records": set(),
    "_forward": set(),
    "_weights": FACTS,
    "_text": FACTS | {"_weights", "_forward"},
    "_masking": FACTS | {"_text"},
    "_attention": set(),
    "_watch": set(),
    "_method": FACTS | {"_attention", "_weights", "_text"},
    "_prompts": FACTS | {"_weights", "_text", "_attention", "_method", "_records"},
    "_guidance": FACTS | {"_attention", "_method", "_prompts"},
    "_layers": {"_forward", "_attention"},
    "_hooks": FACTS | INSIDE,
    "delta": FACTS | INSIDE,
    "erasers": HOOKS | {"pictures"},
    "editors": HOOKS,
    "attacks": HOOKS,
    "models": FACTS,
    "metrics": FACTS | {"models"},
    "suites": FACTS | {"models"},
    "pictures": set(),
    "intervals": set(),
    "api": HOOKS | {"models"},
    "calibration": FACTS | {"api", "delta", "intervals", "pictures"},
    "runs": HOOKS | {"models", "api", "pictures"},
    "report": FACTS | {"runs"},
    "_interrupt": set(),
    "cli": FACTS | {"models", "api", "calibration", "pictures", "runs", "report", "_interrupt"},
    "__main__": {"cli", "_interrupt"},
    "efface": {
        *("core", "api", "calibration", "erasers", "editors", "attacks", "metrics", "suites", "delta", "runs", "report")
    },
}


def imported(source: str, module: str, *, package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, part) for every import of efface in `source`, also inside functions and `if TYPE_CHECKING`."""
    parents = module.split(".") if package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            path = ".".join([*base, node.module] if node.module else base)
            targets = [f"{path}.{alias.name}" for alias in node.names]
        for target in targets:
            head, _, rest = target.partition(".")
            if head != "efface" or rest == "__version__":
                continue
            part = rest.partition(".")[0]
            yield node.lineno, part if is_part(part) else "efface"


def is_part(name: str) -> bool:
    return name in MAY_IMPORT and name != "efface"


def back_edges(source: str, module: str, *, package: bool = False) -> list[str]:
    """The imports of `module` that run the wrong way."""
    own = module.split(".")[1] if "." in module else "efface"
    if own not in MAY_IMPORT:
        return [f"{module}: say in MAY_IMPORT what {own!r} may import"]
    return [
        f"{module}:{line} imports {part}"
        for line, part in imported(source, module, package=package)
        if part not in MAY_IMPORT[own] | {own}
    ]


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=[module for module, _ in modules()])
def test_imports_run_one_way(module: str, path: Path) -> None:
    assert back_edges(path.read_text(), module, package=path.stem == "__init__") == []


def circles(package: str) -> list[str]:
    """The modules of a package that import themselves, by way of others of it."""
    files = {path.stem: path for path in (ROOT / package).glob("*.py")}
    uses: dict[str, set[str]] = {}
    for name, path in files.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        uses[name] = {node.module or "__init__" for node in nodes if node.level == 1} & files.keys()

    def reached(name: str) -> set[str]:
        found: set[str] = set()
        queue = [*uses[name]]
        while queue:
            if (step := queue.pop()) not in found:
                found.add(step)
                queue += uses[step]
        return found

    return sorted(name for name in files if name in reached(name))


@pytest.mark.parametrize("package", ["families"])
def test_no_module_of_a_package_imports_itself_through_others(package: str) -> None:
    assert circles(package) == []


def test_a_family_is_one_file_that_nothing_else_names() -> None:
    files = [path for path in (ROOT / "families").glob("*.py") if not path.stem.startswith("_") and path.stem != "base"]
    names = "|".join(path.stem for path in files)
    assert len(files) > 3
    for module, path in modules():
        if path not in files:
            assert not re.search(rf"families\.({names})\b|from \.({names}) import", path.read_text()), module


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("efface.core", "from efface.families import family\n"),
        ("efface.core", "from efface import families\n"),
        ("efface.core", "from . import families\n"),
        ("efface.core", "import efface.families as facts\n"),
        ("efface.core", "import efface\n"),
        ("efface.core", "from efface import Concept\n"),
        ("efface.core", "def late():\n    from efface._hooks import encode\n"),
        ("efface.core", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from efface.delta import Delta\n"),
        ("efface.registry", "from efface.core import Concept\n"),
        ("efface.families", "from efface._hooks import encode\n"),
        ("efface.families.flux", "from .._text import encode\n"),
        ("efface.families._needs", "from efface.erasers.eiup import EIUP\n"),
        ("efface._hooks", "from efface.delta import Delta\n"),
        ("efface._weights", "from efface._text import encode\n"),
        ("efface._text", "from ._hooks import site\n"),
        ("efface._attention", "from ._hooks import Site\n"),
        ("efface._layers", "from ._hooks import Site\n"),
        ("efface._prompts", "from ._guidance import guided\n"),
        ("efface._method", "from ._prompts import Entry\n"),
        ("efface._hooks", "from efface.erasers import eiup\n"),
        ("efface.delta", "from efface.erasers.eiup import EIUP\n"),
        ("efface.erasers.eiup", "from efface.api import load\n"),
        ("efface.erasers.eiup", "from efface.editors.uce import UCE\n"),
        ("efface.erasers.eiup", "from ..editors import uce\n"),
        ("efface.models.emoji.vae", "from efface._hooks import encode\n"),
        ("efface.models.emoji.vae", "from ..._hooks import encode\n"),
        ("efface.metrics.clip", "from efface.erasers.eiup import EIUP\n"),
        ("efface.api", "from efface.erasers.eiup import EIUP\n"),
        ("efface.api", "from efface.cli import app\n"),
        ("efface.cli", "from efface.erasers.eiup import EIUP\n"),
        ("efface.cli", "from efface._hooks import encode\n"),
        ("efface.attic", "x = 1\n"),
    ],
)
def test_a_back_edge_is_found(module: str, source: str) -> None:
    assert len(back_edges(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("efface.core", "import torch\nfrom efface import __version__\nfrom efface.registry import near\n"),
        ("efface.core", "from effaced import families\nimport effacement.families\n"),
        ("efface.erasers.eiup", "from efface import _hooks, families\nfrom efface.core import Concept\n"),
        ("efface.erasers.gie", "from efface.erasers.eiup import EIUP\nfrom .eiup import EIUP\n"),
        (
            "efface.models.emoji.loader",
            "from .vae import EmojiVAE\nfrom .. import emoji\nfrom ...core import Concept\n",
        ),
        ("efface.cli", "from efface import api, registry\n"),
    ],
)
def test_a_downward_import_is_not_a_back_edge(module: str, source: str) -> None:
    assert back_edges(source, module) == []


def test_a_relative_import_in_a_package_starts_at_the_package() -> None:
    assert back_edges("from . import vae\n", "efface.models.emoji", package=True) == []
    assert back_edges("from .. import _hooks\n", "efface.models", package=True) == ["efface.models:1 imports _hooks"]


def test_registry_imports_the_standard_library_only() -> None:
    for node in ast.walk(ast.parse((ROOT / "registry.py").read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "statement",
    [
        "import efface",
        "import efface.cli",
        "import efface.registry; efface.registry.methods()",
        "import efface.families; efface.families.FAMILIES",
        "import efface; dir(efface)",
    ],
)
def test_light_imports_load_no_model_code(statement: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    script = f"import sys\n{statement}\nprint(*sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", efface.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(efface, name)
    assert value is getattr(efface, name)
    assert name in dir(efface)
    if isinstance(value, type):
        assert value.__name__ == name


def test_unknown_attributes_are_attribute_errors() -> None:
    assert not hasattr(efface, "eraze")
    with pytest.raises(ImportError):
        importlib.import_module("efface.eraze")


def test_no_public_name_is_a_submodule() -> None:
    submodules = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert "registry" in submodules
    assert not submodules & set(efface.__all__)


def test_lazy_names_and_typed_names_agree() -> None:
    """What a type checker sees under `if TYPE_CHECKING` is what `__getattr__` finds."""
    typed = {
        alias.name: node.module
        for node in ast.walk(ast.parse((ROOT / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("efface.")
        for alias in node.names
    }
    assert typed == efface._HOME
    assert set(typed) | {"__version__"} == set(efface.__all__)
