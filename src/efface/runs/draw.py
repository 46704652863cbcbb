"""Draws every row of a suite into a run folder, and continues where an earlier process ended."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..pictures import png, to_pil
from ..records import Row
from .folder import IMAGES, LOCK, RUN, SAMPLES, disk, mend
from .record import DECIDES, Progress, Run
from .remote import send

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from ..core import Eraser

Paint = Callable[[Sequence[Row], Mapping[str, Any]], Iterable[tuple["Image", dict[str, Any]]]]
"""Maps rows and their common pipeline arguments to one picture per row, each with notes."""
Batch = list[tuple[dict[str, Any], list[int]]]
"""The pipeline calls of a batch: arguments, and the numbers of their rows."""
Pictures = tuple[list[tuple[bytes, dict[str, Any]]], float]
"""The pictures of one pipeline call as PNG, each with notes; and the seconds per picture."""
Drawn = list[Pictures]
"""The pictures of the calls of a batch."""
Draw = Callable[[Iterable[Batch]], Iterator[Drawn]]
"""Draws batches, and returns them in order."""


def work(
    folder: Path,
    record: dict[str, Any],
    rows: Sequence[Row],
    draw: Draw,
    progress: Progress,
    what: str = "",
    wait: bool = False,
) -> dict[str, Any]:
    """Completes a run folder, with any function that draws batches. Returns the record.

    Args:
        folder: an existing folder. Locked during the work.
        record: the content of run.json, with one entry in `sessions`. An earlier record must agree.
        rows: all rows of the run.
        draw: draws batches.
        progress: called after each batch.
        what: the task's name for `progress`.
        wait: whether to wait for another process in the folder. Otherwise raises.
    """
    with files.lock(folder / LOCK, (lambda: progress(f"waiting for {folder}", 0, len(rows))) if wait else None):
        return fill(folder, record, rows, draw, progress, what)


def fill(
    folder: Path, record: dict[str, Any], rows: Sequence[Row], draw: Draw, progress: Progress, what: str
) -> dict[str, Any]:
    from .. import schema

    schema.check(
        files.as_json(record), schema.RunFile, "the record of this run", "Shorten the suite, or correct its texts."
    )
    earlier = agree(folder, record)
    size, total = record["batch"], len(rows)
    with disk(folder, 0 if earlier is None else None, total):
        files.inside(folder, IMAGES).mkdir(exist_ok=True)
        kept = mend(folder, total, size)
        if earlier is not None and len(kept) == total:
            progress(what, total, total)
            if earlier["metrics"] != record["metrics"]:  # the metrics for later scores
                earlier["metrics"] = record["metrics"]
                files.write_json(folder / RUN, earlier)
            return earlier
        record = record | {"sessions": [*(earlier or {}).get("sessions", []), *record["sessions"]]}
        files.write_json(folder / RUN, record)
    send(folder, [RUN])
    done = len(kept)
    progress(what, done, total)
    missing = [range(start, min(start + size, total)) for start in range(0, total, size) if start not in kept]
    batches = [calls(rows, numbers, record["call"]) for numbers in missing]
    for numbers, batch, drawn in zip(missing, batches, draw(batches), strict=True):
        entries: dict[int, dict[str, Any]] = {}
        with disk(folder, done, total):
            for (_, group), (pictures, seconds) in zip(batch, drawn, strict=True):
                for k, (content, notes) in zip(group, pictures, strict=True):
                    file = f"{IMAGES}/{rows[k].id}.png"
                    files.create(folder / file, content)  # it counts only once samples.jsonl names it
                    entries[k] = {"k": k, "file": file, "bytes": len(content), "sha256": files.sha256(content)}
                    entries[k] |= {"seconds": seconds, **notes, "row": dataclasses.asdict(rows[k])}
            files.sync(folder / IMAGES)
            files.append(folder / SAMPLES, "".join(json.dumps(entries[k]) + "\n" for k in numbers))
        send(folder, [*(entries[k]["file"] for k in numbers), SAMPLES])
        done += len(numbers)
        progress(what, done, total)
    return record


def locally(paint: Paint, rows: Sequence[Row]) -> Draw:
    """Draws batches of these rows in this process, one after the other."""

    def draw(batches: Iterable[Batch]) -> Iterator[Drawn]:
        for batch in batches:
            yield [timed(paint, [rows[k] for k in group], call) for call, group in batch]

    return draw


def timed(paint: Paint, rows: Sequence[Row], call: Mapping[str, Any]) -> Pictures:
    """Draws the rows of one pipeline call."""
    began = time.perf_counter()
    painted = list(paint(rows, call))
    seconds = round((time.perf_counter() - began) / len(rows), 6)
    if len(painted) != len(rows):
        raise RuntimeError(
            f"The pipeline made {len(painted)} pictures for {len(rows)} prompts. Set it to draw one picture per prompt."
        )
    return [(png(picture), notes) for picture, notes in painted], seconds


def calls(
    rows: Sequence[Row], numbers: Iterable[int], call: Mapping[str, Any]
) -> list[tuple[dict[str, Any], list[int]]]:
    """Groups the rows of one batch by pipeline arguments, in the order of their first row."""
    found: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for k in numbers:
        whole = {**call, **rows[k].call}
        found.setdefault(json.dumps(whole, sort_keys=True), (whole, []))[1].append(k)
    return list(found.values())


def painter(pipe: DiffusionPipeline) -> Paint:
    from ..families import family
    from ..pipelines import draw

    def paint(rows: Sequence[Row], call: Mapping[str, Any]) -> Iterator[tuple[Image, dict[str, Any]]]:
        call = family(pipe).protocol(call)
        pictures = draw(pipe, [r.prompt for r in rows], [r.seed for r in rows], batch=len(rows), **call)
        finite = pictures.isfinite().flatten(1).all(1).tolist()
        images = to_pil(pictures.nan_to_num(0.0, 1.0, 0.0))
        for image, whole in zip(images, finite, strict=True):
            yield image, {} if whole else {"finite": False}

    return paint


def several(eraser: Any) -> tuple[Eraser, ...]:
    """A tuple of one, several or no erasers."""
    if eraser is None:
        return ()
    found: list[Any] = []
    if isinstance(eraser, Sequence) and not isinstance(eraser, str):
        found.extend(eraser)
    else:
        found.append(eraser)
    return tuple(found)


def agree(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier process, or None. Raises ValueError if it belongs to another run."""
    if not files.there(folder / RUN):
        return None
    earlier = Run.open(folder).record
    now = {key: record[key] for key in DECIDES}
    files.check_same({key: earlier[key] for key in now}, now, f"{folder} holds another run", "Name another folder.")
    return dict(earlier)
