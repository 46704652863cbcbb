"""`efface serve run`: the application on uvicorn, with one worker thread, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from prometheus_client import start_http_server
from uvicorn.protocols.http.h11_impl import H11Protocol

from .. import checks
from .app import create_app
from .backend import Backend, check_deltas
from .database import Unavailable
from .jobs import LIVE
from .log import named, told
from .service import Service
from .worker import Worker


def check_host(host: str, everywhere: bool) -> None:
    """Raises ValueError for an address beyond this machine, unless `everywhere` allows it."""
    if everywhere or host == "localhost":
        return
    try:
        near = ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if not near:
        cure = "Give --everywhere to listen beyond this machine, behind a proxy with TLS."
        raise ValueError(checks.refusal("a loopback address such as 127.0.0.1", host, cure))


@contextlib.contextmanager
def _port(host: str, port: int, option: str) -> Iterator[None]:
    """Says in an error which port it is about."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"Cannot listen on {host}, port {port} ({why}). Give another {option}.") from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, bound before anything else starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _port(host, port, "--port"):
        return socket.create_server((host, port), family=family, backlog=2_048)


class Connection(H11Protocol):
    """A connection that is cut if its client takes nothing for as long as the limits say, also after the answer.

    Args:
        seconds: the limit.
        given: what uvicorn gives a protocol.
    """

    def __init__(self, seconds: float, **given: Any) -> None:
        super().__init__(**given)
        self._seconds = seconds
        self._cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # each wait for the client is seen

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut = self.loop.call_later(self._seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep()
        super().connection_lost(exc)

    def _keep(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None


def configured(service: Service, host: str, port: int, *, studio: bool = False) -> uvicorn.Config:
    """How uvicorn serves the application."""
    protocol: Any = functools.partial(Connection, service.limits.send)
    return uvicorn.Config(
        create_app(service, studio=studio), host=host, port=port, log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=5, limit_concurrency=2_000, h11_max_incomplete_event_size=16_384,
        loop="asyncio", http=protocol, ws="none", timeout_graceful_shutdown=5,
    )  # fmt: skip


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or SIGINT: no new requests, accepted jobs are finished. The second one ends it."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining.is_set():
            self.should_exit = self.force_exit = True
            return
        self.service.draining.set()
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        told("draining", seconds=self.service.limits.drain)
        end = time.monotonic() + self.service.limits.drain
        while time.monotonic() < end and self._busy():
            time.sleep(0.1)
        time.sleep(0.3)  # open requests see the last states
        self.should_exit = True

    def _busy(self) -> bool:
        try:
            return self.service.jobs.count(LIVE, self.service.model) > 0
        except Unavailable:
            return True


def run(
    service: Service,
    backend: Backend,
    host: str = "127.0.0.1",
    port: int = 8000,
    metrics_port: int | None = 9000,
    everywhere: bool = False,
    *,
    studio: bool = False,
    ready: Callable[[int], object] | None = None,
) -> int:
    """Serves until a signal. Returns 0, or 1 if the worker ended by an error or stalled.

    Args:
        service: the service.
        backend: what draws.
        host: the address to listen on.
        port: the port of the API. 0: any free one, which the log names.
        metrics_port: the port of the metrics, on the same address. None: no metrics; 0: any free one.
        everywhere: allows an address beyond this machine.
        studio: whether the page at /studio is served.
        ready: called with the port of the API, once it is taken.

    Raises:
        OSError: a port is taken.
        ValueError: the policy of a key names a delta that cannot act on the model.
    """
    check_host(host, everywhere)
    check_deltas(service, backend)
    listening = listen(host, port)
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())  # the log says it in one line
    logging.getLogger("uvicorn").propagate = False
    threading.excepthook = lambda args: told("thread ended", error=named(args.exc_value or args.exc_type()))
    config = configured(service, host, port, studio=studio)
    server = Server(config, service)
    worker = Worker(service, backend)
    if metrics_port is not None:
        with contextlib.ExitStack() as stack, _port(host, metrics_port, "--metrics-port"):
            stack.callback(listening.close)
            metrics, _ = start_http_server(metrics_port, host, registry=service.metrics.registry)
            stack.pop_all()
        told("metrics", port=metrics.server_port)
    worker.start()
    guard = threading.Thread(target=_end_with, args=(worker, server), daemon=True)
    guard.start()
    listening.listen(config.backlog)  # from here on connections wait for the server
    number = listening.getsockname()[1]
    told("listening", host=host, port=number, model=backend.name)
    if ready is not None:
        ready(number)
    failed = _serve(server, [listening], worker)
    service.database.close()
    return 1 if failed else 0


def _serve(server: Server, sockets: Sequence[Any], worker: Worker) -> bool:
    """Serves, and returns whether the worker had ended by an error."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    asyncio.run(server._serve(list(sockets)))
    stalled = server.service.stalled.is_set()
    failed = stalled or not worker.is_alive()
    worker.stop()
    worker.join(0.0 if stalled else server.service.limits.drain)
    told("stopped", failed=failed)
    return failed


def _end_with(worker: Worker, server: Server) -> None:
    """Ends the server if its worker ends by an error or stalls, so that whatever started it starts it again."""
    while worker.is_alive() and not server.service.stalled.is_set():
        worker.join(0.5)
    if server.service.stalled.is_set() or not server.service.draining.is_set():
        told("worker ended", stalled=server.service.stalled.is_set())
        server.service.draining.set()
        server.should_exit = True
