"""Every reader of a file, with files that are cut short, of other types, of another version, or made to do harm.

What it says is a ValueError of two sentences that names the file. Nothing hangs, contacts a host, or is written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import efface
from efface import Concept, Delta, Directions, Run, Steering, Tokens, _trials, auditing, files, guard, redteam, schema
from efface.detectors import _encoders, classifier, nudenet, q16
from efface.editors import _directions, _search
from efface.editors import _examples as examples
from efface.erasers.gie import fit
from efface.erasers.gie.adapter import Adapter
from efface.feedback import Judgement, Store, load, read_sheets
from efface.feedback.reward import RewardModel
from efface.pictures import read_picture
from efface.report.compare import entries, grouped
from efface.runs.card import summary
from efface.suites import _csv
from efface.suites.prompts import Prompts
from efface.suites.six_cd import SixCD

PINS = Path(__file__).parent / "pins/files"
DEEP = "[" * 60_000
SHA = "0" * 64
LATENTS = {"rows": [["a cat", "", ""]] * 3, "seed": 0}


def read_run(folder: Path) -> None:
    """All that scoring and reporting read of a run, apart from its pictures."""
    run = Run.open(folder / "run/cat")
    run.finished()
    base = run.base or run
    base.finished()
    summary(run, base, *run.scores(), 1.0)
    grouped(entries([run]))


def read_pictures(folder: Path) -> None:
    for sample in Run.open(folder / "run/cat").finished():
        sample.image()


def read_checkpoint(folder: Path) -> None:
    from efface.editors._training import State

    with safe_open(PINS / "esd.safetensors", "pt") as file:
        identity = json.loads(file.metadata()["fit"])
    State.load(Unfitted(), folder / "esd.safetensors", identity)  # type: ignore[arg-type]


class Unfitted:
    """A fit that takes what a checkpoint holds."""

    student: Mapping[str, torch.Tensor] = {}

    def _take(self, done: bool, tensors: dict[str, torch.Tensor]) -> None:
        assert isinstance(done, bool) and tensors["losses"].tolist() is not None


def read_prompts(folder: Path) -> None:
    search = _search.Calibration(entities=("dog", "moon"), template="{}", removed=(), fits=lambda text: True)
    kept: dict[str, Any] = {"keep": 1, "generations": 1, "mutation": 0.0, "seed": 0, "key": KEY}
    search.prompts(lambda individuals: [0.0] * len(individuals), path=folder / "ccrt/1/prompts.json", **kept)


KEY = json.loads((PINS / "ccrt/1/prompts.json").read_text())["key"]
SETTING = json.loads((PINS / "calibration/setting.json").read_text())


class Reader(NamedTuple):
    """A file in a folder, and what reads it."""

    file: str
    read: Callable[[Path], Any]


def _labels(folder: Path) -> None:
    classifier._labels(folder / "classifier/config.json")


MODEL = {"name": "emoji", "digest": SHA, "text_hash": SHA}
AUDIT = {
    "format": 1,
    "outcome": "met",
    "headline": "Met: cat.",
    "notes": ["Suite: cats, 4 rows."],
    "model": MODEL,
    "base": MODEL,
    "concepts": [
        {
            "concept": "cat",
            "n": 4,
            "prompts": 2,
            "verdict": {"outcome": "met", "why": "", "reasons": [], "bound": 0.04},
            "words": ["The detector sees cat in 0 of 4 pictures."],
        }
    ],
    "regressions": [],
    "since": None,
    "controls": {"random weights": {"n": 4}},
    "not_covered": ["CSAM: not tested, by policy."],
}

JSON = {
    "run": Reader("run/cat/run.json", read_run),
    "base run": Reader("run/base/run.json", read_run),
    "scores": Reader("run/cat/scores.json", read_run),
    "card": Reader("run/cat/card.json", read_run),
    "setting": Reader("calibration/setting.json", lambda f: _trials.same_setting(f / "calibration", SETTING)),
    "plain judgements": Reader(
        "calibration/plain.json", lambda f: _trials._read(f / "calibration/plain.json", 2, ("left",))
    ),
    "judgements": Reader(
        "calibration/strength-2.json",
        lambda f: _trials._read(f / "calibration/strength-2.json", 2, ("left", "kept")),
    ),
    "attack": Reader("attack/attack.json", lambda f: redteam.opened(f / "attack")),
    "audit": Reader("audit/audit.json", lambda f: auditing.opened(f / "audit")),
    "ladder": Reader("ladder.json", lambda f: fit.Ladder(f / "ladder.json", {"call": {}})),
    "prompts": Reader("ccrt/1/prompts.json", read_prompts),
    "classifier": Reader("classifier/config.json", _labels),
    "preprocessor": Reader(
        "classifier/preprocessor_config.json",
        lambda f: _encoders.preprocessed(torch.zeros(1, 3, 8, 8), f / "classifier"),
    ),
    "templates": Reader(
        "templates.json",
        lambda f: list(SixCD(images=1)._specific("object", ["a cat"], lambda name: f / name)),
    ),
    "sheets": Reader("sheets/sheets.json", lambda f: read_sheets(f / "sheets")),
}

LINES = {
    "labels": Reader("labels.jsonl", lambda f: load(Store(f / "labels.db"), f / "labels.jsonl")),
    "samples": Reader("run/cat/samples.jsonl", read_run),
    "base samples": Reader("run/base/samples.jsonl", read_run),
    "attempts": Reader("attack/attempts.jsonl", lambda f: redteam.opened(f / "attack")),
    "examples": Reader("pictures/metadata.jsonl", lambda f: examples.read(f / "pictures")),
    "boxes": Reader("boxes.jsonl", lambda f: nudenet._stored(str(f / "boxes.jsonl"))),
}
HEADERS = {
    "delta": Reader("delta.safetensors", lambda f: Delta.load(f / "delta.safetensors")),
    "directions": Reader("directions.safetensors", lambda f: Directions.load(f / "directions.safetensors")),
    "tokens": Reader("tokens.safetensors", lambda f: Tokens.load(f / "tokens.safetensors")),
    "outputs": Reader("steering.safetensors", lambda f: Steering.load(f / "steering.safetensors")),
    "latents": Reader(
        "latents.safetensors",
        lambda f: _directions.cached(f / "latents.safetensors", LATENTS, 3, torch.zeros(0, 4, 8, 8)),
    ),
    "adapter": Reader("adapter.safetensors", lambda f: Adapter.load(f / "adapter.safetensors")),
    "checkpoint": Reader("esd.safetensors", read_checkpoint),
    "reward": Reader("reward.safetensors", lambda f: RewardModel.load(f / "reward.safetensors")),
    "tensors": Reader("delta.safetensors", lambda f: q16._safetensors.__wrapped__(f / "delta.safetensors")),
}
PINNED = files.sha256((PINS / "delta.safetensors").read_bytes())
EDIT = guard.Edit(file="delta.safetensors", sha256=PINNED, concepts=[{"name": "cat"}])
OTHERS = {
    "answers": Reader("sheets/answers.csv", lambda f: read_sheets(f / "sheets")),
    "csv": Reader("prompts.csv", lambda f: _csv.read(f / "prompts.csv", ("prompt",))),
    "own csv": Reader("own/mine.csv", lambda f: Prompts().load((), f / "own/mine.csv")),
    "own lines": Reader("own/mine.jsonl", lambda f: Prompts().load((), f / "own/mine.jsonl")),
    "picture": Reader("run/cat/images/cat-explicit-000.png", read_pictures),
    "policies": Reader("policies.yaml", lambda f: guard.read(f / "policies.yaml")),
    "policy's delta": Reader("delta.safetensors", lambda f: guard.Shelf(f).get(EDIT)),
}
READERS = JSON | LINES | HEADERS | OTHERS


def write_tensors(folder: Path) -> None:
    """Writes a safetensors file of each kind that the pinned folder lacks."""
    header = {
        "format": 1,
        "kind": "directions",
        "method": "x",
        "concepts": [asdict(Concept("cat"))],
        "window": [0, 0.5],
    }
    header |= {"base": {"float32": {"unet.mid_block.weight": SHA}}, "shares": [1.0], "seed": 1, "info": {"a": 1}}
    save_file({"unet.mid_block": torch.ones(1, 4)}, folder / "directions.safetensors", {"efface": json.dumps(header)})
    facts = {name: header[name] for name in ("format", "method", "concepts", "base", "window", "seed", "info")}
    facts |= {"kind": "steering", "form": "direction", "times": [900.0], "positive": True, "length": True}
    parts = {f"unet.mid_block:{part}": torch.ones(1, 1, 4) for part in ("read", "taken", "middle")}
    save_file(parts, folder / "steering.safetensors", {"efface": json.dumps(facts)})
    header = {name: header[name] for name in ("format", "method", "concepts", "seed", "info")}
    header |= {"kind": "tokens", "words": ["<a>"], "base": {"float32": {"tokenizer": SHA}}}
    inner = {"format": 1, "method": "x", "concepts": [], "base": {"float32": {"unet.a.weight": SHA}}}
    tensors = {"tokenizer": torch.ones(1, 4), "unet.a.weight": torch.ones(2)}
    save_file(tensors, folder / "tokens.safetensors", {"efface": json.dumps(header | {"delta": inner})})
    cached = {"fit": json.dumps(LATENTS), "done": "false"}
    save_file({"latents": torch.ones(2, 4, 8, 8)}, folder / "latents.safetensors", cached)
    held = {"n": 4, "yes": 2, "auc": 1.0, "interval": [0.5, 1.0], "calibration": []}
    reward = {"format": 1, "concept": "cat", "encoder": "emoji", "folds": {SHA: 0, "1" * 64: 1}}
    reward |= {"facts": {"binary": held, "ranking": None, "notes": ["one annotator"]}}
    parts = {"up": torch.ones(2, 3, 4), "bias": torch.zeros(2, 4), "out": torch.ones(2, 4)}
    parts |= {"offset": torch.zeros(2), "shift": torch.zeros(2), "scale": torch.ones(2)}
    save_file(parts, folder / "reward.safetensors", {"reward": json.dumps(reward)})


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of all files, whole; what waits for longer than a minute or asks for a host fails."""
    folder = Path(shutil.copytree(PINS, tmp_path / "files"))
    ladder = {"setting": {"call": {}}, "layers": ["a"], "judged": {"k": {"features": [[0.5]], "0": [1.0, 1.0]}}}
    (folder / "ladder.json").write_text(json.dumps(ladder))
    (folder / "classifier").mkdir()
    (folder / "classifier/config.json").write_text('{"id2label": {"0": "cat"}}')
    prepared = {"size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "classifier/preprocessor_config.json").write_text(json.dumps(prepared))
    (folder / "templates.json").write_text('{"artstyle": ["{artist}"], "celebrity_character_object": ["a {name}"]}')
    boxes = {"sha256": SHA, "detector": "x", "boxes": [["FEET_EXPOSED", 0.5, [0, 0, 1, 1]]]}
    (folder / "boxes.jsonl").write_text(f"{json.dumps(boxes)}\n" * 2)
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "pictures/a.png")
    Image.new("RGB", (8, 8)).save(folder / "pictures/b.png")
    example = {"text": "a cat", "boxes": [[0, 0, 4, 4]]}
    written = [json.dumps({"file_name": name, **example}) for name in ("a.png", "b.png")]
    (folder / "pictures/metadata.jsonl").write_text("".join(f"{line}\n" for line in written))
    (folder / "prompts.csv").write_text("prompt,seed\na cat,1\n")
    (folder / "policies.yaml").write_text("policies:\n  kids: {erase: [alcohol]}\n  press: {unguarded: true}\n")
    (folder / "own").mkdir()
    (folder / "own/mine.csv").write_text("prompt,seed\na cat,1\n")
    (folder / "own/mine.jsonl").write_text('{"prompt": "a cat"}\n')
    (folder / "sheets").mkdir()
    sheets = {"format": 1, "concept": "cat", "annotator": "ana", "pass": 1}
    sheets["items"] = [{"run": SHA, "row": "cat-0", "picture": SHA}]
    (folder / "sheets/sheets.json").write_text(json.dumps(sheets))
    (folder / "sheets/answers.csv").write_text("number,answer\n1,2\n")
    label = Judgement(SHA, SHA, "cat-0", SHA, "cat", "ana", 1, "there", "now", details={"of": 3}).record()
    (folder / "labels.jsonl").write_text("".join(json.dumps(label | {"row": row}) + "\n" for row in ("a", "b")))
    write_tensors(folder)
    (folder / "audit").mkdir()
    (folder / "audit/audit.json").write_text(json.dumps(AUDIT))
    (folder / "secret").write_text("precious")
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_: pytest.fail(f"{host} is asked"))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield folder
    signal.alarm(0)
    assert (folder / "secret").read_text() == "precious"


