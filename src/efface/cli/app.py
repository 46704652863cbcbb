"""The command `efface` and its global options."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .errors import CODES

app = typer.Typer(
    name="efface",
    help="Erase concepts from text-to-image diffusion models, and measure the result.",
    epilog=CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
