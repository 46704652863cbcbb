"""A report says what was measured and nothing else, stands alone, and cannot be hijacked by what it shows."""

from __future__ import annotations

import dataclasses
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import efface
from efface import Row, Sample, Score, runs, write_report
from efface.records import rows_hash
from efface.report import verdict
from efface.report.compare import entries, grouped
from efface.report.pictures import SIDE, pairs_of
from efface.runs.folder import claim

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
NAN = float("nan")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs need not survive a power cut."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def rows(prompt: str = "a cat on a mat") -> tuple[Row, ...]:
    kinds = (("explicit", "cat"), ("theme", "cat"), ("benign", ""))
    return tuple(
        Row(f"{kind}-{k}", f"{prompt} {k}", 1_000_000 + k, kind, kind, c) for k in range(12) for kind, c in kinds
    )


@dataclasses.dataclass(frozen=True)
class Judge:
    """Says of a picture what its redness says: the cat is drawn in red, what should stay in green."""

    name = "stub"
    protocol: str = "mean red above 0.5"

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        with_cat = [s for s in samples if s.row.concept]
        seen = {s.row.id: float(Image.open(s.path).getpixel((0, 0))[0] > 127) for s in with_cat}
        kept = {s.row.id: float(Image.open(s.path).getpixel((0, 0))[1] > 127) for s in samples}
        scores = []
        for key in ("", "/explicit", "/theme"):
            values = {k: v for k, v in seen.items() if k.startswith(key[1:])}
            gone = {k: 1 - v for k, v in values.items()}
            scores += [self.share(f"detection{key}", values, False), self.share(f"removal.absolute{key}", gone, True)]
        scores += [self.share("retention", kept, True), Score("kid", 1.2345, 36, 1.1, 1.4, "x 1000", False, "eyes")]
        return [*scores, Score("removal.relative", NAN, 24, NAN, NAN, "share", True, self.protocol)]

    def share(self, name: str, values: dict[str, float], higher: bool) -> Score:
        value = sum(values.values()) / len(values)
        return Score(name, value, len(values), value / 2, (1 + value) / 2, "share", higher, self.protocol, values)


