"""The pages that come from code and cards, the links of all pages, and the check of the built site.

`make docs` builds the site and checks the pages as HTML; nothing here needs mkdocs.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_prose
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import efface
from efface import registry
from efface.attacks._contract import ACCESS
from efface.cli import app
from efface.core import shipped_concepts
from efface.models.emoji.weights import FOLDER
from experiments.docs import card
from website import api, cards, check, concepts, formats, links, methods, notebooks, pages, standings, threats

ROOT = Path(__file__).parents[1]
WRITTEN = [*ROOT.glob("docs/**/*.md"), *(ROOT / path for path in links.ELSEWHERE)]
real = efface.grid


@functools.cache
def _made() -> dict[str, str] | Exception:
    try:
        return pages.generated()
    except Exception as error:  # noqa: BLE001 - kept, so that one fault does not cost its time in every test
        return error


def made() -> dict[str, str]:
    found = _made()
    if isinstance(found, Exception):
        raise found
    return found


def navigation(entries: list[object]) -> list[str]:
    found: list[str] = []
    for each in entries:
        parts = list(each.values()) if isinstance(each, dict) else [each]
        for part in parts:
            found += navigation(part) if isinstance(part, list) else [str(part)]
    return found


# ---------------------------------------------------------------- all pages


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_written_page_lead_somewhere_in_the_repository(page: Path) -> None:
    found = list(links.targets(page.read_text("utf-8"), str(page.relative_to(ROOT))))
    assert [target for target in found if not (ROOT / target).exists()] == []


@pytest.mark.long
def test_links_of_generated_pages_lead_to_pages_of_the_site() -> None:
    written = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*") if path.is_file()}
    shown, copied = pages.linked()
    known = {*made(), *pages.moved(), *written, *shown, *map(links.in_site, copied)}
    lost = [
        (page, target)
        for page, text in {**made(), **pages.moved()}.items()
        for target in links.targets(text, page)
        if target not in known
    ]
    assert lost == []


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    listed = navigation(settings["nav"])
    assert len(listed) == len(set(listed))
    groups = tuple(each.removesuffix("*") for each in listed if each.endswith("/*"))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    every = written | made().keys() | pages.moved().keys()
    hidden = ("files/", "models/recipe_", *groups)
    assert {page for page in every if not page.startswith(hidden)} <= set(listed)
    assert {page for page in listed if not page.endswith("/*")} <= every


@pytest.mark.parametrize("name", ["recipes.md", "threat_models.md", "families.md", "formats.md", "concepts/index.md"])
def test_generated_pages_read_once(name: str) -> None:
    assert [f for each in test_prose.paragraphs_of_page(made()[name]) for f in test_prose.faults(each)] == []


@pytest.mark.parametrize("kind", ["concepts/", "methods/"])
def test_pages_of_a_kind_read_once(kind: str) -> None:
    texts = [text for page, text in made().items() if page.startswith(kind)]
    assert len(texts) > 15
    assert [f for text in texts for each in test_prose.paragraphs_of_page(text) for f in test_prose.faults(each)] == []


def test_no_page_holds_the_marks_of_a_merge() -> None:
    files = [*ROOT.glob("*.*"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.*")]
    marks = re.compile(r"^(<{7}|>{7}) |^={7}$", re.MULTILINE)
    assert [file.name for file in files if file.is_file() and marks.search(file.read_text("utf-8", "ignore"))] == []


def test_links_move_outside_of_code_only() -> None:
    text = "[a](docs/usage.md#x) [b](https://e.org/docs/c.md)\n```\n[c](docs/usage.md)\n```\n[d](LICENSE) [e](#here)"
    assert links.rewritten(text, "README.md", "index.md") == (
        "[a](usage.md#x) [b](https://e.org/docs/c.md)\n```\n[c](docs/usage.md)\n```\n[d](files/LICENSE.md) [e](#here)"
    )
    assert links.rewritten("[a](../docs/usage.md)", "experiments/README.md", "howto/x.md") == "[a](../usage.md)"


# ---------------------------------------------------------------- methods, concepts


@pytest.mark.parametrize("name", methods.names())
def test_a_method_has_a_page_with_families_and_figures_or_none(name: str) -> None:
    page = made()[f"methods/{name}.md"]
    assert "\n::: efface." in page and methods.where(name) in page
    assert ("Not measured" in page) != (name in methods.cards.rows())


def test_figures_of_a_method_are_those_of_its_card() -> None:
    (row,) = (row for row in card("leaderboard")["rows"] if row["row"] == "eiup")
    for metric in methods.cards.COLUMNS:
        assert f"{100 * row[metric]['rate']:.1f} %" in made()["methods/eiup.md"]
        assert f"n = {row[metric]['n']}" in made()["methods/eiup.md"]


def test_notes_are_of_methods() -> None:
    assert {path.stem for path in ROOT.glob("docs/methods/*.md")} <= methods.names().keys()


@pytest.mark.parametrize("name", shipped_concepts())
def test_a_page_of_a_concept_has_its_phrases_labels_and_figures_or_none(name: str) -> None:
    page, concept = made()[concepts.file_of(name)], shipped_concepts()[name]
    listed = re.findall(r"^- (.*)$", page.partition("## Anchor")[0], re.MULTILINE)
    assert tuple(listed) == concept.phrases
    rows = [line for line in page.splitlines() if line.startswith("| ") and f"`{'` '}" in line]
    assert len(re.findall(r"^\| (?:MLC|NIST|I2P)", page, re.MULTILINE)) == len(concept.hazards), rows
    names = {row["concept"] for each in ("eiup_outcome", "editors_outcome") for row in card(each)["rows"]}
    measured = name in names or name in cards.ranked(card("leaderboard"))
    assert ("Not measured" in page) != measured


def test_neighbours_of_a_concept_are_those_of_the_card() -> None:
    (row,) = (r for r in card("eiup_bystanders")["rows"] if (r["concept"], r["strength"]) == ("weapon", 2.25))
    assert ", ".join(row["lost"]) in made()[concepts.file_of("weapon")] and len(row["lost"]) > 3


def test_a_concept_that_settings_were_chosen_on_says_it() -> None:
    assert {"alcohol", "weapon", "cat", "neon sign"} <= concepts.tuned() and "death" not in concepts.tuned()
    assert "Settings of methods were chosen on this concept" in made()[concepts.file_of("cat")]
    assert "No setting was chosen" in made()[concepts.file_of("death")]


# ---------------------------------------------------------------- commands, files, names, attacks


def test_every_command_and_option_is_in_the_reference() -> None:
    page = made()["commands.md"]

    def walk(command: object, path: str) -> None:
        for name, each in command.commands.items():  # type: ignore[attr-defined]
            assert f"`{path} {name}`" in page
            if hasattr(each, "commands"):
                walk(each, f"{path} {name}")
            for option in getattr(each, "params", ()):
                assert (
                    option.hidden or f"`{option.opts[0] if option.opts[0][0] == '-' else option.name.upper()}`" in page
                )

    walk(get_command(app), "efface")


@pytest.mark.parametrize("each", formats.FORMATS, ids=lambda each: each.name)
def test_every_entry_of_a_file_is_in_the_reference(each: formats.Format) -> None:
    _, _, rest = made()["formats.md"].partition(f"## {each.name}\n")
    part = rest.partition("\n## ")[0]
    for name, field in each.form.model_fields.items():
        assert f"| `{field.alias or name}` |" in part
    assert "anyOf" not in part and "$ref" not in part


def test_every_public_name_has_one_place() -> None:
    listed = [
        line.rpartition(".")[2] for page in api.pages().values() for line in page.splitlines() if line[:3] == ":::"
    ]
    shown = [registry.resolve(name).__name__ for name in methods.names()]
    wanted = set(efface.__all__) - {"__version__"}
    assert wanted <= {*listed, *shown}
    assert not {name for name in wanted if listed.count(name) > 1} - {"attack"}


def test_every_attack_stands_in_the_threat_models_once() -> None:
    found = threats.attacks()
    assert tuple(found) == ACCESS
    assert sorted(name for names in found.values() for name in names) == sorted(registry.methods("attacks"))


def test_the_sortable_leaderboard_has_every_row_of_its_card() -> None:
    page, rows = made()["standings.md"], card("leaderboard")["rows"]
    assert page.count("<tr data-kind") == len(rows) > 5
    for row in rows:
        value = 100 * row["retention"]["rate"]
        assert f'<td data-value="{value:.3f}">{value:.1f} [' in page
    weights = 'data-kind="weights" data-access="the weights" data-step="small" '
    assert f'{weights}data-fit="short"><td><a href="methods/uce.html">' in page
    assert f'{weights}data-fit="long"><td><a href="methods/esd.html">' in page
    assert (
        'data-kind="run time" data-access="the call" data-step="large" data-fit="none"><td><a href="methods/sld' in page
    )


def test_the_sortable_leaderboard_shows_cards_of_the_runner_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {"leaderboard": card("eiup_swap"), "method_costs": card("method_costs")}
    monkeypatch.setattr("website.standings.card", cards.__getitem__)
    page, rows = standings.page(), cards["leaderboard"]["rows"]
    assert page.count("<tr data-kind") == len(rows) == 3 and "4 concepts, n = 12 pictures a cell" in page
    rate = rows[1]["residual"]
    low, high = (100 * bound for bound in rate["interval"])
    assert f"{100 * rate['rate']:.1f} [{low:.1f}, {high:.1f}]" in page and "not measured" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_sortable_leaderboard_sorts_and_filters(tmp_path: Path) -> None:
    body = "\n".join(line for line in made()["standings.md"].splitlines() if line.startswith("<"))
    script = (ROOT / "docs/site.js").read_text("utf-8")
    clicks = """document.addEventListener("DOMContentLoaded", () => {
      document.querySelectorAll("th button")[3].click();
      const kind = document.querySelector("select"); kind.value = "weights"; kind.dispatchEvent(new Event("change"));
      const shown = [...document.querySelectorAll("tbody tr")].filter((row) => !row.hidden);
      document.title = shown.map((row) => row.cells[0].textContent + " " + row.cells[3].dataset.value).join("|");
    })"""
    path = tmp_path / "page.html"
    path.write_text(f"<html><head><script>{script}</script><script>{clicks}</script></head><body>{body}</body></html>")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title
    names, values = zip(*(each.split(" ") for each in title[1].split("|")), strict=True)
    edited = {"uce", "rece", "speed", "esd", "sdd", "mace", "receler", "casteer", "midsteer", "gloce"}
    assert set(names) == edited
    assert [float(value) for value in values] == sorted(map(float, values), reverse=True)


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text("utf-8")
STEP = r"\| `([\w.]+)` in \[[^]]+\]\(\.\./([^)]+)\)"
WALKS = re.findall(STEP, ARCHITECTURE)


def test_the_walks_name_what_exists() -> None:
    assert len(WALKS) == 49
    for name, file in WALKS:
        owner, _, member = name.partition(".")
        nodes = {getattr(n, "name", ""): n for n in ast.parse((ROOT / file).read_text("utf-8")).body}
        assert owner in nodes, (name, file)
        assert not member or member in {getattr(n, "name", "") for n in nodes[owner].body}, (name, file)


@pytest.mark.long
@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
def test_the_walk_from_the_command_line_is_what_runs(tmp_path: Path) -> None:
    steps = re.findall(STEP, ARCHITECTURE.partition("## From the command line")[2].partition("\n## ")[0])
    ran: set[tuple[str, str]] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            ran.add((frame.f_code.co_qualname, frame.f_code.co_filename))

    args = ["erase", "a night at the pub", "--concept", "alcohol", "--set", "strength=2", "--steps", "2"]
    sys.setprofile(note)
    try:
        result = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "erased")])
    finally:
        sys.setprofile(None)
    assert result.exit_code == 0, result.output
    assert len(steps) > 15
    assert [name for name, file in steps if (name, str(ROOT / file)) not in ran] == []


# ---------------------------------------------------------------- notebooks


@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks.files(), ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_holds(path: Path) -> None:
    assert notebooks.differences(path) == []


def test_notebooks_are_checked_by_what_they_print(tmp_path: Path) -> None:
    cells = [{"cell_type": "code", "source": ["n = 2\n", "print(n)\n", "n + 1"], "metadata": {}, "outputs": []}]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    assert notebooks.differences(path)
    notebooks.write(path)
    assert notebooks.differences(path) == []
    outputs = json.loads(path.read_text())["cells"][0]["outputs"]
    assert [notebooks._shown(each) for each in outputs] == ["2\n", "3"]
    path.write_text(path.read_text().replace("n = 2", "n = 5"))
    assert "now ['5\\n', '6']" in notebooks.differences(path)[0]


@pytest.mark.parametrize(
    ("now", "alike"),
    [
        ("erased: 3 of 8, 95 % interval 14 to 69 %", True),
        ("erased: 4 of 8, 95 % interval 22 to 78 %", False),
        ("erased: 2 of 9, 95 % interval 7 to 59 %", False),
        ("edited: 2 of 8, 95 % interval 7 to 59 %", False),
        ("erased: 2 of 8", False),
    ],
)
def test_counts_may_differ_by_one_picture_between_processors(now: str, alike: bool) -> None:
    assert notebooks._alike("erased: 2 of 8, 95 % interval 7 to 59 %", now) is alike


def test_notebooks_have_outputs_and_are_small() -> None:
    assert len(notebooks.files()) == 2
    for path in notebooks.files():
        cells = json.loads(path.read_text("utf-8"))["cells"]
        assert sum(bool(cell["outputs"]) for cell in cells if cell["cell_type"] == "code") >= 3
        assert path.stat().st_size < 200_000


# ---------------------------------------------------------------- scripts for a GPU


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_a_script_runs_on_a_tiny_pipeline(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, drawn = tmp_path / "out.png", {}
    monkeypatch.setattr(efface, "grid", lambda rows, **look: drawn.update(rows) or real(rows, **look))
    script = runpy.run_path(str(ROOT / f"examples/{name}.py"))
    script["main"](["--tiny", "--concept", "cat", "--prompt", "a red cat", "--images", "1", "--out", str(out)])
    said = capsys.readouterr().out
    assert "was not run on a GPU" in said and "denoiser calls with the eraser: 2" in said
    (base,), (erased,) = drawn.values()
    assert out.stat().st_size > 1_000 and base.tobytes() != erased.tobytes()


# ---------------------------------------------------------------- the built site


def site(folder: Path, body: str = "", head: str = "", style: str = "") -> Path:
    (folder / "sub").mkdir()
    (folder / "index.html").write_text(f"<html><head>{head}</head><body><h1 id='top'>A</h1>{body}</body></html>")
    (folder / "sub/page.html").write_text("<h2 id='place'>B</h2><a href='../index.html#top'>up</a>")
    (folder / "a.css").write_text(style)
    return folder


def test_a_site_without_faults_has_none(tmp_path: Path) -> None:
    body = (
        "<a href='sub/page.html#place'>x</a><a href='https://arxiv.org/abs/1'>y</a><img src='data:image/png;base64,'>"
    )
    assert list(check.faults(site(tmp_path, body, "<link rel='stylesheet' href='a.css'>"))) == []


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("body", "<a href='gone.html'>x</a>"),
        ("body", "<a href='sub/page.html#gone'>x</a>"),
        ("body", "<img src='gone.png'>"),
        ("body", "<img src='https://e.org/a.png'>"),
        ("body", "<script src='//e.org/a.js'></script>"),
        ("head", "<link rel='stylesheet' href='https://fonts.e.org/css'>"),
        ("head", "<link rel='preconnect' href='https://fonts.e.org'>"),
        ("head", "<style>@import url(https://e.org/a.css)</style>"),
        ("style", "@font-face { src: url(https://e.org/a.woff) }"),
    ],
)
def test_the_check_finds(tmp_path: Path, where: str, text: str) -> None:
    assert len(list(check.faults(site(tmp_path, **{where: text})))) == 1


def test_an_empty_folder_is_no_site(tmp_path: Path) -> None:
    assert list(check.faults(tmp_path))


# ---------------------------------------------------------------- citation and policy


def test_the_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert found["version"] == efface.__version__ and found["license"] == "Apache-2.0"
    assert "2408.01014" in str(found["references"])


def test_limits_say_what_efface_is_not() -> None:
    text = (ROOT / "docs/limits.md").read_text("utf-8")
    assert "**No compliance tool.**" in text and "**Not for illegal material.**" in text
