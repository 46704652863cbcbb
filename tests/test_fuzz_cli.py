"""Every verb with generated options and hostile files: no traceback, a documented exit code, nothing of the user's lost."""

import copy
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import efface
from efface import registry
from efface.cli import app
from efface.core import shipped_concepts

GOLDEN = Path(__file__).parent / "pins/files"
CODES = {0, 1, 2, 3, 4, 130}
DEEP = "[" * 50_000
QUICK = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    derandomize=True,
    print_blob=False,
)


# ---------------------------------------------------------------- a desk with files, good and hostile


@functools.cache
def good() -> Path:
    """A folder that is made once: a run of the tiny model, scored, a delta and a saved model."""
    folder = Path(tempfile.mkdtemp())
    pipe = tiny.pipeline("small")
    efface.UCE().fit(pipe, [efface.Concept("cat", anchor="dog")]).save(folder / "delta.safetensors")
    pipe.save_pretrained(folder / "model")
    for name in ("run", "adapter.safetensors"):
        source = GOLDEN / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    (folder / "precious.txt").write_text("precious")
    (folder / "mine").mkdir()
    (folder / "mine/precious.txt").write_text("precious")
    (folder / "file").write_text("precious")
    return folder


HOSTILE = ("delta.safetensors", "run/run.json", "run/samples.jsonl", "run/scores.json", "run/card.json")
HOSTILE += ("model/model_index.json", "model/unet/config.json", "adapter.safetensors")


def mutate(file: Path, how: str, data: st.DataObject) -> None:
    """Makes a good file a bad one."""
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif how == "flipped":
        k = data.draw(st.integers(0, max(len(content) - 1, 0)))
        file.write_bytes(content[:k] + bytes([content[k] ^ data.draw(st.integers(1, 255))]) + content[k + 1 :])
    elif how == "random":
        file.write_bytes(data.draw(st.binary(max_size=64)))
    elif how == "deep":
        file.write_text(DEEP)
    elif how == "gone":
        file.unlink()
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif how == "loop":
        file.unlink()
        file.symlink_to(file.name)
    elif how == "json" and file.suffix in (".json", ".jsonl"):
        lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
        k = data.draw(st.integers(0, len(lines) - 1))
        lines[k] = json.dumps(changed(json.loads(lines[k]), data))
        file.write_text("\n".join(lines) + "\n")


def changed(value: Any, data: st.DataObject) -> Any:
    """A JSON value in which one entry is gone, or is something else."""
    junk = st.sampled_from([None, -1, 10**400, 0.5, True, "", "../x", "a\0b", [], {}, [[]], {"x": {}}])
    if isinstance(value, dict) and value and data.draw(st.integers(0, 5)):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.booleans()):
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 5)):
        k = data.draw(st.integers(0, len(value) - 1))
        return [*value[:k], changed(value[k], data), *value[k + 1 :]]
    return data.draw(junk)


# ---------------------------------------------------------------- options