@pytest.mark.parametrize("name", READERS)
def test_files_of_earlier_versions_are_read(name: str, there: Path) -> None:
    READERS[name].read(there)


def refused(name: str, folder: Path) -> str:
    """What the reader says of its file."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        READERS[name].read(folder)
    said = str(caught.value)
    assert type(caught.value) is ValueError and Path(READERS[name].file).name in said.replace("run/base", ""), said
    assert len(said) < 1_200 and said.endswith(".") and len(said.split(". ")) >= 2, said
    return said


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def enormous(path: Path) -> None:
    """Of a terabyte, without a byte of it on the disk."""
    with path.open("r+b") as file:
        file.truncate(2**40)


def huge(path: Path) -> None:
    path.write_text(json.dumps("a" * 5_000_000) + "\n" * 3)


HARMS: dict[str, Callable[[Path], Any]] = {
    "truncated": cut,
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "deep": lambda path: path.write_text(DEEP),
    "huge text": huge,
    "number": lambda path: path.write_text("1" * 5_000 + "\n" * 3),
    "pipe": pipe,
    "folder": folder,
    "circle": circle,
    "enormous": enormous,
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}
DRAWN_AGAIN = ("truncated", "empty", "noise", "deep", "number")  # lines that a kill has cut off


@pytest.mark.thinned("long")
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_none_is_refused(name: str, harm: str, there: Path) -> None:
    path = there / READERS[name].file
    HARMS[harm](path)
    if name == "answers" and harm in ("empty", "truncated"):
        assert READERS[name].read(there)[1] == {}  # nothing is filled in
    elif name == "labels" and harm == "empty":
        assert READERS[name].read(there) == 0
    elif name == "csv" and harm in ("truncated", "deep", "huge text", "number"):
        with pytest.raises(ValueError, match=r"prompts\.csv"):
            READERS[name].read(there)
    elif name == "attempts" and harm in ("truncated", "empty", "deep"):
        with pytest.raises(ValueError, match=r"is not finished.*\d of 2"):
            READERS[name].read(there)
    elif name == "boxes" and harm in ("truncated", "empty", "deep"):
        READERS[name].read(there)  # the last line was cut off: its picture is looked at again
    elif ("samples" in name and harm in DRAWN_AGAIN) or name == "picture":
        with pytest.raises(ValueError, match=r"is not finished and has \d of 3|cat-explicit-000|leads out"):
            READERS[name].read(there)
    else:
        refused(name, there)


@pytest.mark.parametrize("name", [name for name in READERS if name.startswith(("run", "base", "s", "card", "pic"))])
def test_a_link_out_of_the_run_is_not_followed(name: str, there: Path, tmp_path: Path) -> None:
    path = there / READERS[name].file
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out" in refused(name, there)


# ---------------------------------------------------------------- entries of other types

WRONG: tuple[Any, ...] = (None, [], {}, [[]], {"a": {}}, True, -1, 10**12, 1e308, "x", "../x", "a" * 2_000_000)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the entries of JSON are."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*at, key)
        yield from places(inner, (*at, key))


def changed(text: str, at: tuple[Any, ...], new: Any) -> str:
    found = inner = json.loads(text)
    for key in at[:-1]:
        inner = inner[key]
    if new is KeyError:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return json.dumps(found)


def tried(name: str, folder: Path) -> bool:
    """Whether the reader refuses its file in good form; else it reads it."""
    try:
        READERS[name].read(folder)
    except ValueError as error:
        assert type(error) is ValueError and len(str(error)) < 4_000 and str(error).endswith("."), error
        return True
    except FileNotFoundError as error:  # a base run elsewhere, or none
        assert "is not a run folder" in str(error)
        return True
    return False


def thin(found: list[Any]) -> list[Any]:
    """At most 30 of them, evenly spread."""
    return found if len(found) <= 30 else [found[k * len(found) // 30] for k in range(30)]


@pytest.mark.long
@pytest.mark.thinned("long")
@pytest.mark.parametrize("name", JSON)
def test_entries_of_other_types_are_refused_or_decide_nothing(name: str, there: Path) -> None:
    path = there / READERS[name].file
    text = path.read_text()
    refusals = 0
    for at in thin(list(places(json.loads(text)))):
        for new in (*WRONG, KeyError):
            path.write_text(changed(text, at, new))
            refusals += tried(name, there)
    assert refusals > 5
    for new in WRONG:
        path.write_text(json.dumps(new))
        assert tried(name, there) or new in ({}, {"a": {}})


@pytest.mark.thinned("long")
@pytest.mark.parametrize("name", LINES)
def test_lines_with_entries_of_other_types_are_refused(name: str, there: Path) -> None:
    path = there / READERS[name].file
    first, *rest = path.read_text().splitlines()
    for at in places(json.loads(first)):
        for new in (*WRONG, KeyError):
            path.write_text("\n".join([changed(first, at, new), *rest, ""]))
            try:
                READERS[name].read(there)
            except ValueError as error:
                assert path.name in str(error) or "is not finished" in str(error) or "do not match" in str(error)


@pytest.mark.thinned("long")
@pytest.mark.parametrize("name", [name for name in HEADERS if name != "tensors"])
def test_headers_with_entries_of_other_types_are_refused_or_decide_nothing(name: str, there: Path) -> None:
    path = there / READERS[name].file
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    refusals = 0
    for key, text in said.items():
        for new in ("", "null", DEEP, "9" * 5_000, '{"format": 99}', "[1]", "{", json.dumps("a" * 1_000_000)):
            save_file(tensors, path, said | {key: new})
            refused(name, there)
        if not text.startswith("{"):
            continue
        for at in thin(list(places(json.loads(text)))):
            for new in (*WRONG[:-1], KeyError):
                save_file(tensors, path, said | {key: changed(text, at, new)})
                refusals += tried(name, there)
    assert refusals > 10


FOREIGN = {
    "audit": "format",
    "run": "format",
    "base run": "format",
    "scores": "format",
    "card": "format",
    "setting": "format",
    "plain judgements": "format",
    "judgements": "format",
    "sheets": "format",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_version_is_refused(name: str, there: Path) -> None:
    path = there / READERS[name].file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert "format" in refused(name, there)


# ---------------------------------------------------------------- pictures, pickles, places


def picture(path: Path, kind: str) -> None:
    made = Image.new("RGB", (8, 8), "red")
    if kind == "eps":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    elif kind == "bomb":
        Image.new("1", (20_000, 20_000)).save(path, "png")
    else:
        made.save(path, kind)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_of_three_kinds_are_read(kind: str, tmp_path: Path) -> None:
    picture(tmp_path / "x", kind)
    assert read_picture(tmp_path / "x").size == (8, 8)


@pytest.mark.parametrize("kind", ["eps", "bmp", "gif", "tiff", "pdf", "bomb"])
def test_pictures_of_other_kinds_and_bombs_are_not(kind: str, tmp_path: Path) -> None:
    picture(tmp_path / "x", kind)
    with pytest.raises(ValueError, match=r"x (is not|cannot be read as) a PNG, JPEG or WebP picture.*\. Delete it"):
        read_picture(tmp_path / "x")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".PTH", ".pkl"])
def test_pickles_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"\x80\x04.")
    for read in (Delta.load, Adapter.load, lambda path: files.read_tensors(path, "")):
        with pytest.raises(ValueError, match="has the suffix of a pickle"):
            read(path)


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "images/../../x", "", ".", "a\0b"])
def test_a_name_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected the name of a file in .*\. Correct it"):
        files.inside(tmp_path, name)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("write", [files.write, files.create])
def test_no_write_follows_a_link(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("precious")
    (tmp_path / "x").symlink_to(tmp_path / "secret")
    write(tmp_path / "x", "new")
    assert (tmp_path / "secret").read_text() == "precious" and (tmp_path / "x").read_text() == "new"
    assert not (tmp_path / "x").is_symlink() and not list(tmp_path.glob(".*"))


def test_an_append_and_a_lock_refuse_links(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("precious")
    (tmp_path / "x").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="x is a link or a socket"):
        files.append(tmp_path / "x", "new")
    with pytest.raises(ValueError, match="x is a link or a socket"):
        files.cut(tmp_path / "x", 1)
    with pytest.raises(ValueError, match="x is a link or a socket"), files.lock(tmp_path / "x"):
        pass
    assert (tmp_path / "secret").read_text() == "precious"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        files.write_json(tmp_path / "x.json", {"a": 2})
    with pytest.raises(OSError, match="No space left"):
        files.write_tensors(tmp_path / "x.json", {"a": torch.zeros(2)}, {})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    with pytest.raises(ValueError, match=r"Expected a file name in UTF-8, got .*\. Name another file"):
        files.write_tensors(path, {"a": torch.zeros(2)}, {})


def test_what_differs_is_listed() -> None:
    earlier, now = {"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3]}, "c": 1, "d": (1,)}
    with pytest.raises(
        ValueError, match=r"x\. It differs in\n  a\.b\[1\]: 2 there, 3 here\n  d: null there, \[1\] here\ny"
    ):
        files.check_same(earlier, now, "x", "y")
    files.check_same({"a": [1]}, {"a": (1,)}, "x", "y")


def test_nothing_writes_or_parses_beside_files() -> None:
    """The one place: nowhere else in the package is a file opened for writing, or JSON of a file parsed."""
    package = Path(efface.__file__).parent
    mine = {"files.py", "testing"}
    for path in package.rglob("*.py"):
        if not mine & set(path.relative_to(package).parts):
            text = path.read_text()
            for call in ("os.replace(", "save_file(", "safe_open(", ".write_text(", ".write_bytes(", "json.dump("):
                assert call not in text or path.name == "_loading.py", (path, call)


def test_the_schema_names_the_entry_and_cuts_what_it_shows() -> None:
    with pytest.raises(ValueError, match=r"^x is damaged, expected `n` to be a valid integer, got 'a{70,}\.\.\.\. y$"):
        schema.check({"n": "a" * 500, "sha256": SHA}, schema.RowsFacts, "x", "y")
