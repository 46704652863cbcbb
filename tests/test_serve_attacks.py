"""Attacks on the service that once went through, each with what it meets now."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sql
from PIL import Image
from test_serve import LIMITS, URL, Desk, _until, desk, error, idle, quiet
from test_serve_faults import accept
from test_serve_faults import state as state_of
from test_serve_state import PEPPER, database, new, nothing, postgres
from typer.testing import CliRunner

from efface.cli import app as cli
from efface.serve import tables
from efface.serve.audit import Audit
from efface.serve.backend import Drawn, Row
from efface.serve.database import Database, Unavailable
from efface.serve.keys import Keys
from efface.serve.leases import Leases
from efface.serve.policies import Policies
from efface.serve.run import Server, configured, listen
from efface.serve.watch import Watcher

__all__ = ["database", "desk", "idle", "postgres", "quiet"]
ASKED = {"prompt": "a cat", "steps": 1}
NOISE = Image.frombytes("RGB", (512, 512), os.urandom(512 * 512 * 3))


# ---------------------------------------------------------------- slow clients, on real sockets


@pytest.fixture
def server(desk: Desk) -> Iterator[Server]:
    """The server of `efface serve run`, in a thread. Its answers are larger than what a system holds for a reader."""
    desk.service.limits = replace(LIMITS, send=0.5, read=3.0, tenant=3)
    desk.service.sizes = ((512, 512),)
    drawn = desk.stub._drawn
    desk.stub._drawn = lambda row, call: Drawn(NOISE, drawn(row, call).record)  # type: ignore[method-assign]
    made, line = Server(configured(desk.service, "127.0.0.1", 0), desk.service), listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(made._serve([line])), daemon=True)
    thread.start()
    _until(lambda: made.started)
    yield made
    made.should_exit = made.force_exit = True
    thread.join(10)


def asked(server: Server, key: str, length: int = 0, window: int = 4_096, **more: Any) -> socket.socket:
    """The connection of a request whose answer is not read."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    line.connect(server.servers[0].sockets[0].getsockname())
    body = json.dumps(ASKED | {"n": 6, "output_format": "png"} | more)
    head = [f"POST {URL} HTTP/1.1", "host: x", f"authorization: Bearer {key}", "content-type: application/json"]
    line.sendall("\r\n".join([*head, f"content-length: {length or len(body)}", "", body]).encode())
    return line


def waiting(server: Server) -> list[int]:
    """The bytes that wait for the reader of each connection."""
    return [each.transport.get_write_buffer_size() for each in server.server_state.connections]  # type: ignore[union-attr]


@pytest.mark.long
@pytest.mark.parametrize("stream", [False, True])
def test_a_reader_that_takes_nothing_is_cut_and_one_that_is_slow_is_not(
    stream: bool, server: Server, desk: Desk
) -> None:
    stalled, slow = (asked(server, desk.keys["kids"], window=each, stream=stream) for each in (4_096, 65_536))
    got = b""
    for _ in range(400):
        time.sleep(0.01)
        got += slow.recv(65_536)
        if (b"[DONE]" in got[-300:]) if stream else got.endswith(b"}]}}"):
            break
    assert len(got) > 6 * 512 * 512 * 3  # all of it, and more than one limit took
    _until(lambda: len(waiting(server)) <= 1)
    slow.close()
    _until(lambda: not waiting(server) and not desk.service.open)
    stalled.close()


def test_a_request_is_open_from_its_body_to_the_end_of_its_answer(server: Server, desk: Desk) -> None:
    """Else one tenant could hold all connections of the server, in the phases that are not counted."""
    lines = [asked(server, desk.keys["kids"], 500) for _ in range(3)]  # bodies that do not end
    _until(lambda: desk.service.open == {"kids": 3})
    last = asked(server, desk.keys["kids"])
    assert last.recv(65_536).startswith(b"HTTP/1.1 429 ")
    assert asked(server, desk.keys["teens"], n=1).recv(65_536).startswith(b"HTTP/1.1 200 ")
    for line in lines:
        line.close()
    _until(lambda: not desk.service.open)
    desk.service.limits = replace(desk.service.limits, send=5.0)
    line = asked(server, desk.keys["kids"])  # an answer that nobody takes
    _until(lambda: max(waiting(server), default=0) > 0)
    assert desk.service.open == {"kids": 1} and desk.service.jobs.count(["running", "queued"]) == 0
    line.close()


