"""Every verb with generated options and hostile files: no traceback, a documented exit code, nothing lost."""

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
from efface import files, registry, runs
from efface.cli import app
from efface.core import shipped_concepts
from efface.feedback import Ranking, Session, Store, export, pool, write_sheets
from efface.serve.service import initialise

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
    shutil.copytree(GOLDEN / "run/cat", folder / "run")
    shutil.copytree(GOLDEN / "run/base", folder / "base")
    shutil.copy(GOLDEN / "adapter.safetensors", folder)
    for name in ("run", "base"):  # pictures of today have a hash
        lines = [json.loads(line) for line in (folder / name / "samples.jsonl").read_text().splitlines()]
        hashes = [files.sha256((folder / name / line["file"]).read_bytes()) for line in lines]
        made = [json.dumps(line | {"sha256": each}) + "\n" for line, each in zip(lines, hashes, strict=True)]
        (folder / name / "samples.jsonl").write_text("".join(made))
    with Store(folder / "labels.db") as store:
        items = runs.draw_items(store, runs.Run.open(folder / "run"), "cat")
        session = Session(store, items, "cat", "ana", 1)
        session.answer(0, "there")
        export(store, folder / "labels.jsonl")
        write_sheets(session, folder / "sheets")
        write_sheets(Ranking(store, pool(folder / "run"), "cat", "ana", 1), folder / "ranks")
        shown = Session(store, pool(folder / "run"), "cat", "ben", 1, kind="binary")
        shown.answer(0, "yes")
        shown.answer(1, "no")
    (folder / "policies.yaml").write_text("policies: {kids: {erase: [cat]}, press: {unguarded: true}}")
    made, _ = initialise(folder / "service")
    made.policies.add("kids", {"erase": ["cat"]}, "test")
    made.keys.add("kids", "kids")
    made.database.close()
    (folder / "precious.txt").write_text("precious")
    (folder / "mine").mkdir()
    (folder / "mine/precious.txt").write_text("precious")
    (folder / "file").write_text("precious")
    return folder


HOSTILE = ("delta.safetensors", "run/run.json", "run/samples.jsonl", "run/scores.json", "run/card.json")
HOSTILE += ("labels.db", "labels.jsonl", "sheets/sheets.json", "sheets/answers.csv", "ranks/sheets.json")
HOSTILE += ("service/serve.db", "service/pepper", "policies.yaml")
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


# ---------------------------------------------------------------- commands

