"""A lock that is taken in the order of arrival."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock for threads, taken in the order of arrival. A thread that takes it again and again does not overtake others.

    Example:
        >>> from efface.serve.turns import Turns
        >>> turns = Turns()
        >>> turns.take(1.0), turns.take(0.01)
        (True, False)
        >>> turns.give()
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    def take(self, seconds: float) -> bool:
        """Waits for the lock, at most for so long, and returns whether it was taken."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return True
            mine = threading.Event()
            self._waiting.append(mine)
        if mine.wait(seconds):
            return True
        with self._lock:
            if mine.is_set():  # it came in the last moment
                return True
            self._waiting.remove(mine)
        return False

    def give(self) -> None:
        """Gives the lock to whoever waits longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False
