"""How a command ends: exit codes, and errors on stderr without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from .. import checks
from .._interrupt import INTERRUPTED
from ..progress import Cancelled
from .output import console, escaped

FAILED, BAD_INPUT, NOT_MET, NOT_JUDGED = 1, 2, 3, 4
CODES = (
    "Exit codes: 0 done; 1 an error, such as a full disk; 2 a wrong option or a file that cannot be used; 3 a bar is "
    "not met; 4 not judged; 130 interrupted."
)


def fail(message: str, code: int) -> NoReturn:
    console(stderr=True).print(f"[bold red]Error:[/] {escaped(message)}")
    raise typer.Exit(code)


def warn(message: str) -> None:
    console(stderr=True).print(f"[bold yellow]Warning:[/] {escaped(message)}")


@contextmanager
def told(kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Errors in words and as exit codes.

    Args:
        kept: what to add about what was finished, where a job ends early.
    """

    def end(message: str, code: int, *, early: bool = True) -> NoReturn:
        fail(" ".join(filter(None, [message, kept() if kept and early else ""])), code)

    try:
        yield
    except typer.Exit:
        raise
    except (KeyboardInterrupt, Cancelled):
        end("Interrupted.", INTERRUPTED)
    except checks.NotJudged as error:
        end(str(error), NOT_JUDGED, early=False)
    except RecursionError:
        end("An option or a file is nested too deeply. Give one of less depth.", BAD_INPUT)
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        end(_words(error), BAD_INPUT)
    except _failures() as error:
        end(_words(error), FAILED)


def _words(error: BaseException) -> str:
    """The message; for one of the system's own, which file it is about and what to do."""
    if isinstance(error, OSError) and str(error).startswith("[Errno"):
        file = f"{error.filename2 or error.filename}: " if error.filename else ""
        return f"{file}{error.strerror}. Correct that, or name another file or folder."
    return str(error) or f"{type(error).__name__}. Give a smaller --batch, or fewer pictures."


def _failures() -> tuple[type[BaseException], ...]:
    """What can go wrong although the input is right. safetensors is looked up late: it is not imported for --help."""
    safetensors = sys.modules.get("safetensors")
    more = (safetensors.SafetensorError,) if safetensors else ()
    return (ImportError, OSError, RuntimeError, MemoryError, *more)
