"""`efface new`: write the first files of a method or a family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import told
from .options import AsJson
from .output import say

if TYPE_CHECKING:
    from ..scaffold import Scaffold

new_app = typer.Typer(help="Write the first files of a method or a family of yours.", no_args_is_help=True)


@new_app.command()
def method(
    name: Annotated[str, typer.Argument(help="The name of the method, such as soft_block.")],
    out: Annotated[Path | None, typer.Option(help="The folder of the package. Default: efface-NAME.")] = None,
    repository: Annotated[
        Path | None, typer.Option(help="A clone of Efface, to add the method there and not as a package.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run-time method that works, its test and a page. Replaces no file."""
    with told():
        from .. import scaffold

        if out is not None and repository is not None:
            raise ValueError("Expected --out or --repository, got both. Give one of them.")
        found = scaffold.in_clone(name, repository) if repository else scaffold.package(name, out)
        made = found.write()
    _tell(found, made, "class", as_json)


@new_app.command()
def family(
    name: Annotated[str, typer.Argument(help="The name of the family's files, such as lumina2.")],
    pipeline: Annotated[str, typer.Option(help="The pipeline's class in diffusers, such as Lumina2Pipeline.")],
    repository: Annotated[Path, typer.Option(help="A clone of Efface.")] = Path(),
    reads: Annotated[str, typer.Option(help="How the denoiser reads text: joint_text or cross_text.")] = "joint_text",
    as_json: AsJson = False,
) -> None:
    """Write the facts of a family, its tiny pipeline, test and note, to be filled in. Replaces no file."""
    with told():
        from .. import scaffold

        found = scaffold.family(name, pipeline, repository, reads)
        made = found.write()
    _tell(found, made, "pipeline", as_json)


def _tell(found: Scaffold, made: list[Path], kind: str, as_json: bool) -> None:
    if as_json:
        facts = {"name": found.name, kind: found.cls, "files": list(map(str, made)), "next": found.steps}
        typer.echo(json.dumps(facts, indent=1))
    else:
        for path in made:
            say(str(path))
        for step in found.steps:
            say(step)