def make(
    folder: Path,
    method: str = "eiup",
    hits: int = 3,
    side: int = 64,
    suite: tuple[Row, ...] | None = None,
    judge: Judge | None = None,
    concepts: Sequence[str] = ("cat",),
    **changed: Any,
) -> Path:
    """A scored run in which every `hits`-th picture still shows the cat, and its plain run, which always does."""
    suite = suite or rows()
    record: dict[str, Any] = {
        "format": 1,
        "suite": {"name": "cats", "version": "1", "source": "here", "licence": "CC0", "data_hash": rows_hash(suite)},
        "rows": {"n": len(suite), "sha256": rows_hash(suite)},
        "call": {"guidance_scale": 7.5},
        "batch": 8,
        "model": {
            "name": "stub",
            "text_hash": "0a",
            "pipeline": "Stub",
            "scheduler": {"class": "DDIM"},
            "dtype": "float32",
            "device": "cpu",
        },
        "metrics": [],
        "sessions": [
            {"started": "now", "command": f"efface bench cats --method {method}", "versions": {"efface": "0"}}
        ],
    } | changed

    def paint(drawn: Sequence[Row], call: Any) -> list[tuple[Image.Image, dict[str, Any]]]:
        reds = [255 * (bool(row.concept) and (plain or suite.index(row) % hits == 0)) for row in drawn]
        return [(Image.new("RGB", (side, side), (red, 200, 0)), {}) for red in reds]

    base = f"base-{folder.name}"
    for plain in (True, False):
        where = folder.parent / base if plain else folder
        said = {
            "base": None if plain else f"../{base}",
            "erasers": [] if plain else [{"method": method, "concepts": [{"name": c} for c in concepts]}],
        }
        runs.work(claim(where), record | said, suite, runs.locally(paint, suite), lambda *_: None)
    runs.score(folder, [judge or Judge()])
    return folder


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text.replace("<wbr>", ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(runs: Sequence[Path], out: Path, **options: Any) -> Page:
    write_report(runs, out, **options)
    return Page(out.read_text())


def test_numbers_stand_beside_the_plain_model_interval_protocol_and_data(tmp_path: Path) -> None:
    shown = page([make(tmp_path / "a"), make(tmp_path / "b", "sld", 2)], tmp_path / "out/report.html")
    removed = 100 * (1 - sum(k % 3 == 0 and k % 3 != 2 for k in range(36)) / 24)  # every third row is one of a cat
    assert f"{removed:.1f} %" in shown.text and "base model" in shown.text
    assert "0.0 % [0.0, 50.0]" in shown.text  # the base model removes nothing
    assert shown.text.count("mean red above 0.5") >= 3
    assert rows_hash(rows()) in shown.text and rows_hash(rows())[:12] in shown.text
    assert "1.23 [1.1, 1.4] , n = 36" in shown.text.replace("4]", "4] ").replace("  ", " ")
    assert "nan" not in shown.text.lower().replace("nanoseconds", "")
    assert "efface bench cats --method sld" in shown.text
    assert "explicit n = 12" in shown.text and "theme n = 12" in shown.text
    card = json.loads((tmp_path / "out/report.json").read_text())
    assert [r["label"] for r in card["groups"][0]["runs"]] == ["eiup", "sld"]
    assert all("base" in s and "protocol" in s for r in card["groups"][0]["runs"] for s in r["scores"])


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    shown = page([make(tmp_path / "a")], tmp_path / "report.html")
    assert not [t for t, _ in shown.tags if t in ("script", "iframe", "object", "embed", "base", "form")]
    for tag, attrs in shown.tags:
        assert not [a for a in attrs if a.startswith("on")]
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert attrs.get(name, "data:,").startswith(("data:", "#")), (tag, attrs)
    assert (
        "url(http" not in (tmp_path / "report.html").read_text()
        and "@import" not in (tmp_path / "report.html").read_text()
    )


@pytest.mark.long
def test_no_field_can_inject_html(tmp_path: Path) -> None:
    plain = page([make(tmp_path / "a")], tmp_path / "plain.html")
    evil = make(
        tmp_path / 'a"><b onclick=alert(3)>',
        HOSTILE,
        suite=rows(HOSTILE),
        judge=Judge(HOSTILE),
        model={
            "name": HOSTILE,
            "text_hash": HOSTILE,
            "pipeline": HOSTILE,
            "scheduler": {"x": HOSTILE},
            "dtype": HOSTILE,
            "device": HOSTILE,
        },
        sessions=[{"started": HOSTILE, "command": HOSTILE, "versions": {"efface": HOSTILE}}],
    )
    shown = page([evil], tmp_path / "evil.html")
    assert [t for t, _ in shown.tags] == [t for t, _ in plain.tags]
    assert not [a for _, attrs in shown.tags for a in attrs if a.startswith("on")]
    assert shown.text.count(HOSTILE) > 40
    two = [make(tmp_path / "c", "$x^2$ <i>a</i>"), make(tmp_path / "d", "</svg><script>alert(4)</script>")]
    assert "script" not in [t for t, _ in page(two, tmp_path / "two.html").tags]


@pytest.mark.long
def test_runs_that_must_not_be_compared_are_refused_or_marked(tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    others = {
        "data hash": make(tmp_path / "rows", "sld", suite=rows("another cat")),
        "model": make(tmp_path / "model", "sld", model=runs.Run.open(a).record["model"] | {"text_hash": "0b"}),
        "sampling": make(tmp_path / "call", "sld", call={"guidance_scale": 3}),
        "judged by": make(tmp_path / "judge", "sld", judge=Judge("another detector")),
    }
    for what, other in others.items():
        with pytest.raises(ValueError, match=f"are not comparable:\n  eiup and sld: .*{what}"):
            write_report([a, other], tmp_path / "report.html")
        assert not (tmp_path / "report.html").exists()
    shown = page([a, *others.values()], tmp_path / "mixed.html", mixed=True)
    assert "These runs are not comparable. The page shows 5 groups" in shown.text
    assert "Group E: cats" in shown.text
    assert json.loads((tmp_path / "mixed.json").read_text())["not_comparable"]
    moved = make(tmp_path / "moved", "sld", model=runs.Run.open(a).record["model"] | {"name": "elsewhere/stub"})
    assert "Group" not in page([a, moved], tmp_path / "same.html").text


def test_what_is_flagged_or_was_not_judged_is_blurred(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    groups, _ = grouped(_entry(folder))
    shown = pairs_of(groups[0], 100)
    assert len(shown) == 36
    for k, pair in enumerate(shown):
        want = [bool(pair["row"].concept), bool(pair["row"].concept) and k % 3 == 0]
        assert [p["veiled"] for p in pair["pictures"]] == want
    kinds = [pair["row"].kind for pair in pairs_of(groups[0], 6)]
    assert sorted(kinds) == ["benign", "benign", "explicit", "explicit", "theme", "theme"]
    blind = dataclasses.replace(groups[0][0].scores["retention"])
    unjudged = groups[0][0]._replace(scores={"retention": blind}, base={"retention": blind})
    assert [[p["veiled"] for p in pair["pictures"]] for pair in pairs_of([unjudged], 100)] == [
        [bool(row.concept)] * 2 for row in rows()
    ]


def _entry(folder: Path) -> Any:
    return entries([runs.Run.open(folder)])


@pytest.mark.long
def test_thumbnails_are_bounded(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", side=512)
    shown = page([folder], tmp_path / "report.html", pairs=500)
    sources = [a["src"] or "" for t, a in shown.tags if t == "img"]
    assert len(sources) == 72 and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    import base64
    import io

    assert max(Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2]))).size) == SIDE
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_bad_input_is_explained_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected runs for a report"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"named \.html"):
        write_report([make(tmp_path / "a")], tmp_path / "report.pdf")
    (tmp_path / "a/scores.json").unlink()
    with pytest.raises(FileNotFoundError, match="`efface score "):
        write_report([tmp_path / "a"], tmp_path / "report.html")
    assert not list(tmp_path.glob("report*"))


