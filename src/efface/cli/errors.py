"""How a command fails: exit codes, and errors on stderr without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from .._interrupt import INTERRUPTED
from .output import escaped

BAD_INPUT, FAILED = 2, 1


def fail(message: str, code: int) -> NoReturn:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]Error:[/] {escaped(message)}")
    raise typer.Exit(code)


def warn(message: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold yellow]Warning:[/] {escaped(message)}")


@contextmanager
def bad_input() -> Iterator[None]:
    """What the user gave is wrong: exit code 2, no traceback."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        fail(str(error), BAD_INPUT)
    except (ImportError, OSError) as error:
        fail(str(error), FAILED)
    except KeyboardInterrupt:
        fail("Interrupted.", INTERRUPTED)
