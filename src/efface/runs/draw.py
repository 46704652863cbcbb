"""Draws every row of a suite into a run folder, and goes on where an earlier process ended."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks, files, registry
from ..core import Concepts, as_concepts
from ..records import Row, Suite, rows_hash
from .folder import IMAGES, LOCK, RUN, SAMPLES, claim, disk, mend
from .judges import metric_config
from .record import DECIDES, FORMAT, Progress, Run, digest, model_facts, session, silent

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from ..core import Eraser

Paint = Callable[[Sequence[Row], Mapping[str, Any]], Iterable[tuple["Image", dict[str, Any]]]]
"""Rows and their common pipeline arguments to one picture per row, each with what there is to note about it."""


def make_suite(
    name: str, concepts: Concepts = (), data: str | Path | None = None, limit: int | None = None, **options: Any
) -> Suite:
    """A suite by name, with its rows.

    Args:
        name: as in `efface list suites`.
        concepts: what is to be erased; the suite chooses its rows by them.
        data: the suite's data, for suites that read a file or folder of the user's.
        limit: at most so many rows.
        options: the suite's own fields.

    Raises:
        ValueError: no such suite or field; or what the suite says of concepts and data.

    Example:
        >>> import efface
        >>> efface.make_suite("emojii")
        Traceback (most recent call last):
        ValueError: Unknown suite 'emojii'. ...
    """
    cls = registry.resolve(name, "suites")
    checks.fields(name, cls, options)
    suite: Suite = cls(**options).load(as_concepts(concepts), None if data is None else Path(data), limit)
    return suite


def run(
    suite: Suite,
    model: str | Path | DiffusionPipeline,
    *,
    eraser: Eraser | Sequence[Eraser] | None = None,
    out: str | Path,
    base: str | Path | Run | None = None,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
    command: str | None = None,
) -> Run:
    """Draws every row of a suite into a run folder, or continues where an earlier call ended.

    The plain model's pictures of the same rows are drawn first, into the folder `base`; every run of the same suite,
    model and seeds shares them.

    Args:
        suite: what to draw and how.
        model: a name as `efface.load` takes it, or a pipeline without active erasers.
        eraser: what to apply, or several in order; None draws the plain model.
        out: the run folder; made if it does not exist.
        base: the folder of the plain pictures; None: `base-SUITE-HASH` beside `out`.
        limit: only the first so many rows, at least 1.
        batch: pictures per pipeline call, at least 1. It bounds the memory.
        progress: called after each batch with what is drawn, how many pictures are done, and of how many.
        command: what to write down as the command; None: this process's own.

    Returns:
        The run, complete.

    Raises:
        ValueError: `out` holds another run (the message names what differs) or other files; a pipeline with erasers on.
        BlockingIOError: another process is at work in `out`.
        OSError: a full disk or one that cannot be written to. What was finished stays, and the same call continues.

    Example:
        >>> import tempfile
        >>> import efface
        >>> cat = efface.Row("cat-0", "a cat", 1_000_000, concept="cat")
        >>> suite = efface.Suite("cats", "1", (cat,), call={"num_inference_steps": 1})
        >>> efface.run(suite, "emoji", eraser=efface.EIUP("cat"), out=tempfile.mkdtemp() + "/cats").complete
        True
    """
    checks.whole("batch", batch)
    if limit is not None:
        checks.whole("limit", limit)
    rows = suite.rows[:limit]
    if not rows:
        raise ValueError(f"The suite {suite.name!r} has no rows: nothing to draw.")
    folder = claim(Path(out))
    from .. import api
    from ..delta import active
    from ..hooks.sites import handles as erasers_on

    name = str(model) if isinstance(model, (str, Path)) else None
    pipe = api.load(model) if isinstance(model, (str, Path)) else model
    if erasers_on(pipe) or active(pipe):
        raise ValueError("The pipeline has an eraser on: remove it, and give it as `eraser=` instead.")
    pipe.set_progress_bar_config(disable=True)
    erasers = several(eraser)
    with api.stack(pipe, *erasers) as handles:  # what does not fit the pipeline is found before anything is drawn
        configs = handles.config()
    plain = {
        "format": FORMAT,
        "suite": {f: getattr(suite, f) for f in ("name", "version", "source", "licence", "data_hash")},
        "rows": {"n": len(rows), "sha256": rows_hash(rows)},
        "call": dict(suite.call),
        "batch": batch,
        "model": model_facts(pipe, name),
        "erasers": [],
        "metrics": [metric_config(m) for m in suite.metrics],
        "base": None,
    }
    sessions = [session(command)]
    paint, done = painter(pipe), progress or silent
    if not erasers:
        record = work(folder, plain | {"sessions": sessions}, rows, paint, done, "plain")
        return Run(folder, record, suite.metrics)
    if isinstance(base, Run):
        base = base.folder
    mark = digest({key: plain[key] for key in DECIDES})[:8]
    beside = Path(base) if base is not None else folder.parent / f"base-{suite.name}-{mark}"
    if beside.resolve() == folder.resolve():
        raise ValueError(f"`base` and `out` are one folder, {folder}: name two.")
    with files.lock(folder / LOCK):
        _agree(folder, plain | {"erasers": configs})
        work(claim(beside), plain | {"sessions": sessions}, rows, paint, done, "plain", wait=True)
        erased = plain | {"erasers": configs, "base": os.path.relpath(beside, folder), "sessions": sessions}
        with api.stack(pipe, *erasers):
            record = _fill(folder, erased, rows, paint, done, "erased")
    return Run(folder, record, suite.metrics)


def work(
    folder: Path,
    record: dict[str, Any],
    rows: Sequence[Row],
    paint: Paint,
    progress: Progress,
    what: str = "",
    wait: bool = False,
) -> dict[str, Any]:
    """Makes a run folder complete, whatever paints the pictures. Returns its record.

    Args:
        folder: made by now; locked while this works.
        record: what its run.json shall say, with one entry in `sessions`; an earlier one must agree.
        rows: all rows of the run.
        paint: draws rows.
        progress: told after each batch.
        what: the word for it in `progress`.
        wait: whether to wait for another process at work in the folder, or to refuse.
    """
    with files.lock(folder / LOCK, (lambda: progress(f"waiting for {folder}", 0, len(rows))) if wait else None):
        return _fill(folder, record, rows, paint, progress, what)


def _fill(
    folder: Path, record: dict[str, Any], rows: Sequence[Row], paint: Paint, progress: Progress, what: str
) -> dict[str, Any]:
    from .. import schema

    schema.check(
        files.as_json(record), schema.RunFile, "the record of this run", "Shorten the suite, or mend its texts."
    )
    earlier = _agree(folder, record)
    size, total = record["batch"], len(rows)
    with disk(folder, 0 if earlier is None else None, total):
        files.inside(folder, IMAGES).mkdir(exist_ok=True)
        kept = mend(folder, total, size)
        if earlier is not None and len(kept) == total:
            progress(what, total, total)
            if earlier["metrics"] != record["metrics"]:  # how the finished pictures are to be judged from now on
                earlier["metrics"] = record["metrics"]
                files.write_json(folder / RUN, earlier)
            return earlier
        record = record | {"sessions": [*(earlier or {}).get("sessions", []), *record["sessions"]]}
        files.write_json(folder / RUN, record)
    done = len(kept)
    progress(what, done, total)
    for start in range(0, total, size):
        if start in kept:
            continue
        numbers = range(start, min(start + size, total))
        entries: dict[int, dict[str, Any]] = {}
        for call, group in calls(rows, numbers, record["call"]):
            began = time.perf_counter()
            painted = list(paint([rows[k] for k in group], call))
            each = round((time.perf_counter() - began) / len(group), 6)
            if len(painted) != len(group):
                raise RuntimeError(f"The pipeline made {len(painted)} pictures of {len(group)} prompts.")
            with disk(folder, done, total):
                for k, (picture, notes) in zip(group, painted, strict=True):
                    file = f"{IMAGES}/{rows[k].id}.png"
                    content = _png(picture)
                    files.create(folder / file, content)  # it counts only once samples.jsonl names it
                    entries[k] = {"k": k, "file": file, "bytes": len(content), "sha256": files.sha256(content)}
                    entries[k] |= {"seconds": each, **notes, "row": dataclasses.asdict(rows[k])}
        with disk(folder, done, total):
            files.sync(folder / IMAGES)
            files.append(folder / SAMPLES, "".join(json.dumps(entries[k]) + "\n" for k in numbers))
        done += len(numbers)
        progress(what, done, total)
    return record


def _png(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def calls(
    rows: Sequence[Row], numbers: Iterable[int], call: Mapping[str, Any]
) -> list[tuple[dict[str, Any], list[int]]]:
    """The rows of one batch by equal pipeline arguments, in the order of their first row."""
    found: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for k in numbers:
        whole = {**call, **rows[k].call}
        found.setdefault(json.dumps(whole, sort_keys=True), (whole, []))[1].append(k)
    return list(found.values())


def painter(pipe: DiffusionPipeline) -> Paint:
    from ..api import draw
    from ..pictures import to_pil

    def paint(rows: Sequence[Row], call: Mapping[str, Any]) -> Iterator[tuple[Image, dict[str, Any]]]:
        pictures = draw(pipe, [r.prompt for r in rows], [r.seed for r in rows], batch=len(rows), **call)
        finite = pictures.isfinite().flatten(1).all(1).tolist()
        images = to_pil(pictures.nan_to_num(0.0, 1.0, 0.0))
        for image, whole in zip(images, finite, strict=True):
            yield image, {} if whole else {"finite": False}

    return paint


def several(eraser: Any) -> tuple[Eraser, ...]:
    """One eraser, several, or none, as a tuple."""
    if eraser is None:
        return ()
    found: list[Any] = []
    if isinstance(eraser, Sequence) and not isinstance(eraser, str):
        found.extend(eraser)
    else:
        found.append(eraser)
    return tuple(found)


def _agree(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier process, or None; ValueError if it is one of another run."""
    if not files.there(folder / RUN):
        return None
    earlier = Run.open(folder).record
    now = {key: record[key] for key in DECIDES}
    files.check_same({key: earlier[key] for key in now}, now, f"{folder} holds another run", "Name another folder.")
    return dict(earlier)
