"""The pages for people, judged by axe-core in a browser: WCAG 2.2 AA and its best practices."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from test_audit import _stubs, always, audit, never
from test_report import make
from test_serve import Desk, quiet
from test_studio import DRAWN, address

from efface import write_report

__all__ = ["_stubs", "address", "quiet"]
TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
SIZES = ((360, False), (1280, True))
"""Width in CSS pixels, and whether the reader prefers dark colours."""


def axe() -> Path | None:
    """The script of axe-core, from a package that ships it."""
    for package in ("axe_playwright_python", "axe_core_python"):
        found = importlib.util.find_spec(package)
        for folder in found.submodule_search_locations or () if found is not None else ():
            if (script := Path(folder) / "axe.min.js").is_file():
                return script
    return None


pytestmark = [
    pytest.mark.browser,
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
    pytest.mark.skipif(axe() is None, reason="axe-core is not installed: pip install axe-core-python"),
]


def faults(page: Browser) -> list[str]:
    """What axe-core finds on the open page: rules, and where."""
    script = axe()
    assert script is not None
    page.run(script.read_text("utf-8") + "\n;0")
    run = f"axe.run(document, {{runOnly: {json.dumps(TAGS)}}})"
    found = page.run(
        f"{run}.then(all => all.violations.map(each => [each.id, each.nodes.map(n => n.target.join(' '))]))"
    )
    return [f"{rule}: {', '.join(places[:3])}" for rule, places in found]


def judged(address: str, folder: Path) -> list[str]:
    found = []
    for width, dark in SIZES:
        with Browser(folder / f"profile-{width}", width, dark) as page:
            page.open(address)
            found += [f"{width}: {each}" for each in faults(page)]
    return found


def test_a_report_has_no_fault(tmp_path: Path) -> None:
    write_report([make(tmp_path / "a"), make(tmp_path / "b", "sld", 2)], tmp_path / "report.html")
    assert judged((tmp_path / "report.html").as_uri(), tmp_path) == []


@pytest.mark.parametrize("draws", [never, always])
def test_an_audit_has_no_fault(draws: object, tmp_path: Path) -> None:
    """One that lacks labels, and one with failures and their pictures."""
    audit(draws, tmp_path / "audit")
    assert judged((tmp_path / "audit/audit.html").as_uri(), tmp_path) == []


def test_the_studio_has_no_fault(quiet: Desk, address: str, tmp_path: Path) -> None:
    for width, dark in SIZES:
        with Browser(tmp_path / f"profile-{width}", width, dark) as page:
            page.open(f"{address}#key={quiet.keys['kids']}&other={quiet.keys['press']}")
            page.until("!document.getElementById('ask').hidden")
            assert faults(page) == []
            page.run("document.getElementById('prompt').value = 'a cat'; document.getElementById('go').click()")
            page.until(DRAWN)
            assert faults(page) == []


def test_a_fault_would_be_seen(tmp_path: Path) -> None:
    """What the tests above rely on."""
    words = "<p style='color: #aaa'>pale</p><img src=data:,><input>"
    (tmp_path / "wrong.html").write_text(f"<!doctype html><title>x</title><body style='background: #fff'>{words}")
    found = judged((tmp_path / "wrong.html").as_uri(), tmp_path)
    for rule in ("image-alt", "color-contrast", "label", "html-has-lang"):
        assert any(f": {rule}: " in each for each in found), (rule, found)