ODD = (
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
)
ODD += ("true", "\u202e", "é" * 300, "--", "=", "../..", "/dev/null", "[bold]", "%s{}", DEEP)
JUNK = st.sampled_from(ODD) | st.text(max_size=8)
NUMBER = st.sampled_from(["1", "2", "3", "0.5"]) | JUNK
THERE = (
    "delta.safetensors",
    "adapter.safetensors",
    "run",
    "base",
    "model",
    "mine",
    "file",
    "precious.txt",
    "run/run.json",
    "labels.db",
    "labels.jsonl",
    "sheets",
    "ranks",
)
ELSEWHERE = (
    "absent",
    "new",
    "new/deep",
    "file/below",
    "é",
    "x" * 300,
    "run/images",
    ".",
    "run/new.html",
    "mine/new.html",
)
PATHS = st.sampled_from([*THERE, *ELSEWHERE]) | JUNK
FIELDS = (
    "strength",
    "window",
    "rows",
    "neutral",
    "normalization",
    "adapter",
    "warmup",
    "lam",
    "preserve",
    "steps",
    "rounds",
)
FIELDS += (
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
)
SETTINGS = st.builds(
    "{}={}".format,
    st.sampled_from(FIELDS),
    st.sampled_from(["1", "[0,1]", '["cat"]', "[[]]", '[["cat"]]', '{"a":{}}', "1e999", "projected"]) | JUNK,
)
CONCEPT = st.sampled_from(["cat", "alcohol", "nudity", "caat"]) | JUNK
METHOD = st.sampled_from([*registry.methods(), "sld.strong", "eipu", "esd.paper"]) | JUNK
MODEL = st.sampled_from(["model", "mine", "emojii", "nobody/nothing", "delta.safetensors", "file"]) | JUNK
FORMAT = st.sampled_from(["csv", "md", "latex", "xml"])
LOADING: dict[str, Any] = {
    **{"--device": st.sampled_from(["cpu", "cuda:99", "nowhere"]) | JUNK, "--dtype": st.just("fp32") | JUNK},
    **{"--variant": st.just("fp16") | JUNK, "--offload": st.just("model") | JUNK, "--config": PATHS, "--model": MODEL},
}
TARGETS: dict[str, Any] = {
    **{"--concept": CONCEPT, "--phrase": JUNK, "--set": SETTINGS, "--delta": PATHS, "--method": METHOD},
}
DRAW = {"--seed": NUMBER, "--guidance": NUMBER, "--out": PATHS}
TINY = ["--phrase", "cat", "--model", "tiny"]
ESD = [
    "esd",
    *TINY,
    *(word for name in ("steps", "batch", "reuse", "sampler_steps") for word in ("--set", f"{name}=1")),
]
ERASE = ["a red cat", *TINY, "--images", "1", "--steps", "1"]
BENCH = ["emoji", "--concept", "cat", "--model", "tiny", "--option", "pictures=10", "--limit", "1", "--no-score"]
ATTACK = ["best_of_n", "--concept", "cat", "--prompt", "a red cat", "--model", "tiny", "--steps", "1", "--no-control"]
AUDIT = ["tiny", "--base", "tiny", "--concept", "cat", "--option", "pictures=10", "--limit", "1", "--out", "new"]
CALIBRATE = ["--concept", "cat", "--n", "1", "--strength", "1", "--refine", "0", "--steps", "1"]
KINDS = ("binary", "ranking")
# Verb -> commands that end well, or would if the random weights drew cats; and what may be added to them.
VERBS: dict[str, tuple[list[list[str]], dict[str, Any]]] = {
    "erase": (
        [[*ERASE, "--out", "new"], ERASE, [*ERASE, "--method", "sld"], [*ERASE, "--delta", "delta.safetensors"]],
        {**TARGETS, **LOADING, **DRAW, "--images": NUMBER, "--negative": JUNK},
    ),
    "fit": (
        [[*method, "--out", "new"] for method in (["uce", *TINY], ["rece", *TINY, "--set", "rounds=1"], ESD)],
        {
            "--concept": CONCEPT,
            "--anchor": JUNK,
            "--keep": JUNK,
            "--set": SETTINGS,
            "--after": PATHS,
            **DRAW,
            **LOADING,
        },
    ),
    "concept propose": (
        [["alcohol", "--model", "tiny"], ["cat", "--model", "tiny", "--text", "a dog"]],
        {"--phrase": JUNK, "--text": JUNK, "--n": NUMBER, **LOADING},
    ),
    "delta info": ([["delta.safetensors"]], {}),
    "new method": (
        [["soft_block"], ["soft_block", "--out", "new"], ["soft_block", "--repository", "new"]],
        {"--out": PATHS, "--repository": PATHS},
    ),
    "new family": (
        [["trial", "--pipeline", "FluxPipeline", "--repository", "new"], ["trial", "--pipeline", "NoPipeline"]],
        {"--pipeline": JUNK, "--repository": PATHS, "--reads": JUNK},
    ),
    "delta card": ([["delta.safetensors", "--out", "new"]], {"--out": PATHS, "--run": PATHS}),
    "delta export": ([["delta.safetensors", "--out", "new"]], {"--out": PATHS, "--layout": JUNK, "--rank": NUMBER}),
    "delta merge": ([["delta.safetensors", "--model", "tiny", "--out", "new"]], {"--out": PATHS, **LOADING}),
    "bench": (
        [[*BENCH, "--out", "new"], [*BENCH, "--method", "nag", "--out", "new"]],
        {
            **TARGETS,
            **LOADING,
            "--out": PATHS,
            "--option": SETTINGS,
            "--data": PATHS,
            "--base": PATHS,
            "--limit": NUMBER,
            "--guidance": NUMBER,
        }
        | {"--batch": NUMBER, "--judge": SETTINGS, "--bar": JUNK},
    ),
    "studio": (
        [["--concept", "cat", "--model", "tiny"]],
        {**TARGETS, **LOADING, "--port": NUMBER, "--batch": NUMBER},
    ),
    "score": (
        [["run"], ["run", "--metric", "detection", "--bar", "detection<=1"], ["run", "--format", "csv"]],
        {"--metric": JUNK, "--set": SETTINGS, "--bar": JUNK, "--format": FORMAT, "--labels": PATHS},
    ),
    "report": (
        [["run", "--out", "new.html"], ["run", "--format", "latex"]],
        {"--out": PATHS, "--pairs": NUMBER, "--labels": PATHS},
    ),
    "compare": (
        [["run", "run"], ["run", "run", "--metric", "retention"]],
        {"--metric": JUNK, "--labels": PATHS, "--figure": PATHS},
    ),
    "verify": ([["run", "--redraw", "1"]], {"--redraw": NUMBER, "--model": MODEL, "--seed": NUMBER, **TARGETS}),
    "calibrate": (
        [[*CALIBRATE, "--out", "new"]],
        {**TARGETS, **DRAW, "--n": NUMBER, "--target": NUMBER, "--prompt": JUNK},
    ),
    "attack": (
        [
            [*ATTACK, "--out", "new"],
            [*ATTACK, "--base", "--out", "new"],
            ["guidance_sweep", *ATTACK[1:], "--out", "new"],
        ],
        {**TARGETS, **LOADING, **DRAW, "--prompt": JUNK, "--option": SETTINGS, "--budget": NUMBER, "--images": NUMBER}
        | {"--judge": JUNK, "--search": JUNK, "--at-most": NUMBER},
    ),
    "audit": (
        [AUDIT, [*AUDIT, "--at-most", "0.5"], [*AUDIT, "--recognises", "eyes"]],
        {**LOADING, "--concept": CONCEPT, "--phrase": JUNK, "--out": PATHS, "--base": MODEL, "--at-most": NUMBER}
        | {"--delta": PATHS, "--lora": PATHS, "--labels": PATHS, "--suite": JUNK, "--data": PATHS, "--option": SETTINGS}
        | {"--detector": JUNK, "--detector-set": SETTINGS, "--recognises": JUNK, "--recognises-set": SETTINGS}
        | {"--limit": NUMBER, "--batch": NUMBER, "--guidance": NUMBER, "--since": PATHS, "--log": PATHS}
        | {"--attack": JUNK, "--budget": NUMBER},
    ),
    "judge label": (
        [["run", "--concept", "cat", "--annotator", who, "--sheets", "new"] for who in ("ana", "ben")],
        {"--concept": CONCEPT, "--annotator": JUNK, "--store": PATHS, "--pass": NUMBER, "--sheets": PATHS}
        | {"--seed": NUMBER, "--positives": NUMBER, "--near": NUMBER, "--negatives": NUMBER, "--port": NUMBER},
    ),
    "judge threshold": (
        [["sheets/answers.csv", "--concept", "nudity", "--detector", "open_nsfw"]],
        {"--concept": CONCEPT, "--detector": JUNK, "--detector-set": SETTINGS, "--misses": NUMBER, "--seed": NUMBER},
    ),
    "judge read": ([["sheets"]], {"--store": PATHS}),
    "judge agreement": ([["labels.db"]], {}),
    "judge export": ([["labels.db", "--out", "new"]], {"--out": PATHS}),
    "judge import": ([["labels.db", "labels.jsonl"], ["new", "labels.jsonl"]], {}),
    "feedback draw": (
        [["--prompt", "a cat", "--n", "2", "--model", "tiny", "--out", "new"]],
        {**LOADING, **DRAW, "--prompt": JUNK, "--n": NUMBER, "--batch": NUMBER},
    ),
    "feedback collect": (
        [["run", "--concept", "cat", "--annotator", "ana", "--kind", kind, "--sheets", "new"] for kind in KINDS],
        {"--concept": CONCEPT, "--annotator": JUNK, "--store": PATHS, "--pass": NUMBER, "--sheets": PATHS}
        | {"--kind": JUNK, "--seed": NUMBER, "--port": NUMBER},
    ),
    "feedback read": ([["ranks"]], {"--store": PATHS}),
    "feedback agreement": ([["labels.db"]], {}),
    "feedback export": ([["labels.db", "--out", "new"]], {"--out": PATHS}),
    "feedback import": ([["labels.db", "labels.jsonl"]], {}),
    "feedback reward": (
        [["labels.db", "--pictures", "run", "--concept", "cat", "--out", "new"]],
        {"--concept": CONCEPT, "--pictures": PATHS, "--out": PATHS, "--figure": PATHS, "--seed": NUMBER},
    ),
    "serve init": ([["new"]], {"--database": PATHS}),
    "serve run": (
        [["service", "--model", "tiny"]],
        {**LOADING, "--host": JUNK, "--size": JUNK, "--batch": NUMBER} | {"--port": NUMBER, "--deltas": PATHS},
    ),
    "serve ray": (
        [["service", "--model", "tiny", "--size", "64x64"]],
        {**LOADING, "--host": JUNK, "--size": JUNK, "--batch": NUMBER}
        | {"--port": NUMBER, "--cpus": NUMBER, "--deltas": PATHS},
    ),
    "serve audit": ([["service"]], {"--database": PATHS, "--drop-older": NUMBER}),
    "serve key add": (
        [["service", "--tenant", "kids", "--policy", "kids"], ["service", "--tenant", "ops", "--admin"]],
        {"--tenant": JUNK, "--policy": JUNK, "--days": NUMBER, "--database": PATHS}
        | {"--rate": NUMBER, "--burst": NUMBER},
    ),
    "serve key list": ([["service"]], {"--database": PATHS}),
    "serve key revoke": ([["service", "key_x"]], {}),
    "serve policy add": ([["service", "policies.yaml"]], {"--database": PATHS}),
    "serve policy list": ([["service"]], {"--database": PATHS}),
    "list": ([["methods"], ["concepts"], ["editors", "--format", "md"]], {"--format": FORMAT}),
}
FLAGS = ("--json", "--overwrite", "--mixed", "--plot", "--allow-hub", "--bogus")


