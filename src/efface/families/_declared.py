"""Reads from the source of a native method what its class needs, so that lists import no method and no torch."""

from __future__ import annotations

import ast
import functools
from pathlib import Path


def declared(name: str, room: str) -> tuple[str, tuple[str, ...]] | None:
    """The class of a native method and its needs in the default form; None if the source does not tell them."""
    folder = _folder(room)
    files = [file for file in (folder / f"{name}.py", folder / name / "__init__.py") if file.is_file()]
    exported = [_value(_parsed(file).body, "__all__") for file in files]
    if not exported or not isinstance(exported[0], ast.List) or len(exported[0].elts) != 1:
        return None
    (cls,) = ast.literal_eval(exported[0])
    needs = _needs(_classes(folder), cls)
    return None if needs is None else (cls, needs)


def _needs(classes: dict[str, ast.ClassDef], cls: str) -> tuple[str, ...] | None:
    """A class's `needs`, or those of its bases. `computed` names those of the default form as its second argument."""
    found = _value(classes[cls].body, "needs")
    if isinstance(found, ast.Call):
        found = found.args[1] if len(found.args) == 2 else None
        return None if found is None else tuple(ast.literal_eval(found))
    if found is not None:
        return tuple(ast.literal_eval(found))
    bases = [base.id for base in classes[cls].bases if isinstance(base, ast.Name) and base.id in classes]
    return _needs(classes, bases[0]) if bases else ()


def _value(body: list[ast.stmt], name: str) -> ast.expr | None:
    """The expression that is assigned to a name."""
    for part in body:
        targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
        if isinstance(part, (ast.Assign, ast.AnnAssign)) and getattr(targets[0], "id", "") == name:
            return part.value
    return None


@functools.cache
def _classes(folder: Path) -> dict[str, ast.ClassDef]:
    """The classes of a room by name."""
    found = [node for file in sorted(folder.rglob("*.py")) for node in _parsed(file).body]
    return {node.name: node for node in found if isinstance(node, ast.ClassDef)}


@functools.cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def _folder(room: str) -> Path:
    return Path(__file__).parents[1] / room
