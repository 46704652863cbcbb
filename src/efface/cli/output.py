"""The output of commands: texts and tables on stdout, the progress bar on stderr. Silences libraries."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import progress
from .._interrupt import gently

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def console(stderr: bool = False) -> Console:
    """The console for texts. Sends colours and cursor codes only to terminals."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, force_terminal=stream.isatty(), soft_wrap=True, highlight=False)


def escaped(text: str) -> str:
    """A text for a terminal, without markup and with escaped control characters."""
    from rich.markup import escape

    return escape(_CONTROL.sub(lambda found: ascii(found[0])[1:-1], text))


def say(text: str) -> None:
    console().print(escaped(text))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], **look: Any) -> None:
    """Prints a table, with the first column left-aligned and numbers right-aligned."""
    from rich.table import Table

    table = Table(**{"show_header": any(headings), **look})
    for k, heading in enumerate(headings):
        table.add_column(
            heading, justify="left" if k == 0 or not any(headings) else "right", no_wrap=k > 0 and any(headings)
        )
    for row in rows:
        table.add_row(*map(escaped, row))
    where = console()
    where.soft_wrap = False
    where.print(table)


@contextmanager
def telling() -> Iterator[progress.Meter]:
    """Shows the bar of a job. After its first report, Ctrl-C keeps finished results."""
    with progress.bar() as show:

        def listen(now: progress.Progress) -> None:
            gently()
            show(now)

        with progress.telling(progress.Meter(listen)) as meter:
            yield meter


def quiet() -> None:
    """Silences libraries: their bars, and their repeated warnings about long prompts."""
    import warnings

    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    warnings.filterwarnings("ignore", message="A prompt is longer than the text encoder's limit")
    for log in (diffusers_log, transformers_log):
        log.set_verbosity_error()
        log.disable_progress_bar()
