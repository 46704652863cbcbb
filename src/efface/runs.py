"""A run is a folder: the pictures that a model draws for a suite, what judges say of them, and how to make it again.

    run.json       suite, model, erasers, sampling, versions, command: all that decides the pictures
    images/        one PNG per row, named by the row's id
    samples.jsonl  one line per picture, appended and flushed to disk batch by batch
    scores.json    every score with its value per picture, of this run and of the plain model
    card.json      the summary, for reports and leaderboards

A run may stop at any moment, by Ctrl-C, a kill or a full disk: the same call continues it. Batches are cut by row index
alone; inside a batch, rows with equal pipeline arguments are drawn in one call. So what a batch looks like does not
depend on where an earlier process ended. What was half written of a batch is drawn again. Works where `fcntl` does
(Linux, macOS).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, checks, registry
from .core import Concepts, Metric, Row, Sample, Score, Suite, as_concepts, rows_hash
from .progress import Tell, shows

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from .core import Eraser

__all__ = ["Run", "make_suite", "run", "score"]

RUN, IMAGES, SAMPLES, SCORES, CARD, LOCK = "run.json", "images", "samples.jsonl", "scores.json", "card.json", ".lock"
FORMAT = 1
DECIDES = ("format", "suite", "rows", "call", "batch", "model", "erasers")
"""The entries of run.json that decide the pictures: a folder continues only if all of them agree."""

Paint = Callable[[Sequence[Row], Mapping[str, Any]], Iterable[tuple["Image", dict[str, Any]]]]
"""Rows and their common pipeline arguments to one picture per row, each with what there is to note about it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        folder: where it is.
        record: what its run.json says.
        metrics: the suite's metrics, if they are at hand; else they are made from the record.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.Run.open(tempfile.mkdtemp())
        Traceback (most recent call last):
        FileNotFoundError: ... is not a run folder: it has no run.json. `efface bench` makes one.
    """

    folder: Path
    record: Mapping[str, Any]
    metrics: tuple[Metric, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in a folder.

        Raises:
            FileNotFoundError: there is no run in it.
            ValueError: its record cannot be read, or another version of Efface wrote it.
        """
        path = Path(folder) / RUN
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {RUN}. `efface bench` makes one.")
        record = _json(path)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path} is not a record of format {FORMAT}: run it again with this version of Efface.")
        return cls(Path(folder), record)

    @property
    def n(self) -> int:
        """How many pictures the whole run has."""
        return int(self.record["rows"]["n"])

    @property
    def complete(self) -> bool:
        return len(_kept(self.folder, self.n, self.record["batch"])) == self.n

    @property
    def base(self) -> Run | None:
        """The plain model's run of the same rows; None if this is one itself."""
        beside = self.record["base"]
        return Run.open(os.path.normpath(self.folder / beside)) if beside else None

    def entries(self) -> list[dict[str, Any]]:
        """The finished lines of samples.jsonl, in row order."""
        kept = _kept(self.folder, self.n, self.record["batch"])
        return [json.loads(kept[k]) for k in sorted(kept)]

    def samples(self) -> list[Sample]:
        """What was drawn, in row order; pictures are read when they are asked for."""
        return [Sample(Row(**entry["row"]), path=self.folder / entry["file"]) for entry in self.entries()]

    def scores(self) -> tuple[list[Score], list[Score]]:
        """The scores of this run and of the plain model; `efface.score` makes them.

        Raises:
            FileNotFoundError: the run is not scored yet.
        """
        path = self.folder / SCORES
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} has no scores yet: `efface score {self.folder}` makes them.")
        found = _json(path)
        return [_score(s) for s in found["scores"]], [_score(s) for s in found["base"]]

    def card(self) -> dict[str, Any]:
        """The summary that reports read; `efface.score` makes it."""
        if not (self.folder / CARD).is_file():
            raise FileNotFoundError(f"{self.folder} has no {CARD} yet: `efface score {self.folder}` makes it.")
        card: dict[str, Any] = _json(self.folder / CARD)
        return card


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


