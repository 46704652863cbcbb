"""Imports run one way, `import efface` is light, and public names are what they say."""

import ast
import importlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import efface
from efface import registry

ROOT = Path(efface.__file__).parent

# What each part may import, besides itself. `efface` is the package's own `__init__`.
FILES = {"files", "schema", "pictures", "records"}
FACTS = {"registry", "checks", "fields", "core", "families"} | FILES
TEXTS = FACTS | {"_weights", "_unchanged", "_encodings", "_text", "_condition", "_masking", "_latents"}
HOOKS = TEXTS | {"hooks", "delta"}
MAY_IMPORT: dict[str, set[str]] = {
    "registry": set(),
    "checks": {"registry"},
    "fields": set(),
    "_hazards": set(),
    "_hub": set(),
    "_concepts": {"registry", "checks", "fields", "_hazards"},
    "core": {"registry", "checks", "fields", "_concepts"},
    "files": {"checks"},
    "schema": {"checks", "files"},
    "pictures": {"checks", "files"},
    "records": {"checks", "files", "pictures"},
    "families": {"registry", "checks", "core"},
    "_weights": FACTS,
    "_unchanged": set(),
    "_encodings": FACTS | {"_unchanged"},
    "_text": FACTS | {"_weights", "_encodings"},
    "_condition": FACTS | {"_text"},
    "_masking": FACTS | {"_text"},
    "_latents": set(),
    "hooks": TEXTS,
    "delta": TEXTS | {"hooks"},
    "erasers": HOOKS,
    "editors": HOOKS | {"progress", "feedback", "detectors"},
    "attacks": HOOKS,
    "phrases": TEXTS | {"attacks", "erasers"},
    "testing": TEXTS | {"hooks"},
    "models": FACTS,
    "detectors": FACTS | {"models", "_hub"},
    "metrics": FACTS | {"models", "detectors", "judged"},
    "suites": FACTS | {"models", "_hub"},
    "intervals": {"checks"},
    "judged": {"checks", "intervals"},
    "feedback": {"_sqlite", "checks", "intervals", "judged"} | FILES,
    "thresholds": {"checks", "files", "intervals", "detectors", "records"},
    "progress": set(),
    "_loading": FACTS | {"models"},
    "pipelines": TEXTS | {"delta", "_loading"},
    "api": HOOKS | {"pipelines"},
    "modular": HOOKS,
    "_trials": FACTS | {"api", "intervals"},
    "calibration": FACTS | {"api", "pipelines", "delta", "intervals", "_trials"},
    "redteam": HOOKS | {"attacks", "models", "api", "pipelines", "detectors", "runs", "intervals", "progress"},
    "runs": HOOKS | {"_ray", "models", "api", "pipelines", "metrics", "detectors", "progress", "judged", "feedback"},
    "report": FACTS | {"runs", "redteam", "feedback", "intervals", "judged"},
    "tables": FACTS | {"runs", "report"},
    "guard": HOOKS | {"api", "detectors"},
    "serve": FACTS | {"_hub", "_ray", "_sqlite", "_weights", "api", "guard", "progress"},
    "auditing": HOOKS
    | {"models", "api", "pipelines", "detectors", "metrics", "runs", "redteam", "report", "intervals", "judged"}
    | {"feedback", "progress", "attacks", "_hazards"},
    "jobs": HOOKS | {"models", "api", "pipelines", "runs", "progress", "auditing"},
    "scaffold": {"checks", "files", "registry"},
    "_interrupt": set(),
    "_sqlite": set(),
    "_ray": set(),
    "cli": FACTS
    | {"models", "api", "pipelines", "calibration", "detectors", "runs", "redteam", "report", "tables", "jobs"}
    | {"progress", "feedback", "auditing", "thresholds", "guard", "serve"}
    | {"_interrupt", "_hub", "scaffold", "phrases"},
    "__main__": {"cli", "_interrupt"},
    "efface": {
        *("registry", "core", "records", "pictures", "pipelines", "api", "calibration", "erasers", "editors"),
        *(
            "attacks",
            "auditing",
            "detectors",
            "phrases",
            "suites",
            "delta",
            "guard",
            "modular",
            "runs",
            "redteam",
            "report",
            "tables",
        ),
    },
}


