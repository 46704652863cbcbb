"""Checks a built site: nothing is loaded from elsewhere, and every link inside it leads somewhere."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
LOADED |= {"embed": "src", "object": "data", "link": "href"}
FOLLOWED = ("canonical", "alternate", "next", "prev")
"""Kinds of `link` that load nothing."""


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.style = ""
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self._in_style = tag == "style"
        self.style += given.get("style", "")
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in LOADED and given.get(LOADED[tag]) and given.get("rel") not in FOLLOWED:
            self.loaded.append(given[LOADED[tag]])

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data
            self._in_style = False


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text("utf-8"))
    return page


def faults(site: Path) -> Iterator[str]:
    """What is wrong with a built site, one line each."""
    pages = {path.relative_to(site).as_posix(): _read(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages"
    for name, page in pages.items():
        outside = [each for each in page.loaded if urlsplit(each).scheme in ("http", "https") or each.startswith("//")]
        yield from (f"{name} loads {each}" for each in outside)
        if "url(http" in page.style or "@import" in page.style:
            yield f"{name} has styles that load something"
        if name != "404.html":
            yield from (f"{name}: {each}" for each in _broken(site, name, page, pages))
    for style in site.rglob("*.css"):
        text = style.read_text("utf-8")
        if "url(http" in text or "url(//" in text or "@import" in text:
            yield f"{style.relative_to(site)} loads something from elsewhere"


def _broken(site: Path, name: str, page: _Page, pages: dict[str, _Page]) -> Iterator[str]:
    for link in [*page.links, *page.loaded]:
        parts = urlsplit(link)
        if parts.scheme or link.startswith("//"):
            continue
        path = unquote(parts.path)
        there = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        if (site / there).is_dir():
            there = posixpath.normpath(f"{there}/index.html")
        if there not in pages and not (site / there).is_file():
            yield f"{link} leads nowhere"
        elif parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].ids:
            yield f"{link} has no such place"
