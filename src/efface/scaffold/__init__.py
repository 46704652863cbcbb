"""Writes the first files of a method or of a family: a package with an entry point, or files in a clone of Efface.

A method works, passes the conformance kit, and is meant to be changed. A family holds what can be read from diffusers'
code, and says what has to be filled in. Nothing is ever overwritten.
"""

from __future__ import annotations

import re
from pathlib import Path

from .. import __version__, checks, files, registry
from ._base import PUBLIC, Scaffold, checked, clone_of, filled, template, titled
from .family import family

__all__ = ["PUBLIC", "Scaffold", "family", "in_clone", "package"]

LINE = re.compile(r"^from \.erasers\.(\w+) import ", re.MULTILINE)


def package(name: str, folder: Path | None = None) -> Scaffold:
    """A package that others can install, with the method, its test and a page.

    Args:
        name: the method's name, such as "soft_block".
        folder: its folder. None: `efface-` and the name, in the current folder.

    Raises:
        ValueError: the name cannot be used.

    Example:
        >>> from efface.scaffold import package
        >>> made = package("soft_block")
        >>> made.cls, sorted(made.texts)
        ('SoftBlock', ['README.md', 'efface_soft_block.py', 'pyproject.toml', 'test_soft_block.py'])
    """
    cls = _checked(name)
    module, distribution = f"efface_{name}", f"efface-{name.replace('_', '-')}"
    words = {"name": name, "cls": cls, "module": module, "distribution": distribution, "title": titled(name)}
    major, minor, _ = __version__.split(".", 2)
    words |= {"range": f">={major}.{minor},<{major}.{int(minor) + 1}"}  # minor versions may change `efface.hooks`
    words |= {"imports": template("package_imports"), "package": module, "exports": f'\n__all__ = ["{cls}"]\n'}
    texts = {
        "pyproject.toml": filled("pyproject", words),
        f"{module}.py": filled("method", words),
        f"test_{name}.py": filled("test", words | {"package": module}),
        "README.md": filled("readme", words),
    }
    place = Path(distribution) if folder is None else checks.path("--out", folder)
    steps = (
        f"Install it with `pip install -e {place}`.",
        f"Run its test with `pytest {place}`.",
        f"Change the formula in {module}.py, its docstring, and the theorem in the test.",
    )
    return Scaffold(name, cls, place, texts, "", steps)


def in_clone(name: str, clone: Path) -> Scaffold:
    """The method in the rooms of a clone of Efface, and a line in the list of public names.

    Args:
        name: the method's name.
        clone: the folder of the clone.

    Raises:
        ValueError: the name cannot be used, or the folder is no clone of Efface.
    """
    cls = _checked(name)
    clone = clone_of(clone)
    listed = clone / PUBLIC
    words = {"name": name, "cls": cls, "title": titled(name), "imports": template("clone_imports")}
    words |= {"package": "efface", "exports": f'\n__all__ = ["{cls}"]\n'}
    texts = {
        f"src/efface/erasers/{name}.py": filled("method", words),
        f"tests/test_{name}.py": filled("test", words),
        f"docs/methods/{name}.md": filled("note", words),
    }
    steps = (
        "Change the formula, its docstring, and the theorem in the test.",
        "Add a row to the table of docs/methods.md, and a line to CHANGELOG.md.",
        "Run `python -m experiments docs`, which writes the table of families, and `make test`.",
    )
    return Scaffold(name, cls, clone, texts, _listed(files.read_text(listed), name, cls), steps)


def _checked(name: str) -> str:
    """The name of the class. Raises ValueError unless the name can be a new method's."""
    cls = checked(name, "method")
    if room := registry.methods().get(name):
        raise ValueError(f"Expected a new name, but {name!r} is one of the {room}. Choose another name.")
    return cls


def _listed(text: str, name: str, cls: str) -> str:
    """The list of public names with one more line, in order."""
    line = f"from .erasers.{name} import {cls} as {cls}\n"
    if line in text:
        return text
    places = [found.start() for found in LINE.finditer(text) if found[1] > name]
    last = max(text.index("\n", found.start()) + 1 for found in LINE.finditer(text))
    at = places[0] if places else last
    return text[:at] + line + text[at:]