# The files of a package, in the order in which they may import each other: none imports a later one.
ORDER = {
    "hooks": (
        *(
            "texts",
            "attention",
            "watch",
            "copies",
            "forward",
            "contract",
            "carried",
            "joint",
            "prompts",
            "layers",
            "unconditional",
            "calls",
            "pipeline",
            "batch",
            "edits",
        ),
        *("prediction", "step", "outputs", "denoiser", "sites", "loops", "method", "__init__"),
    ),
    "delta": (
        *("factors", "watch", "overlay", "applied", "embeddings", "words", "base", "table", "gates"),
        *("forms", "file", "lora", "artefact", "delta", "features", "steering", "tokens", "state"),
        "__init__",
    ),
    "runs": (
        *("folder", "remote", "record", "judges", "sample", "card", "labels", "draw", "workers", "bench"),
        *("score", "verify", "__init__"),
    ),
    "feedback": (
        *("forms", "judgement", "store", "jsonl", "session", "pool", "sheets", "page", "agreement", "evidence"),
        *("networks", "reward", "figure", "__init__"),
    ),
    "attacks": (
        *("_words", "_contract", "_texts", "_vocabulary", "_tokens", "_encoders", "_noising", "_recording"),
        *("_directions", "_whitebox", "_masked", "_search", "_compose", "_fit", "_pictures", "__init__"),
        *("best_of_n", "concept_arithmetics", "concept_inversion", "gcg", "guidance_sweep", "image_to_image"),
        "detector_guidance",
        *(
            "inpainting",
            "latent_inversion",
            "lookalike",
            "p4d",
            "paraphrase",
            "prompt_as_negative",
            "prompt_schedule",
            "quantisation",
        ),
        *("relearning", "repetition", "ring_a_bell", "translation", "unlearndiffatk"),
    ),
    "redteam": ("victim", "panel", "trial", "result", "forms", "folder", "run", "__init__"),
    "guard": (
        *(
            "forms",
            "edit",
            "contradictions",
            "policy",
            "file",
            "deltas",
            "proof",
            "record",
            "partial",
            "explain",
            "drawing",
            "guard",
        ),
        "__init__",
    ),
    "serve": (
        *(
            "turns",
            "tables",
            "database",
            "errors",
            "log",
            "bell",
            "metrics",
            "audit",
            "keys",
            "policies",
            "fields",
            "claims",
        ),
        *("jobs", "leases", "fair", "service", "backend", "pulse", "ends", "worker", "watch", "http", "images", "own"),
        *("studio", "app", "run", "cluster", "__init__"),
    ),
    "report": (
        "words",
        "delta_card",
        "template",
        "compare",
        "plot",
        "pictures",
        "verdict",
        "page",
        "attacked",
        "audited",
        "differences",
        "__init__",
    ),
    "auditing": (
        *(
            "judge",
            "verdict",
            "words",
            "prepare",
            "forms",
            "result",
            "folder",
            "rows",
            "hazards",
            "draw",
            "evidence",
            "log",
            "since",
            "run",
            "__init__",
        ),
    ),
}


