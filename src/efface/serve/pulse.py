"""The heartbeat of a worker while it draws and finishes a batch."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from ..progress import Cancelled
from .database import Unavailable
from .jobs import Claim
from .log import told
from .service import Service


class Pulse:
    """The heartbeat of a batch, in a thread, until all its jobs have ended.

    It ends a drawing that nobody waits for. It stops while no step is finished, so that others take the jobs.

    Args:
        service: the service.
        claims: the jobs of the batch.
    """

    def __init__(self, service: Service, claims: Sequence[Claim]) -> None:
        self._service, self._claims = service, list(claims)
        self._wanted = {claim.id for claim in claims}
        self._step, self._moved = 0, 0.0  # 0: nothing is being drawn
        self.missed = False
        """Whether a heartbeat could not be written, as others could not write theirs then."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        self._service.stalled.clear()

    def _run(self) -> None:
        service = self._service
        while not self._over.wait(min(service.limits.lease / 5, 0.5)):
            if self._moved and time.monotonic() - self._moved > service.limits.stall:
                if not service.stalled.is_set():
                    told("drawing stalls", seconds=service.limits.stall, jobs=[claim.id for claim in self._claims])
                service.stalled.set()
                continue
            service.stalled.clear()
            try:
                held, cancelled = service.jobs.beat(self._claims, self._step)
            except Unavailable:
                self.missed = True
                continue
            self._wanted = held - cancelled

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