@pytest.mark.parametrize("turns", range(6))
def test_a_cancellation_in_the_moment_of_a_poll_is_not_lost(turns: int, idle: Desk) -> None:
    """Else a request whose client left would wait on, for as long as the limits say."""

    async def main() -> bool:
        watcher = Watcher(idle.service.jobs)

        async def follow() -> None:
            async for _ in watcher.follow("job_x", 5.0):
                pass

        task = asyncio.create_task(follow())
        for _ in range(5):
            await asyncio.sleep(0)
        for news in watcher._names["job_x"]:
            news.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=0.3)
        return task.done() and task.cancelled()

    assert asyncio.run(main())


def test_a_job_that_is_deleted_again_and_again_leaves_one_entry(quiet: Desk) -> None:
    """Else a tenant could fill the log, which nothing but its operator shortens."""
    queued, running = accept(quiet), accept(quiet, prompt="a dog")
    quiet.service.jobs.claim([running], "a")
    for name in (queued, running):
        asked = [quiet.client.delete(f"/v1/efface/jobs/{name}", headers=quiet.head()) for _ in range(5)]
        assert [(each.status_code, each.json()["deleted"]) for each in asked] == [(200, True)] * 5
    kinds = [(entry["job"], entry["kind"]) for entry in quiet.service.audit.entries() if "job" in entry]
    assert kinds == [(name, kind) for kind in ("job accepted", "job cancelled") for name in (queued, running)]


# ---------------------------------------------------------------- requests with two meanings


@pytest.mark.parametrize(
    "body",
    ['{"prompt": "a cat", "prompt": "beer"}', '{"prompt": "a cat", "seed": 1, "seed": 1}', '{"a": {"b": 1, "b": 2}}'],
)
def test_an_entry_that_occurs_twice_is_refused(body: str, idle: Desk) -> None:
    head = {"content-type": "application/json"}
    error(idle.client.post(URL, content=body, headers=idle.head(**head)), 400, "invalid_json")
    twice = '{"erase": ["alcohol"], "erase": ["cat"]}'
    path, admin = "/v1/efface/policies/kids", idle.head(idle.admin, **head)
    error(idle.client.put(path, content=twice, headers=admin), 400, "invalid_json")


def test_no_answer_names_the_host_of_a_request(idle: Desk) -> None:
    response = idle.client.post(f"{URL}/", json=ASKED, headers=idle.head(host="evil.example"), follow_redirects=False)
    error(response, 404, "not_found")
    assert "evil" not in str(response.headers)


def test_sizes_have_ascii_digits(idle: Desk) -> None:
    assert error(idle.post({**ASKED, "size": "6\uff14x64"}), 400, "invalid_value")["param"] == "size"


