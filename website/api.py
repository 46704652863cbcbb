"""The pages of the Python reference: every public name, from its docstring. Methods have pages of their own."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from types import FunctionType

from .links import ROOT

GROUPS = {
    "erase": ("Draw and erase", ("api", "core", "pipelines", "pictures", "calibration", "modular", "phrases")),
    "deltas": ("Deltas", ("delta",)),
    "guard": ("Guard", ("guard",)),
    "runs": ("Suites, runs and reports", ("runs", "records", "report", "tables", "detectors")),
    "audit": ("Audits and attacks", ("auditing", "redteam")),
    "attacks": ("Attacks by name", ("attacks",)),
}
METHODS = ("erasers", "editors")
PACKAGES = {
    "hooks": ("efface.hooks", "What methods are made of. Provisional until version 1.0."),
    "testing": ("efface.testing", "The conformance kit. Provisional until version 1.0."),
    "attack_parts": ("efface.redteam", "What attacks are made of."),
}


def public() -> dict[str, str]:
    """The public names of Efface, each with the module that it comes from."""
    tree = ast.parse((ROOT / "src/efface/__init__.pyi").read_text("utf-8"))
    return {
        name.name: f"efface.{node.module}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }


def pages() -> dict[str, str]:
    found = {f"api/{file}.md": _page(title, _of(parts)) for file, (title, parts) in GROUPS.items()}
    for file, (package, about) in PACKAGES.items():
        module = importlib.import_module(package)
        shown = [n for n in module.__all__ if isinstance(getattr(module, n), type | FunctionType)]
        names = {name: package for name in shown if getattr(module, name).__module__.startswith("efface.")}
        found[f"api/{file}.md"] = _page(f"`{package}`", names, about)
    return found | {"api/index.md": _index()}


def _of(parts: tuple[str, ...]) -> dict[str, str]:
    return {name: module for name, module in public().items() if module.split(".")[1] in parts}


def _page(title: str, names: Mapping[str, str], about: str = "") -> str:
    entries = [f"::: {_defined(names[name], name)}.{name}" for name in sorted(names, key=str.casefold)]
    return "\n\n".join(filter(None, [f"# {title}", about, *entries]))


def _defined(module: str, name: str) -> str:
    """The module in which a class or function is written, which may be below the one that exports it."""
    home = getattr(getattr(importlib.import_module(module), name), "__module__", module)
    return home if home.startswith("efface") else module


def _index() -> str:
    lines = [
        f"- [{title}]({file}.md): " + ", ".join(f"`{name}`" for name in sorted(_of(parts), key=str.casefold))
        for file, (title, parts) in GROUPS.items()
    ]
    lines += [f"- [`{package}`]({file}.md): {about}" for file, (package, about) in PACKAGES.items()]
    return "\n\n".join(
        [
            "# Python API",
            "Every public name, from its docstring. The methods are on [pages of their own](../methods.md).",
            "\n".join(lines),
        ]
    )
