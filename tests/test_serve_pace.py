"""What the service does beside drawing: it wakes who waits, ends jobs beside the next batch, and keeps little."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sql
import tiny
from test_serve import LIMITS, Desk, _until, error, quiet
from test_serve_faults import ASKED, accept, entries, state

from efface import _encodings
from efface.guard import Policy
from efface.serve import backend, ends, fields, policies, watch, worker
from efface.serve.backend import PipelineBackend, Row
from efface.serve.bell import Bell
from efface.serve.worker import Worker

__all__ = ["quiet"]


# ---------------------------------------------------------------- who waits


def test_requests_and_workers_are_woken(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """By themselves they would look in an hour."""
    for module in (watch, worker):
        monkeypatch.setattr(module, "SELDOM", 3_600.0)
    quiet.service.limits = replace(LIMITS, lease=36_000.0, wait=1.0)
    quiet.start()
    _until(quiet.service.warm.is_set)
    time.sleep(0.2)  # it waits by now
    with monkeypatch.context() as patch:  # the effect: nobody rings
        patch.setattr(Bell, "ring", lambda _: None)
        error(quiet.post(ASKED), 504, "timeout")
    quiet.service.limits = replace(quiet.service.limits, wait=20.0)
    assert [quiet.post(ASKED).status_code for _ in range(2)] == [200, 200]
    assert len(quiet.stub.batches) == 2


def test_a_watcher_that_ends_by_an_error_ends_the_server(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all requests would wait until their time-out, and the server would count as ready."""
    quiet.start()
    assert quiet.client.get("/readyz").status_code == 200
    quiet.service.limits = replace(LIMITS, wait=0.5)
    monkeypatch.setattr(type(quiet.service.jobs), "states", lambda *_: {}[0])
    error(quiet.post(ASKED), 504, "timeout")
    assert quiet.client.get("/readyz").status_code == 503 and quiet.service.stalled.is_set()