@shows
def run(
    suite: Suite,
    model: str | Path | DiffusionPipeline,
    *,
    name: str | None = None,
    eraser: Eraser | Sequence[Eraser] | None = None,
    out: str | Path,
    base: str | Path | Run | None = None,
    limit: int | None = None,
    batch: int = 8,
    progress: bool | Tell | None = None,
    command: str | None = None,
) -> Run:
    """Draws every row of a suite into a run folder, or continues where an earlier call ended.

    The plain model's pictures of the same rows are drawn first, into the folder `base`; every run of the same suite,
    model and seeds shares them.

    Args:
        suite: what to draw and how.
        model: a name as `efface.load` takes it, or a pipeline without active erasers.
        name: what the record calls a pipeline; None: its class.
        eraser: what to apply, or several in order; None draws the plain model.
        out: the run folder; made if it does not exist.
        base: the folder of the plain pictures; None: `base-SUITE-HASH` beside `out`.
        limit: only the first so many rows, at least 1.
        batch: pictures per pipeline call, at least 1. It bounds the memory.
        progress: True shows a bar with the time left. A callable gets what is drawn, how many are done, of how many.
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
    folder = _folder(Path(out))
    from . import api
    from .delta import active
    from .hooks.sites import handles as erasers_on

    name = str(model) if isinstance(model, (str, Path)) else name
    pipe = api.load(model) if isinstance(model, (str, Path)) else model
    if erasers_on(pipe) or active(pipe):
        raise ValueError("The pipeline has an eraser on: remove it, and give it as `eraser=` instead.")
    pipe.set_progress_bar_config(disable=True)
    erasers = _several(eraser)
    with api.stack(pipe, *erasers) as handles:  # what does not fit the pipeline is found before anything is drawn
        configs = handles.config()
    plain = {
        "format": FORMAT,
        "suite": {f: getattr(suite, f) for f in ("name", "version", "source", "licence", "data_hash")},
        "rows": {"n": len(rows), "sha256": rows_hash(rows)},
        "call": dict(suite.call),
        "batch": batch,
        "model": _model(pipe, name),
        "erasers": [],
        "metrics": [metric_config(m) for m in suite.metrics],
        "base": None,
    }
    session = {"started": _now(), "command": command or this_command(), "versions": _versions(), "machine": _machine()}
    paint, done = _painter(pipe), progress if callable(progress) else _silent
    if not erasers:
        record = work(folder, plain | {"sessions": [session]}, rows, paint, done, "plain")
        return Run(folder, record, suite.metrics)
    if isinstance(base, Run):
        base = base.folder
    digest = _digest({key: plain[key] for key in DECIDES})
    beside = Path(base) if base is not None else folder.parent / f"base-{suite.name}-{digest[:8]}"
    if beside.resolve() == folder.resolve():
        raise ValueError(f"`base` and `out` are one folder, {folder}: name two.")
    with _locked(folder):
        _agree(folder, plain | {"erasers": configs})
        work(_folder(beside), plain | {"sessions": [session]}, rows, paint, done, "plain", wait=True)
        erased = plain | {"erasers": configs, "base": os.path.relpath(beside, folder), "sessions": [session]}
        with api.stack(pipe, *erasers):
            record = _fill(folder, erased, rows, paint, done, "erased")
    return Run(folder, record, suite.metrics)


@shows
def score(
    run: Run | str | Path, metrics: Sequence[Metric] | None = None, progress: bool | Tell | None = None
) -> list[Score]:
    """Scores a finished run and writes scores.json and card.json into its folder; draws nothing.

    The plain model's pictures are scored by the same metrics, and their scores stand beside the run's.

    Args:
        run: a run, or its folder.
        metrics: what to measure; None: the suite's metrics.
        progress: True shows a bar. A callable gets each metric's name, how many are done, and of how many.

    Raises:
        FileNotFoundError: no run in the folder, or its base is gone.
        ValueError: the run is not complete, or there is nothing to measure.

    Returns:
        The scores of the run.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.score(tempfile.mkdtemp())
        Traceback (most recent call last):
        FileNotFoundError: ... is not a run folder: it has no run.json. `efface bench` makes one.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    chosen = tuple(metrics) if metrics is not None else run.metrics or make_metrics(run.record["metrics"])
    if not chosen:
        raise ValueError(f"Nothing to measure: the suite of {run.folder} names no metrics. Give `metrics=` (--metric).")
    plain, samples = run.base, run.samples()
    base = plain.samples() if plain else samples
    for name, drawn, n in ((run.folder, samples, run.n), (plain.folder if plain else run.folder, base, run.n)):
        if len(drawn) != n:
            raise ValueError(
                f"{name} is not finished: {len(drawn)} of {n} pictures. Run the command that made it, it continues."
            )
    tell = progress if callable(progress) else _silent
    measured: list[list[Score]] = [[], []]
    began = time.perf_counter()
    for k, metric in enumerate(chosen):
        tell(metric.name, k, len(chosen))
        measured[0] += metric(samples, base)
        measured[1] += metric(base, base) if plain else measured[0][len(measured[1]) :]
    tell("scored", len(chosen), len(chosen))
    scores, base_scores = measured
    configs = [metric_config(m) for m in chosen]
    _write(
        run.folder / SCORES,
        {
            "metrics": configs,
            "scored": _now(),
            "versions": _versions(),
            "scores": [_fields(s) for s in scores],
            "base": [_fields(s) for s in base_scores],
        },
    )
    _write(run.folder / CARD, _card(run, plain, scores, base_scores, time.perf_counter() - began))
    return scores