JUNK = st.sampled_from(
    [
        "",
        " ",
        "x",
        "-1",
        "0",
        "nan",
        "inf",
        "1e400",
        "9" * 5000,
        "\x1b[31m",
        "a\0b",
        "\udcff",
        "[]",
        "[[]]",
        "{}",
        "null",
    ]
    + ["true", "\u202e", "é" * 300, "--", "=", "../..", "/dev/null", "[bold]", "%s{}"]
) | st.text(max_size=8)
NUMBER = st.sampled_from(["1", "2", "3", "0.5"]) | JUNK
PATHS = st.sampled_from(
    [
        "delta.safetensors",
        "adapter.safetensors",
        "run",
        "model",
        "mine",
        "file",
        "absent",
        "run/run.json",
        "x\udcff",
        "a\0b",
    ]
    + ["new", "new/deep", "file/below", "é", "x" * 300, "precious.txt", "run/images", ".", "", "-"]
)
CONCEPTS = st.sampled_from(["cat", "alcohol", "nudity", "caat"]) | JUNK
SETTINGS = st.builds(
    lambda name, value: f"{name}={value}",
    st.sampled_from(
        ["strength", "window", "rows", "neutral", "normalization", "adapter", "warmup", "lam", "preserve", "steps"]
        + [
            "template",
            "validation",
            "concepts",
            "removal.by",
            "by",
            "retention.kinds",
            "pictures",
            "first_seed",
            "",
            "x",
        ]
    ),
    st.sampled_from(["1", "0", "[0,1]", '["cat"]', "[[]]", '[["cat"]]', DEEP, '{"a":{}}', "1e999", "projected"]) | JUNK,
)
LOADING: dict[str, Any] = {
    "--device": st.sampled_from(["cpu", "cuda:99", "nowhere"]) | JUNK,
    "--dtype": st.sampled_from(["fp32", "fp64x"]) | JUNK,
    "--variant": st.sampled_from(["fp16"]) | JUNK,
    "--offload": st.sampled_from(["model", "x"]),
    "--config": PATHS,
}
TARGETS: dict[str, Any] = {
    "--concept": CONCEPTS,
    "--phrase": st.sampled_from(["cat", "a red dog", "unheard"]) | JUNK,
    "--set": SETTINGS,
    "--delta": PATHS,
    "--method": st.sampled_from([*registry.methods("erasers"), "sld.strong", "uce", "eipu"]) | JUNK,
}
MODEL = st.sampled_from(
    ["tiny", "tiny", "tiny", "model", "mine", "emojii", "nobody/nothing", "delta.safetensors", "file"]
)
FLAGS = st.lists(st.sampled_from(["--json", "--overwrite", "--mixed", "--no-score", "--plot", "--bogus"]), max_size=2)
VERBS: dict[str, tuple[Sequence[Any], dict[str, Any]]] = {
    "erase": (
        [st.sampled_from(["a cat", "a red dog"]) | JUNK],
        {**TARGETS, **LOADING, "--model": MODEL, "--images": NUMBER, "--seed": NUMBER, "--guidance": NUMBER}
        | {"--negative": JUNK, "--out": PATHS},
    ),
    "fit": (
        [st.sampled_from([*registry.methods("editors"), "eiup", "x"])],
        {"--out": PATHS, "--concept": CONCEPTS, "--phrase": st.just("cat"), "--anchor": JUNK, "--keep": JUNK}
        | {"--set": SETTINGS, "--after": PATHS, "--seed": NUMBER, "--model": MODEL, **LOADING},
    ),
    "delta info": ([PATHS], {}),
    "delta export": (
        [PATHS],
        {"--out": PATHS, "--layout": st.sampled_from(["kohya", "diffusers"]) | JUNK, "--rank": NUMBER},
    ),
    "delta merge": ([PATHS, PATHS], {"--out": PATHS, "--model": MODEL, **LOADING}),
    "bench": (
        [st.sampled_from([*registry.methods("suites"), "emojii"]) | JUNK],
        {**TARGETS, "--out": PATHS, "--option": SETTINGS, "--data": PATHS, "--base": PATHS, "--limit": NUMBER}
        | {"--batch": NUMBER, "--judge": SETTINGS, "--bar": JUNK, "--model": MODEL},
    ),
    "score": (
        [PATHS],
        {"--metric": st.sampled_from([*registry.methods("metrics"), "removl"]) | JUNK, "--set": SETTINGS}
        | {"--bar": st.sampled_from(["removal.absolute>=0.9", "x>=1", "removal.absolute>=x"]) | JUNK}
        | {"--format": st.sampled_from(["csv", "md", "latex", "xml"])},
    ),
    "report": (
        [PATHS],
        {"--out": PATHS, "--pairs": NUMBER, "--format": st.sampled_from(["csv", "md", "latex", "xml"])},
    ),
    "verify": ([PATHS], {"--redraw": NUMBER, "--model": MODEL, "--seed": NUMBER}),
    "calibrate": (
        [],
        {"--concept": CONCEPTS, "--method": TARGETS["--method"], "--set": SETTINGS, "--n": NUMBER, "--out": PATHS}
        | {"--strength": NUMBER, "--target": NUMBER, "--seed": NUMBER, "--prompt": JUNK, "--guidance": NUMBER},
    ),
    "list": ([st.sampled_from(["methods", "concepts", "models", "editors", "x"]) | JUNK], {}),
}
FIXED: dict[str, list[str]] = {
    "erase": ["--steps", "1", "--images", "1"],
    "fit": ["--set", "steps=0"],
    "bench": ["--limit", "1"],
    "calibrate": ["--steps", "1", "--n", "1", "--refine", "0"],
}


