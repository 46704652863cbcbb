"""Jobs without a screen, the progress that they tell, and the tables and grids that show results."""

import csv
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

import efface
from efface import UCE, Concept, jobs, progress
from efface.progress import Cancelled, Meter, Progress
from efface.tables import render

CAT = Concept("cat", anchor="dog")


def erasure(**fields: Any) -> jobs.Erasure:
    given = {"images": 3, "steps": 1, "seed": 7, **fields}
    return jobs.Erasure(tiny.pipeline("small"), [efface.EIUP(CAT)], "a red cat", **given)


def test_a_job_tells_how_far_it_is_and_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "BATCH", 2)
    told: list[Progress] = []
    with progress.telling(Meter(told.append)):
        record = erasure().run(tmp_path)
    assert [(now.done, now.total) for now in told] == [(0, 6), (2, 6), (4, 6), (5, 6), (6, 6)]
    assert told[0].seconds_left is None and all((now.seconds_left or 0) >= 0 for now in told)
    assert record["complete"] and json.loads((tmp_path / "record.json").read_text()) == record
    assert {p.name for p in tmp_path.glob("after-*.png")} == {"after-7.png", "after-8.png", "after-9.png"}


def test_another_thread_cancels_a_job_and_what_was_finished_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "BATCH", 1)
    job = erasure()

    def listen(now: Progress) -> None:
        if now.done == 2:
            thread = threading.Thread(target=meter.cancel)
            thread.start()
            thread.join()

    meter = Meter(listen)
    with pytest.raises(Cancelled, match="cancelled at drawn 3/6"), progress.telling(meter):
        job.run(tmp_path)
    assert "1 of 3 pictures were finished, and 1 more of the base model" in job.finished(tmp_path)
    assert not json.loads((tmp_path / "record.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " "}, "`prompt` to be a text that is not empty"),
        ({"prompt": "\udcff"}, "`prompt` to be a text in UTF-8"),
        ({"images": 0}, "whole number `images` >= 1"),
        ({"seed": 2**32 - 2}, "so that all 3 seeds stay below"),
        ({"guidance": float("nan")}, "`guidance` to be a finite number"),
    ],
)
def test_a_job_that_cannot_be_done_is_refused_when_it_is_made(fields: dict[str, Any], message: str) -> None:
    prompt = fields.pop("prompt", "a cat")
    with pytest.raises(ValueError, match=message):
        jobs.Erasure(tiny.pipeline("small"), [efface.EIUP(CAT)], prompt, **{"images": 3, **fields})


def test_a_fit_is_a_job(tmp_path: Path) -> None:
    told: list[Progress] = []
    pipe, file = tiny.pipeline("small"), tmp_path / "deep/cat.safetensors"
    with progress.telling(Meter(told.append)):
        delta = jobs.Fit(UCE(), pipe, [CAT], file).run()
        esd = efface.ESD(steps=2, batch=1, reuse=1, sampler_steps=1)
        jobs.Fit(esd, pipe, [CAT], tmp_path / "esd.safetensors").run()
    assert efface.Delta.load(file).hash == delta.hash
    assert [(now.done, now.total) for now in told if now.what == "ESD"] == [(1, 2), (2, 2)]
    assert told[-1].note.startswith("loss ") and not list(tmp_path.glob("*.checkpoint"))


def test_a_run_shows_a_bar_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (efface.Row("cat-0", "a cat", 1_000_000, concept="cat"),)
    suite = efface.Suite("cats", "1", rows, call={"num_inference_steps": 1})
    pipe = tiny.pipeline("small")
    efface.run(suite, pipe, out=tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    efface.run(suite, pipe, out=tmp_path / "loud", progress=True)
    said = capsys.readouterr().err
    assert "1/1" in said and "\x1b" not in said and "\r" not in said  # no terminal: a line, no bar
    seen: list[tuple[str, int, int]] = []
    efface.run(suite, pipe, out=tmp_path / "called", progress=lambda *now: seen.append(now))
    assert seen[-1][1:] == (1, 1)


def test_the_time_left_follows_from_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 20.0, 20.0])
    monkeypatch.setattr("efface.progress.time.monotonic", lambda: next(clock))
    told: list[Progress] = []
    meter = Meter(told.append)
    for what, done in (("plain", 4), ("plain", 6), ("erased", 0), ("erased", 0)):
        meter(what, done, 8)
    assert [now.seconds_left for now in told] == [None, 2.0, None, None]


