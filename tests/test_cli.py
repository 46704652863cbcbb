"""The `efface` command, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from efface.models.emoji.weights import FOLDER

EFFACE = Path(sys.executable).parent / "efface"
needs_weights = pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([EFFACE, *args], capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["", "--concept", "alcohol"], "The prompt is empty"),
        (["a cat"], "Nothing to erase"),
        (["a cat", "--concept", "alcohl"], "Did you mean 'alcohol'?"),
        (["a cat", "--concept", "cat", "--method", "eipu"], "Did you mean 'eiup'?"),
        (["a cat", "--concept", "cat", "--set", "strenght=2"], "Did you mean 'strength'?"),
        (["a cat", "--concept", "cat", "--set", "strength"], "Expected --set NAME=VALUE"),
        (["a cat", "--concept", "cat", "--set", "strength=-1"], "Expected `strength`"),
        (["a cat", "--concept", "cat", "--set", "strength=much"], "Expected `strength`"),
        (["a cat", "--concept", "cat", "--set", "window=[0, 1.5]"], "Expected `window`"),
        (["a cat", "--concept", "cat", "--set", "window=0.5"], "Expected `window`"),
        (["a cat", "--phrase", " "], "needs a name"),
        (["a cat", "--concept", "cat", "--seed", str(2**32 - 1)], "Seeds go up to"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(args: list[str], expected: str, tmp_path: Path) -> None:
    done = run("erase", *args, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = run("erase", "a cat", "--concept", "cat", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_overwrite_removes_nothing_before_the_model_is_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/grid.png").write_text("earlier")
    (tmp_path / "empty").mkdir()
    args = ["erase", "a cat", "--concept", "cat", "--model", str(tmp_path / "empty")]
    done = run(*args, "--out", str(tmp_path / "out"), "--overwrite")
    assert done.returncode == 2
    assert "is not a saved pipeline" in done.stderr
    assert (tmp_path / "out/grid.png").read_text() == "earlier"


def test_an_output_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("erase", "a cat", "--concept", "cat", "--out", str(tmp_path / "file"))
    assert (done.returncode, "is a file" in done.stderr) == (2, True)
    done = run("erase", "a cat", "--concept", "cat", "--out", str(tmp_path / "file" / "below"))
    assert (done.returncode, "Cannot write to" in done.stderr) == (2, True)


def test_list_shows_methods_and_concepts() -> None:
    assert json.loads(run("list", "methods", "--json").stdout)["methods"]["eiup"] == "erasers"
    assert "beer, wine, cocktail" in run("list", "concepts").stdout
    done = run("list", "method")
    assert (done.returncode, "Did you mean 'methods'?" in done.stderr) == (2, True)


@needs_weights
def test_erase_writes_pictures_grid_and_record(tmp_path: Path) -> None:
    args = ["erase", "a night at the pub", "--concept", "alcohol", "--images", "3", "--steps", "4", "--seed", "7"]
    done = run(*args, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "alcohol" in done.stdout
    assert str(tmp_path / "out") in done.stdout.replace("\n", "")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    pictures = {f"{when}-{seed}.png" for when in ("before", "after") for seed in (7, 8, 9)}
    assert names == pictures | {"grid.png", "record.json"}
    record = json.loads((tmp_path / "out/record.json").read_text())
    assert record["complete"]
    assert record["eraser"]["method"] == "eiup"
    assert [e["seed"] for e in record["images"]] == [7, 8, 9]
    assert all(len(e["after"]["seen"]["alcohol"]) == 2 for e in record["images"])
    before, after = (Image.open(tmp_path / f"out/{when}-7.png") for when in ("before", "after"))
    assert before.size == (64, 64)
    assert before.tobytes() != after.tobytes()
    # The same command refuses, and with --overwrite gives the same pictures again.
    assert run(*args, "--out", str(tmp_path / "out")).returncode == 2
    again = run(*args, "--out", str(tmp_path / "out"), "--overwrite", "--json")
    assert json.loads(again.stdout)["complete"]
    assert Image.open(tmp_path / "out/after-7.png").tobytes() == after.tobytes()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--concept", "nudity"], "unknown concept 'nudity'"),
        (["--concept", "cat", "--model", "some/model"], "There is no detector"),
        (["--concept", "cat", "--set", "strength=1"], "The strength is what is looked for"),
    ],
)
def test_bad_calibrations_are_explained(args: list[str], expected: str, tmp_path: Path) -> None:
    done = run("calibrate", *args, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*"))


@needs_weights
def test_calibrate_names_a_strength_and_goes_on_without_drawing(tmp_path: Path) -> None:
    args = ["calibrate", "--concept", "cat", "--prompt", "a cat", "--keep-prompt", "a rocket", "--n", "4"]
    args += ["--strength", "1", "--refine", "0", "--target", "0.5", "--keep", "0.5", "--steps", "12"]
    done = run(*args, "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["plain"]["rate"] >= 0.3
    assert [p["strength"] for p in found["points"]] == [1.0] and found["points"][0]["left"]["n"] == 4
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "setting.json",
        "plain.json",
        "strength-1.json",
        "calibration.json",
    }
    (tmp_path / "out/strength-1.json").write_text('{"left": [[1, 1, 1, 1]], "kept": [[1, 1, 1, 1]]}')
    again = run(*args, "--out", str(tmp_path / "out"))
    assert again.returncode == 0 and "No strength from 1 to 1 reaches" in " ".join(again.stdout.split())


@needs_weights
def test_without_out_folders_are_numbered(tmp_path: Path) -> None:
    args = ["erase", "a cat", "--phrase", "a feline", "--images", "1", "--steps", "1"]
    for k in (1, 2):
        assert run(*args, cwd=tmp_path).returncode == 0
        assert (tmp_path / f"efface-out/{k:03d}/record.json").exists()


@needs_weights
def test_ctrl_c_keeps_what_was_finished(tmp_path: Path) -> None:
    args = [EFFACE, "erase", "a cat", "--concept", "cat", "--images", "800", "--steps", "2", "--out", tmp_path / "out"]
    process = subprocess.Popen([*map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not list((tmp_path / "out").glob("record.json")):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Interrupted after" in " ".join(errors.split())
    assert "Traceback" not in errors
    record = json.loads((tmp_path / "out/record.json").read_text())
    assert not record["complete"]
    assert 0 < len(record["images"]) < 800
    assert all((tmp_path / "out" / e["after"]["file"]).exists() for e in record["images"])
    assert (tmp_path / "out/grid.png").exists()
