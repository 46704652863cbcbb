"""Exit codes, shared options and messages of the command, as kinds."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from PIL import Image
from safetensors import SafetensorError
from test_cli import call
from typer.testing import CliRunner, Result

import efface
from efface import _hub, feedback
from efface.cli import app
from efface.cli.list import TABLES

GOLDEN = Path(__file__).parent / "pins/files"


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def flat(result: Result) -> str:
    """What was said, on one line."""
    return " ".join(result.output.split())


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A scored run with its base."""
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    return tmp_path / "run/cat"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The model "small" is a tiny pipeline; what it was loaded with."""
    given: dict[str, Any] = {}

    def load(model: Any, **loading: Any) -> Any:
        given.update(loading, model=model, judges=_hub.allowed())
        return tiny.pipeline("small")

    monkeypatch.setattr("efface.api.load", load)
    return given


# ---------------------------------------------------------------- exit codes


def test_the_exit_codes_are_told() -> None:
    said = " ".join(invoke("--help").stdout.split())
    for words in ("0 done", "1 an error", "2 a wrong option", "3 a bar is not met", "4 not judged", "130 interrupted"):
        assert words in said


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("Expected x."), 2, "Expected x."),
        (TypeError("Expected y."), 2, "Expected y."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), 2, "gone: No such file or directory."),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
        (OSError(errno.ENOSPC, "No space left on device", "a", None, "b"), 1, "b: No space left on device. Correct"),
        (RuntimeError("CUDA error"), 1, "CUDA error"),
        (MemoryError(), 1, "MemoryError. Give a smaller --batch"),
        (ImportError("pip install x"), 1, "pip install x"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (efface.progress.Cancelled("at 1/2"), 130, "Interrupted."),
        (efface.checks.NotJudged("cannot be judged"), 4, "cannot be judged"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_kind_of_error_has_its_exit_code(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_delta(path: Path) -> Any:
        raise error

    monkeypatch.setattr("efface.api.load_delta", load_delta)
    assert words in call("delta", "info", "x", code=code)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efface.api.load_delta", lambda path: {}["bug"])
    assert isinstance(invoke("delta", "info", "x").exception, KeyError)


def test_a_bar_is_met_by_the_worse_end_of_the_interval(run_folder: Path) -> None:
    args = ["score", run_folder, "--metric", "detection"]
    assert invoke(*args).exit_code == 0
    score = next(s for s in efface.Run.open(run_folder).scores()[0] if s.metric == "detection")
    assert score.low < score.high
    inside = (score.low + score.high) / 2
    for bar, code in (
        (f"detection>={score.low - 0.01}", 0),
        (f"detection >= {inside}", 3),
        (f"detection<={score.high + 0.01}", 0),
        (f"detection<={inside}", 3),
        ("removl>=0.5", 4),
        ("detection", 2),
        ("detection>=much", 2),
        ("detection>=nan", 2),
    ):
        done = invoke(*args, "--bar", bar, "--json")
        assert done.exit_code == code, (bar, done.output)
        assert code == 2 or json.loads(done.stdout)["scores"], "the scores are printed all the same"
    assert "Not judged: removl" in invoke(*args, "--bar", "removl>=0.5").stderr


def test_pictures_that_differ_have_an_exit_code(
    tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (efface.Row("cat-0", "a cat", 1_000_000, concept="cat"),)
    suite = efface.Suite("cats", "1", rows, call={"num_inference_steps": 1})
    efface.run(suite, tiny.pipeline("small"), out=tmp_path / "run")
    args = ["verify", tmp_path / "run", "--model", "small", "--redraw", "1"]
    assert "1 of 1 pictures are the same" in call(*args)
    assert small["model"] == "small"
    pictures = tiny.pipeline("small")
    pictures.vae.decoder.conv_out.bias.data += 1
    monkeypatch.setattr("efface.api.load", lambda model, **loading: pictures)
    done = invoke(*args)
    assert done.exit_code == 3 and "pixels differ" in done.stdout and "The pictures differ" in done.stderr


# ---------------------------------------------------------------- options


@pytest.mark.long
def test_every_verb_that_loads_a_model_hands_on_how(tmp_path: Path, small: dict[str, Any]) -> None:
    options = ["--device", "cpu", "--dtype", "fp32", "--variant", "fp16", "--config", "c", "--allow-hub"]
    delta = tmp_path / "cat.safetensors"
    verbs = [
        ["fit", "uce", "--phrase", "cat", "--anchor", "dog", "--out", delta],
        ["erase", "a cat", "--phrase", "cat", "--images", "1", "--steps", "1", "--out", tmp_path / "e"],
        ["delta", "merge", delta, "--out", tmp_path / "m"],
        [
            *("bench", "emoji", "--concept", "cat", "--option", "pictures=10", "--no-score"),
            "--out",
            tmp_path / "b",
            "--limit",
            1,
        ],
        ["verify", tmp_path / "b", "--redraw", "1"],
    ]
    for verb in verbs:
        small.clear()
        call(*verb, "--model", "small", *options)
        assert small == {
            **{"model": "small", "device": "cpu", "dtype": "fp32", "variant": "fp16", "offload": None},
            **{"config": Path("c"), "allow_hub": True, "judges": True},
        }, verb
    assert json.loads((tmp_path / "b/run.json").read_text())["model"]["name"] == "small"
    said = " ".join(invoke("calibrate", "--help").stdout.split())
    assert all(option in said for option in ("--device", "--dtype", "--variant", "--offload", "--allow-hub"))


@pytest.mark.parametrize("allow", [False, True])
def test_models_that_judge_are_downloaded_only_with_allow_hub(
    allow: bool, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def stop(*_: Any, **__: Any) -> None:
        asked.append(_hub.allowed())
        raise ValueError("Stopped.")

    for name in ("runs.score", "thresholds.threshold", "detectors._encoders.encoder"):
        monkeypatch.setattr(f"efface.{name}", stop)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("picture,label\na.png,1\n")
    feedback.Store(str(tmp_path / "store.db")).close()
    monkeypatch.setattr("efface.feedback.Evidence.of", lambda *_: SimpleNamespace(pictures=()))
    verbs = [
        ["score", run_folder],
        ["judge", "threshold", tmp_path / "labels.csv", "--concept", "cat", "--detector", "clip"],
        ["feedback", "reward", tmp_path / "store.db", "--pictures", tmp_path, "--concept", "cat"],
    ]
    verbs[2] += ["--out", tmp_path / "reward.safetensors", "--encoder", "owner/clip"]
    for verb in verbs:
        assert "Stopped." in flat(invoke(*verb, *(["--allow-hub"] if allow else []))), verb
    assert asked == [allow] * 3


@pytest.mark.long
def test_a_bench_takes_guidance_and_its_record_says_it(small: dict[str, Any], tmp_path: Path) -> None:
    args = ["bench", "emoji", "--concept", "cat", "--limit", "1", "--option", "pictures=10", "--no-score"]
    for name, more in (("own", []), ("given", ["--guidance", "2.5"])):
        assert invoke(*args, "--model", "small", "--out", tmp_path / name, *more).exit_code == 0
    found = [
        json.loads((tmp_path / name / "run.json").read_text())["call"]["guidance_scale"] for name in ("own", "given")
    ]
    assert found[0] != found[1] == 2.5
    said = invoke(*args, "--model", "small", "--out", tmp_path / "x", "--guidance", "1", "--method", "sld")
    assert said.exit_code == 2 and "SLD needs guidance, but --guidance is 1. Give a value above 1" in flat(said)


@pytest.mark.long
def test_a_method_that_needs_guidance_is_refused_where_the_model_draws_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("efface.api.load", lambda model, **_: tiny.pipeline("flux"))
    args = ["erase", "a cat", "--concept", "cat", "--method", "sld", "--model", "flux", "--images", "1", "--steps", "1"]
    said = invoke(*args, "--out", tmp_path / "none")
    assert said.exit_code == 2 and not (tmp_path / "none").exists()
    assert "SLD needs guidance, but this model draws without it by default. Give --guidance above 1" in flat(said)
    assert invoke(*args, "--out", tmp_path / "some", "--guidance", "4").exit_code == 0
    record = json.loads((tmp_path / "some/record.json").read_text())
    assert (record["true_cfg_scale"], record["guidance_scale"]) == (4.0, 3.5)


def test_a_fit_takes_a_preset_by_name(small: dict[str, Any], tmp_path: Path) -> None:
    args = ["fit", "esd.paper", "--concept", "cat", "--model", "small", "--set", "steps=1", "--set", "sampler_steps=2"]
    done = invoke(*args, "--out", tmp_path / "a.safetensors", "--json")
    assert done.exit_code == 0, done.output
    made = efface.Delta.load(tmp_path / "a.safetensors").config()
    assert made["method"] == "esd" and made["fields"]["biases"] is True and made["fields"]["steps"] == 1


def test_lists_are_shown_without_torch() -> None:
    script = (
        "import sys; from efface.cli import app; "
        f"[app(['list', each], standalone_mode=False) for each in {[*TABLES]}]; "
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(each in done.stdout for each in ("open_nsfw", "nudenet3_any9_t0.45", "eiup", "true_cfg_scale"))
    assert done.stdout.splitlines()[-1] == "[]"


def test_lists_tell_presets_and_every_room() -> None:
    methods = json.loads(invoke("list", "methods", "--json").stdout)["methods"]
    assert "Presets: sld.weak, " in methods["sld"] and methods["uce"].startswith("UCE: ")
    assert methods.keys() == efface.registry.methods().keys()
    for name, cls in ((n, efface.registry.resolve(n)) for n in efface.registry.methods("erasers")):
        assert efface.registry.preset_names(name, "erasers") == list(efface.registry.presets(cls))
    assert "Presets: esd.paper, esd.code_2025." in methods["esd"]
    without = set()
    for name, cls in ((n, efface.registry.resolve(n)) for n in efface.registry.methods("editors")):
        found = efface.registry.preset_names(name, "editors")
        assert found == list(efface.registry.presets(cls))
        without |= set() if found else {name}
    assert without == {
        "latent_directions",  # the paper's learning rate ruins pictures of the embedded model
        "hfi",  # the paper's settings are not known
        "mace",  # nor are these
        "midsteer",
    }
    assert json.loads(invoke("list", "detectors", "--json").stdout)["detectors"].keys() >= {"eyes", "nudenet", "clip"}
    assert json.loads(invoke("list", "erasers", "--json").stdout).keys() == {"erasers"}
    assert invoke("list", "concepts", "--format", "csv").stdout.startswith("name,about\n")


@pytest.mark.parametrize("how", ["csv", "md", "latex"])
def test_scores_are_printed_as_a_table(how: str, run_folder: Path) -> None:
    said = invoke("report", run_folder, "--format", how).stdout
    assert said == efface.table(run_folder, how)  # type: ignore[arg-type]
    assert "detection" in said and list(run_folder.parent.glob("*.html")) == []
    assert "detection" in invoke("score", run_folder, "--metric", "detection", "--format", how).stdout


# ---------------------------------------------------------------- messages

VERBS_WITH_OUT = [
    ["erase", "a cat", "--concept", "cat"],
    ["fit", "uce", "--concept", "cat"],
    ["delta", "export", GOLDEN / "delta.safetensors"],
    ["delta", "merge", GOLDEN / "delta.safetensors"],
    ["bench", "emoji", "--concept", "cat"],
    ["report", GOLDEN / "run/cat"],
    ["calibrate", "--concept", "cat"],
]


@pytest.mark.parametrize("verb", VERBS_WITH_OUT, ids=lambda verb: " ".join(map(str, verb[:2])))
def test_an_output_path_that_no_record_can_hold_is_refused(verb: list[Any], tmp_path: Path) -> None:
    assert "Expected `--out` to be a path in UTF-8" in call(*verb, "--out", f"{tmp_path}/a\udcff", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS_WITH_OUT, ids=lambda verb: " ".join(map(str, verb[:2])))
def test_overwrite_is_advised_only_where_it_exists(verb: list[Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    out = tmp_path / "out" if verb[0] not in ("fit", "report") and verb[1] != "export" else tmp_path / "out/mine.txt"
    done = invoke(*verb, "--out", out)
    assert done.exit_code == 2
    assert ("--overwrite" in done.stderr) <= ("--overwrite" in invoke(*map(str, verb[:2]), "--help").stdout)
    assert (tmp_path / "out/mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("value", "words"),
    [("[" * 60_000, "a flat value for --set strength"), ("1" * 5_000, "a flat value for --set strength")],
    ids=["deep", "long"],
)
def test_a_value_that_json_cannot_hold_is_refused(value: str, words: str, tmp_path: Path) -> None:
    said = call("erase", "a cat", "--concept", "cat", "--set", f"strength={value}", "--out", tmp_path / "o", code=2)
    assert words in said and len(said) < 300


def test_a_field_that_is_set_twice_is_refused(tmp_path: Path) -> None:
    args = ["erase", "a cat", "--concept", "cat", "--set", "strength=1", "--set", "strength=2", "--out", tmp_path / "o"]
    assert "Expected --set strength once, got it twice" in call(*args, code=2)


@pytest.mark.parametrize("rows", ["[[]]", '[["caat"]]', "5", '"cat"', "{}"])
def test_rows_of_any_shape_end_in_words(rows: str, tmp_path: Path, small: dict[str, Any]) -> None:
    args = ["erase", "a cat", "--phrase", "cat", "--images", "1", "--steps", "1", "--model", "small"]
    done = invoke(*args, "--set", f"rows={rows}", "--out", tmp_path / "o")
    assert isinstance(done.exception, SystemExit | None) and done.exit_code in (0, 2)


def test_a_fit_of_no_steps_ends_in_a_delta_or_in_words(tmp_path: Path, small: dict[str, Any]) -> None:
    done = invoke("fit", "esd", "--phrase", "cat", "--set", "steps=0", "--model", "small", "--out", tmp_path / "d")
    assert isinstance(done.exception, SystemExit | None) and done.exit_code in (0, 2)
    assert done.exit_code == 2 or (tmp_path / "d").exists()


def test_what_a_text_holds_never_steers_the_terminal(tmp_path: Path) -> None:
    said = invoke("erase", "a cat", "--concept", "\x1b[31mred\x07[bold]", "--out", tmp_path / "o")
    assert said.exit_code == 2 and "\x1b" not in said.output and "[bold]" in said.output


def test_no_colours_go_into_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "efface", "list", "nothing"]
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and "\x1b" not in done.stderr + done.stdout


def test_a_full_disk_is_no_traceback(tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    said = call("fit", "uce", "--phrase", "cat", "--model", "small", "--out", tmp_path / "d.safetensors", code=1)
    assert "No space left on device" in said and "was not written" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", ["suites", "metrics"])
def test_what_is_misspelt_is_called_what_it_is(room: str, run_folder: Path, tmp_path: Path) -> None:
    if room == "suites":
        said = call("bench", "emojii", "--concept", "cat", "--out", tmp_path / "b", code=2)
        assert "Unknown suite 'emojii'. Did you mean 'emoji'" in said
    else:
        assert "Unknown metric 'removl'. Did you mean 'removal'?" in call(
            "score", run_folder, "--metric", "removl", code=2
        )


def test_a_misspelt_local_model_contacts_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*args: Any, **options: Any) -> None:
        raise AssertionError(f"a host is looked up: {args}")

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    said = call("erase", "a cat", "--concept", "cat", "--model", "models/typo", "--out", tmp_path / "o", code=2)
    assert "There is no folder 'models/typo'" in said and "--allow-hub" in said