@st.composite
def commands(draw: Any) -> list[str]:
    """A command that would end well, but for up to three slips."""
    verb = draw(st.sampled_from(list(VERBS)))
    good, options = VERBS[verb]
    argv = [*draw(st.sampled_from(good))]
    for _ in range(draw(st.integers(0, 2))):
        if options and draw(st.integers(0, 3)):
            name = draw(st.sampled_from(list(options)))
            argv += [name, draw(options[name])]
        else:
            values = [k for k, word in enumerate(argv) if not word.startswith("--")]
            argv[draw(st.sampled_from(values))] = draw(PATHS)
    more = [draw(st.sampled_from(FLAGS))] if not draw(st.integers(0, 3)) else []
    return [*verb.split(), *argv, *more]


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
            return copy.deepcopy(pipeline())
        return real(model, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "load", load)
        patch.setattr("efface.serve.cluster.host", lambda host: host.service.database.close() or 0)
        patch.setattr("efface.serve.run.run", lambda service, *_, **__: service.database.close() or 0)
        yield


@functools.cache
def pipeline() -> Any:
    return tiny.pipeline("small")


def allowed(argv: Sequence[str], name: str) -> bool:
    """Whether this command may change a file that was there."""
    if argv[0] == "score":
        return name in ("run/scores.json", "run/card.json")
    if argv[0] in ("judge", "feedback") and name == "labels.db":
        return True  # a store grows
    if argv[0] == "serve" and name == "service/serve.db":
        return True
    if argv[0] == "bench":
        return name.startswith("run/")
    return "--overwrite" in argv and "precious" not in name


def check(argv: list[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        desk = Path(name) / "desk"
        shutil.copytree(good(), desk)
        if data.draw(st.booleans()):
            named = [file for file in HOSTILE if file.partition("/")[0] in argv]
            file = data.draw(st.sampled_from(named or HOSTILE))
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


@pytest.mark.long
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
