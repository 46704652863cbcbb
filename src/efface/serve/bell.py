"""Wakes what waits in this process, so that it need not look into the database all the time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Bell:
    """Something of the database has changed. Whoever waits for it is woken, if it waits in the same process.

    Other processes cannot hear it, so all look now and then: seldom if `rings` says that somebody here rings.

    Example:
        >>> import threading
        >>> from efface.serve.bell import Bell
        >>> bell, news = Bell(), threading.Event()
        >>> with bell.heard(news.set), bell.ringing():
        ...     bell.ring()
        ...     news.is_set(), bell.rings
        (True, True)
        >>> bell.rings
        False
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wakes: list[Callable[[], object]] = []
        self._ringers = 0

    @property
    def rings(self) -> bool:
        """Whether anybody in this process rings it."""
        return self._ringers > 0

    @contextlib.contextmanager
    def ringing(self) -> Iterator[None]:
        """Inside, the caller rings whenever it has changed something."""
        with self._lock:
            self._ringers += 1
        try:
            yield
        finally:
            with self._lock:
                self._ringers -= 1

    @contextlib.contextmanager
    def heard(self, wake: Callable[[], object]) -> Iterator[None]:
        """Inside, each ring calls `wake` in the thread that rings."""
        with self._lock:
            self._wakes.append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakes.remove(wake)

    def ring(self) -> None:
        """Wakes all who wait."""
        with self._lock:
            wakes = tuple(self._wakes)
        for wake in wakes:
            wake()
