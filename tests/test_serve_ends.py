"""Between the drawing of a job and its end: killed workers, other holders, cancellations, a full disk, a shutdown."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sql
from PIL import Image
from test_serve import LIMITS, Desk, _until, quiet
from test_serve_faults import ASKED, accept, entries, state

from efface import files
from efface.serve import ends, images, jobs, tables
from efface.serve.backend import Drawn, Row
from efface.serve.ends import Ends
from efface.serve.run import Server, configured

__all__ = ["quiet"]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The first picture is not encoded before this is set."""
    go, first, encoded = threading.Event(), threading.Lock(), ends.encoded

    def wait(*given: Any) -> bytes:
        if first.acquire(blocking=False):
            go.wait(20)
        return encoded(*given)

    monkeypatch.setattr(ends, "encoded", wait)
    yield go
    go.set()


def attempts(desk: Desk, name: str) -> int:
    with desk.service.database.reading() as connection:
        return int(connection.execute(sql.select(tables.jobs.c.attempts).where(tables.jobs.c.id == name)).scalar_one())


# ---------------------------------------------------------------- what one job does to others


def poisoned(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Pictures in WebP cannot be encoded."""
    encoded = ends.encoded

    def fails(picture: Any, kind: str, *more: Any) -> bytes:
        if kind == "webp":
            raise error
        return encoded(picture, kind, *more)

    monkeypatch.setattr(ends, "encoded", fails)


def test_pictures_that_cannot_be_encoded_fail_their_own_job(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, OSError("encoder error"))
    bad, good = accept(quiet, output_format="webp"), accept(quiet)
    quiet.start()
    _until(lambda: quiet.service.jobs.count(jobs.LIVE) == 0)
    found = quiet.service.jobs.get("kids", bad)
    assert found is not None and found.error is not None and found.error.code == "drawing_failed"
    assert state(quiet, good) == "done" and [len(rows) for rows, _ in quiet.stub.batches] == [2]
    assert {each["job"]: each["state"] for each in entries(quiet, "job finished")} == {bad: "failed", good: "done"}
    assert quiet.workers[0].is_alive() and quiet.post(ASKED).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_job_whose_end_ends_its_workers_takes_no_other_with_it(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end fails while the next job is drawn, so that one is lost, too; but never a second time."""
    poisoned(monkeypatch, KeyError("x"))
    quiet.service.limits = replace(LIMITS, rows=1, lease=0.1)
    bad, good = accept(quiet, output_format="webp"), accept(quiet)
    for _ in range(jobs.ATTEMPTS + 1):
        quiet.start()
        _until(lambda: not quiet.workers[-1].is_alive() or quiet.service.jobs.count(jobs.LIVE) == 0)
    assert attempts(quiet, good) == 2 and attempts(quiet, bad) == jobs.ATTEMPTS  # the effect: it was lost once
    ends_ = [(each["job"], each["state"]) for each in entries(quiet, "job finished")]
    assert sorted(ends_) == sorted([(bad, "failed"), (good, "done")])


# ---------------------------------------------------------------- what happens between


def test_a_job_that_others_took_before_its_end_ends_once(quiet: Desk, held: threading.Event) -> None:
    """As if the first worker had been frozen after its drawing."""
    name = accept(quiet)
    quiet.start()
    _until(lambda: len(quiet.stub.batches) == 1 and quiet.service.jobs.count(["running"]) == 1)
    time.sleep(0.1)  # it encodes
    _until(
        lambda: any(quiet.service.jobs.release(*key, beat, None) for key, beat in quiet.service.jobs.running().items())
    )  # type: ignore[arg-type]
    quiet.start()
    _until(lambda: state(quiet, name) == "done")
    (winner,) = entries(quiet, "job finished")
    held.set()
    for worker in quiet.workers:
        worker.stop()
        worker.join(10)
    assert len(quiet.stub.batches) == 2 and entries(quiet, "job finished") == [winner]
    assert winner["worker"] == quiet.workers[1].name and len(quiet.service.jobs.pictures(name)) == 1
    finished = quiet.service.metrics.registry.get_sample_value("efface_jobs_finished_total", {"state": "done"})
    assert finished == 1


def test_a_job_that_is_cancelled_before_its_end_leaves_no_picture(quiet: Desk, held: threading.Event) -> None:
    name = accept(quiet)
    quiet.start()
    _until(lambda: len(quiet.stub.batches) == 1)
    time.sleep(0.1)
    images.cancel(quiet.service, quiet.service.keys.holder(quiet.keys["kids"]), name)  # type: ignore[arg-type]
    assert state(quiet, name) == "running"  # the effect: its end is to come
    held.set()
    _until(lambda: state(quiet, name) == "cancelled")
    assert quiet.service.jobs.pictures(name) == []
    assert [each["state"] for each in entries(quiet, "job finished")] == ["cancelled"]


def test_a_shutdown_waits_for_ends(quiet: Desk, held: threading.Event) -> None:
    name = accept(quiet)
    quiet.start()
    _until(lambda: len(quiet.stub.batches) == 1)
    server = Server(configured(quiet.service, "127.0.0.1", 0), quiet.service)
    server.handle_exit(signal.SIGTERM, None)
    time.sleep(0.6)
    assert quiet.service.draining.is_set() and not server.should_exit and state(quiet, name) == "running"
    held.set()
    _until(lambda: server.should_exit)
    assert state(quiet, name) == "done" and len(quiet.service.jobs.pictures(name)) == 1


def test_a_database_that_goes_away_for_longer_than_a_lease_before_an_end(quiet: Desk, held: threading.Event) -> None:
    """The worker keeps what it has drawn, and no other takes the job."""
    name = accept(quiet)
    for _ in range(2):
        quiet.start()
    _until(lambda: len(quiet.stub.batches) == 1)
    there = quiet.service.database.engine
    quiet.service.database.engine = sql.create_engine("sqlite:////absent/serve.db")
    held.set()
    time.sleep(3 * LIMITS.lease)
    quiet.service.database.engine = there
    _until(lambda: state(quiet, name) == "done")
    assert len(quiet.stub.batches) == 1 and attempts(quiet, name) == 1
    assert len(entries(quiet, "job finished")) == 1 and quiet.service.audit.verify()[1] == ""


def test_a_disk_that_is_full_at_an_end_costs_nothing(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, drawn = Image.frombytes("RGB", (256, 256), os.urandom(256 * 256 * 3)), quiet.stub._drawn

    def large(row: Row, call: Any) -> Drawn:
        return Drawn(noise, drawn(row, call).record)

    monkeypatch.setattr(quiet.stub, "_drawn", large)
    name, engine = accept(quiet), quiet.service.database.engine
    with quiet.service.database.reading() as connection:
        pages = int(connection.exec_driver_sql("PRAGMA page_count").scalar() or 0)
    most = [pages + 10]

    def bounded(connection: Any, record: Any, proxy: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={most[0]}")

    sql.event.listen(engine, "checkout", bounded)
    quiet.start()
    _until(lambda: len(quiet.stub.batches) == 1)
    time.sleep(2 * LIMITS.lease)
    assert state(quiet, name) == "running" and quiet.service.jobs.pictures(name) == []
    most[0] = 2**30
    _until(lambda: state(quiet, name) == "done")
    sql.event.remove(engine, "checkout", bounded)
    assert len(quiet.stub.batches) == 1 and len(quiet.service.jobs.pictures(name)[0].content or b"") > 100_000


# ---------------------------------------------------------------- partial pictures


def test_the_log_has_partial_pictures_that_a_lost_worker_showed(quiet: Desk) -> None:
    """They may have left. The next attempt replaces them, and so may the hashes of its own."""
    quiet.service.policies.add("open", {"erase": ["alcohol"], "partial_pictures": True}, "test")
    quiet.keys["open"] = quiet.service.keys.add("open", "open")[1]
    name = accept(quiet, key="open", stream=True, partial_images=1, steps=4)
    (claim,) = quiet.service.jobs.claim([name], "lost")
    stored = quiet.service.policies.version(claim.policy)
    assert stored is not None
    owned = [(claim, Row("a cat", None, 1, stored.policy, 1))]
    Ends(quiet.service, "lost").show(owned, 0, 0, Image.new("RGB", (8, 8), (7, 7, 7)))
    ((_, content),) = quiet.service.jobs.partial(name, 0)
    assert quiet.service.jobs.release(name, claim.fence, 0, lambda *_: None) == "queued"
    Ends(quiet.service, "lost").show(owned, 0, 0, Image.new("RGB", (8, 8)))  # too late: it is neither stored nor told
    quiet.start()
    _until(lambda: state(quiet, name) == "done")
    first, second = entries(quiet, "partial picture")
    assert (first["job"], first["sha256"], first["worker"]) == (name, files.sha256(content), "lost")
    ((_, content),) = quiet.service.jobs.partial(name, 0)
    assert second["sha256"] == files.sha256(content) != first["sha256"] and second["worker"] == quiet.workers[0].name
