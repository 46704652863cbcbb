"""The `efface` command. Heavy imports happen inside commands, so that `efface --help` is quick."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__, registry
from ._interrupt import INTERRUPTED, gently

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from rich.progress import Progress
    from torch import Tensor

    from .core import Concept, Metric
    from .runs import Run

app = typer.Typer(
    name="efface",
    help="Erase concepts from text-to-image diffusion models, and see that they are gone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
BAD_INPUT, FAILED = 2, 1
SHOWN = 8  # pictures in the grid
BATCH = 8
EVERY = 30  # seconds between lines of progress where there is no terminal

ConceptNames = Annotated[list[str] | None, typer.Option("--concept", help="A shipped concept; may be repeated.")]
Phrases = Annotated[list[str] | None, typer.Option("--phrase", help="A text of your own to erase; may be repeated.")]
ModelName = Annotated[str, typer.Option("--model", help='"emoji", a folder, or a hub id.')]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="How to erase, see `efface list methods`; eiup, or nothing beside --delta. A preset goes behind a dot: "
        "sld.strong.",
    ),
]
DeltaFiles = Annotated[list[Path] | None, typer.Option("--delta", help="A file made by `efface fit`; may be repeated.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A field of the method, NAME=VALUE.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _fail(message: str, code: int) -> NoReturn:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]Error:[/] {_plain(message)}")
    raise typer.Exit(code)


def _warn(message: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold yellow]Warning:[/] {_plain(message)}")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def _bad_input() -> Iterator[None]:
    """What the user gave is wrong: exit code 2, no traceback."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        _fail(str(error), BAD_INPUT)
    except (ImportError, OSError) as error:
        _fail(str(error), FAILED)
    except KeyboardInterrupt:
        _fail("Interrupted.", INTERRUPTED)


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


# ---------------------------------------------------------------- list


