"""What commands print: text on terminals, and how far a job is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def progress() -> Progress:
    """A bar on stderr with the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    # Speed over the last hour: batches may take minutes. Without a terminal there is no bar.
    return Progress(
        *columns, console=console, transient=True, speed_estimate_period=3600, disable=not console.is_terminal
    )


def quiet() -> None:
    """Keeps libraries from printing, batch by batch, the prompts that are longer than the text encoder takes."""
    import warnings

    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    warnings.filterwarnings("ignore", message="A prompt is longer than the text encoder takes")
    diffusers_log.set_verbosity_error()
    transformers_log.set_verbosity_error()