def imported(source: str, module: str, *, package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) for every import of efface in `source`, also inside functions and `if TYPE_CHECKING`."""
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
            if head == "efface" and rest != "__version__":
                yield node.lineno, rest


def is_part(name: str) -> bool:
    return name in MAY_IMPORT and name != "efface"


def back_edges(source: str, module: str, *, package: bool = False) -> list[str]:
    """The imports of `module` that run the wrong way."""
    own = module.split(".")[1] if "." in module else "efface"
    if own not in MAY_IMPORT:
        return [f"{module}: say in MAY_IMPORT what {own!r} may import"]
    order = ORDER.get(own, ())
    name = "__init__" if package else module.rpartition(".")[2]
    found = []
    for line, target in imported(source, module, package=package):
        part, _, rest = target.partition(".")
        part = part if is_part(part) else "efface"
        inner = rest.partition(".")[0]
        inner = inner if inner in order else "__init__"
        if part not in MAY_IMPORT[own] | {own}:
            found.append(f"{module}:{line} imports {part}")
        elif part == own and order and order.index(inner) >= order.index(name):
            found.append(f"{module}:{line} imports {part}.{inner}")
    return found


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted([*ROOT.rglob("*.py"), *ROOT.rglob("*.pyi")]):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_imports_run_one_way() -> None:
    known = modules()
    assert len(known) > 300
    edges = [back_edges(path.read_text(), module, package=path.stem == "__init__") for module, path in known]
    assert [*itertools.chain(*edges)] == []


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
        ("efface.core", "def late():\n    from efface.hooks import Method\n"),
        ("efface.core", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from efface.delta import Delta\n"),
        ("efface.registry", "from efface.core import Concept\n"),
        ("efface.families", "from efface.hooks import Method\n"),
        ("efface.families.flux", "from .._text import encode\n"),
        ("efface.families._needs", "from efface.erasers.eiup import EIUP\n"),
        ("efface.hooks.denoiser", "from efface.delta import Delta\n"),
        ("efface._weights", "from efface._text import encode\n"),
        ("efface._text", "from .hooks import Method\n"),
        ("efface.hooks.denoiser", "from ..erasers import eiup\n"),
        ("efface.hooks.denoiser", "from efface.erasers import eiup\n"),
        ("efface.hooks.attention", "from .denoiser import Site\n"),
        ("efface.hooks.step", "if TYPE_CHECKING:\n    from .denoiser import Site\n"),
        ("efface.delta.delta", "from efface.erasers.eiup import EIUP\n"),
        ("efface.delta.overlay", "from .applied import AppliedDelta\n"),
        ("efface.delta.overlay", "from . import applied\n"),
        ("efface.delta.file", "from .lora import export\n"),
        ("efface.delta.lora", "if TYPE_CHECKING:\n    from efface.delta import Delta\n"),
        ("efface.delta.watch", "import efface.delta.overlay\n"),
        ("efface.erasers.eiup", "from efface.api import load\n"),
        ("efface.erasers.eiup", "from efface.editors.uce import UCE\n"),
        ("efface.erasers.eiup", "from ..editors import uce\n"),
        ("efface.models.emoji.vae", "from efface.hooks import Method\n"),
        ("efface.models.emoji.vae", "from ...hooks import Method\n"),
        ("efface.metrics.clip", "from efface.erasers.eiup import EIUP\n"),
        ("efface.api", "from efface.erasers.eiup import EIUP\n"),
        ("efface.api", "from efface.cli import app\n"),
        ("efface.cli", "from efface.erasers.eiup import EIUP\n"),
        ("efface.cli", "from efface.hooks import Method\n"),
        ("efface.testing.conformance", "from ..erasers.eiup import EIUP\n"),
        ("efface.testing.tiny.flux", "from efface.delta import Delta\n"),
        ("efface.erasers.eiup", "from efface.testing import check\n"),
        ("efface.hooks.method", "from ..testing import Trial\n"),
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
        ("efface.erasers.eiup", "from efface import hooks, families\nfrom efface.core import Concept\n"),
        ("efface.erasers.gie", "from efface.erasers.eiup import EIUP\nfrom .eiup import EIUP\n"),
        (
            "efface.models.emoji.loader",
            "from .vae import EmojiVAE\nfrom .. import emoji\nfrom ...core import Concept\n",
        ),
        ("efface.cli", "from efface import api, registry\n"),
        ("efface.testing.kit", "from ..hooks import Method\nfrom . import conformance\nfrom .tiny import FAMILIES\n"),
        ("efface.delta.applied", "from .overlay import Overlay\nfrom efface.delta import watch\n"),
        ("efface.editors.uce", "from ..delta import Delta\nfrom ..delta.watch import unwatched\n"),
    ],
)
def test_a_downward_import_is_not_a_back_edge(module: str, source: str) -> None:
    assert back_edges(source, module) == []


def test_a_relative_import_in_a_package_starts_at_the_package() -> None:
    assert back_edges("from . import vae\n", "efface.models.emoji", package=True) == []
    assert back_edges("from .. import hooks\n", "efface.models", package=True) == ["efface.models:1 imports hooks"]


def graph() -> dict[str, set[str]]:
    """Each module, and the modules that it imports, also inside functions; without the package's own `__init__`."""
    known = dict(modules())
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        package = path.stem == "__init__"
        parents = module.split(".") if package else module.split(".")[:-1]
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = parents[: len(parents) - node.level + 1] if node.level else []
                start = ".".join([*base, node.module] if node.module else base)
                names |= {name if (name := f"{start}.{alias.name}") in known else start for alias in node.names}
        found[module] = (names & known.keys()) - {"efface", module}
    return found