@pytest.mark.parametrize("place", ["a/run.html", "a/x/y.html", "a/images/z.htm", "base-a/run.html", "link/run.html"])
def test_a_report_is_not_written_into_a_run_that_it_reads(place: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"is in the run folder .*\. Name a file elsewhere"):
        write_report([tmp_path / "a"], tmp_path / place)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_numbers_replace_an_earlier_report_only(tmp_path: Path) -> None:
    make(tmp_path / "a")
    for content in ('{"name": "the user\'s own"}', "no JSON", "[]"):
        (tmp_path / "package.json").write_text(content)
        with pytest.raises(ValueError, match=r"numbers would replace .*package\.json.*\. Name another page"):
            write_report([tmp_path / "a"], tmp_path / "package.html")
        assert (tmp_path / "package.json").read_text() == content and not (tmp_path / "package.html").exists()
    for _ in range(2):
        write_report([tmp_path / "a"], tmp_path / "report.html")


def test_a_report_says_once_that_pictures_are_unverified_and_needs_all_of_them(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    assert "unverified" not in page([folder], tmp_path / "report.html").text
    lines = folder / "samples.jsonl"
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    lines.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "sha256"}) + "\n" for e in entries))
    runs.score(folder, [Judge()])
    shown = page([folder], tmp_path / "report.html").text
    assert shown.count("unverified. 36 pictures of the run and its base run have no SHA-256") == 1
    (folder / "images/explicit-0.png").unlink()
    with pytest.raises(ValueError, match="is not finished and has 28 of 36 pictures"):
        write_report([folder], tmp_path / "report.html")


