"""Follows jobs for all open requests of a process, with one query for all."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from .database import Unavailable
from .jobs import LIVE, Jobs
from .log import named, told

EVERY = 0.05


class Watcher:
    """Follows jobs for the requests that wait for them.

    Args:
        jobs: the jobs.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._names: Counter[str] = Counter()
        self._latest: dict[str, tuple[str, int, int]] = {}
        self._ticked = asyncio.Condition()

    async def run(self) -> None:
        """Polls while anything is followed. It ends when its task is cancelled."""
        while True:
            if self._names:
                names = list(self._names)
                try:
                    self._latest = await run_in_threadpool(self._jobs.states, names)
                except (Unavailable, ValueError) as error:
                    told("jobs cannot be followed", error=named(error))
                    await asyncio.sleep(1.0)
                async with self._ticked:
                    self._ticked.notify_all()
            await asyncio.sleep(EVERY)

    async def _tick(self) -> None:
        async with self._ticked:
            await self._ticked.wait()

    async def follow(self, name: str, seconds: float) -> AsyncIterator[tuple[str, int, int]]:
        """State, step and steps of a job at each poll, until it ends or the time is over."""
        end = time.monotonic() + seconds
        self._names[name] += 1
        try:
            while time.monotonic() < end:
                try:
                    async with asyncio.timeout(end - time.monotonic()):  # `wait_for` of Python 3.11 loses cancellations
                        await self._tick()
                except TimeoutError:
                    return
                found = self._latest.get(name)
                if found is not None:
                    yield found
                    if found[0] not in LIVE:
                        return
        finally:
            self._names[name] -= 1
            if not self._names[name]:
                del self._names[name]
