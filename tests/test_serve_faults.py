"""Faults of the service that were found by reading it, each with the outcome that it has now."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_serve import LIMITS, Desk, Stub, _until, desk, error, quiet
from test_serve_state import new, nothing

from efface.serve import backend, ends, images, jobs, log
from efface.serve.backend import Drawn, OnPartial, Row
from efface.serve.database import Unavailable
from efface.serve.errors import Refused
from efface.serve.fields import parsed
from efface.serve.service import DATABASE_FILE, PEPPER_FILE, initialise, opened
from efface.serve.watch import Watcher
from efface.serve.worker import Worker

__all__ = ["desk", "quiet"]
ASKED = {"prompt": "a cat", "steps": 1}


def accept(desk: Desk, again: str | None = None, key: str = "kids", **more: Any) -> str:
    holder = desk.service.keys.holder(desk.keys[key])
    assert holder is not None
    return images.accept(desk.service, holder, parsed({**ASKED, **more}), again, "req_1")


def state(desk: Desk, name: str) -> str:
    return desk.service.jobs.states([name])[name][0]


def entries(desk: Desk, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in desk.service.audit.entries() if entry["kind"] == kind]


# ---------------------------------------------------------------- workers


def test_the_heartbeat_lasts_until_the_pictures_are_stored(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = ends.encoded

    def slow(*arguments: Any) -> bytes:
        time.sleep(2.5 * LIMITS.lease)
        return encoded(*arguments)

    monkeypatch.setattr(ends, "encoded", slow)
    name = accept(quiet)
    quiet.start()
    quiet.start()
    _until(lambda: state(quiet, name) == "done")
    assert len(quiet.stub.batches) == 1


class Hangs(Stub):
    """Finishes no step before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def draw(
        self, rows: Sequence[Row], call: Mapping[str, Any], on_step: Callable[[int], None], on_partial: OnPartial
    ) -> list[Drawn]:
        self.began.set()
        self.go.wait(30)
        return super().draw(rows, call, on_step, on_partial)


def test_a_drawing_that_hangs_loses_its_jobs_to_another_worker(quiet: Desk) -> None:
    quiet.service.limits = replace(LIMITS, stall=0.4)
    hangs = Hangs()
    stuck = Worker(quiet.service, hangs)
    name = accept(quiet)
    stuck.start()
    assert hangs.began.wait(5)
    _until(lambda: quiet.client.get("/readyz").json()["worker"] is False)
    quiet.start()
    _until(lambda: state(quiet, name) == "done")
    hangs.go.set()
    stuck.stop()
    stuck.join(10)
    assert not quiet.service.stalled.is_set() and len(quiet.stub.batches) == 1
    assert [entry["state"] for entry in entries(quiet, "job finished")] == ["done"]


def test_a_job_with_more_rows_than_a_batch_is_drawn_in_parts(desk: Desk) -> None:
    made = desk.post({**ASKED, "n": 10, "seed": 3}).json()
    assert len(made["data"]) == len(made["efface"]["rows"]) == 10
    assert [[row.seed for row in rows] for rows, _ in desk.stub.batches] == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_job_that_ends_its_workers_ends_no_other_job(quiet: Desk) -> None:
    """It is drawn in one batch with others the first time, and alone from then on."""
    quiet.service.limits = replace(LIMITS, lease=0.1)
    quiet.stub.fails = {"poison": KeyError("x")}
    poison = accept(quiet, prompt="poison")
    others = [accept(quiet, prompt=prompt) for prompt in ("a dog", "a tree", "a cup")]
    for _ in range(jobs.ATTEMPTS + 1):
        quiet.start()
        _until(lambda: not quiet.workers[-1].is_alive() or state(quiet, poison) == "failed")
    _until(lambda: [state(quiet, name) for name in others] == ["done"] * 3)
    assert len(quiet.stub.batches[0][0]) == 4  # the effect: all were there
    found = quiet.service.jobs.get("kids", poison)
    assert found is not None and found.error is not None and found.error.code == "worker_lost"
    ends = {entry["job"]: entry["state"] for entry in entries(quiet, "job finished")}
    assert ends == dict.fromkeys(others, "done") | {poison: "failed"}


