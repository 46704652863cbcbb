"""What `mkdocs build` calls: adds the generated pages, fills the navigation, and moves links."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from website import links, pages  # noqa: E402

MADE: dict[str, str] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    MADE.clear()
    MADE.update(pages.generated())
    config.nav = _filled(config.nav)
    return config


def _filled(nav: Any) -> Any:
    """The navigation, with "NAME/*" replaced by the generated pages of that folder."""
    done: list[Any] = []
    for each in nav:
        if isinstance(each, dict):
            done.append({title: _filled(part) if isinstance(part, list) else part for title, part in each.items()})
        elif each.endswith("/*"):
            found = sorted(path for path in MADE if path.startswith(each[:-1]) and not path.endswith("/index.md"))
            done.append({f"Every {each.removesuffix('s/*')}" if each != "api/*" else "Modules": found})
        else:
            done.append(each)
    return done


def on_files(files: Files, config: MkDocsConfig) -> Files:
    shown, copied = pages.linked()
    for path, text in (MADE | pages.moved() | shown).items():
        if there := files.get_file_from_path(path):
            files.remove(there)  # the note of a method, which its page contains
        files.append(File.generated(config, path, content=text))
    for path in copied:
        files.append(File.generated(config, links.in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages of `docs` are written for the repository; generated ones have the links of the site already."""
    if page.file.generated_by is not None:
        return markdown
    return links.rewritten(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
