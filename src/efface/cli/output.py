"""What commands print: texts and tables on stdout, the progress bar on stderr, and libraries that are kept quiet."""

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
    """Where texts go. Colours and cursor codes go to terminals only, never into files."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, force_terminal=stream.isatty(), soft_wrap=True, highlight=False)


def escaped(text: str) -> str:
    """A text of the user's or of a file's, for a terminal: no markup, and control characters as Python writes them."""
    from rich.markup import escape

    return escape(_CONTROL.sub(lambda found: ascii(found[0])[1:-1], text))


def say(text: str) -> None:
    console().print(escaped(text))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], **look: Any) -> None:
    """A table: the first column to the left, numbers in the others to the right."""
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
    """The bar of a job; from its first word on, Ctrl-C keeps what was finished."""
    with progress.bar() as show:

        def listen(now: progress.Progress) -> None:
            gently()
            show(now)

        with progress.telling(progress.Meter(listen)) as meter:
            yield meter


def quiet() -> None:
    """Keeps libraries from printing: bars of their own, and, batch by batch, prompts that are too long."""
    import warnings

    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    warnings.filterwarnings("ignore", message="A prompt is longer than the text encoder takes")
    for log in (diffusers_log, transformers_log):
        log.set_verbosity_error()
        log.disable_progress_bar()