@st.composite
def commands(draw: Any) -> list[str]:
    verb = draw(st.sampled_from(list(VERBS)))
    positional, options = VERBS[verb]
    argv = [*verb.split(), *(draw(each) for each in positional), *FIXED.get(verb, [])]
    needed = [name for name in ("--out", "--concept") if name in options and draw(st.integers(0, 5))]
    model = ["--model"] if "--model" in options else []
    more = draw(st.lists(st.sampled_from(list(options)), max_size=3)) if options else []
    for name in dict.fromkeys([*needed, *model, *more]):
        argv += [name, draw(options[name])]
    return argv + draw(FLAGS)


# ---------------------------------------------------------------- what must hold


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@contextmanager
def stubs() -> Iterator[None]:
    """The model "tiny" is a tiny pipeline; what draws for "emoji" is one too."""
    from efface import api

    real: Callable[..., Any] = api.load

    def load(model: Any, **options: Any) -> Any:
        if str(model) in ("tiny", "emoji"):
            real_options = {k: v for k, v in options.items() if k in ("dtype", "device") and v is not None}
            if real_options:
                real("emoji-none", **real_options)
            return copy.deepcopy(pipeline())
        return real(model, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "load", load)
        yield


@functools.cache
def pipeline() -> Any:
    return tiny.pipeline("small")


def allowed(argv: Sequence[str], name: str) -> bool:
    """Whether this command may change a file that was there."""
    if argv[0] == "score":
        return name in ("run/scores.json", "run/card.json")
    if argv[0] == "bench":
        return name.startswith("run/")
    return "--overwrite" in argv and "precious" not in name


def check(argv: list[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        desk = Path(name) / "desk"
        shutil.copytree(good(), desk)
        if data.draw(st.booleans()):
            file = data.draw(st.sampled_from(HOSTILE))
            how = data.draw(
                st.sampled_from(["cut", "flipped", "random", "deep", "gone", "folder", "pipe", "loop", "json", "json"])
            )
            note(f"{file} is {how}")
            mutate(desk / file, how, data)
        before, here = contents(desk), os.getcwd()
        os.chdir(desk)
        try:
            with stubs():
                done = CliRunner().invoke(app, argv)
        finally:
            os.chdir(here)
        note(f"{argv!r}: {done.exit_code}\n{done.output[-2000:]}")
        crash = None if isinstance(done.exception, SystemExit) else done.exception
        if crash is not None:
            raise AssertionError(f"{argv!r} ends in {crash!r}") from crash
        assert done.exit_code in CODES
        assert "Traceback" not in done.output and "\x1b" not in done.output
        assert done.exit_code == 0 or done.stderr.strip(), "an error says what is wrong"
        after = contents(desk)
        lost = [name for name in before if after.get(name) != before[name] and not allowed(argv, name)]
        assert not lost, f"{argv!r} changed {lost}"
        assert not [name for name in after if name.endswith((".partial", ".writable"))]


@settings(QUICK, max_examples=150)
@given(commands(), st.data())
def test_no_command_ends_in_a_traceback_or_loses_a_file(argv: list[str], data: st.DataObject) -> None:
    torch.set_num_threads(1)
    check(argv, data)


@pytest.mark.slow
@settings(QUICK, max_examples=2_000, derandomize=False)
@given(commands(), st.data())
def test_no_command_of_many_ends_in_a_traceback_or_loses_a_file(argv: list[str], data: st.DataObject) -> None:
    check(argv, data)


def test_the_generator_knows_every_verb() -> None:
    from typer.main import get_command

    def verbs(command: Any, path: str = "") -> Iterator[str]:
        for name, each in command.commands.items():
            if hasattr(each, "commands"):
                yield from verbs(each, f"{path}{name} ")
            else:
                yield f"{path}{name}"

    assert set(verbs(get_command(app))) == VERBS.keys()
    assert "cat" in shipped_concepts()