# ---------------------------------------------------------------- pictures that must not leave


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"outcome": "blocked"}, 403, "content_blocked"),
        ({"outcome": "odd"}, 403, "content_blocked"),
        ({"acted": []}, 500, "policy_not_applied"),
        ({"policy": "0" * 64}, 500, "policy_not_applied"),
        ({}, 200, ""),
    ],
)
def test_a_picture_leaves_only_with_a_record_of_its_whole_policy(
    change: dict[str, Any], status: int, code: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = desk.stub._drawn

    def other(row: Row, call: Any) -> Drawn:
        made = drawn(row, call)
        return Drawn(made.picture, {**made.record, **change})

    monkeypatch.setattr(desk.stub, "_drawn", other)
    response = desk.post(ASKED)
    assert (response.status_code == status and "b64_json" in response.text) or bool(error(response, status, code))
    with desk.service.database.reading() as connection:
        contents = connection.execute(sql.select(tables.pictures.c.content)).scalars().all()
    assert any(contents) == (status == 200)


# ---------------------------------------------------------------- a database that goes away


def test_a_database_that_goes_away_costs_a_job_no_attempt(quiet: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several such times would end a job that nobody could draw."""
    name, version, away = accept(quiet), quiet.service.policies.version, [True] * 2

    def sometimes(number: int) -> Any:
        if away:
            away.pop()
            raise Unavailable("The database cannot be used.")
        return version(number)

    monkeypatch.setattr(quiet.service.policies, "version", sometimes)
    quiet.start()
    _until(lambda: state_of(quiet, name) == "done")
    with quiet.service.database.reading() as connection:
        assert connection.execute(sql.select(tables.jobs.c.attempts)).scalar() == 1
    assert not away


def test_a_worker_that_could_not_see_heartbeats_takes_no_job(quiet: Desk) -> None:
    clock = iter((0.0, 20.0, 40.0, 60.0))
    leases = Leases(15.0, clock=lambda: next(clock))
    assert leases.dead({("a", 1): 7}) == []
    assert leases.dead({("a", 1): 7}) == [("a", 1, 7)]  # the effect
    leases.forget()
    assert leases.dead({("a", 1): 7}) == []
    quiet.start()
    worker = quiet.workers[0]
    worker._leases._seen = {("other", 1): (7, -1e9)}
    there = quiet.service.database.engine
    quiet.service.database.engine = sql.create_engine("sqlite:////absent/serve.db")
    _until(lambda: not worker._leases._seen)
    quiet.service.database.engine = there


def test_a_request_joins_no_other_after_an_error_of_the_database(database: Database) -> None:
    from efface.serve.jobs import Jobs

    jobs = Jobs(database)
    jobs.accept(new("kids"), nothing)

    def clash(connection: sql.Connection) -> None:
        for _ in range(2):
            connection.execute(tables.audit.insert().values(seq=9, body="{}", hash="0" * 64))

    with pytest.raises(sql.exc.IntegrityError):
        jobs.accept(new("kids"), clash)


def test_a_url_that_cannot_be_read_shows_no_password() -> None:
    for url in ("postgresql+psycopg://efface:a@b:s3cret@db/efface", "postgresql://efface@db:s3cret/e", "s3cret"):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            Database(url)
        assert "s3cret" not in str(caught.value) and caught.value.__suppress_context__


# ---------------------------------------------------------------- keys, policies and the log


def _moved(connection: sql.Connection) -> None:
    connection.execute(tables.keys.update().where(tables.keys.c.tenant == "kids").values(policy="press"))


def _back(connection: sql.Connection) -> None:
    connection.execute(tables.keys.update().values(revoked=None))


def _older(connection: sql.Connection) -> None:
    connection.execute(tables.policies.delete().where(tables.policies.c.version == 2))


def _weaker(connection: sql.Connection) -> None:
    other = connection.execute(sql.select(tables.policies).where(tables.policies.c.name == "press")).mappings().one()
    same = {"body": other["body"], "hash": other["hash"]}
    connection.execute(tables.policies.update().where(tables.policies.c.version == 2).values(same))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    ("change", "which"), [(_moved, "key"), (_back, "key"), (_older, "policy kids"), (_weaker, "policy kids")]
)
def test_a_key_or_a_policy_that_was_changed_in_the_database_is_found(
    dropped: bool, change: Callable[[sql.Connection], None], which: str, database: Database
) -> None:
    audit = Audit(database, PEPPER)
    keys, policies = Keys(database, audit, PEPPER), Policies(database, audit)
    for name, entries_ in (("kids", {"erase": ["cat"]}), ("press", {"unguarded": True}), ("kids", {"erase": ["dog"]})):
        policies.add(name, entries_, "test")
    keys.add("kids", "kids", days=1.5, rate=0.1)
    keys.revoke(keys.add("admin", None, admin=True)[0])
    if dropped:
        time.sleep(0.01)
        assert audit.drop(0) == 6
    n, fault = audit.verify()
    assert (n, fault) == (7 if dropped else 6, "")
    with database.writing() as connection:
        change(connection)
    found = audit.verify()[1]
    assert found.startswith(f"the {which}") and found.endswith("is not as the log says")
    with pytest.raises(ValueError, match="damaged"):
        audit.drop(0)


def test_writers_of_one_policy_make_one_version_each(database: Database) -> None:
    audit, failed = Audit(database, PEPPER), list[BaseException]()
    begin = threading.Barrier(6)

    def write(concept: str) -> None:
        begin.wait()
        try:
            Policies(database, audit).add("kids", {"erase": [{"name": concept}]}, "test")
        except sql.exc.IntegrityError as error_:
            failed.append(error_)

    threads = [threading.Thread(target=write, args=(f"thing {k}",)) for k in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    latest = Policies(database, audit).latest("kids")
    assert not failed and latest is not None and latest.policy.version == 6 and audit.verify() == (6, "")


def _cut(database: Database, seq: int) -> None:
    """Somebody with the database, but without the pepper, deletes the last entries."""
    with database.writing() as connection:
        for name in ("audit_no_delete",) if database.sqlite else ("audit_no_change ON audit",):
            connection.execute(sql.text(f"DROP TRIGGER IF EXISTS {name}"))
        connection.execute(tables.audit.delete().where(tables.audit.c.seq > seq))


def test_an_end_that_was_cut_off_is_told_by_a_running_worker(quiet: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    quiet.start()
    worker = quiet.workers[0]
    _until(lambda: worker._entry is not None)
    n = quiet.service.audit.last()[0]
    accept(quiet)
    _until(lambda: worker._entry[0] == n + 2)  # type: ignore[index]
    assert quiet.service.metrics.registry.get_sample_value("efface_audit_last_entry") == n + 2
    assert quiet.service.metrics.registry.get_sample_value("efface_audit_faults_total") == 0
    _cut(quiet.service.database, n + 1)
    _until(lambda: quiet.service.metrics.registry.get_sample_value("efface_audit_faults_total") == 1)
    assert quiet.service.audit.verify() == (n + 1, "")  # which the chain itself does not show
    assert any(json.loads(line)["event"] == "audit log cut off" for line in capfd.readouterr().err.splitlines())
    time.sleep(0.3)
    assert quiet.service.metrics.registry.get_sample_value("efface_audit_faults_total") == 1


def test_the_command_finds_an_end_that_was_cut_off(quiet: Desk) -> None:
    accept(quiet)
    audit, folder = quiet.service.audit, str(quiet.service.database.name).removesuffix("/serve.db")
    n, hash_ = audit.last()
    run = CliRunner().invoke
    shown = run(cli, ["serve", "audit", folder])
    assert shown.exit_code == 0 and f"{n}:{hash_}" in shown.output
    assert run(cli, ["serve", "audit", folder, "--expect", f"{n}:{hash_}"]).exit_code == 0
    _cut(quiet.service.database, n - 1)
    with quiet.service.database.writing() as connection:  # the service goes on
        audit.add(connection, "event", {})
    assert run(cli, ["serve", "audit", folder]).exit_code == 0
    found = run(cli, ["serve", "audit", folder, "--expect", f"{n}:{hash_}"])
    assert found.exit_code == 2 and "not the expected one" in found.output
    for odd in ("x", f"{n}", f"{n}:0", f"\u0663:{hash_}", f"{'9' * 30}:{hash_}"):
        assert "NUMBER:HASH" in run(cli, ["serve", "audit", folder, "--expect", odd]).output
