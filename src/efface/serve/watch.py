"""Follows jobs for all open requests of a process, with one query for all."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from .bell import Bell
from .database import Unavailable
from .jobs import LIVE, Jobs
from .log import named, told

EVERY, SELDOM = 0.05, 0.25
"""Seconds between two looks for the jobs of workers in other processes: without, and with a worker in this one."""
PAUSE = 1.0


class Watcher:
    """Follows jobs for the requests that wait for them.

    Args:
        jobs: the jobs.
        ended: rung by workers of this process when jobs have changed. None: there are none.
    """

    def __init__(self, jobs: Jobs, ended: Bell | None = None) -> None:
        self._jobs, self._ended = jobs, Bell() if ended is None else ended
        self._names: dict[str, set[asyncio.Event]] = {}
        self._latest: dict[str, tuple[str, int, int]] = {}
        self._look_now = asyncio.Event()

    async def run(self) -> None:
        """Looks when a worker of this process rings, when a request begins to follow, and now and then, while anything
        is followed. It ends when its task is cancelled."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._look_now.set)

        with self._ended.heard(wake):
            while True:
                self._look_now.clear()
                if self._names:
                    await self._look()
                pause = SELDOM if self._ended.rings else EVERY
                await _happens(self._look_now, pause if self._names else None)

    async def _look(self) -> None:
        """Reads the states of all jobs, and wakes the followers of those that changed."""
        before = self._latest
        try:
            self._latest = await run_in_threadpool(self._jobs.states, list(self._names))
        except (Unavailable, ValueError) as error:
            told("jobs cannot be followed", error=named(error))
            await asyncio.sleep(1.0)
            return
        for name, found in self._latest.items():
            if before.get(name) != found:
                for news in self._names.get(name, ()):
                    news.set()

    async def follow(self, name: str, seconds: float, pause: float = PAUSE) -> AsyncIterator[tuple[str, int, int]]:
        """State, step and steps of a job whenever they change, and after each pause, until it ends or the time is over.

        Args:
            name: the job.
            seconds: the time.
            pause: seconds without a change after which they are repeated.
        """
        end, news = time.monotonic() + seconds, asyncio.Event()
        if name in self._latest:  # another request follows it, too
            news.set()
        self._names.setdefault(name, set()).add(news)
        self._look_now.set()
        try:
            while (left := end - time.monotonic()) > 0:
                await _happens(news, min(left, pause))
                news.clear()
                found = self._latest.get(name)
                if found is not None:
                    yield found
                    if found[0] not in LIVE:
                        return
        finally:
            self._names[name].discard(news)
            if not self._names[name]:
                del self._names[name]


async def _happens(event: asyncio.Event, seconds: float | None) -> None:
    """Waits for an event, at most for so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):  # `wait_for` of Python 3.11 loses cancellations
            await event.wait()