def test_a_policy_that_cannot_be_drawn_spoils_no_batch(quiet: Desk) -> None:
    def check(policy: Any) -> None:
        if "cat" in {concept.name for concept in policy.concepts}:
            raise backend.REFUSALS[0]("the detector knows no cat")

    quiet.stub.check = check  # type: ignore[method-assign]
    good, bad = accept(quiet), accept(quiet, also_erase=["cat"])
    quiet.start()
    _until(lambda: quiet.service.jobs.count(jobs.LIVE) == 0)
    found = quiet.service.jobs.get("kids", bad)
    assert found is not None and found.error is not None
    assert (found.error.status, found.error.param) == (400, "also_erase")
    assert state(quiet, good) == "done" and [len(rows) for rows, _ in quiet.stub.batches] == [1]


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_a_clock_that_jumps_while_drawing_takes_no_job(
    jump: float, quiet: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet.stub.gate.clear()
    name, now = accept(quiet), time.time
    for _ in range(2):  # either would take the job
        quiet.start()
    assert quiet.stub.began.wait(5)
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    time.sleep(1.5 * LIMITS.lease)
    quiet.stub.gate.set()
    _until(lambda: state(quiet, name) == "done")
    assert len(quiet.stub.batches) == 1 and len(quiet.service.jobs.pictures(name)) == 1
    assert quiet.service.audit.verify()[1] == ""


# ---------------------------------------------------------------- requests


def test_a_key_whose_policy_is_gone_draws_nothing(quiet: Desk) -> None:
    with quiet.service.database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM policies WHERE name = 'kids'")
    error(quiet.post(ASKED), 403, "no_policy")
    error(quiet.client.get("/v1/efface/me", headers=quiet.head()), 403, "no_policy")
    assert quiet.service.jobs.waiting("stub") == [] and accept(quiet, key="press")


def test_a_request_that_can_be_repeated_outlives_its_time_out(quiet: Desk) -> None:
    quiet.service.limits = replace(LIMITS, wait=0.3)
    head = {"idempotency-key": "order-1"}
    error(quiet.post(ASKED, **head), 504, "timeout")
    quiet.service.limits = LIMITS
    quiet.start()
    assert quiet.post(ASKED, **head).status_code == 200 and len(quiet.stub.batches) == 1


@pytest.mark.parametrize(
    ("keep", "drains", "end"), [(False, False, "cancelled"), (True, False, "queued"), (False, True, "queued")]
)
def test_a_request_whose_task_is_cancelled_cancels_its_job(keep: bool, drains: bool, end: str, quiet: Desk) -> None:
    """Some servers cancel the task when a client leaves. All do it when they shut down, and the job stays."""
    if drains:
        quiet.service.draining.set()
    name = accept(quiet)
    holder: Any = quiet.service.keys.holder(quiet.keys["kids"])

    async def there() -> bool:
        return False

    async def main() -> None:
        watcher = Watcher(quiet.service.jobs)
        polls = asyncio.create_task(watcher.run())
        request: Any = SimpleNamespace(
            app=SimpleNamespace(state=SimpleNamespace(watcher=watcher)), is_disconnected=there
        )
        task = asyncio.create_task(images._wait(request, quiet.service, holder, name, keep))
        await asyncio.sleep(0.2)
        assert watcher._names.keys() == {name}
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert watcher._names == {}
        polls.cancel()

    asyncio.run(main())
    assert state(quiet, name) == end


def test_a_stream_says_that_the_database_went_away(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise Unavailable("secret")

    monkeypatch.setattr(images, "answer", away)
    text = desk.post({**ASKED, "stream": True}).text
    assert '"code": "unavailable"' in text and "secret" not in text


def test_a_request_that_exists_needs_no_room(quiet: Desk) -> None:
    first = accept(quiet, "order-1")
    for _ in range(LIMITS.tenant - 1):
        accept(quiet)
    with pytest.raises(Refused, match="no room"):
        accept(quiet)
    with pytest.raises(Refused, match="no room"):
        accept(quiet, "order-2")
    assert accept(quiet, "order-1") == first


def test_a_queue_is_bounded_also_for_requests_at_the_same_time(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(quiet.service.jobs), "load", lambda *_: (0, 0, 0.0))  # as all saw it before any wrote
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        made = [pool.submit(accept, quiet) for _ in range(12)]
    refused = [each.exception() for each in made if each.exception() is not None]
    assert quiet.service.jobs.count(jobs.LIVE) == LIMITS.tenant and len(refused) == 12 - LIMITS.tenant
    assert len(entries(quiet, "job accepted")) == LIMITS.tenant


def test_a_key_that_used_up_its_rate_says_when_to_come_back(quiet: Desk) -> None:
    cost = 64 * 64 * 2 / 1e6
    quiet.keys["slow"] = quiet.service.keys.add("kids", "kids", rate=cost, burst=2 * cost)[1]
    made = [accept(quiet, again, "slow") for again in ("order-1", None)]
    response = quiet.post(ASKED, "slow")
    assert error(response, 429, "rate_limit_exceeded") and response.headers["retry-after"] == "1"
    assert accept(quiet, "order-1", "slow") == made[0]  # a job that exists costs nothing
    error(quiet.post({**ASKED, "steps": 3}, "slow"), 400, "too_costly")
    assert accept(quiet) and quiet.service.jobs.count(jobs.LIVE) == 3


def test_jobs_of_a_model_that_nobody_serves_take_no_room(quiet: Desk) -> None:
    for _ in range(LIMITS.queue):
        quiet.service.jobs.accept(new(model="retired"), nothing)
    assert accept(quiet)


def test_one_idempotency_key_is_not_shared_by_policies_of_one_tenant(desk: Desk) -> None:
    """Else a holder of the weaker key could hand pictures to a holder of the stronger one."""
    desk.keys["lax"] = desk.service.keys.add("kids", "press")[1]
    head = {"idempotency-key": "order-1"}
    assert desk.post(ASKED, "lax", **head).json()["efface"]["rows"][0]["acted"] == []
    error(desk.post(ASKED, "kids", **head), 422, "idempotency_key_reused")


def test_one_tenant_cannot_take_all_open_requests(desk: Desk) -> None:
    name = desk.post(ASKED).json()["efface"]["job"]
    _until(lambda: not desk.service.open)
    desk.service.open["kids"] = LIMITS.tenant
    asked = [desk.client.get(f"/v1/efface/jobs/{name}{end}", headers=desk.head()) for end in ("", "/events")]
    assert desk.client.delete(f"/v1/efface/jobs/{name}", headers=desk.head()).status_code == 200  # which ends them
    desk.service.open["kids"] = 2 * LIMITS.tenant
    asked.append(desk.client.delete(f"/v1/efface/jobs/{name}", headers=desk.head()))
    for response in (desk.post(ASKED), *asked):
        assert error(response, 429, "too_many_open") and response.headers["retry-after"]
    assert desk.post(ASKED, "teens").status_code == 200


# ---------------------------------------------------------------- what is kept


def test_no_part_of_a_prompt_stays_in_the_database(desk: Desk) -> None:
    long, short = "a cat " * 40 + "UNREADTAIL", "PLAINPROMPT"
    error(desk.post({**ASKED, "prompt": long}), 400, "prompt_too_long")
    assert desk.post({**ASKED, "prompt": short}).status_code == 200
    with desk.service.database.reading() as connection:
        connection.exec_driver_sql("SELECT 1")
    for each in desk.workers:
        each.stop()
        each.join(10)
    desk.service.database.close()  # the last one empties the write-ahead log
    content = Path(str(desk.service.database.name)).read_bytes()
    assert b"queued" in content or b"failed" in content
    assert b"UNREADTAIL" not in content and short.encode() not in content


def test_a_body_is_stored_as_a_keyed_hash(quiet: Desk) -> None:
    import hashlib

    found = quiet.service.jobs.get("kids", accept(quiet))
    bare = hashlib.sha256(parsed(ASKED).model_dump_json().encode()).hexdigest()
    assert found is not None and len(found.body_hash) == 64 and found.body_hash != bare


def test_the_audit_log_has_one_end_for_each_accepted_job(quiet: Desk) -> None:
    queued, running, done = (accept(quiet, prompt=prompt) for prompt in ("a", "b", "c"))
    holder: Any = quiet.service.keys.holder(quiet.keys["kids"])
    images.cancel(quiet.service, holder, queued)
    quiet.stub.gate.clear()
    quiet.start()
    assert quiet.stub.began.wait(5)
    images.cancel(quiet.service, holder, running)
    quiet.stub.gate.set()
    _until(lambda: quiet.service.jobs.count(jobs.LIVE) == 0)
    assert {entry["job"] for entry in entries(quiet, "job accepted")} == {queued, running, done}
    ends = {entry["job"]: entry["state"] for entry in entries(quiet, "job finished")}
    assert ends == {running: "cancelled", done: "done"}
    assert collections.Counter(entry["job"] for entry in entries(quiet, "job cancelled")) == {queued: 1, running: 1}


def test_a_service_and_its_database_belong_together(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    initialise(one)[0].database.close()
    initialise(two)[0].database.close()
    url = f"sqlite:///{one / DATABASE_FILE}"
    with pytest.raises(ValueError, match="Restore its pepper"):
        initialise(tmp_path / "three", url)
    assert not (tmp_path / "three" / PEPPER_FILE).exists()
    with pytest.raises(ValueError, match="does not fit"):
        opened(two, url)
    opened(one, url).database.close()


def test_a_log_on_a_full_disk_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(log.sys, "stderr", full)
        with pytest.raises(OSError, match="space"):
            print("x", file=full, flush=True)
        log.told("request", status=200)
        with contextlib.suppress(OSError):
            full.close()
