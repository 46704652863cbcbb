"""The heartbeat of a worker while it draws and finishes a batch."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from ..progress import Cancelled
from .claims import Claim
from .database import Unavailable
from .log import told
from .service import Service


class Pulse:
    """The heartbeat of a batch, in a thread, from `start` to `end`: until all its jobs have ended.

    It ends a drawing that nobody waits for. It stops while no step is finished, so that others take the jobs.

    Args:
        service: the service.
        claims: the jobs of the batch.
        missed: called when a heartbeat cannot be written, as others cannot write theirs then.
    """

    def __init__(self, service: Service, claims: Sequence[Claim], missed: Callable[[], object]) -> None:
        self._service, self._claims, self._missed = service, list(claims), missed
        self._wanted = {claim.id for claim in claims}
        self._step, self._moved = 0, 0.0  # 0: nothing is being drawn
        self._stalls = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        self._stall(False)

    def __enter__(self) -> Pulse:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def _run(self) -> None:
        service = self._service
        while not self._over.wait(min(service.limits.lease / 5, 0.5)):
            self._stall(bool(self._moved) and time.monotonic() - self._moved > service.limits.stall)
            if self._stalls:
                continue
            try:
                held, cancelled = service.jobs.beat(self._claims, self._step)
            except Unavailable:
                self._missed()
                continue
            self._wanted = held - cancelled

    def _stall(self, stalls: bool) -> None:
        """Says whether the drawing stalls, if that has changed: the batch before may still be finished meanwhile."""
        if stalls == self._stalls:
            return
        self._stalls = stalls
        if not stalls:
            self._service.stalled.clear()
            return
        told("drawing stalls", seconds=self._service.limits.stall, jobs=[claim.id for claim in self._claims])
        self._service.stalled.set()

    @contextlib.contextmanager
    def drawing(self, names: Collection[str]) -> Iterator[Callable[[int], None]]:
        """Gives what to call at each finished step of a drawing of these jobs."""

        def on_step(step: int) -> None:
            self._step, self._moved = step, time.monotonic()
            if self._wanted.isdisjoint(names):
                raise Cancelled("No request waits for this batch.")

        self._moved = time.monotonic()
        try:
            yield on_step
        finally:
            self._moved = 0.0
