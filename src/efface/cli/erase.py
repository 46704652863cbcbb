"""`efface erase`: a prompt before and after."""

from __future__ import annotations

import json
import math
import re
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from .._interrupt import INTERRUPTED, gently
from .errors import BAD_INPUT, FAILED, bad_input, fail, warn
from .folders import check_folder, output_folder
from .options import (
    AsJson,
    ConceptNames,
    DeltaFiles,
    MethodName,
    ModelName,
    Phrases,
    Settings,
    check_guidance,
    find_erasers,
    known,
)
from .output import escaped, progress, quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from ..core import Concept

SHOWN = 8  # pictures in the grid
BATCH = 8


def _results(folder: Path) -> list[Path]:
    """What `efface erase` wrote there, and nothing else."""
    ours = re.compile(r"(before|after)-\d+\.png|grid\.png|record\.json")
    return [file for file in folder.iterdir() if ours.fullmatch(file.name)]


class _Judge:
    """What the eyes of the emoji model say about pictures; for other models nothing is said."""

    def __init__(self, concepts: list[Concept]) -> None:
        from ..models import emoji
        from ..models.emoji.eyes import load_eyes

        self.eyes = load_eyes()
        names = dict.fromkeys(c.name for c in concepts)
        self.judged = [name for name in names if name == "watermark" or known(emoji.truth, name)]
        self.not_judged = [name for name in names if name not in self.judged]

    def scores(self, images: Tensor) -> dict[str, list[list[bool]]]:
        """Concept to one list per eye, one answer per picture; "any icon" beside them."""
        seen = self.eyes.see(images)
        found = {name: self.eyes.concept(seen, name).tolist() for name in self.judged}
        return found | {"any icon": self.eyes.icons(seen).any(-1).tolist()}


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
    with bad_input():
        if not prompt.strip():
            raise ValueError("The prompt is empty: write what to draw.")
        if not math.isfinite(guidance):
            raise ValueError(f"Expected --guidance to be a finite number, but got {guidance}.")
        if seed + images > 2**32:
            raise ValueError(f"Seeds go up to {2**32 - 1}, but {images} pictures from {seed} on go past it.")
        targets, erasers = find_erasers(concept, phrase, method, delta, set_)
        for rows in (getattr(eraser, "rows", None) for eraser in erasers):
            if rows is not None and len(rows) != images:
                raise ValueError(f"`rows` has {len(rows)} entries, but --images is {images}: give one list a picture.")
        from .. import api

        check_guidance(erasers, guidance)
        check_folder(out, overwrite)
        pipe = api.load(model)
        quiet()
        api.stack(pipe, *erasers).remove()  # a phrase too long or a wrong pipeline is found before anything is drawn
        for what, text in (("prompt", prompt), ("negative prompt", negative)):
            if lost := api.cut_off(pipe, text):
                warn(f"The {what} is longer than the text encoder takes; not read is {lost!r}.")
        judge = _Judge(targets) if model == "emoji" else None
        record = _record(prompt, negative, model, api.model_hash(pipe), erasers, seed, images, steps, guidance)
        if judge:
            record["not_judged"] = judge.not_judged
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negative or None}
    with ExitStack() as ends:
        with bad_input():
            folder = ends.enter_context(output_folder(out))
        try:
            gently()
            _draw(pipe, erasers, prompt, call, folder, record, judge)
        except KeyboardInterrupt:
            fail(f"Interrupted. {_finished(folder, record)}", INTERRUPTED)
        except (ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
            code = BAD_INPUT if isinstance(error, (ValueError, TypeError)) else FAILED
            fail(f"{error or 'Out of memory.'}\n{_finished(folder, record)}", code)
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

    from ..core import config

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
    from ..api import draw, stack
    from ..pictures import to_pil

    (first, last), earlier = record["seeds"], _results(folder)
    pipe.set_progress_bar_config(disable=True)
    with progress() as bar:
        task = bar.add_task("drawing", total=2 * (last - first + 1))
        for start in range(first, last + 1, BATCH):
            seeds = list(range(start, min(start + BATCH, last + 1)))
            unsaved: list[tuple[int, str, Image, dict[str, Any]]] = []
            own = [_part(eraser, start - first, len(seeds)) for eraser in erasers]
            for when in ("before", "after"):
                bar.update(task, description=when)
                began = time.perf_counter()
                with stack(pipe, *(own if when == "after" else ())):
                    pictures = draw(pipe, [prompt] * len(seeds), seeds, **call)
                record["seconds"][when] += time.perf_counter() - began
                bar.advance(task, len(seeds))
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
    from .. import files
    from ..pictures import png

    try:
        files.write(file, made if isinstance(made, str) else png(made))
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(f"{file} cannot be written ({why}): free some space, or name another folder by --out.") from error


def _write(folder: Path, record: dict[str, Any]) -> None:
    """The record and the grid of what there is so far."""
    from PIL import Image as Pictures

    from ..pictures import grid

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
        console.print(f"{escaped(record['prompt'])}: seen in {len(entries)} pictures", soft_wrap=True, highlight=False)
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
            table.add_row(escaped(name), *cells)
        console.print(table)
        if record["not_judged"]:
            names = ", ".join(record["not_judged"])
            console.print(f"not judged: {escaped(names)} (the eyes do not know it)", soft_wrap=True, highlight=False)
    else:
        console.print("No detector for this model here: look at the pictures.", style="yellow")
    console.print(f"{folder}/grid.png", soft_wrap=True, highlight=False)
