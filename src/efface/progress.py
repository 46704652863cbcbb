"""Reports the progress of a job to a listener or as a bar. A job can be cancelled at each report.

with progress.bar() as listen, progress.telling(Meter(listen)): ... # jobs in this block report to the meter
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

EVERY = 30  # seconds between lines where there is no terminal


@dataclass(frozen=True)
class Progress:
    """The progress of a job.

    Args:
        what: the current task, such as "erased".
        done, total: pictures, updates or metrics. `total` is 0 if unknown.
        seconds_left: None until the first item is done.
        note: a further remark, such as the loss of a fit.
    """

    what: str
    done: int
    total: int
    seconds_left: float | None = None
    note: str = ""


Listener = Callable[[Progress], None]
Tell = Callable[[str, int, int], None]
F = TypeVar("F", bound=Callable[..., Any])


class Cancelled(Exception):
    """The job was cancelled. Its finished results stay."""


class Meter:
    """Takes the reports of a job: `meter("erased", 3, 40)`.

    Args:
        listener: called with a `Progress` at each report.

    Example:
        >>> from efface.progress import Meter
        >>> meter = Meter(print)
        >>> meter("drawn", 0, 8)
        Progress(what='drawn', done=0, total=8, seconds_left=None, note='')
        >>> meter.cancel()
        >>> meter("drawn", 1, 8)
        Traceback (most recent call last):
        efface.progress.Cancelled: The job was cancelled at drawn 1/8.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener, self._stop = listener, threading.Event()
        self._what, self._first, self._began = "", 0, 0.0

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        if self._stop.is_set():
            raise Cancelled(f"The job was cancelled at {what} {done}/{total}.")
        now = time.monotonic()
        if what != self._what:
            self._what, self._first, self._began = what, done, now
        made = done - self._first
        left = (now - self._began) * (total - done) / made if made > 0 and total >= done else None
        self._listener(Progress(what, done, total, left, note))

    def cancel(self) -> None:
        """Ends the job at its next report. Any thread may call this."""
        self._stop.set()


_current: ContextVar[Meter | None] = ContextVar("efface progress", default=None)


@contextmanager
def telling(meter: Meter) -> Iterator[Meter]:
    """Jobs inside this block report to the meter."""
    token = _current.set(meter)
    try:
        yield meter
    finally:
        _current.reset(token)


@contextmanager
def shown(progress: bool | Tell | None = None) -> Iterator[Tell]:
    """Yields the function to which a job reports: task, number done, total.

    Args:
        progress: True shows a bar, False shows nothing. A callable receives the reports. None uses the meter of
            `telling`, if there is one.
    """
    if progress is None:
        progress = current() or False
    if callable(progress):
        yield progress
    elif progress:
        with bar() as listener:
            yield Meter(listener)
    else:
        yield lambda what, done, total: None


def shows(job: F) -> F:
    """Lets the argument `progress` of a job take all values that `shown` takes."""
    signature = inspect.signature(job)

    @functools.wraps(job)
    def told(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options)
        with shown(given.arguments.get("progress")) as tell:
            given.arguments["progress"] = tell
            return job(*given.args, **given.kwargs)

    return cast("F", told)


def current() -> Meter | None:
    """The meter of `telling`, if there is one."""
    return _current.get()


@contextmanager
def bar() -> Iterator[Listener]:
    """Shows a bar with the remaining time on stderr. If stderr is not a terminal, prints a line every 30 seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    last, said = "", 0.0
    with Bar(
        *columns, TextColumn("{task.fields[left]}"), console=console, transient=True, disable=not console.is_terminal
    ) as drawn:
        task = drawn.add_task("loading", total=None, left="")

        def listen(now: Progress) -> None:
            nonlocal last, said
            left = now.seconds_left
            hint = f"{timedelta(seconds=round(left))} left" if left is not None and now.done < now.total else ""
            words = " ".join(filter(None, [now.what, now.note]))
            drawn.update(task, description=words, completed=now.done, total=now.total or None, left=hint)
            clock = time.monotonic()
            if now.what != last:
                last, said = now.what, clock
            if not console.is_terminal and now.total and (now.done == now.total or clock - said >= EVERY):
                said = clock
                line = ", ".join(filter(None, [f"{now.what} {now.done}/{now.total}", hint]))
                console.print(line, soft_wrap=True, highlight=False, markup=False)

        yield listen