# ---------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--log-level=0",
    "--virtual-time-budget=20000",
]
PROBE = """<!doctype html><link rel="icon" href="data:,">
<iframe id="f" src="report.html" width="375" height="800"></iframe>
<pre id="out">nothing</pre><script>
document.getElementById("f").onload = () => {
  const d = document.getElementById("f").contentDocument, w = d.defaultView, found = {};
  const blur = e => w.getComputedStyle(e).filter;
  found.violations = [];
  d.addEventListener("securitypolicyviolation", e => found.violations.push(e.violatedDirective));
  found.wide = d.documentElement.scrollWidth - d.documentElement.clientWidth;
  found.pictures = [...d.images].map(i => i.complete && i.naturalWidth > 0);
  const card = d.querySelector(".card:has(.show)"), box = card.querySelector(".show");
  const veiled = card.querySelector("img.veil"), words = card.querySelector("span.veil");
  found.before = [blur(veiled), blur(words)];
  card.querySelector(".over").click();
  veiled.style.transition = "none";
  found.after = [blur(veiled), blur(words), box.checked];
  card.querySelector(".over").click();
  found.again = blur(veiled);
  box.focus();
  found.focused = d.activeElement === box;
  found.clear = [...d.querySelectorAll("img:not(.veil)")].map(blur).every(f => f === "none");
  const others = [...d.querySelectorAll("img.veil")];
  others.forEach(i => i.style.transition = "none");
  d.querySelector(".all").click();
  found.all = others.map(blur).every(f => f === "none");
  const plot = d.querySelector(".plot svg").getBoundingClientRect();
  found.plot = plot.width > 250 && plot.height > 150;
  const letters = [...d.querySelectorAll("p, td, th, dd, span, .plot text")].filter(e => e.textContent.trim());
  found.smallest = Math.min(...letters.map(e => parseFloat(w.getComputedStyle(e).fontSize)));
  document.getElementById("out").textContent = JSON.stringify(found);
};
</script>"""


@pytest.fixture
def site(tmp_path: Path) -> Any:
    handler = partial(
        type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}),
        directory=str(tmp_path),
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def browse(address: str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The page after it has run, and what it said on its console."""
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.long
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("flags", [(), ("--blink-settings=preferredColorScheme=0",)], ids=["light", "dark"])
def test_in_a_browser_it_fits_a_phone_and_a_click_unblurs(flags: tuple[str, ...], site: str, tmp_path: Path) -> None:
    many = [make(tmp_path / "a"), make(tmp_path / "b", "a_method_with_a_rather_long_name_of_its_own", 2)]
    write_report(many, tmp_path / "report.html")
    (tmp_path / "probe.html").write_text(PROBE)
    dom, said = browse(f"{site}/probe.html", tmp_path / "profile", *flags)
    match = re.search(r'<pre id="out">(.*?)</pre>', dom)
    assert match and match[1].startswith("{"), dom[-2000:]
    found = json.loads(match[1])
    assert said == [] and found["violations"] == []
    assert found["wide"] <= 0
    assert len(found["pictures"]) == 72 and all(found["pictures"])
    assert all("blur" in f for f in found["before"]) and "blur" in found["again"]
    assert found["after"] == ["none", "none", True]
    assert found["clear"] and found["all"] and found["focused"] and found["plot"]
    assert found["smallest"] >= 8


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_console_is_watched(site: str, tmp_path: Path) -> None:
    """What the test above relies on: an error on a page is seen."""
    (tmp_path / "wrong.html").write_text("<link rel=icon href=data:,><script>console.error('seen'); nothing()</script>")
    _, said = browse(f"{site}/wrong.html", tmp_path / "profile")
    assert len(said) == 2 and "seen" in said[0]


def test_a_report_names_a_detector_that_was_made_for_another_model() -> None:
    def named(model: str, detector: str) -> bool:
        run: Any = SimpleNamespace(
            scores={"removal": SimpleNamespace(protocol=detector)}, card={"model": {"name": model}}
        )
        return any("was made for the emoji models" in line for line in verdict._general([run]))

    eyes = efface.detector("eyes", "cat").name
    assert named("stable-diffusion", eyes) and not named("stable-diffusion", "nudenet3")
    assert not any(named(model, eyes) for model in ("emoji", "emoji-128", "emoji-flux + no-cats.safetensors"))
