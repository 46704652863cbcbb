"""A job that tells how far it is, and ends in words."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from .._interrupt import INTERRUPTED, gently
from .errors import BAD_INPUT, FAILED, fail
from .output import progress

EVERY = 30  # seconds between lines of progress where there is no terminal


@contextmanager
def job(folder: Path | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Gives what tells how far a job is; exit code 2 for what was given, 1 for what failed, 130 for Ctrl-C.

    Without a terminal, as under nohup or in a batch job, a line now and then takes the place of the bar.
    """
    kept = f" What was finished is in {folder}; run the same command, it continues." if folder else ""
    with progress() as bar:
        task = bar.add_task("loading", total=None)
        last, said = "", -math.inf

        def tell(what: str, done: int, total: int) -> None:
            nonlocal last, said
            gently()
            if what != last:
                bar.reset(task, total=total, completed=done, description=what)
                last, said = what, -math.inf
            bar.advance(task, done - bar.tasks[0].completed)
            now = time.monotonic()
            if not bar.console.is_terminal and (now - said >= EVERY or done == total):
                said, left = now, bar.tasks[0].time_remaining
                hint = f", {timedelta(seconds=round(left))} left" if left else ""
                bar.console.print(f"{what} {done}/{total}{hint}", soft_wrap=True, highlight=False)

        try:
            yield tell
        except KeyboardInterrupt:
            bar.stop()
            fail(f"Interrupted.{kept}", INTERRUPTED)
        except (FileNotFoundError, ValueError, TypeError) as error:
            bar.stop()
            fail(str(error), BAD_INPUT)
        except RuntimeError as error:
            bar.stop()
            fail(f"{error}{kept}", FAILED)
        except (ImportError, OSError) as error:
            bar.stop()
            fail(str(error), FAILED)