# ---------------------------------------------------------------- tables and grids

ROWS = [["a_b & c", "1", "3 %"], ["x|y", "", "–"]]


def test_tables_are_what_programs_and_papers_read() -> None:
    assert list(csv.reader(io.StringIO(render(["name", "n", "rate"], ROWS, "csv")))) == [["name", "n", "rate"], *ROWS]
    assert render(["name", "n", "rate"], ROWS, "md").splitlines() == [
        "| name | n | rate |",
        "| --- | ---: | ---: |",
        "| a_b & c | 1 | 3 % |",
        "| x&#124;y |  | – |",
    ]
    tex = render(["name", "n", "rate"], ROWS, "latex")
    assert r"a\_b \& c & 1 & 3 \% \\" in tex and r"\begin{tabular}{lrr}" in tex and "x|y &  & -- " in tex


def test_the_scores_of_runs_are_a_table() -> None:
    golden = Path(__file__).parent / "pins/files/run/cat"
    found = list(csv.DictReader(io.StringIO(efface.table(golden, "csv"))))
    scores, base = efface.Run.open(golden).scores()
    assert [row["metric"] for row in found] == [s.metric for s in scores]
    assert {row["run"] for row in found} == {"cat"} and len(base) > 0
    for row, score in zip(found, scores, strict=True):
        assert row["value"] == ("" if score.value != score.value else f"{score.value:.10g}")
    assert efface.table([golden, golden], "md").count("\n") == 2 + 2 * len(scores)
    with pytest.raises(ValueError, match="`format` to be one of 'csv', 'md', 'latex', got 'xlsx'"):
        efface.table(golden, "xlsx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected runs for a table"):
        efface.table([])


def test_pictures_are_laid_out_row_by_row() -> None:
    colours = ["red", "lime", "blue", "white", "black"]
    pictures = [Image.new("RGB", (8, 8), colour) for colour in colours]
    sheet = efface.grid(pictures, columns=2, labels=["one", "two", "three"], side=16)
    left, top = 64 + 4, 4
    assert sheet.getpixel((left + 8, top + 8)) == (255, 0, 0)
    assert sheet.getpixel((left + 20 + 8, top + 8)) == (0, 255, 0)
    assert sheet.getpixel((left + 8, top + 20 + 8)) == (0, 0, 255)
    same = efface.grid(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), columns=["a", "b"], side=16)
    assert same.size == (64 + 4 + 2 * 20, 18 + 20)
    for bad, message in (
        (lambda: efface.grid([]), "at least one picture"),
        (lambda: efface.grid(pictures, columns=0), "whole number `columns`"),
        (lambda: efface.grid(pictures, columns=2, labels=["one"]), "a label for each of 3 rows, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.long
@pytest.mark.parametrize("model", ["small", "flux"])
def test_the_guidance_of_a_job_is_the_neutral_scale_or_the_models_own(model: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline(model)
    call = {"num_inference_steps": 1, "batch": 1}
    for guidance in (None, 3.0):
        job = jobs.Erasure(pipe, [efface.SAFREE(CAT)], "a red cat", images=1, steps=1, seed=7, guidance=guidance)
        folder = tmp_path / f"{guidance}"
        folder.mkdir()
        record = job.run(folder)
        expected = efface.pictures.to_pil(efface.pipelines.draw(pipe, ["a red cat"], [7], guidance=guidance, **call))[0]
        assert Image.open(folder / "before-7.png").tobytes() == expected.tobytes()
        used = efface.pipelines.guided(pipe, guidance)
        assert {"guidance_scale", *used} - {"negative_prompt"} <= record.keys()
        assert all(record[name] == value for name, value in used.items() if name != "negative_prompt")
    befores = {(tmp_path / g / "before-7.png").read_bytes() for g in ("None", "3.0")}
    assert len(befores) == 2
