"""The service on Ray Serve: its pieces without a cluster, and one cluster of which a replica is killed under load."""

from __future__ import annotations

import ast
import asyncio
import collections
import concurrent.futures
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx2
import pytest
from test_serve import LIMITS, URL, Desk, Stub, _until, quiet
from test_serve_faults import accept, state

import efface
from efface import _ray
from efface.serve import cluster
from efface.serve.backend import Drawn, OnPartial, Row
from efface.serve.cluster import Application, Drawer, Host, Hosting, deployments
from efface.serve.service import Limits

__all__ = ["quiet"]
ROOT = Path(efface.__file__).parent


def stub(hosting: Hosting) -> Stub:
    return Stub()


def hosting(desk: Desk, **more: Any) -> Hosting:
    folder = str(Path(str(desk.service.database.name)).parent)
    facts: dict[str, Any] = {"limits": LIMITS, "backend": stub, **more}
    return Hosting(folder, "none", Stub.sizes, Stub.name, **facts)


# ---------------------------------------------------------------- pieces


def test_only_one_file_of_the_service_imports_ray() -> None:
    found = set()
    for path in [*(ROOT / "serve").rglob("*.py"), *(ROOT / "guard").glob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.partition(".")[0] == "ray" for name in names):
                found.add(path.name)
    assert found == {"cluster.py"}


class _Serve:
    """Takes down what is asked of Ray Serve. It has no `batch` and no `multiplexed`."""

    def __init__(self) -> None:
        self.asked: dict[str, dict[str, Any]] = {}

    def deployment(self, name: str, **options: Any) -> Callable[[Any], Any]:
        self.asked[name] = options
        return lambda cls: SimpleNamespace(bind=lambda *given: (cls, given))

    def ingress(self, build: Any) -> Callable[[Any], Any]:
        self.build = build
        return lambda cls: cls


def test_ray_serve_is_asked_for_no_queue_batch_or_time_out_of_its_own(quiet: Desk) -> None:
    serve, limits = _Serve(), Limits(drain=40.0)
    made = hosting(quiet, limits=limits, workers=3, apis=2, gpus=1.0)
    cls, (flag, drawers) = deployments(serve, made, "flag")
    assert (cls, flag, drawers) == (Application, "flag", (Drawer, (made,)))
    drawer, application = serve.asked["drawer"], serve.asked["application"]
    assert (drawer["num_replicas"], application["num_replicas"]) == (3, 2)
    assert drawer["ray_actor_options"]["num_gpus"] == 1.0 and "num_gpus" not in application["ray_actor_options"]
    assert drawer["graceful_shutdown_timeout_s"] > limits.drain  # the batch is finished
    assert application["max_ongoing_requests"] >= limits.tenant  # our queue says 429, with a delay that it computes
    assert not any("autoscaling" in option for each in serve.asked.values() for option in each)
    built = serve.build()
    assert built.state.service.model == Stub.name
    built.state.service.database.close()


def test_a_drawing_replica_draws_and_ends_after_its_batch(quiet: Desk) -> None:
    drawer = Drawer(hosting(quiet))
    _until(drawer.ready)
    drawer.check_health()
    name = accept(quiet)
    _until(lambda: state(quiet, name) == "done")
    drawer.__del__()
    assert not drawer.worker.is_alive() and not drawer.ready()
    with pytest.raises(RuntimeError, match="ended or stalls"):
        drawer.check_health()
    later = accept(quiet)
    time.sleep(0.1)
    assert state(quiet, later) == "queued"
    drawer.service.database.close()


