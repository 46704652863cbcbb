"""Ray Serve hosts the same application and the same workers on several GPUs or machines.

The application's replicas answer requests, and each drawing replica has one worker, which takes whole batches from the
database. So a replica that dies loses no job, and Ray sees neither prompts nor pictures of other replicas. Only this
file imports Ray, when it starts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import start_http_server

from .. import _ray, checks
from .._hub import allowing
from .app import create_app
from .backend import Backend, PipelineBackend, check_deltas
from .database import Unavailable
from .jobs import LIVE
from .log import named, told
from .run import check_host
from .service import Limits, Service, opened
from .worker import Worker

NAME = "efface"
OPEN = 2_000
"""Open requests of a replica of the application."""
POLL = 1.0
PORTS = 100


def load_backend(hosting: Hosting) -> Backend:
    """The model of a drawing replica."""
    from .. import api

    pipe = api.load(hosting.model, **hosting.loading)
    pipe.set_progress_bar_config(disable=True)
    return PipelineBackend(pipe, hosting.name, hosting.sizes, hosting.deltas)


@dataclasses.dataclass(frozen=True)
class Hosting:
    """What every replica is made from.

    Args:
        folder: the folder of the service, which each machine has at this path.
        model: what `efface.load` takes, with the same meaning on each machine.
        sizes: the sizes that are drawn; the first is the default.
        name: the name of the model in requests.
        database: a URL. None: the SQLite file in the folder, for one machine.
        loading: further arguments of `efface.load`.
        limits: the bounds of the service.
        workers: drawing replicas.
        apis: replicas of the application.
        cpus: CPUs that Ray counts for each drawing replica.
        gpus: GPUs of each drawing replica.
        metrics: the first port that replicas try for their metrics. None: no metrics.
        deltas: the folder of the deltas that policies name, which each machine has at this path.
        near: whether replicas listen on loopback addresses only. `Host` sets it.
        backend: what makes the backend of a drawing replica.

    Raises:
        ValueError: a number is out of range, or no size is given.
    """

    folder: str
    model: str
    sizes: Sequence[tuple[int, int]]
    name: str
    database: str | None = dataclasses.field(default=None, repr=False)
    loading: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limits: Limits = dataclasses.field(default_factory=Limits)
    workers: int = 1
    apis: int = 1
    cpus: float = 0.5
    gpus: float = 0.0
    metrics: int | None = None
    deltas: str | None = None
    near: bool = False
    backend: Callable[[Hosting], Backend] = load_backend

    def __post_init__(self) -> None:
        checks.whole("workers", self.workers)
        checks.whole("apis", self.apis)
        checks.number("cpus", self.cpus, 0)
        checks.number("gpus", self.gpus, 0)
        if not self.sizes:
            raise ValueError("Expected at least one size, because replicas of the application load no model, got none.")

    def service(self) -> Service:
        """The service as a replica opens it."""
        if self.near:
            _stay_near()
        made = opened(Path(self.folder), self.database, limits=self.limits, model=self.name, sizes=self.sizes)
        if self.metrics is not None:
            _measured(made, self.metrics)
        return made


def _stay_near() -> None:
    """Binds the server for other replicas, which Ray Serve starts next, to a loopback address. Ray takes all addresses.

    Raises:
        RuntimeError: this version of Ray Serve starts that server in another way.
    """
    replica: Any = importlib.import_module("ray.serve._private.replica")
    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is None:
        raise RuntimeError(
            "This version of Ray Serve cannot be kept on loopback addresses. Install ray 2.60, or start a cluster and "
            "give its address."
        )
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


def _measured(service: Service, first: int) -> None:
    """Serves the metrics of a replica on the first free port, because a machine may have several replicas."""
    for port in range(first, first + PORTS):
        try:
            start_http_server(port, "127.0.0.1", registry=service.metrics.registry)
        except OSError:
            continue
        told("metrics", port=port)
        return
    told("no port for metrics", first=first)


class Drawer:
    """A replica that draws: one worker with its model.

    Args:
        hosting: what it is made from.
    """

    def __init__(self, hosting: Hosting) -> None:
        self.service = hosting.service()
        with allowing(bool(hosting.loading.get("allow_hub"))):
            backend = hosting.backend(hosting)
            check_deltas(self.service, backend)
            self.worker = Worker(self.service, backend)
        self.worker.start()

    def ready(self) -> bool:
        """Whether it draws. It answers while it draws, because the worker is a thread."""
        return self.worker.is_alive() and self.service.warm.is_set() and not self.service.stalled.is_set()

    def check_health(self) -> None:
        """Raises RuntimeError if the worker ended or stalls, so that Ray starts the replica again."""
        if not self.worker.is_alive() or self.service.stalled.is_set():
            raise RuntimeError("The worker ended or stalls.")

    def __del__(self) -> None:
        """Ends after the present batch, when Ray stops the replica."""
        if worker := getattr(self, "worker", None):
            worker.stop()
            worker.join(self.service.limits.drain)


class Flag:
    """Says to all replicas that the service shuts down."""

    def __init__(self) -> None:
        self._set = False

    def raise_(self) -> None:
        self._set = True

    def raised(self) -> bool:
        return self._set


class Application:
    """A replica of the application. Its routes are those of `create_app`.

    Args:
        flag: a handle of a `Flag`.
        drawers: a handle of the drawing replicas.
    """

    app: Any
    """Ray Serve sets it."""

    def __init__(self, flag: Any, drawers: Any) -> None:
        self._flag, self._drawers = flag, drawers
        self._task: asyncio.Task[None] | None = None

    async def reconfigure(self, _: Any) -> None:
        """Called once the application is built."""
        if self._task is None:
            self._task = asyncio.create_task(self.watch(self.app.state.service))

    async def watch(self, service: Service) -> None:
        """Follows whether a replica draws and whether the service shuts down."""
        while True:
            if await self._asked(lambda: self._drawers.ready.remote()):
                service.warm.set()
            else:
                service.warm.clear()
            if await self._asked(lambda: self._flag.raised.remote()):
                service.draining.set()
            await asyncio.sleep(POLL)

    async def _asked(self, ask: Callable[[], Any]) -> bool:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            return bool(await asyncio.wait_for(ask(), 5 * POLL))
        except (RayError, RayServeException, TimeoutError):
            return False


def deployments(serve: Any, hosting: Hosting, flag: Any) -> Any:
    """The application of Ray Serve: no `@serve.batch`, no `@serve.multiplexed`, no autoscaling, no time-out of Ray's.

    The queue, the batches and the deadlines are the service's own.

    Args:
        serve: the module `ray.serve`.
        hosting: what replicas are made from.
        flag: a handle of a `Flag`.
    """
    limits, health = hosting.limits, {"health_check_period_s": 5.0, "health_check_timeout_s": 30.0}
    drawer = serve.deployment(
        name="drawer", num_replicas=hosting.workers, max_ongoing_requests=100,
        graceful_shutdown_timeout_s=limits.drain + 10.0, **health,
        ray_actor_options={"num_cpus": hosting.cpus, "num_gpus": hosting.gpus},
    )(Drawer)  # fmt: skip

    def build() -> Any:
        return create_app(hosting.service())

    application = serve.deployment(
        name="application", num_replicas=hosting.apis, max_ongoing_requests=OPEN, max_queued_requests=OPEN,
        graceful_shutdown_timeout_s=10.0, user_config={}, **health, ray_actor_options={"num_cpus": 0.1},
    )(serve.ingress(build)(Application))  # fmt: skip
    return application.bind(flag, drawer.bind(hosting))


class Host:
    """Starts the service on a cluster, and drains and stops it.

    Args:
        hosting: what replicas are made from.
        address: "local" to start a cluster on this machine, which requires a token and whose own ports are on
            loopback addresses; or the address of a cluster, such as "auto".
        host: the address on which the API listens.
        port: its port.
        everywhere: allows an address beyond this machine, and listens on every machine.

    Raises:
        ValueError: the address is beyond this machine without `everywhere`, or several machines would share an SQLite
            file.
    """

    def __init__(
        self, hosting: Hosting, address: str = "local", host: str = "127.0.0.1", port: int = 8000,
        everywhere: bool = False,
    ) -> None:  # fmt: skip
        check_host(host, everywhere)
        self.hosting = dataclasses.replace(hosting, near=address == "local")
        self.service = dataclasses.replace(hosting, metrics=None).service()
        if address != "local" and self.service.database.sqlite:
            self.service.database.close()
            cure = "Give --database postgresql+psycopg://..., which all machines reach."
            raise ValueError(checks.refusal("a PostgreSQL database for a cluster", "SQLite", cure))
        self._address, self._ours = address, False
        self._ray: Any = None
        self._serve: Any = None
        self._http = {"host": host, "port": port, "request_timeout_s": None}
        self._place = "EveryNode" if everywhere else "HeadOnly"

    def start(self) -> None:
        """Starts all replicas, and returns when they are ready. Raises ImportError if Ray Serve is not installed."""
        self._ray = _ray.imported(self._address == "local", "Hosting on a cluster", "ray-serve")
        try:
            from ray import serve
        except ImportError as error:
            raise ImportError('Hosting needs Ray Serve. Install it with pip install "efface[ray-serve]".') from error
        self._serve = serve
        local = {"include_dashboard": False} if self._address == "local" else {}
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._ray.init(self._address, log_to_driver=False, logging_level="error", **local)
        self._serve.start(proxy_location=self._place, http_options=self._http)
        self._flag = self._ray.remote(Flag).options(num_cpus=0).remote()
        self._serve.run(deployments(self._serve, self.hosting, self._flag), name=NAME, route_prefix="/")
        told("listening", host=self._http["host"], port=self._http["port"], model=self.hosting.name)

    def drain(self) -> None:
        """New requests get 503, and accepted jobs are finished, for as long as the limits say."""
        self.service.draining.set()
        told("draining", seconds=self.hosting.limits.drain)
        self._ray.get(self._flag.raise_.remote())
        end = time.monotonic() + self.hosting.limits.drain
        time.sleep(2 * POLL)
        while time.monotonic() < end and self._busy():
            time.sleep(0.2)

    def _busy(self) -> bool:
        try:
            return self.service.jobs.count(LIVE, self.hosting.name) > 0
        except Unavailable:
            return True

    def stop(self) -> None:
        """Stops all replicas; those that draw finish their batch."""
        if self._serve is not None:
            self._serve.shutdown()
            if self._ours:
                self._ray.shutdown()
        self.service.database.close()
        told("stopped")

    def failed(self) -> bool:
        """Whether Ray gave up on starting the replicas."""
        found = self._serve.status().applications.get(NAME)
        return found is None or str(getattr(found.status, "value", found.status)) == "DEPLOY_FAILED"


def host(host: Host) -> int:
    """Serves until SIGTERM or SIGINT, then drains. Returns 0, or 1 if the replicas could not be started."""
    ended = threading.Event()
    try:
        host.start()
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray sets handlers of its own when it starts
            signal.signal(number, lambda *_: ended.set())
        while not ended.wait(5.0):
            if host.failed():
                told("replicas failed")
                return 1
        host.drain()
    except RuntimeError as error:
        told("not started", error=named(error))
        return 1
    finally:
        host.stop()
    return 0
