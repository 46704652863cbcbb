"""A run can be stopped at any moment and nothing is lost, doubled or mixed up."""

import errno
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from typer.testing import CliRunner

import efface
from efface import Row, Sample, Score, Suite, files, pipelines, runs
from efface.cli import app
from efface.delta import present
from efface.families import filled
from efface.models.emoji.weights import FOLDER
from efface.records import rows_hash
from efface.runs.folder import claim
from efface.runs.record import model_facts

STUB = """
import hashlib, os, random, signal, sys, time
from pathlib import Path
from PIL import Image
from typer.testing import CliRunner
from efface import runs
from efface.records import Row, rows_hash

ROWS = [Row(f"row-{k}", f"a cat {k}", 1_000_000 + k, call={"guidance_scale": k % 2}) for k in range(157)]
SUITE = dict.fromkeys(("name", "version", "source", "licence", "data_hash"), "cats")
MODEL = dict.fromkeys(("name", "text_hash", "pipeline", "dtype", "device"), "stub") | {"scheduler": {}}
RECORD = {"format": 1, "suite": SUITE, "rows": {"n": len(ROWS), "sha256": rows_hash(ROWS)}, "call": {}, "batch": 4,
          "model": MODEL, "erasers": [], "metrics": [], "base": None,
          "sessions": [{"started": "now", "command": "c", "versions": {}}]}

def paint(rows, call):
    assert len({r.call["guidance_scale"] for r in rows}) == 1 and call == rows[0].call
    with open(painted, "a") as log:
        log.write("".join(f"{r.id}\\n" for r in rows))
    for row in rows:
        time.sleep(0.001)
        pixels = hashlib.sha256(f"{row.prompt} {row.seed}".encode()).digest() * 6
        yield Image.frombytes("RGB", (8, 8), pixels), {}

def work():
    runs.work(folder, RECORD, ROWS, runs.locally(paint, ROWS), lambda *_: None)
"""
KILL = """
folder, painted = Path(sys.argv[1]) / "killed", Path(sys.argv[1]) / "painted"
folder.mkdir()
chance, lines, killed = random.Random(0), folder / "samples.jsonl", []
for _ in range(20):
    before = lines.stat().st_size if lines.exists() else 0
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    if chance.random() < 0.7:  # some die before their first batch is whole
        while not lines.exists() or lines.stat().st_size <= before:
            time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    killed.append(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
    print(len(runs.Run.open(folder).entries()) if (folder / "run.json").exists() else 0, killed[-1])
work()
folder, painted = folder.with_name("whole"), folder.with_name("painted-whole")
folder.mkdir()
work()
"""