@pytest.mark.long
def test_the_application_follows_the_drawing_replicas_and_the_shutdown(
    quiet: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RayError(Exception):
        pass

    for name, errors in {"ray.exceptions": ["RayError"], "ray.serve.exceptions": ["RayServeException"]}.items():
        module: Any = ModuleType(name)
        for error in errors:
            setattr(module, error, RayError)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(cluster, "POLL", 0.02)
    answers: dict[str, Any] = {"ready": True, "raised": False}

    def handle(name: str) -> Any:
        async def remote() -> bool:
            if answers[name] is None:
                await asyncio.sleep(60)
            if answers[name] == "dead":
                raise RayError
            return bool(answers[name])

        return SimpleNamespace(**{name: SimpleNamespace(remote=remote)})

    service = quiet.service

    async def main() -> None:
        task = asyncio.create_task(Application(handle("raised"), handle("ready")).watch(service))
        for answer in (True, "dead", True, None, True, False):
            answers["ready"] = answer
            await asyncio.sleep(0.3)
            assert service.warm.is_set() == (answer is True), answer
            assert not service.draining.is_set()
        answers["raised"] = True
        await asyncio.sleep(0.3)
        assert service.draining.is_set()
        task.cancel()

    asyncio.run(main())


def test_what_cannot_be_hosted_is_refused_before_ray_starts(quiet: Desk) -> None:
    with pytest.raises(ValueError, match="at least one size"):
        Hosting("service", "none", (), "stub")
    for name in ("workers", "apis"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            hosting(quiet, **{name: 0})
    with pytest.raises(ValueError, match="PostgreSQL"):
        Host(hosting(quiet), "auto")
    with pytest.raises(ValueError, match="--everywhere"):
        Host(hosting(quiet), host="0.0.0.0")
    made, everywhere = Host(hosting(quiet)), Host(hosting(quiet), everywhere=True, host="0.0.0.0")
    assert made._http["request_timeout_s"] is None  # a time-out of Ray's is a 408, which clients repeat
    assert (made._http["host"], made._place, everywhere._place) == ("127.0.0.1", "HeadOnly", "EveryNode")
    for each in (made, everywhere):
        assert each.hosting.near
        each.service.database.close()
    assert "secret" not in repr(hosting(quiet, database="postgresql://u:secret@h/x"))


def test_a_cluster_of_this_machine_requires_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for local, mode in ((True, "token"), (False, None)):
        found: dict[str, str] = {}
        monkeypatch.setattr(_ray, "os", SimpleNamespace(environ=found))
        monkeypatch.setattr(_ray, "sys", SimpleNamespace(modules={}))  # as in a new process
        monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
        _ray.imported(local, "This test", "ray-serve")
        assert found.get("RAY_AUTH_MODE") == mode and found["RAY_USAGE_STATS_ENABLED"] == "0"


def test_replicas_of_one_machine_share_no_port_for_metrics(quiet: Desk) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        service = hosting(quiet, metrics=first).service()
        assert b"efface_queue_jobs" in httpx2.get(f"http://127.0.0.1:{first + 1}/metrics").content
    service.database.close()


def test_a_port_beyond_this_machine_would_be_seen() -> None:
    with socket.socket() as near, socket.socket() as beyond:
        for each, address in ((near, "127.0.0.1"), (beyond, "")):
            each.bind((address, 0))
            each.listen()
        assert f"0100007F:{near.getsockname()[1]}" in _listening(os.getpid(), near=True)
        assert f"00000000:{beyond.getsockname()[1]}" in _listening(os.getpid(), near=False)


# ---------------------------------------------------------------- a cluster


class Slow(Stub):
    """Draws slowly, and leaves its process id in a folder."""

    folder = Path()

    def draw(
        self, rows: Sequence[Row], call: Mapping[str, Any], on_step: Callable[[int], None], on_partial: OnPartial
    ) -> list[Drawn]:
        (self.folder / str(os.getpid())).touch()
        for _ in range(10):
            time.sleep(0.05)
            on_step(1)
        return super().draw(rows, call, on_step, on_partial)


def slow(hosting: Hosting) -> Stub:
    made = Slow()
    made.folder = Path(hosting.folder).parent / "drawing"
    return made


@pytest.fixture
def host(quiet: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    pytest.importorskip("grpc", reason="Ray Serve is not installed")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    monkeypatch.setenv("PYTHONPATH", path)
    (tmp_path / "drawing").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = Limits(rows=2, lease=2.0, drain=15.0)
    made = Host(hosting(quiet, limits=limits, workers=2, cpus=0.2, backend=slow), port=port)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.mark.slow
def test_a_killed_replica_loses_no_job_and_doubles_none(host: Host, quiet: Desk, tmp_path: Path) -> None:
    """40 requests, two drawing replicas, one of them killed: 40 answers, and each job ends once."""
    url = f"http://127.0.0.1:{host._http['port']}"
    _until(lambda: httpx2.get(f"{url}/readyz", timeout=10).status_code == 200, 60)
    head = quiet.head("press", serve_multiplexed_model_id="other", **{"serve-multiplexed-model-id": "other"})
    asked = [{"prompt": f"cat {k}", "steps": 1, "seed": k} for k in range(40)]
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        made = [pool.submit(httpx2.post, url + URL, json=each, headers=head, timeout=120) for each in asked]
        _until(lambda: len(list((tmp_path / "drawing").iterdir())) == 2, 60)
        victim = int(next((tmp_path / "drawing").iterdir()).name)
        os.kill(victim, signal.SIGKILL)
        answers = [each.result() for each in made]
    print(f"\n40 requests, one replica killed: {time.monotonic() - began:.1f} s")
    assert [answer.status_code for answer in answers] == [200] * 40
    names = [answer.json()["efface"]["job"] for answer in answers]
    finished = collections.Counter(
        entry["job"] for entry in quiet.service.audit.entries() if entry["kind"] == "job finished"
    )
    assert finished == collections.Counter(names) and len(set(names)) == 40
    assert all(len(quiet.service.jobs.pictures(name)) == 1 for name in names)
    with quiet.service.database.reading() as connection:
        attempts = connection.exec_driver_sql("SELECT max(attempts) FROM jobs").scalar()
    assert attempts == 2  # the effect: the killed replica held jobs
    assert quiet.service.audit.verify()[1] == ""
    _until(lambda: len(list((tmp_path / "drawing").iterdir())) == 3 or bool(_more(url, head)), 60)  # Ray restarts it
    assert _listening(os.getpid(), near=True) and not _listening(os.getpid(), near=False)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        last = pool.submit(httpx2.post, url + URL, json=asked[0], headers=head, timeout=60)
        _until(lambda: quiet.service.jobs.count(["running"]) == 1)
        draining = threading.Thread(target=host.drain)
        draining.start()
        assert last.result().status_code == 200
        _until(lambda: httpx2.get(f"{url}/readyz", timeout=10).json()["draining"])
        late = httpx2.post(url + URL, json=asked[0], headers=head, timeout=10)
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        draining.join()


def _more(url: str, head: dict[str, str]) -> None:
    """Gives all drawing replicas work, so that a new one shows itself."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: httpx2.post(url + URL, json={"prompt": "x"}, headers=head, timeout=60), range(4)))


def _listening(root: int, near: bool) -> set[str]:
    """The TCP ports on loopback addresses, or on others, on which a process and its descendants listen (Linux)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text("utf-8").rpartition(")")[2].split()[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    mine = set()
    for pid in family:
        for each in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                mine.add(os.readlink(each))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text("ascii").splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            address, _, port = local.partition(":")
            loopback = address.endswith("7F") or address == "0" * 24 + "01000000"  # the last octet group, reversed
            if state == "0A" and f"socket:[{rest[5]}]" in mine and loopback == near:
                found.add(f"{address}:{int(port, 16)}")
    return found
