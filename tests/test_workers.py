"""Runs on the workers of a Ray cluster: the same pictures to the bit, also when workers are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import ALCOHOL as CONCEPT
from typer.testing import CliRunner

import efface
from efface import EIUP, Row, Suite
from efface.cli import app
from efface.runs import Cluster
from efface.runs.record import model_facts
from efface.runs.workers import RESTARTS, workers

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")

ROWS = tuple(Row(f"row-{k}", f"a cat {k}", 1_000_000 + k, call={"guidance": 3.0} if k % 3 else {}) for k in range(10))
SUITE = Suite("cats", "1", ROWS, call={"num_inference_steps": 2, "height": 16, "width": 16})
ERASER = EIUP(CONCEPT, strength=1.0)
with_ray = pytest.mark.usefixtures("one_thread")  # which starts it


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two workers where there are two CPUs, as Ray counts them here."""
    import ray  # which takes seconds

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sd1"
    tiny.pipeline("sd1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> efface.Run:
    """The run of one process."""
    return efface.run(SUITE, model, eraser=ERASER, out=tmp_path_factory.mktemp("alone") / "run", batch=2)


def drawn(run: efface.Run) -> list[dict[str, Any]]:
    """What there is of a run and of its base: all but the seconds."""
    runs = [run, run.base] if run.base else [run]
    return [{k: v for k, v in entry.items() if k != "seconds"} for each in runs for entry in each.entries()]


@with_ray
@pytest.mark.slow
def test_workers_draw_the_same_to_the_bit(alone: efface.Run, model: Path, tmp_path: Path) -> None:
    run = efface.run(SUITE, model, eraser=ERASER, out=tmp_path / "run", batch=2, ray="local")
    assert run.complete and drawn(run) == drawn(alone)
    assert len({entry["sha256"] for entry in drawn(run)}) == 2 * len(ROWS)  # the eraser acts on every row
    assert {k: v for k, v in run.record.items() if k not in ("sessions", "base")} == {
        k: v for k, v in alone.record.items() if k not in ("sessions", "base")
    }
    assert efface.verify(run, model=model).same


@with_ray
@pytest.mark.long
def test_a_killed_worker_loses_nothing(
    alone: efface.Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        if what == "erased" and done in (2, 6) and len(killed) < 2:
            os.kill(found[0].pids()[len(killed)], signal.SIGKILL)
            killed.append(done)

    from efface.runs import bench

    found: list[Any] = []
    real = bench.workers

    def spied(*args: Any) -> Any:
        import contextlib

        @contextlib.contextmanager
        def manage() -> Iterator[Any]:
            with real(*args) as there:
                found.append(there)
                yield there

        return manage()

    monkeypatch.setattr(bench, "workers", spied)
    run = efface.run(SUITE, model, eraser=ERASER, out=tmp_path / "run", batch=2, ray="local", progress=kill)
    assert len(killed) == 2
    assert run.complete and drawn(run) == drawn(alone)


@with_ray
@pytest.mark.slow
def test_an_unfinished_run_goes_on_with_workers(alone: efface.Run, model: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what == "erased" and done == 4:
            raise Stop

    with pytest.raises(Stop):
        efface.run(SUITE, model, eraser=ERASER, out=tmp_path / "run", batch=2, progress=stop)
    run = efface.run(SUITE, model, eraser=ERASER, out=tmp_path / "run", batch=2, ray=Cluster("local", model))
    assert drawn(run) == drawn(alone)


@with_ray
@pytest.mark.long
def test_a_workers_error_is_the_callers(model: Path, tmp_path: Path) -> None:
    broken = Suite("cats", "1", ROWS, call={"num_inference_steps": 1, "height": 15, "width": 16})
    with pytest.raises(ValueError, match="have to be divisible by 8"):
        efface.run(broken, model, out=tmp_path / "run", ray="local")


@with_ray
@pytest.mark.slow
def test_a_worker_that_always_dies_is_an_error_that_says_what_stayed(model: Path, tmp_path: Path) -> None:
    facts = model_facts(efface.load(model), None)
    with workers(Cluster("local", model), facts) as there:
        actor = there._actors[0]
        with pytest.raises(RuntimeError, match=rf"A worker died {RESTARTS + 1} times .*it continues"):
            there._wait(actor.__ray_call__.remote(lambda self: os._exit(1)))


@with_ray
@pytest.mark.slow
def test_workers_have_the_callers_model(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pipe = tiny.pipeline("sd1")
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if name.endswith("attn2.to_k.weight"):
                weight.add_(1.0)
    pipe.save_pretrained(other)
    with pytest.raises(ValueError, match=r"A worker has another model than the caller\. It differs in\n  text_hash"):
        efface.run(SUITE, model, out=tmp_path / "run", ray=Cluster("local", other))


@with_ray
@pytest.mark.long
def test_workers_need_a_model_by_name(sd1: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a model by name for `ray`, got a StableDiffusionPipeline"):
        efface.run(SUITE, sd1, out=tmp_path / "run", ray="local")
    assert not (tmp_path / "run").exists()


def test_ray_is_not_imported_where_it_is_not_used() -> None:
    code = "import sys, efface.runs, efface.api, efface.cli; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@with_ray
@pytest.mark.slow
def test_a_bench_by_command_draws_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.pipeline("small").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    args = ["bench", "emoji", "--concept", "cat", "--model", "model", "--dtype", "fp32", "--limit", "3", "--batch", "2"]
    args += ["--option", "pictures=10", "--no-score"]
    done = CliRunner().invoke(app, [*args, "--out", "here/run"])
    assert done.exit_code == 0, done.output
    command = [sys.executable, "-m", "efface", *args, "--out", "there/run", "--ray", "local"]  # starts Ray itself
    fresh = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert fresh.returncode == 0, fresh.stderr
    assert drawn(efface.Run.open("there/run")) == drawn(efface.Run.open("here/run"))
    refused = CliRunner().invoke(app, [*args, "--out", "x", "--ray", " "])
    assert refused.exit_code == 2 and "--ray" in refused.output


def test_a_command_without_ray_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.pipeline("small").save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "ray", None)
    args = ["bench", "emoji", "--concept", "cat", "--model", str(tmp_path / "model"), "--no-score", "--ray", "local"]
    done = CliRunner().invoke(app, [*args, "--limit", "1", "--out", str(tmp_path / "run")])
    assert done.exit_code == 1 and 'pip install "efface[ray]"' in done.output
