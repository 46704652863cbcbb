"""Exit codes, and errors on stderr without a traceback."""

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
    "Exit codes: 0 done; 1 an error, such as a full disk; 2 a wrong option or an unusable file; 3 a bar is not met; "
    "4 not judged; 130 interrupted."
)


def fail(message: str, code: int) -> NoReturn:
    console(stderr=True).print(f"[bold red]Error:[/] {escaped(message)}")
    raise typer.Exit(code)


def warn(message: str) -> None:
    console(stderr=True).print(f"[bold yellow]Warning:[/] {escaped(message)}")


@contextmanager
def told(kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Turns errors into messages and exit codes.

    Args:
        kept: returns a sentence on the finished results of a job that ended early.
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
        end("An option or a file is nested too deeply. Give a flatter one.", BAD_INPUT)
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        end(_words(error), BAD_INPUT)
    except _failures() as error:
        end(_words(error), FAILED)


def _words(error: BaseException) -> str:
    """The message. For system errors, adds the file and the cure."""
    if isinstance(error, OSError) and str(error).startswith("[Errno"):
        file = f"{error.filename2 or error.filename}: " if error.filename else ""
        return f"{file}{error.strerror}. Correct that, or name another file or folder."
    return str(error) or f"{type(error).__name__}. Give a smaller --batch, or fewer pictures."


def _failures() -> tuple[type[BaseException], ...]:
    """Errors that occur with valid input. Looks up safetensors late, because --help does not import it."""
    safetensors = sys.modules.get("safetensors")
    more = (safetensors.SafetensorError,) if safetensors else ()
    return (ImportError, OSError, RuntimeError, MemoryError, *more)
