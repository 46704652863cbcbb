"""Draws batches of a run on the workers of a Ray cluster. The process that called `efface.run` writes the run folder.

A worker loads the model by its name; weights and settings must equal the caller's. It draws complete batches, cut as
without workers, with as many threads as the caller. So machines of one kind draw bitwise equal pictures. A worker that
dies is restarted and draws its batch again.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _ray, checks, files
from ..pipelines import EMBEDDED
from .draw import Batch, Draw, Drawn, painter, timed
from .record import model_facts

if TYPE_CHECKING:
    from ..core import Eraser
    from ..records import Row

AHEAD = 2  # batches queued per worker, so that it does not wait for the next one
RESTARTS = 3


@dataclass(frozen=True)
class Cluster:
    """The cluster that draws the batches of a run, and how its workers load the model.

    Args:
        address: "local" to start workers on this machine, or the address of a Ray cluster, such as "auto" or
            "ray://head:10001". Anybody who reaches a cluster's ports and has its token can run code on it. A local
            cluster requires a token.
        model: a name as `efface.load` takes it, with the same meaning on each worker: an embedded model, a folder that
            all machines have, or a hub id.
        loading: further arguments of `efface.load`.

    Example:
        >>> from efface.runs import Cluster
        >>> Cluster("local", "emoji", {"dtype": "bf16"}).model
        'emoji'
    """

    address: str
    model: str | Path
    loading: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.text("ray", self.address)
        object.__setattr__(self, "model", _in_full(self.model))
        if self.loading.get("config"):
            object.__setattr__(self, "loading", {**self.loading, "config": _in_full(self.loading["config"])})


def _in_full(model: str | Path) -> str | Path:
    """A file or folder of this machine by its whole path: workers need not stand where the caller does."""
    return model if str(model) in EMBEDDED or not Path(model).exists() else Path(model).resolve()


class _Worker:
    """A worker process, with the model and its erasers."""

    def __init__(self, cluster: Cluster, threads: int) -> None:
        import torch

        from ..pipelines import load

        torch.set_num_threads(threads)
        self.pipe = load(cluster.model, **cluster.loading)
        self.pipe.set_progress_bar_config(disable=True)
        self.on: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self.erasers: Sequence[Eraser] = ()

    def facts(self) -> dict[str, Any]:
        return model_facts(self.pipe, None)

    def pid(self) -> int:
        return os.getpid()

    def draw(self, batch: list[tuple[Mapping[str, Any], list[Row]]], erasers: Sequence[Eraser]) -> Drawn:
        """Draws the pictures of a batch. The erasers stay applied for the next batch."""
        from .. import api

        if list(erasers) != list(self.erasers):
            self.on.__exit__(None, None, None)
            self.on, self.erasers = contextlib.nullcontext(), ()
            self.on = api.stack(self.pipe, *erasers)
            self.erasers = erasers
        paint = painter(self.pipe)
        return [timed(paint, rows, call) for call, rows in batch]


class Workers:
    """Workers that loaded the model. `workers` makes them."""

    def __init__(self, ray: Any, actors: Sequence[Any]) -> None:
        self._ray, self._actors = ray, actors

    def pids(self) -> list[int]:
        """The process id of each worker."""
        found: list[int] = self._ray.get([actor.pid.remote() for actor in self._actors])
        return found

    def drawing(self, rows: Sequence[Row], erasers: Sequence[Eraser] = ()) -> Draw:
        """Returns a function that draws batches of these rows on all workers, with these erasers, in order."""
        on = self._ray.put(tuple(erasers))

        def draw(batches: Iterable[Batch]) -> Iterator[Drawn]:
            waiting: deque[Any] = deque()
            for k, batch in enumerate(batches):
                if len(waiting) == AHEAD * len(self._actors):
                    yield self._wait(waiting.popleft())
                whole = [(call, [rows[n] for n in numbers]) for call, numbers in batch]
                waiting.append(self._actors[k % len(self._actors)].draw.remote(whole, on))
            while waiting:
                yield self._wait(waiting.popleft())

        return draw

    def _wait(self, result: Any) -> Any:
        """The result of a worker. Raises a worker's error here."""
        try:
            return self._ray.get(result)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayActorError as error:
            raise RuntimeError(
                f"A worker died {RESTARTS + 1} times ({checks.shown(' '.join(str(error).split()))}). Finished pictures "
                "stay. Look for lack of memory in Ray's logs, then run the same command, which continues."
            ) from error


@contextlib.contextmanager
def workers(cluster: Cluster, facts: Mapping[str, Any]) -> Iterator[Workers]:
    """Starts as many workers as fit on the cluster: one per GPU, or one per as many CPUs as this process has threads.

    Args:
        cluster: the cluster, and the model that workers load.
        facts: `model_facts` of the caller's model. Each worker's facts must be equal.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a worker has another model.
        ConnectionError: the address has no cluster.
    """
    ray = _ray.imported(cluster.address == "local", "Drawing on workers", "ray")
    local = {"include_dashboard": False} if cluster.address == "local" else {}
    import torch

    threads, ours = torch.get_num_threads(), not ray.is_initialized()
    if ours:
        ray.init(cluster.address, log_to_driver=False, logging_level="error", configure_logging=True, **local)
    try:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if facts["device"] == "cuda" else 0
        count = gpus or max(int(there.get("CPU", 1)) // threads, 1)
        share = {"num_gpus": 1} if gpus else {"num_cpus": min(threads, int(there.get("CPU", 1)))}
        kind = ray.remote(_Worker).options(max_restarts=RESTARTS, max_task_retries=RESTARTS, **share)
        found = Workers(ray, [kind.remote(cluster, threads) for _ in range(count)])
        for actor in found._actors:
            theirs: Any = found._wait(actor.facts.remote())
            here = {k: v for k, v in facts.items() if k != "name"}
            cure = "Give workers and caller the same model, dtype and device."
            files.check_same({k: theirs[k] for k in here}, here, "A worker has another model than the caller", cure)
        yield found
        del found, actor, kind
    finally:
        if ours:
            ray.shutdown()
