"""Every page that is not written by hand, by its path in the site."""

from __future__ import annotations

from collections.abc import Callable

from efface.core import shipped_concepts

from . import api, commands, concepts, formats, links, methods, notebooks, recipes, standings, threats
from .links import ROOT

SINGLE: dict[str, Callable[[], str]] = {
    "families.md": methods.families,
    "threat_models.md": threats.page,
    "recipes.md": recipes.page,
    "standings.md": standings.page,
    "commands.md": commands.page,
    "formats.md": formats.page,
    "concepts/index.md": concepts.index,
}


def generated() -> dict[str, str]:
    """Path in the site -> the page, with the links of the site."""
    found = {path: make() for path, make in SINGLE.items()}
    found |= {f"methods/{name}.md": methods.page(name) for name in methods.names()}
    found |= {concepts.file_of(name): concepts.page(name) for name in shipped_concepts()}
    found |= {f"notebooks/{path.stem}.md": notebooks.page(path) for path in notebooks.files()}
    return found | api.pages()


def moved() -> dict[str, str]:
    """The pages of the repository outside of `docs`, by their path in the site."""
    return {
        there: links.rewritten((ROOT / path).read_text("utf-8"), path, there)
        for path, there in links.ELSEWHERE.items()
        if (ROOT / path).is_file()
    }


def linked() -> tuple[dict[str, str], list[str]]:
    """The files to which pages link: those that become pages, and those that are copied (paths in the repository)."""
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md"), *(ROOT / path for path in links.ELSEWHERE)]
    asked = {
        target
        for page in pages
        if page.is_file()
        for target in links.targets(page.read_text("utf-8"), str(page.relative_to(ROOT)))
    }
    others = sorted(
        path
        for path in asked
        if path not in links.ELSEWHERE and not path.startswith("docs/") and not path.endswith(".ipynb")
    )
    copied = [path for path in others if path.endswith(links.COPIED)]
    copied += [f"results/{path.name}" for path in sorted((ROOT / "results").glob("*.json"))]
    return {links.in_site(path): links.shown(path) for path in others if path not in copied}, sorted(set(copied))