def test_an_idle_service_seldom_asks_its_database(quiet: Desk) -> None:
    asked: list[str] = []
    quiet.service.limits = replace(LIMITS, lease=60.0)
    quiet.start()
    _until(quiet.service.warm.is_set)
    time.sleep(0.3)  # the first sweep is over
    sql.event.listen(quiet.service.database.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    time.sleep(1.0)
    looks = [text for text in asked if "FROM jobs" in text]
    assert 1 <= len(looks) <= 6, looks  # each 0.25 s; in other processes' stead it would be 20


def test_a_worker_sees_as_many_jobs_as_its_queue_holds(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a flood would hide the jobs of others from the choice between tenants."""
    monkeypatch.setattr(worker, "MOST", 1)
    for key in ("kids", "kids", "teens"):
        accept(quiet, key=key)
    assert Worker(quiet.service, quiet.stub).once() == 3


# ---------------------------------------------------------------- ends of jobs


def test_jobs_end_while_the_next_batch_is_drawn_and_no_more_than_one_batch_waits(
    quiet: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, encoded = threading.Event(), ends.encoded

    def held(*given: Any) -> bytes:
        go.wait(20)
        return encoded(*given)

    monkeypatch.setattr(ends, "encoded", held)
    quiet.service.limits = replace(LIMITS, rows=1)
    names = [accept(quiet, prompt=prompt) for prompt in ("a cat", "a dog", "a cup", "a tree")]
    quiet.start()
    _until(lambda: len(quiet.stub.batches) == 2)  # the second is drawn, and the first has not ended
    time.sleep(2 * LIMITS.lease)
    assert len(quiet.stub.batches) == 2 and [state(quiet, name) for name in names] == ["running"] * 2 + ["queued"] * 2
    go.set()
    _until(lambda: [state(quiet, name) for name in names] == ["done"] * 4)
    assert len(quiet.stub.batches) == 4
    assert [entry["job"] for entry in entries(quiet, "job finished")] == names


def test_a_worker_that_is_stopped_ends_what_it_has_drawn(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    began, encoded = threading.Event(), ends.encoded

    def slow(*given: Any) -> bytes:
        began.set()
        time.sleep(0.3)
        return encoded(*given)

    monkeypatch.setattr(ends, "encoded", slow)
    name = accept(quiet)
    quiet.start()
    assert began.wait(10)
    quiet.workers[0].stop()
    quiet.workers[0].join(10)
    assert state(quiet, name) == "done" and not quiet.workers[0].is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unknown_error_beside_the_drawing_ends_the_worker(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bytes:
        raise KeyError("x")

    with monkeypatch.context() as patch:
        patch.setattr(ends, "encoded", broken)
        name = accept(quiet)
        quiet.start()
        quiet.workers[0].join(10)
    assert not quiet.workers[0].is_alive() and not quiet.service.warm.is_set() and state(quiet, name) == "running"
    quiet.start()  # another worker takes the job
    _until(lambda: state(quiet, name) == "done")
    assert len(entries(quiet, "job finished")) == 1


# ---------------------------------------------------------------- what is kept


def test_prompts_and_tenants_leave_nothing_in_memory(quiet: Desk) -> None:
    """60 prompts of 10 tenants, with 4 sets of further erasures; then as many again."""
    more = ([], ["cat"], ["neon sign"], ["cat", "neon sign"])
    for k in range(10):
        quiet.keys[f"tenant-{k}"] = quiet.service.keys.add(f"tenant-{k}", "kids")[1]
    quiet.service.limits = replace(LIMITS, queue=1_000, tenant=1_000, rows=30)
    drawing = Worker(quiet.service, quiet.stub)
    registry, engine = quiet.service.metrics.registry, quiet.service.database.engine

    def kept() -> dict[str, int]:
        for k in range(60):
            accept(quiet, key=f"tenant-{k % 10}", prompt=f"a cat of kind {time.monotonic_ns()}", also_erase=more[k % 4])
        while drawing.once():
            pass
        return {
            "series": sum(len(metric.samples) for metric in registry.collect()),
            "statements": len(engine._compiled_cache or ()),
            "policies": policies._read.cache_info().currsize + policies._with.cache_info().currsize,
            "tenants": len(drawing._fair.credit),
            "ends": len(drawing._ending),
            "open": len(quiet.service.open),
        }

    first = kept()
    again = kept()
    assert again.pop("statements") < first.pop("statements") + 5  # one more may be compiled, not one per prompt
    assert again == first and first["tenants"] <= 10 and first["ends"] == first["open"] == 0
    assert quiet.service.jobs.count(["done"]) == 120  # the effect: all were drawn
    assert all(each.cache_info().maxsize for each in (policies._read, policies._with))


def test_a_backend_keeps_the_guards_of_a_bounded_number_of_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "KEPT", 5)
    pipe = tiny.pipeline()
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    drawing = PipelineBackend(pipe, "tiny", ((side, side),))
    texts = [{"name": f"c{k}", "phrases": [tiny.PROMPTS[k % 2]]} for k in range(12)]
    every = [Policy(erase=[each]) for each in texts]
    for policy in every:
        drawing.check(policy)
    assert [*drawing._guards] == [policy.hash for policy in every[-5:]]
    call = fields.batch_facts(fields.parsed({"prompt": "x", "steps": 1}), "tiny", (side, side), every[0])
    made = drawing.draw([Row("a cat", None, 1, policy) for policy in every], call, lambda _: None, lambda *_: None)
    assert [each.record["outcome"] for each in made] == ["drawn"] * 12 and len(drawing._guards) == 5


def test_kept_encodings_have_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest concepts are encoded again. A mix of policies that was not drawn before adds nothing."""
    pipe = tiny.pipeline()
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    drawing = PipelineBackend(pipe, "tiny", ((side, side),))
    some = [Policy(erase=[{"name": f"c{k}", "phrases": [text]}]) for k, text in enumerate(tiny.PROMPTS * 2)]
    call = fields.batch_facts(fields.parsed({"prompt": "x", "steps": 1}), "tiny", (side, side), some[0])

    def draw(*which: int) -> tuple[int, int]:
        rows = [Row("a cat", None, 1, some[k]) for k in which]
        drawing.draw(rows, call, lambda _: None, lambda *_: None)
        kept = _encodings.held(pipe)
        return len(kept), kept.size

    for k in range(3):
        draw(k)
    assert draw(0, 1) == draw(2, 0, 1) == draw(1, 2)
    number, size = draw(0)
    monkeypatch.setattr(_encodings, "MOST", size)
    assert [draw(k)[1] <= size for k in range(3, len(some))] == [True] * (len(some) - 3)
    assert len(_encodings.held(pipe)) <= number + 1