@pytest.mark.long
def test_twenty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STUB + KILL, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept, killed = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    counts = [int(k) for k in kept]
    assert set(killed) == {"True"} and len(killed) == 20
    assert counts == sorted(counts) and len(set(counts)) > 8 and counts[-1] < 157  # they died at work
    broken, whole = runs.Run.open(tmp_path / "killed"), runs.Run.open(tmp_path / "whole")
    lines = [json.loads(line) for line in (broken.folder / "samples.jsonl").read_text().splitlines()]
    assert [line["k"] for line in lines] == list(range(157))
    for a, b in zip(broken.entries(), whole.entries(), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
        assert (broken.folder / a["file"]).read_bytes() == (whole.folder / b["file"]).read_bytes()
    assert len(list((broken.folder / "images").iterdir())) == 157
    painted = (tmp_path / "painted").read_text().splitlines()
    assert set(painted) == {row.row.id for row in whole.samples()}
    assert 157 < len(painted) <= 157 + 20 * 4  # a kill costs at most its batch


ROWS = tuple(Row(f"r{k}", f"a cat {k}", 1_000_000 + k) for k in range(10))


def record(rows: Sequence[Row] = ROWS, batch: int = 4, **changed: Any) -> dict[str, Any]:
    names = dict.fromkeys(("version", "source", "licence", "data_hash"), "")
    facts = {"pipeline": "Stub", "scheduler": {}, "dtype": "float32", "device": "cpu"}
    found: dict[str, Any] = {
        "format": 1,
        "suite": names | {"name": "cats"},
        "rows": {"n": len(rows), "sha256": rows_hash(rows)},
        "call": {},
        "batch": batch,
        "model": facts | {"name": "stub", "text_hash": "0a"},
        "erasers": [],
        "metrics": [],
        "base": None,
        "sessions": [{"started": "now", "command": "efface bench", "versions": {}}],
    }
    return found | {key: found[key] | value if isinstance(value, dict) else value for key, value in changed.items()}


class Stub:
    """Paints by seed; counts, and can fail."""

    def __init__(self, fail_at: int = -1) -> None:
        self.painted: list[str] = []
        self.calls: list[int] = []
        self.alive: list[weakref.ref[Any]] = []
        self.fail_at = fail_at

    def __call__(self, rows: Sequence[Row], call: Mapping[str, Any]) -> list[tuple[Image.Image, dict[str, Any]]]:
        assert sum(ref() is not None for ref in self.alive) <= 8
        if len(self.calls) == self.fail_at:
            raise RuntimeError("out of memory")
        self.calls.append(len(rows))
        self.painted += [row.id for row in rows]
        made = [Image.new("RGB", (8, 8), (row.seed % 256, 0, 0)) for row in rows]
        self.alive += [weakref.ref(picture) for picture in made]
        return [(picture, {}) for picture in made]


def silent(*_: Any) -> None:
    pass


def finish(folder: Path, rows: Sequence[Row] = ROWS, **changed: Any) -> Stub:
    stub = Stub()
    folder.mkdir(exist_ok=True)
    runs.work(folder, record(rows, **changed), rows, runs.locally(stub, rows), silent)
    return stub


def pixels(folder: Path) -> dict[str, bytes]:
    return {s.row.id: Image.open(s.path).tobytes() for s in runs.Run.open(folder).samples()}


def test_batches_are_cut_by_row_index_and_the_memory_is_one_batch(tmp_path: Path) -> None:
    rows = tuple(Row(f"r{k}", "a cat", k) for k in range(80))
    assert finish(tmp_path / "a", rows, batch=8).calls == [8] * 10
    assert finish(tmp_path / "b").calls == [4, 4, 2]
    run = runs.Run.open(tmp_path / "b")
    assert run.complete and [s.row for s in run.samples()] == list(ROWS)
    assert finish(tmp_path / "b").calls == []


def test_pictures_reach_the_disk_before_the_line_that_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill does not show it, a power cut would: each batch's pictures are synced, then its lines."""
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), sync(file))[1])
    finish(tmp_path / "a")
    lines = (tmp_path / "a/samples.jsonl").stat().st_ino
    counted = [k for k, inode in enumerate(synced) if inode == lines]
    assert len(counted) == 3
    for k, sample in enumerate(runs.Run.open(tmp_path / "a").samples()):
        assert synced.index(sample.path.stat().st_ino) < counted[k // 4]


def test_rows_with_equal_arguments_are_drawn_together_within_their_batch(tmp_path: Path) -> None:
    rows = tuple(Row(f"r{k}", "a cat", k, call={"guidance_scale": 7 + k % 2} if k != 5 else {}) for k in range(8))
    stub = finish(tmp_path / "a", rows, call={"guidance_scale": 7})
    assert stub.painted == ["r0", "r2", "r1", "r3", "r4", "r5", "r6", "r7"]
    assert stub.calls == [2, 2, 3, 1]
    assert [s.row.id for s in runs.Run.open(tmp_path / "a").samples()] == [r.id for r in rows]


@pytest.mark.parametrize(
    ("whole", "more", "kept"), [(9, 0, 8), (9, 1, 8), (9, -1, 8), (8, -1, 4), (5, 30, 4), (0, 9, 0)]
)
def test_a_torn_tail_is_drawn_again(whole: int, more: int, kept: int, tmp_path: Path) -> None:
    """The file ends `more` bytes behind its first `whole` lines."""
    finish(tmp_path / "a")
    want, lines = pixels(tmp_path / "a"), tmp_path / "a/samples.jsonl"
    text = lines.read_bytes()
    lines.write_bytes(text[: len(b"".join(text.splitlines(keepends=True)[:whole])) + more])
    run = runs.Run.open(tmp_path / "a")
    assert len(run.samples()) == kept and not run.complete
    assert finish(tmp_path / "a").painted == [r.id for r in ROWS[kept:]]
    assert pixels(tmp_path / "a") == want
    assert len(lines.read_text().splitlines()) == 10


@pytest.mark.parametrize("harm", ["missing picture", "short picture", "broken line", "lost line"])
def test_a_damaged_batch_is_drawn_again_whole_and_the_others_stay(harm: str, tmp_path: Path) -> None:
    finish(tmp_path / "a")
    want, lines = pixels(tmp_path / "a"), tmp_path / "a/samples.jsonl"
    if harm == "missing picture":
        (tmp_path / "a/images/r1.png").unlink()
    elif harm == "short picture":
        (tmp_path / "a/images/r1.png").write_bytes(b"\x89PNG")
    else:
        kept = lines.read_bytes().splitlines(keepends=True)
        kept[1] = b'{"k": 1, "fil\n' if harm == "broken line" else b""
        lines.write_bytes(b"".join(kept))
    assert finish(tmp_path / "a").painted == ["r0", "r1", "r2", "r3"]
    assert pixels(tmp_path / "a") == want
    assert sorted(json.loads(line)["k"] for line in lines.read_text().splitlines()) == list(range(10))


def test_a_failing_pipeline_loses_its_batch_only(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        runs.work(claim(tmp_path / "a"), record(), ROWS, runs.locally(Stub(fail_at=1), ROWS), silent)
    assert finish(tmp_path / "a").painted == [r.id for r in ROWS[4:]]


@pytest.mark.parametrize(("where", "nth"), [("create", 1), ("create", 7), ("append", 2)])
def test_a_full_disk_stops_with_a_message_and_continues(
    where: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file that is created is the record, the others are pictures."""
    real, calls = getattr(files, where), []

    def full(path: Path, what: Any) -> Any:
        calls.append(path)
        if len(calls) == nth:
            if where == "append":
                real(path, what[: len(what) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, what)

    monkeypatch.setattr(files, where, full)
    kept = 0 if nth == 1 else 4
    with pytest.raises(OSError, match=f"The disk is full. {kept} of 10 pictures stayed in .*same command") as caught:
        finish(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert finish(tmp_path / "a").painted == [r.id for r in ROWS[kept:]]
    assert runs.Run.open(tmp_path / "a").complete and not list((tmp_path / "a").glob(".*.partial"))


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path) -> None:
    finish(tmp_path / "a")
    hold = (
        "import sys; from pathlib import Path; from efface import files\n"
        "with files.lock(Path(sys.argv[1]) / '.lock'):\n    print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    with pytest.raises(BlockingIOError, match=rf"Another process \({process.pid}\) is working"):
        finish(tmp_path / "a")
    process.kill()
    process.communicate()
    assert (tmp_path / "a/.lock").exists()
    finish(tmp_path / "a")  # what a killed process left does not block


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"suite": {"name": "dogs"}}, 'suite.name: "cats" there, "dogs" here'),
        ({"model": {"name": "stub", "text_hash": "0b"}}, 'model.text_hash: "0a" there, "0b" here'),
        ({"erasers": [{"method": "eiup"}]}, 'erasers: \\[\\] there, \\[{"method": "eiup"}\\] here'),
        ({"batch": 5}, "batch: 4 there, 5 here"),
        ({"call": {"guidance_scale": 9}}, "call.guidance_scale: null there, 9 here"),
    ],
)
def test_a_folder_of_another_run_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    finish(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        finish(tmp_path / "a", **changed)
    assert finish(tmp_path / "a").calls == []


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        claim(tmp_path)
    with pytest.raises(ValueError, match="got the file"):
        claim(tmp_path / "mine.txt")
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        runs.Run.open(tmp_path)


# ---------------------------------------------------------------- with a pipeline


@dataclass(frozen=True)
class Red:
    """The share of pictures that are redder than a level."""

    name: ClassVar[str] = "red"
    unit: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool | None] = False

    level: float = 0.5

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        assert base is not None and [s.row for s in base] == [s.row for s in samples]
        seen = {s.row.id: float(s.image()[0].mean() > self.level) for s in samples}
        value = sum(seen.values()) / len(seen)
        return [
            Score("red", value, len(seen), 0.0, 1.0, higher_is_better=False, protocol="mean of R", per_sample=seen),
            Score("undefined", float("nan"), 0, float("nan"), float("nan")),
        ]


SUITE = Suite(
    "pub",
    "1",
    tuple(Row(f"p{k}", tiny.PROMPT, 1_000_000 + k, call={"guidance_scale": 3.0} if k == 2 else {}) for k in range(3)),
    call={"num_inference_steps": 2, "guidance_scale": 7.5},
    metrics=(Red(),),
)
ALCOHOL = efface.EIUP(tiny.ALCOHOL)


def images(run: efface.Run) -> torch.Tensor:
    return torch.stack([s.image() for s in run.samples()])


def test_a_run_draws_what_the_pipeline_draws(sd1: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    run = efface.run(SUITE, sd1, eraser=ALCOHOL, out=tmp_path / "a", progress=lambda *t: told.append(t), batch=2)
    assert run.base is not None and run.base.folder.parent.samefile(tmp_path) and run.base.base is None
    call = dict(SUITE.call)
    plain = torch.cat([pipelines.draw(sd1, [r.prompt], [r.seed], **{**call, **r.call}) for r in SUITE.rows])
    assert (images(run.base) - plain).abs().max() <= 1 / 255
    with ALCOHOL.apply(sd1):
        erased = torch.cat([pipelines.draw(sd1, [r.prompt], [r.seed], **{**call, **r.call}) for r in SUITE.rows])
    assert (images(run) - erased).abs().max() <= 1 / 255
    assert (erased - plain).abs().max() > 8 / 255
    assert told == [(w, n, 3) for w in ("plain", "erased") for n in (0, 2, 3)]
    assert run.record["erasers"] == [efface.core.config(filled(ALCOHOL, sd1))] != [efface.core.config(ALCOHOL)]
    again = efface.run(SUITE, sd1, eraser=ALCOHOL, out=tmp_path / "a", batch=2)
    assert again.record == run.record


def test_runs_share_their_plain_pictures(sd1: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = pipelines.draw
    monkeypatch.setattr(pipelines, "draw", lambda *a, **k: drawn.append(len(a[1])) or real(*a, **k))
    first = efface.run(SUITE, sd1, eraser=ALCOHOL, out=tmp_path / "a")
    assert sum(drawn) == 6
    second = efface.run(SUITE, sd1, eraser=[ALCOHOL, efface.EIUP(tiny.CAT)], out=tmp_path / "b")
    assert sum(drawn) == 9
    assert first.base == second.base and len(second.record["erasers"]) == 2
    plain = efface.run(SUITE, sd1, out=first.base.folder)
    assert sum(drawn) == 9 and plain.base is None
    with pytest.raises(ValueError, match="rows.n: 3 there, 2 here"):
        efface.run(SUITE, sd1, eraser=ALCOHOL, out=tmp_path / "a", limit=2)
    with pytest.raises(ValueError, match="strength: 2.25 there, 0.5 here"):
        efface.run(SUITE, sd1, eraser=efface.EIUP(tiny.ALCOHOL, strength=0.5), out=tmp_path / "a")
    other = tiny.pipeline("sd1")
    other.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data += 1
    with pytest.raises(ValueError, match="model.text_hash: "):
        efface.run(SUITE, other, eraser=ALCOHOL, out=tmp_path / "a")


def test_what_cannot_run_is_refused_before_drawing(sd1: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already has an eraser"), ALCOHOL.apply(sd1):
        efface.run(SUITE, sd1, out=tmp_path / "a")
    with pytest.raises(ValueError, match="a whole number `batch`"):
        efface.run(SUITE, sd1, out=tmp_path / "a", batch=0)
    with pytest.raises(ValueError, match="whole number `limit`"):
        efface.run(SUITE, sd1, out=tmp_path / "a", limit=0)
    with pytest.raises(ValueError, match="to be different folders"):
        efface.run(SUITE, sd1, out=tmp_path / "a", base=tmp_path / "a", eraser=ALCOHOL)
    with pytest.raises(TypeError, match="got 'eiup'. Pass method names to efface.erase"):
        efface.run(SUITE, sd1, out=tmp_path / "b", eraser="eiup")
    assert not [p for p in tmp_path.rglob("*.png")]


def test_scores_stand_beside_the_plain_model_and_need_no_drawing(sd1: Any, tmp_path: Path) -> None:
    run = efface.run(SUITE, sd1, eraser=ALCOHOL, out=tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no scores yet"):
        run.scores()
    reds = sorted(float(s.image()[0].mean()) for s in run.base.samples())
    level = (reds[0] + reds[1]) / 2
    (red, undefined) = efface.score(tmp_path / "a", metrics=[Red(level)])
    scores, base = run.scores()
    assert scores[0] == red and scores[0].per_sample == red.per_sample
    assert undefined.value != undefined.value and scores[1].value != scores[1].value
    assert base[0].value == pytest.approx(2 / 3)
    card = run.card()
    assert card["scores"][0]["base"]["value"] == base[0].value and "per_sample" not in card["scores"][0]
    assert card["cost"]["seconds_per_picture"] > 0
    json.loads((tmp_path / "a/scores.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert efface.score(run)[0].metric == "red"  # the suite's own metric, at its own level
    with pytest.raises(ValueError, match="names no metrics"):
        efface.score(run, metrics=[])
    lines = tmp_path / "a/samples.jsonl"
    lines.write_text("")
    with pytest.raises(ValueError, match="is not finished and has 0 of 3"):
        efface.score(run)


def test_other_judges_of_a_finished_run_are_remembered(sd1: Any, tmp_path: Path) -> None:
    first = efface.run(SUITE, sd1, eraser=ALCOHOL, out=tmp_path / "a")
    harsher = replace(SUITE, metrics=(Red(0.75),))
    drawn = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    again = efface.run(harsher, sd1, eraser=ALCOHOL, out=tmp_path / "a")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")} == drawn
    opened = efface.Run.open(tmp_path / "a")
    assert first.record["metrics"][0]["level"] == 0.5
    assert again.record["metrics"] == opened.record["metrics"] == [runs.metric_config(Red(0.75))]
    assert {**opened.record, "metrics": []} == {**first.record, "metrics": []}


def test_pictures_that_are_not_finite_are_noted(sd1: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipelines.draw

    def broken(*args: Any, **call: Any) -> torch.Tensor:
        pictures = real(*args, **call)
        pictures[0, 0, 0, 0] = float("nan")
        return pictures

    monkeypatch.setattr(pipelines, "draw", broken)
    run = efface.run(SUITE, sd1, out=tmp_path / "a", limit=2)
    assert [e.get("finite") for e in run.entries()] == [False, None]
    efface.score(run)
    assert run.card()["not_finite"] == 1


EMOJI = """
import sys, torch
torch.set_num_threads(1)
import efface
rows = tuple(efface.Row(f"r{k}", p, 1_800_000 + k) for k, p in enumerate(["a cat", "a beer"] * 6))
suite = efface.Suite("kills", "1", rows, call={"num_inference_steps": 8, "guidance_scale": 7.5})
efface.run(suite, "emoji", eraser=efface.EIUP("alcohol"), out=sys.argv[1], batch=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
def test_a_killed_run_of_a_real_model_sees_the_same_as_an_unbroken_one(tmp_path: Path) -> None:
    from efface.models.emoji.eyes import load_eyes

    for wanted in (2, 6, 2, 8):  # lines in samples.jsonl at which to kill: twice of the plain run, twice of the erased
        process = subprocess.Popen([sys.executable, "-c", EMOJI, tmp_path / "broken" / "a"])
        base = wanted in (2, 6) and not (tmp_path / "broken/a/samples.jsonl").exists()
        while process.poll() is None:
            found = list((tmp_path / "broken").glob("base-*/samples.jsonl" if base else "a/samples.jsonl"))
            if found and found[0].read_bytes().count(b"\n") >= wanted:
                process.kill()
        process.wait()
    for name in ("broken", "whole"):
        subprocess.run([sys.executable, "-c", EMOJI, tmp_path / name / "a"], check=True)
    broken, whole = (images(runs.Run.open(tmp_path / name / "a")) for name in ("broken", "whole"))
    assert len(broken) == 12 and (broken - whole).abs().max() <= 1 / 255
    eyes = load_eyes()
    assert torch.equal(eyes.icons(broken), eyes.icons(whole))


@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
def test_a_rehearsal_finds_what_a_metric_lacks_before_anything_is_drawn() -> None:
    suite = efface.make_suite("emoji", "alcohol", limit=40)
    runs.rehearse(suite)
    lacking = replace(suite, metrics=(runs.make_metric("removal", detector="nudenet"),))
    with pytest.raises(ValueError, match="NudeNet cannot judge alcohol"):
        runs.rehearse(lacking)
    with pytest.raises(ValueError, match="names no metric"):
        runs.rehearse(replace(suite, metrics=()))
    natural = replace(suite, metrics=(runs.make_metric("in_prompt_clip"),), rows=suite.rows[:1])
    with pytest.raises(ValueError, match="none of the metrics .*in_prompt_clip.* judges such rows"):
        runs.rehearse(natural)


# ---------------------------------------------------------------- a run of a stranger


def lines(folder: Path, edit: Any) -> None:
    path = folder / "samples.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        edit(entry)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def edited(folder: Path, **entries: Any) -> runs.Run:
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return runs.Run.open(folder)


def test_a_picture_that_was_replaced_is_not_scored(tmp_path: Path) -> None:
    finish(tmp_path / "a")
    run = runs.Run.open(tmp_path / "a")
    path = run.folder / "images/r3.png"
    size = path.stat().st_size
    Image.new("RGB", (8, 8)).save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    assert path.stat().st_size == size
    with pytest.raises(ValueError, match=r"r3\.png is not the picture that was drawn, because its SHA-256 .*\. Draw"):
        efface.score(run, metrics=[Red()])
    assert not (run.folder / "scores.json").exists()


def test_pictures_of_an_old_run_are_unverified_and_said_to_be(tmp_path: Path) -> None:
    finish(tmp_path / "a")
    assert efface.score(tmp_path / "a", metrics=[Red()]) and runs.Run.open(tmp_path / "a").card()["unverified"] == 0
    lines(tmp_path / "a", lambda entry: entry.pop("sha256"))
    assert efface.score(tmp_path / "a", metrics=[Red()]) and runs.Run.open(tmp_path / "a").card()["unverified"] == 10
    assert finish(tmp_path / "a").calls == []


@pytest.mark.parametrize("field", ["prompt", "seed", "concept"])
def test_rows_that_were_replaced_are_refused(field: str, tmp_path: Path) -> None:
    finish(tmp_path / "a")
    lines(tmp_path / "a", lambda entry: entry["row"].update({field: 7 if field == "seed" else "another"}))
    with pytest.raises(ValueError, match="The rows in .*a do not match the SHA-256 in its run.json"):
        runs.Run.open(tmp_path / "a").samples()


@pytest.mark.parametrize("base", ["/etc", ".", "../other", "../a/images", "\0"])
def test_a_base_run_is_a_plain_one_of_the_same_rows(base: str, tmp_path: Path) -> None:
    finish(tmp_path / "a", erasers=[{"method": "eiup"}])
    finish(tmp_path / "other", ROWS[:4])
    with pytest.raises((ValueError, FileNotFoundError), match=r"to be relative|is not the base|is not a run folder"):
        edited(tmp_path / "a", base=base).base  # noqa: B018


PLACES: list[dict[str, Any]] = [
    {"method": "clip_score", "encoder": "stranger/model"},
    {"method": "clip_score", "encoder": "model"},
    {"method": "kid", "features": "clip:/home"},
    {"method": "kid", "reference": "/home"},
    {"method": "nudenet_counts", "store": "diary"},
    {"method": "detection", "detector": {"name": "nudenet", "store": "/home/diary"}},
    {"method": "detection", "detector": {"name": "clip", "clip": "stranger/model"}},
    {"method": "detection", "detector": {"name": "q16", "prompts": "x.safetensors"}},
    {"method": "detection", "detector": {"name": "classifier", "folder": "/home"}},
    {"method": "inappropriateness", "detectors": ["nudenet", {"name": "clip", "template": "{:>999999999}"}]},
]


@pytest.mark.parametrize("config", PLACES)
def test_a_record_names_no_file_and_no_model_of_a_hub(config: dict[str, Any], tmp_path: Path) -> None:
    finish(tmp_path / "a")
    run = edited(tmp_path / "a", metrics=[config])
    field = next(key for key in config if key != "method")
    with pytest.raises(ValueError, match=rf"`{config['method']}.{field}` to '.*may be a file or a hub model\. If"):
        efface.score(run)
    for given in (field, f"{config['method']}.{field}"):
        assert runs.recorded(run, [given]) == [config]


def test_a_record_may_choose_among_what_is_in_efface(tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [
        {"method": "detection", "detector": "nudenet3_any9_t0.45", "by": ["concept", "a/b"]},
        {"method": "detection", "detector": {"name": "nudenet", "labels": "9", "threshold": 0.6}},
        {"method": "deviation_ratio", "detector": {"name": "clip", "clip": "emoji"}, "classes": ["a man", "a/woman"]},
        {"method": "nudenet_counts", "threshold": 0.5, "labels": "2", "count": "pictures", "store": ""},
        {"method": "kid", "features": "eye", "reference": "", "kinds": ["benign"]},
        {"method": "clip_score", "encoder": "emoji"},
        {"method": "lpips", "net": "vgg", "size": 64},
    ]
    finish(tmp_path / "a")
    assert runs.recorded(edited(tmp_path / "a", metrics=configs)) == configs
    with pytest.raises(ValueError, match="os:system"):
        runs.recorded(edited(tmp_path / "a", metrics=[{"method": "os:system"}]))


# ---------------------------------------------------------------- drawn again


def test_sampled_rows_are_drawn_again_and_compared(sd1: Any, tmp_path: Path) -> None:
    run = efface.run(SUITE, sd1, eraser=ALCOHOL, out=tmp_path / "a", batch=2)
    told: list[tuple[str, int, int]] = []
    found = efface.verify(run.folder, 16, model=sd1, progress=lambda *t: told.append(t))
    assert found.same and [(row.row, row.base) for row in found.rows] == [
        (f"p{k}", base) for base in (False, True) for k in range(3)
    ]
    assert told[-1] == ("base again", 6, 6) and str(found) == "6 of 6 pictures are the same to the bit."
    one = efface.verify(run, 1, model=sd1, seed=3)
    assert [row.row for row in one.rows] in (["p0", "p1"] * 2, ["p2"] * 2)  # a whole pipeline call, of run and base
    assert one == efface.verify(run, 1, model=sd1, seed=3)


def test_a_picture_that_the_model_does_not_draw_is_found(sd1: Any, tmp_path: Path) -> None:
    run = efface.run(SUITE, sd1, eraser=ALCOHOL, out=tmp_path / "a", batch=2)
    path = run.folder / "images/p1.png"
    picture = Image.open(path).convert("RGB")
    picture.putpixel((3, 4), tuple(x ^ 64 for x in picture.getpixel((3, 4))))
    picture.save(path)

    def forge(entry: dict[str, Any]) -> None:
        content = (run.folder / entry["file"]).read_bytes()
        entry.update(bytes=len(content), sha256=files.sha256(content))

    lines(run.folder, forge)  # as a forger would: hashes agree, only the model does not
    found = efface.verify(run.folder, model=sd1)
    assert [row.row for row in found.rows if not row.same] == ["p1"] and not found.same
    assert found.record()["rows"][1] == {
        "row": "p1",
        "base": False,
        "largest": 64,
        "share": pytest.approx(1 / (picture.width * picture.height)),
        "same": False,
    }
    assert "p1 (run): " in str(found) and "5 of 6 pictures are the same to the bit." in str(found)
    assert found.versions == {}
    record = json.loads((run.folder / "run.json").read_text("utf-8"))
    record["sessions"][0]["machine"] = "Linux x86_64, 7 threads"
    (run.folder / "run.json").write_text(json.dumps(record))
    assert efface.verify(run.folder, model=sd1).versions["machine"][0] == "Linux x86_64, 7 threads"
    json.dumps(found.record())


def test_what_cannot_be_drawn_again_is_refused(sd1: Any, tmp_path: Path) -> None:
    run = efface.run(SUITE, sd1, eraser=ALCOHOL, out=tmp_path / "a")
    with pytest.raises(ValueError, match="is not embedded in Efface. If you trust it, give it as `model=`"):
        efface.verify(run)
    other = tiny.pipeline("sd1")
    other.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data += 1
    with pytest.raises(ValueError, match=r"(?s)The model is not that of .*text_hash: "):
        efface.verify(run, model=other)
    with pytest.raises(ValueError, match="(?s)The erasers are not those of .*strength: 2.25 there, 0.5 here"):
        efface.verify(run, model=sd1, eraser=efface.EIUP(tiny.ALCOHOL, strength=0.5))
    assert efface.verify(run, model=sd1, eraser=ALCOHOL).same
    with pytest.raises(ValueError, match="(?s)The erasers are not those of "):
        efface.verify(run, model=sd1, eraser=[ALCOHOL, efface.EIUP(tiny.CAT)])
    with pytest.raises(ValueError, match="`redraw`"):
        efface.verify(run, 0, model=sd1)
    eiup = run.record["erasers"][0]
    for config in (
        {"method": "uce", "fields": {}},
        {"method": "os:system"},
        {**eiup, "x": 1},
        {**eiup, "strength": -1},
        {**eiup, "normalization": "/etc/passwd"},
        {"method": "gie", "concepts": eiup["concepts"], "adapter": "/etc/x.safetensors"},
        {**eiup, "concepts": [{"nam": "cat"}]},
    ):
        with pytest.raises(ValueError, match=r"cannot be rebuilt from its record|is damaged"):
            efface.verify(edited(run.folder, erasers=[config]), model=sd1)


def test_deltas_are_given_and_other_erasers_made_by_name(sd1: Any, tmp_path: Path) -> None:
    delta = efface.UCE().fit(sd1, tiny.CAT)
    run = efface.run(SUITE, sd1, eraser=[delta, ALCOHOL], out=tmp_path / "a", batch=2)
    with pytest.raises(
        ValueError, match=r"The eraser 'uce' .* cannot be rebuilt from its record .*--delta for a delta"
    ):
        efface.verify(run, model=sd1)
    assert efface.verify(run, model=sd1, eraser=delta).same


@pytest.mark.long
@pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")
def test_the_command_says_of_each_picture_whether_it_is_the_same(tmp_path: Path) -> None:
    rows = tuple(Row(f"r{k}", "a cat", 1_900_000 + k) for k in range(3))
    suite = Suite("cats", "1", rows, call={"num_inference_steps": 1, "guidance_scale": 7.5})
    run = efface.run(suite, "emoji", eraser=efface.EIUP("cat"), out=tmp_path / "a", batch=2)
    done = CliRunner().invoke(app, ["verify", str(run.folder), "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["same"] and len(found["rows"]) == 6
    Image.new("RGB", (64, 64)).save(run.folder / "images/r0.png")

    def forge(entry: dict[str, Any]) -> None:
        content = (run.folder / entry["file"]).read_bytes()
        entry.update(bytes=len(content), sha256=files.sha256(content))

    lines(run.folder, forge)
    done = CliRunner().invoke(app, ["verify", str(run.folder)])
    assert done.exit_code == 3 and "5 of 6 pictures are the same to the bit." in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines() if "pixels differ" in line] == [["r0", "(run):"]]
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "none")])
    assert done.exit_code == 2 and "is not a run folder" in done.stderr


def test_a_setting_that_json_cannot_hold_is_recorded_as_a_text() -> None:
    """DPM-Solver clips at minus infinity by default."""
    pipe = tiny.pipeline("sd1")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for facts in (model_facts(pipe, "x"), present(pipe)):
        assert json.loads(json.dumps(facts, allow_nan=False))["scheduler"]["lambda_min_clipped"] == "-inf"
