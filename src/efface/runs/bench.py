"""`run`: a suite drawn with the base model and with erasers, here or on the workers of a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks, files, registry
from ..core import Concepts, as_concepts
from ..progress import shows
from ..records import Suite, rows_hash
from .draw import agree, fill, locally, painter, several, work
from .folder import LOCK, claim
from .judges import metric_config
from .record import DECIDES, FORMAT, Progress, Run, digest, model_facts, session, silent
from .remote import local
from .workers import Cluster, workers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..core import Eraser


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
    progress: bool | Progress | None = None,
    command: str | None = None,
    guidance: float | None = None,
    ray: str | Cluster | None = None,
) -> Run:
    """Draws every row of a suite into a run folder, or continues where an earlier call ended.

    The plain model's pictures of the same rows are drawn first, into the folder `base`; every run of the same suite,
    model and seeds shares them.

    Args:
        suite: what to draw and how.
        model: a name as `efface.load` takes it, or a pipeline without active erasers.
        name: what the record calls a pipeline; None: its class.
        eraser: what to apply, or several in order; None draws the plain model.
        out: the run folder; made if it does not exist. Or an address that fsspec knows, such as s3://bucket/runs/a: the
            run is made in a copy on this machine, and sent there after each batch.
        base: the folder of the plain pictures; None: `base-SUITE-HASH` beside `out`.
        limit: only the first so many rows, at least 1.
        batch: pictures per pipeline call, at least 1. It bounds the memory.
        progress: True shows a bar with the time left; a callable gets what is drawn, how many are done, of how many.
        command: what to write down as the command; None: this process's own.
        guidance: the guidance scale of all rows, as `efface.pipelines.guided` takes it. None: the suite's, which holds
            for predictions with and without the prompt; on FLUX the pipeline's own default.
        ray: draws batches on the workers of a Ray cluster: "local" for this machine, the address of a cluster, or a
            `Cluster` that says how workers load the model. None draws here.

    Returns:
        The run, complete.

    Raises:
        ValueError: `out` holds another run (the message names what differs) or other files; a pipeline with erasers on;
            `ray` with a pipeline, which workers cannot load.
        ImportError: `ray` without Ray.
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
    checks.path("out", out)
    rows = suite.rows[:limit]
    if not rows:
        raise ValueError(f"The suite {suite.name!r} has no rows. Name another concept, or another data folder.")
    cluster = _cluster(ray, model)
    folder = claim(local(out))
    from .. import api
    from ..delta import active
    from ..families import family
    from ..hooks.sites import handles as erasers_on
    from ..pipelines import guided, load

    name = str(model) if isinstance(model, (str, Path)) else name
    pipe = load(model, **(cluster.loading if cluster else {})) if isinstance(model, (str, Path)) else model
    if erasers_on(pipe) or active(pipe):
        raise ValueError("The pipeline has an eraser on. Remove it, and give it as `eraser=` instead.")
    pipe.set_progress_bar_config(disable=True)
    call = family(pipe).protocol(suite.call)
    if guidance is not None:
        call |= guided(pipe, guidance)
        own = ({k: v for k, v in row.call.items() if k not in ("guidance", "guidance_scale")} for row in rows)
        rows = tuple(dataclasses.replace(row, call=each) for row, each in zip(rows, own, strict=True))
    erasers = several(eraser)
    with api.stack(pipe, *erasers) as handles:  # what does not fit the pipeline is found before anything is drawn
        configs = handles.config()
    plain: dict[str, Any] = {
        "format": FORMAT,
        "suite": {f: getattr(suite, f) for f in ("name", "version", "source", "licence", "data_hash")},
        "rows": {"n": len(rows), "sha256": rows_hash(rows)},
        "call": call,
        "batch": batch,
        "model": model_facts(pipe, name),
        "erasers": [],
        "metrics": [metric_config(m) for m in suite.metrics],
        "base": None,
        "sessions": [session(command)],
    }
    done, suited = progress if callable(progress) else silent, suite.metrics
    if isinstance(base, Run):
        base = base.folder
    mark = digest({key: plain[key] for key in DECIDES})[:8]
    beside = local(base) if base is not None else folder.parent / f"base-{suite.name}-{mark}"
    if erasers and beside.resolve() == folder.resolve():
        raise ValueError(f"`base` and `out` are one folder, {folder}. Name two.")
    with contextlib.ExitStack() as ends:
        far = ends.enter_context(workers(cluster, plain["model"])) if cluster else None
        here = locally(painter(pipe), rows)
        if not erasers:
            return Run(folder, work(folder, plain, rows, far.drawing(rows) if far else here, done, "plain"), suited)
        with files.lock(folder / LOCK):
            agree(folder, plain | {"erasers": configs})
            work(claim(beside), plain, rows, far.drawing(rows) if far else here, done, "plain", wait=True)
            erased = plain | {"erasers": configs, "base": os.path.relpath(beside, folder)}
            if far:
                record = fill(folder, erased, rows, far.drawing(rows, erasers), done, "erased")
            else:
                with api.stack(pipe, *erasers):
                    record = fill(folder, erased, rows, here, done, "erased")
    return Run(folder, record, suited)


def _cluster(ray: str | Cluster | None, model: Any) -> Cluster | None:
    if ray is None or isinstance(ray, Cluster):
        return ray
    if not isinstance(model, (str, Path)):
        raise ValueError(
            f"Expected a model by name for `ray`, got a {type(model).__name__}, which workers cannot load. Give its "
            "name or folder, or a Cluster that names it."
        )
    return Cluster(checks.text("ray", ray), model)