def rehearse(suite: Suite) -> None:
    """Scores grey pictures of a few rows of each kind, and throws the scores away.

    What a metric lacks (a package, weights, a detector that knows the concept) is found before anything is drawn.
    """
    import torch

    if not suite.metrics:
        raise ValueError(f"the suite {suite.name!r} names no metric for these rows")
    few = list({(row.kind, row.category): row for row in reversed(suite.rows)}.values())
    halves = {f"{row.id}-clean" for row in few}
    few += [row for row in suite.rows if row.id in halves and row not in few]
    grey = [Sample(row, pixels=torch.full((3, 64, 64), 0.5)) for row in few]
    if not any([metric(grey, grey) for metric in suite.metrics]):  # all are called: each may lack something
        known = ", ".join(metric.name for metric in suite.metrics)
        raise ValueError(f"none of the metrics of the suite {suite.name!r} ({known}) judges such rows")


def _card(run: Run, plain: Run | None, scores: list[Score], base: list[Score], seconds: float) -> dict[str, Any]:
    def short(s: Score) -> dict[str, Any]:
        return {k: v for k, v in _fields(s).items() if k != "per_sample"}

    beside = {s.metric: {k: short(s)[k] for k in ("value", "n", "low", "high")} for s in base}
    record, entries = run.record, run.entries()
    cost = {"seconds_per_picture": _mean(e["seconds"] for e in entries), "scoring_seconds": round(seconds, 3)}
    cost["plain_seconds_per_picture"] = _mean(e["seconds"] for e in (plain.entries() if plain else entries))
    return {
        **{key: record[key] for key in DECIDES},
        "folder": run.folder.resolve().name,
        "not_finite": sum(e.get("finite") is False for e in entries),
        "scores": [short(s) | {"base": beside.get(s.metric)} for s in scores],
        "cost": cost,
        "command": record["sessions"][0]["command"],
        "sessions": record["sessions"],
        "scored": _now(),
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 6)


