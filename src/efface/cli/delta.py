"""`efface delta`: inspect deltas, and export them to other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import told
from .folders import check_folder, output_file, output_folder
from .options import AsJson, ModelName, Overwrite, load, load_deltas, loads
from .output import print_table, say

delta_app = typer.Typer(help="Inspect deltas, and export them to other tools.", no_args_is_help=True)
DeltaFile = Annotated[Path, typer.Argument(help="A file made by `efface fit`.")]


@delta_app.command()
def info(
    file: DeltaFile,
    as_json: AsJson = False,
) -> None:
    """Show what a delta erases, how it was made, and its base model."""
    with told():
        from .. import api

        delta = api.load_delta(file)
    if as_json:
        typer.echo(json.dumps(delta.config(), indent=1))
    else:
        describe(file, delta)


@delta_app.command()
def export(
    file: DeltaFile,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    layout: Annotated[
        str, typer.Option(help="diffusers (pipe.load_lora_weights) or kohya (A1111, ComfyUI).")
    ] = "diffusers",
    rank: Annotated[
        int | None, typer.Option(min=1, help="The largest rank. Default: no limit, which loses nothing.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a delta as a LoRA."""
    with told(), ExitStack() as ends:
        from .. import api

        delta = weights_of(file, api.load_delta(file))
        ends.enter_context(output_folder(output_file(out, overwrite).parent))
        error = delta.export(out, layout, rank)
    if as_json:
        facts = {"out": str(out), "layout": layout, "rank": rank, "relative_error": error, "delta": delta.hash}
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo(f"{out}: relative error {error:.1e}")


@delta_app.command()
@loads
def merge(
    files: Annotated[list[Path], typer.Argument(help="Files made by `efface fit`; several are added.")],
    out: Annotated[Path, typer.Option(help="The folder for the complete model.")],
    model: ModelName = "emoji",
    as_json: AsJson = False,
    *,
    loading: Mapping[str, Any],
) -> None:
    """Write a complete model with deltas merged into its weights."""
    with told(), ExitStack() as ends:
        from functools import reduce
        from operator import add

        from .. import api

        delta = reduce(add, [weights_of(*each) for each in zip(files, load_deltas(files), strict=True)])
        check_folder(out)
        pipe = load(model, loading)
        delta.merge(pipe)
        pipe.save_pretrained(ends.enter_context(output_folder(out)))
    if as_json:
        facts = {"out": str(out), "model": model, "text_hash": api.model_hash(pipe), "delta": delta.config()}
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo(f"{out}")


@delta_app.command()
def card(
    file: DeltaFile,
    out: Annotated[Path, typer.Option(help="The file to write, such as README.md.")],
    run: Annotated[Path | None, typer.Option(help="A scored run of the base model with this delta.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the page that goes with a published delta: what it erases, how to apply it, what was measured."""
    with told():
        from .. import api, files
        from ..report.delta_card import delta_card
        from ..runs import Run

        text = delta_card(api.load_delta(file).config(), file.name, None if run is None else Run.open(run))
        files.write(output_file(out, overwrite), text)
    typer.echo(f"{out}")


def weights_of(file: Path, delta: Any) -> Any:
    """The delta. Raises ValueError if it is not one of weights."""
    if not hasattr(delta, "weights"):
        what = "words" if hasattr(delta, "words") else "edits of outputs" if hasattr(delta, "form") else "directions"
        raise ValueError(
            f"{file} holds {what}, and only a file of weights can be exported or merged. Apply it with --delta or "
            "`efface.api.load_delta`."
        )
    return delta


def _size(delta: Any) -> tuple[str, str]:
    """What a delta changes, and how much of it."""
    if hasattr(delta, "words"):
        return "words", f"{len(delta.words)}: {', '.join(delta.words)}"
    if hasattr(delta, "form"):
        return "outputs", f"{len(delta.modules)} modules, form {delta.form!r}"
    if not hasattr(delta, "weights"):
        return "vectors", ", ".join(f"{list(v.shape)} at {name}" for name, v in delta.vectors.items())
    ranks = [change.rank for change in delta.weights.values() if hasattr(change, "rank")]
    whole = len(delta.weights) - len(ranks)
    kinds = [f"{len(ranks)} of rank {min(ranks)} to {max(ranks)}"] if ranks else []
    kinds += [f"{whole} whole"] if whole else []
    return "weights", f"{len(delta.weights)}: {', '.join(kinds)}"


def describe(file: Path, delta: Any) -> None:
    """Describes a delta in a few lines."""
    config, (what, size) = delta.config(), _size(delta)
    rows = {
        "erases" if what == "weights" else "concepts": ", ".join(c["name"] for c in config["concepts"]),
        "method": " ".join([config["method"], *(f"{k}={v}" for k, v in config["fields"].items())]),
        "model": f"{config['model']}, base hash {config['base'][:16]}",
        "after": ", ".join(f"{h[:16]} at strength {s:g}" for h, s in config["after"].items()) or "-",
        what: size,
        "hash": config["hash"][:16],
        **{name: json.dumps(value) for name, value in config["info"].items()},
    }
    print_table(("", ""), list(rows.items()), box=None)
    say(str(file))