@app.command("list")
def show(
    what: Annotated[
        str, typer.Argument(help="methods, concepts, suites, metrics, models or families; all if left out.")
    ] = "all",
    as_json: AsJson = False,
) -> None:
    """Show what there is: methods, concepts, suites, metrics, models, families."""
    from .core import concept_sources, shipped_concepts
    from .families import FAMILIES, about

    with _bad_input():
        concepts = {name: ", ".join(c.phrases) for name, c in shipped_concepts().items()}
        concepts |= {name: f"{concepts[name]} (source: {source})" for name, source in concept_sources().items()}
    tables: dict[str, dict[str, str]] = {
        "methods": registry.methods(),
        "concepts": concepts,
        "suites": registry.about("suites"),
        "metrics": registry.about("metrics"),
        "models": {"emoji": "embedded, 64 x 64", "FOLDER or HUB/ID": "any diffusers pipeline of a known family"},
        "families": {f.name: about(f) for f in FAMILIES} if what in ("all", "families") else {},
    }
    if what != "all" and what not in tables:
        hint = registry.near(what, tables)
        _fail(f"Unknown list {what!r}. {hint}{' ' if hint else ''}There is: {', '.join(tables)}.", BAD_INPUT)
    chosen = tables if what == "all" else {what: tables[what]}
    if as_json:
        typer.echo(json.dumps(chosen, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    for title, rows in chosen.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in rows.items():
            table.add_row(_plain(name), _plain(text))
        Console().print(table, "")


# ---------------------------------------------------------------- erase


def _fields(settings: list[str]) -> dict[str, Any]:
    """`name=value` pairs; a value is read as JSON if it is JSON, else as text."""
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"Expected --set NAME=VALUE, but got {setting!r}; for example --set strength=1.5.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def _check_folder(out: Path | None, overwrite: bool) -> None:
    """ValueError unless the output folder can be made and written, and is empty or may have its results replaced."""
    out = _numbered() if out is None else out
    try:
        if out.exists() and not out.is_dir():
            raise ValueError(f"Expected --out to be a folder, but {out} is a file: name another one.")
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise ValueError(f"{out} is not empty: give --overwrite to replace its results, or name another folder.")
        _try_to_write(out / ".writable")
    except OSError as error:
        raise ValueError(f"Cannot write to {out} ({error.strerror}): name another folder with --out.") from error


def _numbered() -> Path:
    """The next folder where none was named."""
    base = Path("efface-out")
    taken = [int(p.name) for p in base.glob("[0-9]*") if p.name.isdigit()] if base.is_dir() else []
    return base / f"{max(taken, default=0) + 1:03d}"


def _try_to_write(file: Path) -> None:
    """Makes a file, with the folders above it, and removes all that it made; OSError if that fails."""
    made = [file, *_absent(file.parent)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    finally:
        _remove(made)


def _absent(folder: Path) -> list[Path]:
    """The folder and those above it that are not there, the innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove(made: list[Path]) -> None:
    """Removes files, and folders that are empty."""
    for each in made:
        with suppress(OSError):
            each.rmdir() if each.is_dir() else each.unlink()


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """The output folder, a numbered one if none is named; removed again where nothing was written into it."""
    out = _numbered() if out is None else out
    made = _absent(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield out
    finally:
        _remove(made)


def _results(folder: Path) -> list[Path]:
    """What `efface erase` wrote there, and nothing else."""
    ours = re.compile(r"(before|after)-\d+\.png|grid\.png|record\.json")
    return [file for file in folder.iterdir() if ours.fullmatch(file.name)]


class _Judge:
    """What the eyes of the emoji model say about pictures; for other models nothing is said."""

    def __init__(self, concepts: list[Concept]) -> None:
        from .models import emoji
        from .models.emoji.eyes import load_eyes

        self.eyes = load_eyes()
        names = dict.fromkeys(c.name for c in concepts)
        self.judged = [name for name in names if name == "watermark" or _known(emoji.truth, name)]
        self.not_judged = [name for name in names if name not in self.judged]

    def scores(self, images: Tensor) -> dict[str, list[list[bool]]]:
        """Concept to one list per eye, one answer per picture; "any icon" beside them."""
        seen = self.eyes.see(images)
        found = {name: self.eyes.concept(seen, name).tolist() for name in self.judged}
        return found | {"any icon": self.eyes.icons(seen).any(-1).tolist()}


def _known(truth: Callable[[str], object], name: str) -> bool:
    try:
        truth(name)
    except ValueError:
        return False
    return True


def _targets(concept: list[str] | None, phrase: list[str] | None) -> list[Concept]:
    from .core import Concept
    from .core import concept as shipped

    return [shipped(name) for name in concept or []] + [Concept(text) for text in phrase or []]


def _erasers(
    concept: list[str] | None,
    phrase: list[str] | None,
    method: str | None,
    delta: list[Path] | None,
    settings: list[str] | None,
) -> tuple[list[Concept], list[Any]]:
    """What is to be erased, and what erases it: deltas, then the method."""
    targets, fields = _targets(concept, phrase), _fields(settings or [])
    name = (None if delta else "eiup") if method is None else method
    if not targets and name is not None:
        raise ValueError("Nothing to erase: give --concept NAME or --phrase TEXT.")
    if fields and name is None:
        raise ValueError("--set is for the fields of a --method, but only deltas were given: name the method too.")
    if name is not None:
        registry.resolve(registry.split(name)[0], "erasers")
    from . import api

    erasers = _deltas(delta)
    targets = targets or list(dict.fromkeys(c for each in erasers for c in each.concepts))
    return targets, erasers + ([api.build(name, targets, **fields)] if name is not None else [])


def _deltas(files: Sequence[Path] | None) -> list[Any]:
    """The deltas in these files; ValueError if two are the same, whose change would count twice."""
    from . import api

    found: dict[str, Path] = {}
    deltas = []
    for path in files or ():
        deltas.append(api.load_delta(path))
        if (first := found.setdefault(deltas[-1].hash, path)) is not path:
            twice = f"{path} is given twice" if first == path else f"{path} is the same delta as {first}"
            raise ValueError(f"{twice}, and its change would count twice: give each delta once.")
    return deltas


def _check_guidance(erasers: list[Any], guidance: float) -> None:
    for eraser in erasers:
        if guidance <= 1 and getattr(eraser, "wants_guidance", False):
            raise ValueError(
                f"{type(eraser).__name__} needs guidance, but --guidance is {guidance:g}: give a value above 1, or "
                "--method eiup."
            )


@app.command()
def erase(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    concept: ConceptNames = None,
    phrase: Phrases = None,
    model: ModelName = "emoji",
    method: MethodName = None,
    delta: DeltaFiles = None,
    set_: Settings = None,
    images: Annotated[int, typer.Option(min=1, help="How many pictures, with seeds one apart.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the first picture.")] = 1_000_000,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    negative: Annotated[str, typer.Option(help="The user's own negative prompt.")] = "",
    out: Annotated[Path | None, typer.Option(help="Output folder; a fresh numbered one if left out.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a prompt before and after erasing concepts, and write pictures, a grid and a record."""
    with _bad_input():
        if not prompt.strip():
            raise ValueError("The prompt is empty: write what to draw.")
        if not math.isfinite(guidance):
            raise ValueError(f"Expected --guidance to be a finite number, but got {guidance}.")
        if seed + images > 2**32:
            raise ValueError(f"Seeds go up to {2**32 - 1}, but {images} pictures from {seed} on go past it.")
        targets, erasers = _erasers(concept, phrase, method, delta, set_)
        for rows in (getattr(eraser, "rows", None) for eraser in erasers):
            if rows is not None and len(rows) != images:
                raise ValueError(f"`rows` has {len(rows)} entries, but --images is {images}: give one list a picture.")
        from . import api

        _check_guidance(erasers, guidance)
        _check_folder(out, overwrite)
        pipe = api.load(model)
        _quiet()
        api.stack(pipe, *erasers).remove()  # a phrase too long or a wrong pipeline is found before anything is drawn
        for what, text in (("prompt", prompt), ("negative prompt", negative)):
            if lost := api.cut_off(pipe, text):
                _warn(f"The {what} is longer than the text encoder takes; not read is {lost!r}.")
        judge = _Judge(targets) if model == "emoji" else None
        record = _record(prompt, negative, model, api.model_hash(pipe), erasers, seed, images, steps, guidance)
        if judge:
            record["not_judged"] = judge.not_judged
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negative or None}
    with ExitStack() as ends:
        with _bad_input():
            folder = ends.enter_context(_folder(out))
        try:
            gently()
            _draw(pipe, erasers, prompt, call, folder, record, judge)
        except KeyboardInterrupt:
            _fail(f"Interrupted. {_finished(folder, record)}", INTERRUPTED)
        except (ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
            code = BAD_INPUT if isinstance(error, (ValueError, TypeError)) else FAILED
            _fail(f"{error or 'Out of memory.'}\n{_finished(folder, record)}", code)
    if as_json:
        typer.echo(json.dumps({"out": str(folder), **record}, indent=1))
    else:
        _report(folder, record)


def _record(
    prompt: str,
    negative: str,
    model: str,
    digest: str,
    erasers: list[Any],
    seed: int,
    n: int,
    steps: int,
    guidance: float,
) -> dict[str, Any]:
    from importlib.metadata import version

    from .core import config

    return {
        "prompt": prompt,
        "negative_prompt": negative,
        "model": {"name": model, "text_hash": digest},
        "eraser": config(erasers[0]) if len(erasers) == 1 else [config(eraser) for eraser in erasers],
        "steps": steps,
        "guidance_scale": guidance,
        "seeds": [seed, seed + n - 1],
        "versions": {"efface": __version__} | {p: version(p) for p in ("torch", "diffusers", "transformers")},
        "seconds": {"before": 0.0, "after": 0.0},
        "complete": False,
        "images": [],
    }


def _progress() -> Progress:
    """A bar on stderr with the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    # Speed over the last hour: batches may take minutes. Without a terminal there is no bar.
    return Progress(
        *columns, console=console, transient=True, speed_estimate_period=3600, disable=not console.is_terminal
    )


def _draw(
    pipe: DiffusionPipeline,
    erasers: list[Any],
    prompt: str,
    call: dict[str, Any],
    folder: Path,
    record: dict[str, Any],
    judge: _Judge | None,
) -> None:
    """Draws batch by batch, before and after with the same seeds; what is drawn is on disk at once.

    Earlier results in the folder stay until the first batch can replace them. The record names what is on disk only.
    """
    from .api import draw, stack
    from .pictures import to_pil

    (first, last), earlier = record["seeds"], _results(folder)
    pipe.set_progress_bar_config(disable=True)
    with _progress() as progress:
        task = progress.add_task("drawing", total=2 * (last - first + 1))
        for start in range(first, last + 1, BATCH):
            seeds = list(range(start, min(start + BATCH, last + 1)))
            unsaved: list[tuple[int, str, Image, dict[str, Any]]] = []
            own = [_part(eraser, start - first, len(seeds)) for eraser in erasers]
            for when in ("before", "after"):
                progress.update(task, description=when)
                began = time.perf_counter()
                with stack(pipe, *(own if when == "after" else ())):
                    pictures = draw(pipe, [prompt] * len(seeds), seeds, **call)
                record["seconds"][when] += time.perf_counter() - began
                progress.advance(task, len(seeds))
                scores = judge.scores(pictures) if judge else {}
                for k, (s, picture) in enumerate(zip(seeds, to_pil(pictures), strict=True)):
                    facts: dict[str, Any] = {"file": f"{when}-{s}.png"}
                    if judge:
                        facts["seen"] = {c: [eye[k] for eye in eyes] for c, eyes in scores.items()}
                    unsaved.append((s, when, picture, facts))
                if when == "before" and earlier:
                    continue
                while earlier:
                    earlier.pop().unlink()
                while unsaved:
                    s, which, picture, facts = unsaved[0]
                    _save(folder / facts["file"], picture)
                    if which == "before":
                        record["images"].append({"seed": s})
                    record["images"][s - first][which] = facts
                    del unsaved[0]
                _write(folder, record)
    record["complete"] = True
    _write(folder, record)


def _part(eraser: Any, start: int, n: int) -> Any:
    """The eraser for `n` pictures from number `start` on: with their `rows`, if it has any."""
    rows = getattr(eraser, "rows", None)
    return eraser if rows is None else replace(eraser, rows=rows[start : start + n])


def _save(file: Path, made: Image | str) -> None:
    """Writes a picture or a text, whole or not at all; an error names the file."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as out:
            out.write(made.encode()) if isinstance(made, str) else made.save(out, "PNG")
            out.flush()
            os.fsync(out.fileno())  # some file systems tell only now that they are full
        partial.replace(file)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(f"{file} cannot be written ({why}): free some space, or name another folder by --out.") from error
    finally:
        partial.unlink(missing_ok=True)


def _write(folder: Path, record: dict[str, Any]) -> None:
    """The record and the grid of what there is so far."""
    from PIL import Image as Pictures

    from .pictures import grid

    _save(folder / "record.json", json.dumps(record, indent=1))
    both = [e for e in record["images"] if "after" in e]
    shown = (both or record["images"])[:SHOWN]
    rows = {when: [Pictures.open(folder / e[when]["file"]) for e in shown] for when in shown[0] if when != "seed"}
    _save(folder / "grid.png", grid(rows, [str(e["seed"]) for e in shown]))


def _finished(folder: Path, record: dict[str, Any]) -> str:
    """What there is of a job that ended early, recorded as far as the disk allows."""
    drawn, (first, last) = record["images"], record["seeds"]
    if not drawn:
        return "No picture was finished."
    with suppress(OSError):  # the disk may be full, which was said already
        _write(folder, record)
    both = sum("after" in entry for entry in drawn)
    more = f", and {len(drawn) - both} more without erasing" if both < len(drawn) else ""
    return f"{both} of {last - first + 1} pictures were finished{more}; they are in {folder}."


def _report(folder: Path, record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, entries = Console(), record["images"]
    judged = entries and "seen" in entries[0]["before"]
    if judged:
        console.print(f"{_plain(record['prompt'])}: seen in {len(entries)} pictures", soft_wrap=True, highlight=False)
        table = Table()
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name in entries[0]["before"]["seen"]:
            cells = []
            for when in ("before", "after"):
                counts = [sum(e[when]["seen"][name][eye] for e in entries) for eye in range(2)]
                # The less favourable eye: the one that still sees more of a concept, or fewer recognisable icons.
                count = min(counts) if name == "any icon" or when == "before" else max(counts)
                cells.append(f"{count} ({100 * count / len(entries):.0f} %)")
            table.add_row(_plain(name), *cells)
        console.print(table)
        if record["not_judged"]:
            names = ", ".join(record["not_judged"])
            console.print(f"not judged: {_plain(names)} (the eyes do not know it)", soft_wrap=True, highlight=False)
    else:
        console.print("No detector for this model here: look at the pictures.", style="yellow")
    console.print(f"{folder}/grid.png", soft_wrap=True, highlight=False)


# ---------------------------------------------------------------- fit, delta


def _file(out: Path, overwrite: bool) -> Path:
    """The output file: in a folder that is there and writable, and not there yet unless it may be replaced."""
    try:
        if out.is_dir():
            raise ValueError(
                f"Expected --out to be a file, but {out} is a folder: add a name, such as delta.safetensors."
            )
        if out.exists() and not overwrite:
            raise ValueError(f"{out} exists: give --overwrite to replace it, or name another file.")
        _try_to_write(out.with_name(f".{out.name}.writable"))
    except OSError as error:
        raise ValueError(f"Cannot write to {out} ({error.strerror}): name another file with --out.") from error
    return out


@app.command()
def fit(
    method: Annotated[str, typer.Argument(help="An editor; see `efface list methods`.")],
    out: Annotated[Path, typer.Option(help="The file to write, such as no-alcohol.safetensors.")],
    concept: ConceptNames = None,
    phrase: Phrases = None,
    anchor: Annotated[str, typer.Option(help="What the concepts are to become; nothing in particular if empty.")] = "",
    keep: Annotated[list[str] | None, typer.Option(help="A text that must stay as it is; may be repeated.")] = None,
    model: ModelName = "emoji",
    set_: Settings = None,
    after: Annotated[list[Path] | None, typer.Option(help="Fit on top of this delta; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the fit.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn a delta that erases concepts from a model, and write it to one file."""
    with _bad_input():
        import shutil
        from inspect import signature

        targets = _targets(concept, phrase)
        if not targets:
            raise ValueError("Nothing to erase: give --concept NAME or --phrase TEXT.")
        targets = [replace(target, anchor=anchor, keep=tuple(keep or ())) for target in targets]
        fields = _fields(set_ or [])
        registry.resolve(method, "editors")
        from . import api

        editor = api.editor(method, **fields)
        file = _file(out, overwrite)
        pipe = api.load(model)
        pipe.set_progress_bar_config(disable=True)
        began, kept = time.perf_counter(), file.with_name(f"{file.name}.checkpoint")
        resumes = "checkpoint" in signature(editor.fit).parameters
        options = {"checkpoint": kept} if resumes else {}
        try:
            with api.stack(pipe, *_deltas(after)):
                file.parent.mkdir(parents=True, exist_ok=True)
                gently()
                delta = editor.fit(pipe, targets, seed=seed, **options)
        except KeyboardInterrupt:
            further = f" The same command goes on from {kept}." if kept.exists() else ""
            _fail(f"Interrupted: {file} was not written.{further}", INTERRUPTED)
        except RuntimeError as error:
            _fail(f"{error}\n{file} was not written.", FAILED)
        seconds = time.perf_counter() - began
        delta.save(file)
        if resumes:
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink(missing_ok=True)
    if as_json:
        typer.echo(json.dumps({"out": str(file), "seconds": seconds, **delta.config()}, indent=1))
    else:
        _describe(file, delta)


delta_app = typer.Typer(help="Look at deltas, and bring them to other tools.", no_args_is_help=True)
app.add_typer(delta_app, name="delta")
DeltaFile = Annotated[Path, typer.Argument(help="A file made by `efface fit`.")]


@delta_app.command()
def info(
    file: DeltaFile,
    as_json: AsJson = False,
) -> None:
    """Say what a delta erases, how it was made, and which model it belongs to."""
    with _bad_input():
        from . import api

        delta = api.load_delta(file)
    if as_json:
        typer.echo(json.dumps(delta.config(), indent=1))
    else:
        _describe(file, delta)


@delta_app.command()
def export(
    file: DeltaFile,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    layout: Annotated[
        str, typer.Option(help="diffusers (pipe.load_lora_weights) or kohya (A1111, ComfyUI).")
    ] = "diffusers",
    rank: Annotated[int | None, typer.Option(min=1, help="At most this rank; if left out, nothing is lost.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a delta as a LoRA."""
    with _bad_input(), ExitStack() as ends:
        from . import api

        delta = api.load_delta(file)
        ends.enter_context(_folder(_file(out, overwrite).parent))
        error = delta.export(out, layout, rank)  # type: ignore[arg-type]
    if as_json:
        facts = {"out": str(out), "layout": layout, "rank": rank, "relative_error": error, "delta": delta.hash}
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo(f"{out}: relative error {error:.1e}")


@delta_app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Files made by `efface fit`; several are added up.")],
    out: Annotated[Path, typer.Option(help="The folder to write the whole model to.")],
    model: ModelName = "emoji",
    as_json: AsJson = False,
) -> None:
    """Write a whole model with deltas added to its weights for good."""
    with _bad_input(), ExitStack() as ends:
        from functools import reduce
        from operator import add

        from . import api

        delta = reduce(add, _deltas(files))
        _check_folder(out, overwrite=False)
        pipe = api.load(model)
        delta.merge(pipe)
        pipe.save_pretrained(ends.enter_context(_folder(out)))
    if as_json:
        facts = {"out": str(out), "model": model, "text_hash": api.model_hash(pipe), "delta": delta.config()}
        typer.echo(json.dumps(facts, indent=1))
    else:
        typer.echo(f"{out}")


def _describe(file: Path, delta: Any) -> None:
    """A delta in a few lines."""
    from rich.console import Console
    from rich.table import Table

    config = delta.config()
    ranks = [change.rank for change in delta.weights.values() if hasattr(change, "rank")]
    whole = len(delta.weights) - len(ranks)
    kinds = [f"{len(ranks)} of rank {min(ranks)} to {max(ranks)}"] if ranks else []
    kinds += [f"{whole} whole"] if whole else []
    rows = {
        "erases": ", ".join(c["name"] for c in config["concepts"]),
        "method": " ".join([config["method"], *(f"{k}={v}" for k, v in config["fields"].items())]),
        "model": f"{config['model']}, base hash {config['base'][:16]}",
        "after": ", ".join(f"{h[:16]} at strength {s:g}" for h, s in config["after"].items()) or "-",
        "weights": f"{len(delta.weights)}: {', '.join(kinds)}",
        "hash": config["hash"][:16],
        **{name: json.dumps(value) for name, value in config["info"].items()},
    }
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(_plain(name), _plain(text))
    Console(soft_wrap=True, highlight=False).print(table)
    Console(soft_wrap=True, highlight=False).print(_plain(str(file)))


# ---------------------------------------------------------------- bench, score, report


@contextmanager
def _job(folder: Path | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Gives what tells how far a job is; exit code 2 for what was given, 1 for what failed, 130 for Ctrl-C.

    Without a terminal, as under nohup or in a batch job, a line now and then takes the place of the bar.
    """
    kept = f" What was finished is in {folder}; run the same command, it continues." if folder else ""
    with _progress() as bar:
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
            _fail(f"Interrupted.{kept}", INTERRUPTED)
        except (FileNotFoundError, ValueError, TypeError) as error:
            bar.stop()
            _fail(str(error), BAD_INPUT)
        except RuntimeError as error:
            bar.stop()
            _fail(f"{error}{kept}", FAILED)
        except (ImportError, OSError) as error:
            bar.stop()
            _fail(str(error), FAILED)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="What to draw and how to score it; see `efface list suites`.")],
    out: Annotated[Path, typer.Option(help="The run folder. An earlier run of the same command continues in it.")],
    concept: ConceptNames = None,
    phrase: Phrases = None,
    model: Annotated[
        str | None, typer.Option(help='"emoji", which is meant if there is no --data; a folder, or a hub id.')
    ] = None,
    method: MethodName = None,
    delta: DeltaFiles = None,
    set_: Settings = None,
    option: Annotated[list[str] | None, typer.Option(help="A field of the suite, NAME=VALUE.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder that holds the suite's data, if it needs any.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="The folder of the plain model's pictures; one beside --out if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at a time; it bounds the memory.")] = BATCH,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="A field of a metric, METRIC.NAME=VALUE; the suite may lack it. May be repeated."),
    ] = None,
    no_score: Annotated[bool, typer.Option("--no-score", help="Only draw; `efface score` judges it later.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a suite with and without an eraser into a run folder, and score it.

    The same command continues a run that was stopped, by Ctrl-C, a kill or a full disk.
    """
    with _bad_input():
        registry.resolve(suite, "suites")
        if model is None and data is not None:
            raise ValueError(f"Which model is to draw {suite}? Give --model FOLDER, or a hub id.")
        targets, erasers = _erasers(concept, phrase, method, delta, set_)
        from . import runs

        chosen = runs.make_suite(suite, targets, data, limit, **_fields(option or []))
        if judge:
            chosen = replace(chosen, metrics=_judges([runs.metric_config(m) for m in chosen.metrics], judge))
    _quiet()
    with _job(out) as tell:
        if not no_score:
            try:
                runs.rehearse(chosen)
            except (ImportError, OSError, ValueError) as error:
                raise ValueError(
                    f"Nothing is drawn yet, for it could not be scored: {error}\nMend that, change the metric with "
                    "--judge METRIC.NAME=VALUE, or draw with --no-score and run `efface score` later."
                ) from error
        command = shlex.join(["efface", *sys.argv[1:]])
        made = runs.run(
            chosen, model or "emoji", eraser=erasers, out=out, base=base, batch=batch, progress=tell, command=command
        )
        if not no_score:
            runs.score(made, progress=tell)
    if no_score:
        typer.echo(
            json.dumps({"out": str(out), "n": made.n}) if as_json else f"{out}: drawn; `efface score {out}` is next"
        )
    else:
        _scored(made, as_json)


def _quiet() -> None:
    """Keeps libraries from printing, batch by batch, the prompts that are longer than the text encoder takes."""
    import warnings

    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    warnings.filterwarnings("ignore", message="A prompt is longer than the text encoder takes")
    diffusers_log.set_verbosity_error()
    transformers_log.set_verbosity_error()


def _judges(configs: Sequence[Mapping[str, Any]], settings: list[str]) -> tuple[Metric, ...]:
    """Metrics with some of their fields set, and those that settings name besides; METRIC may be left out if one."""
    from . import runs

    changed = [dict(config) for config in configs]
    for key, value in _fields(settings).items():
        name, _, field = key.rpartition(".")
        meant = [config for config in changed if name in ("", config["method"])]
        if not meant and name in registry.methods("metrics"):
            meant = [{"method": name}]
            changed += meant
        if len(meant) != 1:
            known = ", ".join(config["method"] for config in changed)
            raise ValueError(f"Expected METRIC.NAME=VALUE with one of the metrics {known}, but got {key!r}.")
        meant[0][field] = value
    return runs.make_metrics(changed)


@app.command()
def score(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="What to measure instead of what the suite says; may be repeated.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of a metric, METRIC.NAME=VALUE; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run again, from its pictures."""
    with _bad_input():
        from . import runs

        found = runs.Run.open(run)
        configs = [{"method": name} for name in metric or []] or found.record["metrics"]
        metrics = _judges(configs, set_ or [])
    with _job() as tell:
        runs.score(found, metrics, progress=tell)
    _scored(found, as_json)


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(help="Scored run folders.")],
    out: Annotated[Path, typer.Option(help="The page to write; its numbers go beside it as JSON.")] = Path(
        "report.html"
    ),
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Also show runs that must not be compared, in marked groups.")
    ] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Rows of pictures, at most.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Write scored runs into one HTML page that stands alone."""
    with _job():
        from .report import write_report

        card = write_report(run, out, mixed=mixed, pairs=pairs)
    typer.echo(json.dumps(card, indent=1) if as_json else str(out))


def _scored(run: Run, as_json: bool) -> None:
    """The scores of a run beside the plain model's."""
    card = run.card()
    if as_json:
        typer.echo(json.dumps({"out": str(run.folder), **card}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from .report import number, span

    scores, base = run.scores()
    plain, table = {s.metric: s for s in base}, Table(box=None, caption="95 % intervals", caption_justify="left")
    for heading in ("", "plain", "erased", "n"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for s in scores:
        if "/" not in s.metric:
            cells = [f"{number(each)} {span(each)}" for each in (plain.get(s.metric), s)]
            table.add_row(*map(_plain, (s.metric, *cells)), str(s.n))
    console = Console()
    console.print(table)
    console.print(f"{run.folder}; `efface report {run.folder}` shows more", soft_wrap=True, highlight=False)


# ---------------------------------------------------------------- calibrate


def _in_turn(prompts: list[str], most: int) -> list[str]:
    """At most so many of them, evenly spread."""
    return prompts if len(prompts) <= most else [prompts[k * len(prompts) // most] for k in range(most)]


@app.command()
def calibrate(
    concept: Annotated[str, typer.Option(help="The shipped concept to erase.")],
    model: Annotated[str, typer.Option(help='"emoji": other models have no detector on the command line.')] = "emoji",
    method: Annotated[str, typer.Option(help="How to erase; see `efface list methods`.")] = "eiup",
    set_: Annotated[list[str] | None, typer.Option("--set", help="A field of the method, NAME=VALUE.")] = None,
    target: Annotated[float, typer.Option(min=0, max=1, help="Most that may be left, as a share.")] = 0.03,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Least that must be kept, as a share.")] = 0.95,
    strength: Annotated[list[float] | None, typer.Option(help="A strength to try; may be repeated.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt that draws the concept; may be repeated.")] = None,
    keep_prompt: Annotated[list[str] | None, typer.Option(help="A prompt that must survive; may be repeated.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Pictures for each rate.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="First of the tuning seeds, which go up to 9,999.")] = 1_000,
    refine: Annotated[int, typer.Option(min=0, help="How often to halve the gap below.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    out: Annotated[Path | None, typer.Option(help="Output folder; an interrupted one goes on.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Also draw calibration.png; needs matplotlib.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the smallest strength that erases a concept and keeps the rest, on tuning seeds."""
    with _bad_input(), ExitStack() as ends:
        if model != "emoji":
            raise ValueError(
                f"There is no detector for {model!r} on the command line: use efface.calibrate with your own."
            )
        from .core import shipped_concepts
        from .models import emoji

        shipped = shipped_concepts()
        drawn = [name for name in shipped if _known(emoji.truth, name)]
        if concept not in drawn:
            why = "is a shipped concept, but emoji cannot draw it" if concept in shipped else "is not a shipped concept"
            hint = registry.near(concept, drawn)
            raise ValueError(f"{concept!r} {why}. {hint}{' ' if hint else ''}It can draw {', '.join(drawn)}.")
        about = shipped[concept]
        fields = _fields(set_ or [])
        if "strength" in fields:
            raise ValueError(
                "The strength is what is looked for: give --strength for those to try, not --set strength."
            )
        cells = {cell: [text for text, _ in emoji.prompts(about.name, cell)] for cell in emoji.CELLS}
        registry.resolve(registry.split(method)[0], "erasers")
        from . import api
        from .calibration import STRENGTHS
        from .calibration import calibrate as search

        eraser = api.build(method, about, **fields)
        _check_guidance([eraser], guidance)
        if out is None or not (out / "setting.json").exists():
            _check_folder(out, False)
        pipe = api.load(model)
        eraser.apply(pipe).remove()
        out = ends.enter_context(_folder(out))
        pipe.set_progress_bar_config(disable=True)
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        from .models.emoji.eyes import ConceptEyes

        eyes = ConceptEyes(about.name)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("plain", total=None)

            def tell(what: str, pictures: int) -> None:
                bar.advance(task, pictures)
                bar.update(task, description=f"{what}, {bar.tasks[0].completed:g} pictures")

            try:
                gently()
                found = search(
                    pipe,
                    eraser,
                    about,
                    eyes,
                    target,
                    keep,
                    prompts=prompt or _in_turn(cells["explicit"] + cells["theme"], n),
                    keep_prompts=keep_prompt or _in_turn(cells["pair"], n),
                    kept=eyes.kept,
                    strengths=strength or STRENGTHS,
                    refine=refine,
                    n=n,
                    first_seed=seed,
                    out=out,
                    plot=plot,
                    progress=tell,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                )
            except KeyboardInterrupt:
                _fail(f"Interrupted. Every finished strength is in {out}: the same command with --out goes on.", 130)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "concept": about.name, "method": method, **found.record()}, indent=1))
        return
    from rich.table import Table

    table = Table("strength", "left", "kept")
    for point in found.points:
        table.add_row(f"{point.strength:g}", str(point.left), str(point.kept), style="bold" * (point == found.best))
    Console().print(table)
    for line in (str(found), f"{out}/calibration.json"):
        Console().print(_plain(line), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
