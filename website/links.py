"""Links of pages: from paths in the repository to paths in the site.

Pages are written for the repository, so that their links work there. In the site, a page of `docs/` keeps its path, the
pages of `ELSEWHERE` have another one, pictures are copied, and any other file becomes a page that shows it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "experiments/README.md": "experiments.md",
    "recipes/emoji/README.md": "models/recipe_emoji.md",
    "recipes/emoji128/README.md": "models/recipe_emoji128.md",
    "src/efface/models/emoji/MODEL_CARD.md": "models/emoji.md",
    "src/efface/models/emoji128/MODEL_CARD.md": "models/emoji128.md",
}
HIDDEN = "---\nsearch:\n  exclude: true\n---"
COPIED = (".png", ".svg", ".jpg", ".json", ".cff")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def targets(text: str, origin: str) -> Iterator[str]:
    """The paths in the repository to which a page links.

    Args:
        text: the page.
        origin: its path in the repository.
    """
    for found in LINK.finditer(CODE.sub("", text)):
        path = found[2].partition("#")[0]
        if path and "://" not in path and not path.startswith("mailto:"):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".ipynb"):
        return f"notebooks/{Path(path).stem}.md"
    return f"files/{path}" if path.endswith(COPIED) else f"files/{path}.md"


def rewritten(text: str, origin: str, page: str) -> str:
    """A page with the links of the site.

    Args:
        text: the page.
        origin: its path in the repository.
        page: its path in the site.
    """

    def moved(found: re.Match[str]) -> str:
        path, mark, anchor = found[2].partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return found[0]
        there = in_site(posixpath.normpath(posixpath.join(posixpath.dirname(origin), path)))
        return f"{found[1]}{posixpath.relpath(there, posixpath.dirname(page) or '.')}{mark}{anchor}{found[3]}"

    return outside_code(text, lambda prose: LINK.sub(moved, prose))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Changes the text outside of fenced code."""
    done, at = [], 0
    for block in CODE.finditer(text):
        done += [change(text[at : block.start()]), block[0]]
        at = block.end()
    return "".join([*done, change(text[at:])])


def shown(path: str, root: Path = ROOT) -> str:
    """A page that shows a file of the repository, or the files of a folder.

    Raises:
        FileNotFoundError: a page links to a file that does not exist.
    """
    place = root / path
    if not place.exists():
        raise FileNotFoundError(f"A page links to {path}, which does not exist. Correct the link.")
    files = [place] if place.is_file() else sorted(file for file in place.iterdir() if file.is_file())
    parts = [HIDDEN, f"# `{path}`"]
    for file in files:
        text = file.read_text("utf-8")
        kind = {".py": "python", ".toml": "toml", ".json": "json"}.get(file.suffix, "text")
        parts.append(f"{f'## `{file.name}`' if place.is_dir() else ''}\n\n````{kind}\n{text.rstrip()}\n````")
    return "\n\n".join(parts) + "\n"
