"""Writes the first files of a method: a package with an entry point, or the files in a clone of Efface.

The method works, passes the conformance kit, and is meant to be changed. Nothing is ever overwritten.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from .. import checks, files, registry

NAME = re.compile("[a-z][a-z0-9]*(_[a-z0-9]+)*")
LONGEST = 40
PUBLIC = "src/efface/__init__.pyi"
LINE = re.compile(r"^from \.erasers\.(\w+) import ", re.MULTILINE)


@dataclass(frozen=True)
class Scaffold:
    """The files of a new method.

    Args:
        name: the method's name.
        cls: the name of its class.
        folder: where the files go.
        texts: the content of each new file, by its path in the folder.
        public: the whole new list of public names; "" outside of a clone.
        steps: what to do next, a sentence each.
    """

    name: str
    cls: str
    folder: Path
    texts: Mapping[str, str]
    public: str
    steps: tuple[str, ...]

    def write(self) -> list[Path]:
        """Writes the files, and returns them. If one cannot be written, the others are removed again.

        Raises:
            ValueError: a file exists.
            OSError: a file cannot be written.
        """
        paths = {self.folder / path: text for path, text in self.texts.items()}
        if taken := [str(path) for path in paths if files.there(path)]:
            raise ValueError(f"Expected new files, but found {', '.join(taken)}. Choose another name or folder.")
        made: list[Path] = []
        try:
            for path, text in paths.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("x", encoding="utf-8") as file:  # "x" never replaces a file
                    made.append(path)
                    file.write(text)
            if self.public:
                files.write(self.folder / PUBLIC, self.public)
        except OSError:
            for path in made:
                path.unlink(missing_ok=True)
            raise
        return made


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
    words = {"name": name, "cls": cls, "module": module, "distribution": distribution, "title": _title(name)}
    words |= {"imports": _template("package_imports"), "package": module, "exports": f'\n__all__ = ["{cls}"]\n'}
    texts = {
        "pyproject.toml": _filled("pyproject", words),
        f"{module}.py": _filled("method", words),
        f"test_{name}.py": _filled("test", words | {"package": module}),
        "README.md": _filled("readme", words),
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
    clone = checks.path("--repository", clone)
    listed = clone / PUBLIC
    if not listed.is_file():
        raise ValueError(
            f"Expected {clone} to be a clone of Efface, but it has no {PUBLIC}. Name the folder that holds "
            "pyproject.toml, or leave --repository out for a package."
        )
    words = {"name": name, "cls": cls, "title": _title(name), "imports": _template("clone_imports")}
    words |= {"package": "efface", "exports": f'\n__all__ = ["{cls}"]\n'}
    texts = {
        f"src/efface/erasers/{name}.py": _filled("method", words),
        f"tests/test_{name}.py": _filled("test", words),
        f"docs/methods/{name}.md": _filled("note", words),
    }
    steps = (
        "Change the formula, its docstring, and the theorem in the test.",
        "Add a row to the table of docs/methods.md, and a line to CHANGELOG.md.",
        "Run `python -m experiments docs`, which writes the table of families, and `make test`.",
    )
    return Scaffold(name, cls, clone, texts, _listed(files.read_text(listed), name, cls), steps)


def _checked(name: str) -> str:
    """The name of the class. Raises ValueError unless the name can be a new method's."""
    checks.text("name", name)
    if not NAME.fullmatch(name) or len(name) > LONGEST or keyword.iskeyword(name):
        cure = f"Write lower-case letters, digits and single underscores, at most {LONGEST}, such as soft_block."
        raise ValueError(checks.refusal("the name of a method", name, cure))
    if name in sys.stdlib_module_names:
        raise ValueError(checks.refusal("a name that no module of Python has", name, "Choose another name."))
    if room := registry.methods().get(name):
        raise ValueError(f"Expected a new name, but {name!r} is one of the {room}. Choose another name.")
    return "".join(word.capitalize() for word in name.split("_"))


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _listed(text: str, name: str, cls: str) -> str:
    """The list of public names with one more line, in order."""
    line = f"from .erasers.{name} import {cls} as {cls}\n"
    if line in text:
        return text
    places = [found.start() for found in LINE.finditer(text) if found[1] > name]
    last = max(text.index("\n", found.start()) + 1 for found in LINE.finditer(text))
    at = places[0] if places else last
    return text[:at] + line + text[at:]


def _template(name: str) -> str:
    return (resources.files(__package__) / f"templates/{name}.txt").read_text("utf-8").rstrip("\n")


def _filled(name: str, words: Mapping[str, str]) -> str:
    return Template(_template(name)).substitute(words) + "\n"