def work(
    folder: Path,
    record: dict[str, Any],
    rows: Sequence[Row],
    paint: Paint,
    progress: Tell,
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
    with _locked(folder, (lambda: progress(f"waiting for {folder}", 0, len(rows))) if wait else None):
        return _fill(folder, record, rows, paint, progress, what)


def _fill(
    folder: Path, record: dict[str, Any], rows: Sequence[Row], paint: Paint, progress: Tell, what: str
) -> dict[str, Any]:
    earlier = _agree(folder, record)
    size, total = record["batch"], len(rows)
    with _disk(folder, 0 if earlier is None else None, total):
        (folder / IMAGES).mkdir(exist_ok=True)
        kept = _mend(folder, total, size)
        if earlier is not None and len(kept) == total:
            progress(what, total, total)
            if earlier["metrics"] != record["metrics"]:  # how the finished pictures are to be judged from now on
                earlier["metrics"] = record["metrics"]
                _write(folder / RUN, earlier)
            return earlier
        record = record | {"sessions": [*(earlier or {}).get("sessions", []), *record["sessions"]]}
        _write(folder / RUN, record)
    done = len(kept)
    progress(what, done, total)
    for start in range(0, total, size):
        if start in kept:
            continue
        numbers = range(start, min(start + size, total))
        entries: dict[int, dict[str, Any]] = {}
        for call, group in _groups(rows, numbers, record["call"]):
            began = time.perf_counter()
            painted = list(paint([rows[k] for k in group], call))
            each = round((time.perf_counter() - began) / len(group), 6)
            if len(painted) != len(group):
                raise RuntimeError(f"The pipeline made {len(painted)} pictures of {len(group)} prompts.")
            with _disk(folder, done, total):
                for k, (picture, notes) in zip(group, painted, strict=True):
                    file = f"{IMAGES}/{rows[k].id}.png"
                    written = _save(folder / file, picture)
                    entries[k] = {"k": k, "file": file, "bytes": written, "seconds": each, **notes}
                    entries[k]["row"] = dataclasses.asdict(rows[k])
        with _disk(folder, done, total):
            _sync(folder / IMAGES)
            _append(folder / SAMPLES, "".join(_line(entries[k]) for k in numbers))
        done += len(numbers)
        progress(what, done, total)
    return record


def _groups(
    rows: Sequence[Row], numbers: Iterable[int], call: Mapping[str, Any]
) -> list[tuple[dict[str, Any], list[int]]]:
    """The rows of one batch by equal pipeline arguments, in the order of their first row."""
    found: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for k in numbers:
        whole = {**call, **rows[k].call}
        found.setdefault(json.dumps(whole, sort_keys=True), (whole, []))[1].append(k)
    return list(found.values())


def _painter(pipe: DiffusionPipeline) -> Paint:
    from .api import draw
    from .pictures import to_pil

    def paint(rows: Sequence[Row], call: Mapping[str, Any]) -> Iterator[tuple[Image, dict[str, Any]]]:
        pictures = draw(pipe, [r.prompt for r in rows], [r.seed for r in rows], batch=len(rows), **call)
        finite = pictures.isfinite().flatten(1).all(1).tolist()
        images = to_pil(pictures.nan_to_num(0.0, 1.0, 0.0))
        for image, whole in zip(images, finite, strict=True):
            yield image, {} if whole else {"finite": False}

    return paint


# ---------------------------------------------------------------- what a record says


def _model(pipe: DiffusionPipeline, name: str | None) -> dict[str, Any]:
    from .api import model_hash

    settings = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    return {
        "name": name if name is not None else f"a {type(pipe).__name__} in memory",
        "text_hash": model_hash(pipe),
        "pipeline": type(pipe).__name__,
        "scheduler": json.loads(json.dumps({"class": type(pipe.scheduler).__name__, **settings}, default=str)),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
    }


def _fields(score: Score) -> dict[str, Any]:
    """A score as JSON, which has no NaN: null stands for it."""
    fields = dataclasses.asdict(score)
    fields |= {k: None if math.isnan(fields[k]) else fields[k] for k in ("value", "low", "high")}
    if score.per_sample is not None:
        fields["per_sample"] = {k: None if math.isnan(v) else v for k, v in score.per_sample.items()}
    return fields


def _several(eraser: Any) -> tuple[Eraser, ...]:
    """One eraser, several, or none, as a tuple."""
    if eraser is None:
        return ()
    found: list[Any] = []
    if isinstance(eraser, Sequence) and not isinstance(eraser, str):
        found.extend(eraser)
    else:
        found.append(eraser)
    return tuple(found)


def _score(fields: dict[str, Any]) -> Score:
    fields = fields | {k: math.nan if fields[k] is None else fields[k] for k in ("value", "low", "high")}
    if fields["per_sample"] is not None:
        fields["per_sample"] = {k: math.nan if v is None else v for k, v in fields["per_sample"].items()}
    return Score(**fields)


def metric_config(metric: Metric) -> dict[str, Any]:
    """A metric's name and fields; what is no JSON, such as a detector of the user's own, by its representation."""
    fields: dict[str, Any] = dataclasses.asdict(metric) if dataclasses.is_dataclass(metric) else {}
    return {"method": registry.name_of(type(metric)), **json.loads(json.dumps(fields, default=repr))}


def make_metrics(configs: Sequence[Mapping[str, Any]]) -> tuple[Metric, ...]:
    """The metrics that a record names."""
    return tuple(make_metric(entry["method"], **{k: v for k, v in entry.items() if k != "method"}) for entry in configs)


def make_metric(name: str, **fields: Any) -> Metric:
    """A metric by name, with its own fields."""
    cls = registry.resolve(name, "metrics")
    checks.fields(name, cls, fields)
    metric: Metric = cls(**fields)
    return metric


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"efface": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _machine() -> str:
    torch = sys.modules.get("torch")
    threads = f", {torch.get_num_threads()} threads" if torch else ""
    return f"{platform.system()} {platform.machine()}{threads}"


def this_command() -> str:
    """The command line of this process."""
    name, *rest = sys.argv or [""]
    return shlex.join([Path(name).name, *rest] if not name.endswith(".py") else ["python", name, *rest])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _silent(what: str, done: int, total: int) -> None:
    pass


# ---------------------------------------------------------------- the folder


def _folder(path: Path) -> Path:
    """A folder that is a run or empty; made if need be."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected a folder for the run, but {path} is a file: name another one.")
    if path.is_dir() and not (path / RUN).exists():
        others = sorted(p.name for p in path.iterdir() if p.name not in (LOCK, IMAGES, f"{RUN}.partial"))
        if others:
            raise ValueError(f"{path} holds other files ({', '.join(others[:3])}, ...): name a folder of its own.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Cannot make the folder {path} ({error.strerror}): name another one.") from error
    return path


@contextlib.contextmanager
def _locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Keeps other processes off the folder. The system frees the lock when this process ends, however it ends."""
    import fcntl

    with (folder / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                lock.seek(0)
                owner = lock.read().strip()
                raise BlockingIOError(
                    f"Another process{f' ({owner})' if owner else ''} is at work in {folder}: wait for it or end it, "
                    "or name another folder."
                ) from None
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # the number is only for the message above; a full disk must not matter
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        yield


def _agree(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier process, or None; ValueError if it is one of another run."""
    if not (folder / RUN).exists():
        return None
    earlier = Run.open(folder).record
    found = [d for key in DECIDES for d in _differences(key, earlier.get(key), json.loads(json.dumps(record[key])))]
    if found:
        shown = "\n".join(f"  {line}" for line in found[:8])
        raise ValueError(f"{folder} holds another run. It differs in\n{shown}\nName another folder.")
    return dict(earlier)


def _differences(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(f"{name}.{k}", old.get(k), new.get(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for k, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differences(f"{name}[{k}]", a, b)]
    return [] if old == new else [f"{name}: {_short(old)} there, {_short(new)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file; a torn last one is left out."""
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _kept(folder: Path, total: int, size: int) -> dict[int, bytes]:
    """Row number to line, of the batches whose lines and pictures are all there."""
    found: dict[int, bytes] = {}
    for line in _lines(folder / SAMPLES):
        try:
            entry = json.loads(line)
            k, file, written = entry["k"], folder / entry["file"], entry["bytes"]
        except (ValueError, KeyError, TypeError):
            continue
        if line.endswith(b"\n") and file.is_file() and file.stat().st_size == written:
            found[k] = line
    whole = [range(s, min(s + size, total)) for s in range(0, total, size)]
    return {k: found[k] for numbers in whole if all(k in found for k in numbers) for k in numbers}


def _mend(folder: Path, total: int, size: int) -> dict[int, bytes]:
    """Takes what is broken or half a batch out of samples.jsonl, and returns the rest."""
    path, kept = folder / SAMPLES, _kept(folder, total, size)
    good = set(kept.values())
    old, new = _lines(path), b"".join(line for line in _lines(path) if line in good)
    if b"".join(old) == new:
        return kept
    if b"".join(old).startswith(new):  # the usual case, and it needs no room on a full disk
        with path.open("r+b") as file:
            file.truncate(len(new))
            os.fsync(file.fileno())
    else:
        _replace(path, new)
    return kept


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _append(path: Path, text: str) -> None:
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _save(path: Path, picture: Image) -> int:
    """Writes a PNG to disk and returns its size. It counts only once samples.jsonl names it."""
    with path.open("wb") as file:
        picture.save(file, format="PNG")
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _write(path: Path, value: Any) -> None:
    _replace(path, (json.dumps(value, indent=1) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    """The whole new file or the whole old one, never something between."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk(folder: Path, done: int | None, total: int) -> Iterator[None]:
    """Says of a disk error what is kept and how to go on."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "The disk is full" if full else f"The disk cannot be written to ({error.strerror or error})"
        kept = "What was finished" if done is None else f"{done} of {total} pictures"
        cure = "free some space" if full else "mend that"
        stop = OSError(f"{what}. {kept} stayed in {folder}: {cure} and run the same command, it continues.")
        stop.errno = error.errno
        raise stop from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it, or run again into another folder.") from error
