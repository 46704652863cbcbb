"""Which holders of jobs count as dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Leases:
    """Finds holders without a heartbeat, by this process's own clock, so that changes of the time of day do no harm.

    Args:
        patience: seconds without a heartbeat after which a holder counts as dead.
        clock: seconds, which never go back.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience, self._clock = patience, clock
        self._seen: dict[tuple[str, int], tuple[int, float]] = {}

    def forget(self) -> None:
        """Watches all holders from now on, because heartbeats could not be seen, such as without the database."""
        self._seen = {}

    def dead(self, running: Mapping[tuple[str, int], int]) -> list[tuple[str, int, int]]:
        """Id, fence and beat of the running jobs whose beat stood still for too long."""
        now = self._clock()
        seen = {}
        for job, beat in running.items():
            earlier = self._seen.get(job)
            seen[job] = earlier if earlier is not None and earlier[0] == beat else (beat, now)
        self._seen = seen
        return [(*job, beat) for job, (beat, since) in seen.items() if now - since >= self._patience]