def test_no_imports_run_in_a_circle() -> None:
    """Rooms included: a module of a package imports its siblings in one order."""
    TopologicalSorter(graph()).prepare()  # CycleError names the circle


def test_a_circle_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "efface").mkdir()
    (tmp_path / "efface/a.py").write_text("def late():\n    from .b import x\n")
    (tmp_path / "efface/b.py").write_text("from efface import a\n")
    monkeypatch.setattr("test_imports.ROOT", tmp_path / "efface")
    with pytest.raises(CycleError):
        TopologicalSorter(graph()).prepare()


def test_the_order_names_every_file_of_its_package() -> None:
    for part, order in ORDER.items():
        assert sorted(order) == sorted(path.stem for path in (ROOT / part).glob("*.py"))


def test_no_file_of_the_package_is_long() -> None:
    """What grows over the limit is split by what it does; a file that is longer all the same is named here."""
    longer: set[str] = set()
    counts = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {name for name, lines in counts.items() if lines > 350} == longer


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
        "import efface; efface.Row, efface.Suite",
    ],
)
def test_light_imports_load_no_model_code(statement: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'pydantic', 'pydantic_core'} & set(sys.modules)"
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


def test_dir_shows_the_public_names_and_no_other() -> None:
    assert set(dir(efface)) == set(efface.__all__)


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "py.typed").is_file() and (ROOT / "__init__.pyi").is_file()


@pytest.mark.parametrize("name", registry.methods())
def test_every_native_method_is_a_public_name(name: str) -> None:
    cls = registry.resolve(name)
    assert getattr(efface, cls.__name__) is cls


@pytest.mark.long
def test_all_public_names_can_be_imported_when_efface_is() -> None:
    """`EAGER_IMPORT=1` is how lazy names are checked in the libraries that load them as we do."""
    environment = {**os.environ, "EAGER_IMPORT": "1"}
    script = "import efface; assert set(efface.__all__) <= set(vars(efface))"
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.long
def test_nothing_imports_the_conformance_kit() -> None:
    assert [part for part, allowed in MAY_IMPORT.items() if "testing" in allowed] == []
    environment = {**os.environ, "EAGER_IMPORT": "1"}
    script = "import efface, sys; assert 'efface.hooks' in sys.modules and 'efface.testing' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.long
def test_the_conformance_kit_needs_no_test_framework() -> None:
    script = "import efface.testing, sys; print(*sorted({'pytest', '_pytest', 'hypothesis'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_unknown_attributes_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'eraze'\. Did you mean 'erase'"):
        efface.eraze  # noqa: B018
    assert not hasattr(efface, "_eraze")
    with pytest.raises(ImportError):
        importlib.import_module("efface.eraze")


def test_no_public_name_is_a_submodule() -> None:
    submodules = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert "registry" in submodules
    assert not submodules & set(efface.__all__)
