"""Which code made a figure: a hash that comments, docstrings and layout do not change."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import efface

ROOT = Path(__file__).parents[1]
FIRST_VERSION = "0.1.0"  # of which the first cards of this runner are
ROOTS = {"efface": Path(efface.__file__).parents[1], "experiments": ROOT}


def commit() -> str:
    """The commit of the working tree, with `+` if tracked files differ from it; "" outside a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        return ""
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, check=True).stdout
    return found.stdout.strip() + "+" * bool(dirty)


@functools.cache
def meaning(path: Path) -> str:
    """A source file's syntax tree, without docstrings, and as if the version had never changed."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__version__"]:
            node.value = ast.Constant(FIRST_VERSION)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.dump(tree)


@functools.cache
def code_hash(*used: Any) -> str:
    """sha256 over the code of classes and functions: their files, and all of this project that these import."""
    todo, seen = [Path(inspect.getfile(each)) for each in used], set()
    todo += sorted((ROOTS["efface"] / "efface/families").glob("*.py"))  # imported by name
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += imported(path)
    return hashlib.sha256("\n".join(meaning(path) for path in sorted(seen)).encode()).hexdigest()


@functools.cache
def imported(path: Path) -> tuple[Path, ...]:
    """The files of this project that a file imports, anywhere in it."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[Path]:
    root = next((root for name, root in ROOTS.items() if path.is_relative_to(root / name)), None)
    if root is None:
        return
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from filter(None, (_file(name) or _file(base) for name in names))
        elif isinstance(node, ast.Import):
            yield from filter(None, (_file(alias.name) for alias in node.names))


def _file(module: str) -> Path | None:
    first, *rest = module.split(".")
    if first not in ROOTS:
        return None
    path = ROOTS[first].joinpath(first, *rest)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
