"""The files that are written, their names, and their templates."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from .. import checks, files

NAME = re.compile("[a-z][a-z0-9]*(_[a-z0-9]+)*")
LONGEST = 40
PUBLIC = "src/efface/__init__.pyi"


@dataclass(frozen=True)
class Scaffold:
    """The files of a new method or family.

    Args:
        name: its name.
        cls: the name of its class, or of its pipeline.
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


def checked(name: str, kind: str) -> str:
    """The name as a class is called. Raises ValueError unless a new method, or another `kind`, can have this name."""
    checks.text("name", name)
    if not NAME.fullmatch(name) or len(name) > LONGEST or keyword.iskeyword(name):
        cure = f"Write lower-case letters, digits and single underscores, at most {LONGEST}, such as soft_block."
        raise ValueError(checks.refusal(f"the name of a {kind}", name, cure))
    if name in sys.stdlib_module_names:
        raise ValueError(checks.refusal("a name that no module of Python has", name, "Choose another name."))
    return "".join(word.capitalize() for word in name.split("_"))


def clone_of(folder: Path) -> Path:
    """The folder of a clone of Efface. Raises ValueError if it is none."""
    clone = checks.path("--repository", folder)
    if not (clone / PUBLIC).is_file():
        raise ValueError(
            f"Expected {clone} to be a clone of Efface, but it has no {PUBLIC}. Name the folder that holds "
            "pyproject.toml."
        )
    return clone


def titled(name: str) -> str:
    return name.replace("_", " ").capitalize()


def template(name: str) -> str:
    return (Path(__file__).parent / f"templates/{name}.txt").read_text("utf-8").rstrip("\n")


def filled(name: str, words: Mapping[str, str]) -> str:
    return Template(template(name)).substitute(words) + "\n"
