"""`run` draws a suite with the base model and with erasers, here or on the workers of a cluster."""

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
from ..records import Suite, alike, rows_hash
from .draw import agree, fill, locally, painter, several, work
from .folder import LOCK, claim
from .judges import metric_config
from .record import DECIDES, FORMAT, MODELS, Progress, Run, digest, model_facts, session, silent
from .remote import local
from .workers import Cluster, workers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..core import Eraser


def make_suite(
    name: str, concepts: Concepts = (), data: str | Path | None = None, limit: int | None = None, **options: Any
) -> Suite:
    """Makes a suite by name, with its rows.

    Args:
        name: a name from `efface list suites`.
        concepts: the concepts to erase. The suite chooses its rows by them.
        data: the file or folder of the user's that some suites read.
        limit: the largest number of rows, alike from each concept and category.
        options: the suite's fields.

    Raises:
        ValueError: the suite or a field is unknown, or the suite refuses the concepts or the data.

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
    """Draws every row of a suite into a run folder, or continues an interrupted run.

    Draws the base model's pictures of the same rows first, into the folder `base`. All runs of the same suite, model
    and seeds share them.

    Args:
        suite: the suite to draw.
        model: a name as `efface.load` takes it, or a pipeline without active erasers.
        name: the pipeline's name in the record. None: its class.
        eraser: the eraser to apply, or several in order. None draws the base model.
        out: the run folder, created if it does not exist; or an address that fsspec knows, such as s3://bucket/runs/a.
            For an address, the run is made in a local copy, and sent there after each batch.
        base: the folder of the base model's pictures. None: `base-SUITE-HASH` next to `out`. Without an eraser: the
            finished run of another model, with which this model is compared.
        limit: the largest number of rows to draw, alike from each concept, category and kind.
        batch: pictures per pipeline call, at least 1. Limits the memory.
        progress: True shows a bar with the remaining time. A callable receives the task, the number done and the total.
        command: the command in the record. None: the command of this process.
        guidance: the guidance scale of all rows, as `efface.pipelines.guided` takes it. None: the suite's scale, which
            applies to families with classifier-free guidance; FLUX keeps its default.
        ray: a Ray cluster whose workers draw the batches: "local" for this machine, an address, or a `Cluster`, which
            also says how workers load the model. None draws in this process.

    Returns:
        The complete run.

    Raises:
        ValueError: the suite is that of another embedded model; `out` holds another run (the message names the
            differences) or other files; `base` is a run of other rows or sampling; the pipeline has erasers; `ray` is
            given with a pipeline, which workers cannot load.
        ImportError: `ray` is given but Ray is not installed.
        BlockingIOError: another process is working in `out`.
        OSError: the disk is full or cannot be written to. Finished pictures stay, and the same call continues.

    Example:
        >>> import tempfile
        >>> import efface
        >>> cat = efface.Row("cat-0", "a cat", 1_000_000, concept="cat")
        >>> suite = efface.Suite("cats", "1", (cat,), call={"num_inference_steps": 1})
        >>> efface.run(suite, "emoji", eraser=efface.EIUP("cat"), out=tempfile.mkdtemp() + "/cats").complete
        True
    """
    checks.whole("batch", batch)
    checks.path("out", out)
    rows = alike(suite.rows, limit)
    if not rows:
        raise ValueError(f"The suite {suite.name!r} has no rows. Name another concept, or another data folder.")
    cluster = _cluster(ray, model)
    from .. import api
    from ..delta import active
    from ..families import family
    from ..hooks.sites import handles as erasers_on
    from ..models import embedded
    from ..pipelines import guided, load

    name = str(model) if isinstance(model, (str, Path)) else name
    pipe = load(model, **(cluster.loading if cluster else {})) if isinstance(model, (str, Path)) else model
    if erasers_on(pipe) or active(pipe):
        raise ValueError("The pipeline already has an eraser. Remove it, and give it as `eraser=` instead.")
    _check_vocabulary(suite, embedded(pipe))
    folder = claim(local(out))
    pipe.set_progress_bar_config(disable=True)
    call = family(pipe).protocol(suite.call)
    if guidance is not None:
        call |= guided(pipe, guidance)
        own = ({k: v for k, v in row.call.items() if k not in ("guidance", "guidance_scale")} for row in rows)
        rows = tuple(dataclasses.replace(row, call=each) for row, each in zip(rows, own, strict=True))
    erasers = several(eraser)
    with api.stack(pipe, *erasers) as handles:  # finds erasers that do not fit the pipeline before anything is drawn
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
    other = base if isinstance(base, Run) and not erasers else None
    base = base.folder if isinstance(base, Run) else base
    mark = digest({key: plain[key] for key in DECIDES})[:8]
    beside = local(base) if base is not None else folder.parent / f"base-{suite.name}-{mark}"
    if erasers and beside.resolve() == folder.resolve():
        raise ValueError(f"Expected `base` and `out` to be different folders, got {folder} for both. Name two.")
    with contextlib.ExitStack() as ends:
        far = ends.enter_context(workers(cluster, plain["model"])) if cluster else None
        here = locally(painter(pipe), rows)
        if not erasers:
            plain |= _compared(plain, other, folder)
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


def _check_vocabulary(suite: Suite, model: str | None) -> None:
    """Raises ValueError for the prompts of one embedded model and the pipeline of another, which has other icons."""
    from ..models import SUITES, suite_of

    if model is not None and suite.name in SUITES and suite.name != suite_of(model):
        raise ValueError(
            f"Expected the suite `{suite_of(model)}` for a model with the vocabulary of {model}, got {suite.name!r}. "
            "Draw that suite, or another model."
        )


def _compared(record: dict[str, Any], other: Run | None, folder: Path) -> dict[str, Any]:
    """The entries of run.json that name the finished run of another model with the same rows and sampling."""
    if other is None:
        return {}
    there, here = ({k: of[k] for k in DECIDES if k != "model"} for of in (other.record, record))
    cure = "Draw the same suite with both models."
    files.check_same(there, here, f"{other.folder} cannot be compared with this run", cure)
    other.finished()
    return {"base": os.path.relpath(other.folder, folder), "compares": MODELS}


def _cluster(ray: str | Cluster | None, model: Any) -> Cluster | None:
    if ray is None or isinstance(ray, Cluster):
        return ray
    if not isinstance(model, (str, Path)):
        raise ValueError(
            f"Expected a model by name for `ray`, got a {type(model).__name__}, which workers cannot load. Give its "
            "name or folder, or a Cluster with its name."
        )
    return Cluster(ray, model)
