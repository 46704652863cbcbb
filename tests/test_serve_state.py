"""Jobs, keys, policies and the audit log, on SQLite and on PostgreSQL: nothing is lost, doubled or changed."""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st

from efface.serve import jobs as module
from efface.serve import tables
from efface.serve.audit import Audit
from efface.serve.claims import End, Picture
from efface.serve.database import CACHE, Database, Unavailable
from efface.serve.errors import Refused
from efface.serve.fair import Fair
from efface.serve.jobs import Jobs, New, Waiting
from efface.serve.keys import Keys
from efface.serve.leases import Leases
from efface.serve.policies import Policies, effective
from efface.serve.service import Limits, Service, initialise
from efface.serve.turns import Turns

PEPPER = b"p" * 32
PICTURE = Picture(b"png", {"outcome": "drawn"})
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def nothing(connection: sql.Connection, state: str = "") -> None:
    pass


# ---------------------------------------------------------------- databases


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server for this test run, on a socket and a free port of this machine."""
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    if not BINARIES:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql; `apt-get install postgresql` installs one")
    folder, user = tmp_path_factory.mktemp("postgres"), None
    if os.geteuid() == 0:  # the server refuses to run as root
        user = next((name for name in ("postgres", "nobody") if _known(name)), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no other user to run it")
        for each in (folder, *folder.parents):
            if each.name.startswith("pytest") or each == folder:
                each.chmod(each.stat().st_mode | 0o055)
        shutil.chown(folder, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = {"user": user, "capture_output": True, "text": True, "cwd": folder}
    data, bin_ = folder / "data", BINARIES[-1]
    made = subprocess.run([bin_ / "initdb", "-D", data, "-U", "efface", "-A", "trust", "-N"], **run)  # type: ignore[call-overload]
    if made.returncode:
        pytest.skip(f"PostgreSQL cannot make a cluster here: {made.stderr.strip()[-200:]}")
    options = f"-F -h 127.0.0.1 -p {port} -k {folder}"
    start = [bin_ / "pg_ctl", "-D", data, "-o", options, "-w", "-l", folder / "log", "start"]
    started = subprocess.run(start, **{**run, "capture_output": False, "stdout": subprocess.DEVNULL})  # type: ignore[call-overload]
    assert started.returncode == 0, (folder / "log").read_text()
    url = f"postgresql+psycopg://efface@127.0.0.1:{port}"
    admin = sql.create_engine(f"{url}/postgres", isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sql.text("CREATE DATABASE migrated"))
    admin.dispose()
    template = Database(f"{url}/migrated")
    template.migrate()
    template.close()
    yield url
    subprocess.run([bin_ / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **run)  # type: ignore[call-overload]


def _known(user: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(user))
    return False


def _fresh(server: str, more: str = "") -> str:
    """The URL of a new database."""
    name = f"t{time.monotonic_ns()}"
    admin = sql.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sql.text(f"CREATE DATABASE {name} {more}"))
    admin.dispose()
    return f"{server}/{name}"


@functools.cache
def migrated() -> Path:
    """An empty SQLite file with the tables."""
    path = Path(tempfile.mkdtemp()) / "serve.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.close()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/serve.db"
        shutil.copy(migrated(), tmp_path / "serve.db")
    else:
        url = _fresh(request.getfixturevalue("postgres"), "TEMPLATE migrated")
    made = Database(url)
    yield made
    made.close()


def new(tenant: str = "kids", **more: Any) -> New:
    facts: dict[str, Any] = {"tenant": tenant, "key": "key_1", "policy": 1, "policy_hash": "0" * 64, "batch": "b"}
    facts["model"] = "stub"
    facts |= {"rows": 1, "cost": 1.0, "steps": 3, "request": '{"prompt": "secret", "n": 1}', "body_hash": "1" * 64}
    return New(**(facts | more))


# ---------------------------------------------------------------- tables


def test_the_migrations_make_the_declared_tables(database: Database) -> None:
    database.migrate()  # a second time changes nothing
    assert database.version() == "0003"
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.DATA) == []


def test_a_url_of_another_database_is_refused() -> None:
    for url in (
        "mysql://localhost/x",
        "nonsense",
        "sqlite+none:///x",
        "",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:////dev/zero",
    ):
        with pytest.raises(ValueError, match=r"Expected|ordinary file"):
            Database(url)


def test_a_database_that_cannot_be_used_says_why_and_shows_no_password(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/absent/serve.db", "postgresql+psycopg://u:secret@127.0.0.1:1/x"):
        with pytest.raises(Unavailable) as caught, Database(url).reading():
            pass
        assert "secret" not in str(caught.value) and "Correct that, and try again." in str(caught.value)


# ---------------------------------------------------------------- keys


def test_keys_are_shown_once_and_stored_as_keyed_hashes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = Audit(database, PEPPER)
    keys = Keys(database, audit, PEPPER)
    Policies(database, audit).add("kids", {"erase": ["alcohol"]}, "test")
    name, key = keys.add("kids", "kids", days=1)
    with database.reading() as connection:
        stored = [str(value) for row in connection.execute(sql.select(tables.keys)) for value in row]
        stored += connection.execute(sql.select(tables.audit.c.body)).scalars().all()
    assert key.startswith("ef_") and len(key) == 46 and not any(key[3:] in text for text in stored)
    assert "hash" not in keys.list()[0]
    holder = keys.holder(key)
    assert holder is not None and (holder.key, holder.tenant, holder.policy, holder.admin) == (
        name,
        "kids",
        "kids",
        False,
    )
    for wrong in ("", "ef_", key[:-1], key + "x", key.upper(), "ef_" + "a" * 43):
        assert keys.holder(wrong) is None
    assert Keys(database, audit, b"q" * 32).holder(key) is None
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 2 * 86_400)
        assert keys.holder(key) is None
    assert keys.holder(key) is not None
    keys.revoke(name)
    assert keys.holder(key) is None
    for act in (lambda: keys.revoke(name), lambda: keys.revoke("key_x")):
        with pytest.raises(ValueError, match="List the keys"):
            act()
    for policy, admin in ((None, False), ("kids", True), ("absent", False)):
        with pytest.raises(ValueError, match="policy"):
            keys.add("kids", policy, admin=admin)
    for tenant in ("", "a b", "a\0", "../x", "x" * 101, "\u202e"):
        with pytest.raises(ValueError, match="Expected a tenant"):
            keys.add(tenant, "kids")
    with pytest.raises(ValueError, match="pepper"):
        Keys(database, audit, b"short")


def test_a_key_with_a_rate_spends_what_the_rate_allows(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    audit, now = Audit(database, PEPPER), 1_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    keys = Keys(database, audit, PEPPER)
    Policies(database, audit).add("kids", {"erase": ["alcohol"]}, "test")
    name, free = (keys.add("kids", "kids", **more)[0] for more in ({"rate": 2.0, "burst": 10.0}, {}))

    def spend(cost: float, key: str = name) -> int:
        """The status of the refusal, or 200; seconds to wait are added."""
        try:
            with database.writing() as connection:
                keys.spend(connection, key, cost)
        except Refused as refused:
            return refused.status + (refused.retry or 0)
        return 200

    assert spend(1e6, free) == 200
    assert [spend(6), spend(4), spend(1)] == [200, 200, 429 + 1]  # the burst is spent; a refusal spends nothing
    assert spend(7) == 429 + 4 and spend(11) == 400
    now += 3.0
    assert [spend(6), spend(0.1)] == [200, 430]
    now -= 500.0  # the clock goes back: nothing is filled, and from here on it fills again
    assert spend(1) == 430
    now += 500.0 + 0.5
    assert spend(1) == 200
    now += 1e6  # it jumps ahead: one burst, not a million seconds
    assert [spend(10), spend(0.1)] == [200, 430]
    now += 1.0
    made: list[int] = []
    threads = [threading.Thread(target=lambda: made.append(spend(2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [200, 430, 430, 430]
    for rate, burst in ((0.0, None), (-1.0, None), (float("nan"), None), (2.0, 1.0), (None, 5.0)):
        with pytest.raises(ValueError, match=r"`(rate|burst)`"):
            keys.add("kids", "kids", rate=rate, burst=burst)


# ---------------------------------------------------------------- policies


def test_versions_of_policies_count_and_never_change(database: Database) -> None:
    policies = Policies(database, Audit(database, PEPPER))
    first = policies.add("kids", {"erase": ["alcohol"]}, "a")
    again = policies.add("kids", {"erase": ["alcohol"]}, "b")
    second = policies.add("kids", {"erase": ["alcohol", "weapon"]}, "b")
    assert (first.policy.version, again.id, second.policy.version) == (1, first.id, 2)
    latest, earlier = policies.latest("kids"), policies.version(first.id)
    assert latest is not None and latest.policy.hash == second.policy.hash
    assert earlier is not None and earlier.policy.hash == first.policy.hash and policies.latest("x") is None
    for entries in ({}, {"erase": ["alcohol"], "version": 9}, {"erase": ["alcohol"], "strenght": 1}):
        with pytest.raises(ValueError, match="Expected"):
            policies.add("kids", entries, "a")
    assert [each.policy.version for each in policies.list()] == [2]
    assert effective(first.policy, ["cat"]).hash != first.policy.hash == effective(first.policy, []).hash


# ---------------------------------------------------------------- audit


def test_the_audit_log_cannot_be_changed_unseen(database: Database) -> None:
    audit = Audit(database, PEPPER)
    for k in range(5):
        with database.writing() as connection:
            audit.add(connection, "event", {"k": k})
    assert audit.verify() == (5, "")
    more = () if database.sqlite else ("TRUNCATE audit",)
    for statement in ("UPDATE audit SET body = 'x'", "DELETE FROM audit", *more):
        with (
            pytest.raises((sql.exc.IntegrityError, ValueError), match="cannot be changed"),
            database.writing() as connection,
        ):
            connection.execute(sql.text(statement))
    assert audit.verify() == (5, "") and [entry["k"] for entry in audit.entries(2)] == [3, 4]
    assert Audit(database, b"q" * 32).verify() == (1, "entry 1 was changed")
    with database.writing() as connection:  # by somebody who may drop the triggers
        triggers = ("audit_no_update", "audit_no_delete") if database.sqlite else ("audit_no_change ON audit",)
        for name in triggers:
            connection.execute(sql.text(f"DROP TRIGGER {name}"))
        connection.execute(sql.text("UPDATE audit SET body = replace(body, '2', '7') WHERE seq = 3"))
    assert audit.verify() == (3, "entry 3 was changed")
    with database.writing() as connection:
        connection.execute(sql.text("DELETE FROM audit WHERE seq = 2"))
    assert audit.verify() == (2, "entry 2 is missing")


def test_old_entries_are_dropped_and_the_rest_can_be_checked(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit, now = Audit(database, PEPPER), time.time()
    for age in (40, 35, 2, 50, 1):  # the fourth was written while the clock was wrong
        monkeypatch.setattr(time, "time", lambda age=age: now - age * 86_400)
        with database.writing() as connection:
            audit.add(connection, "event", {"age": age})
    monkeypatch.setattr(time, "time", lambda: now)
    assert audit.drop(60) == 0 and audit.drop(30) == 2 and audit.drop(30) == 0
    assert [entry.get("age") for entry in audit.entries()] == [2, 50, 1, None] and audit.verify() == (6, "")
    with (
        pytest.raises((sql.exc.IntegrityError, ValueError), match="cannot be changed"),
        database.writing() as connection,
    ):
        connection.execute(sql.text("DELETE FROM audit WHERE seq = 3"))
    with database.writing() as connection:  # a start that makes the deletion possible
        connection.execute(tables.starts.insert().values(seq=3, hash="0" * 64, mac="0" * 64))
        connection.execute(sql.text("DELETE FROM audit WHERE seq = 3"))
    assert audit.verify() == (3, "the start after entry 3 was forged")
    with pytest.raises(ValueError, match="damaged"):
        audit.drop(0)


def test_an_entry_of_another_history_is_found(tmp_path: Path) -> None:
    """An old copy of the database has an entry with a right hash, which does not fit the present chain."""
    rows = []
    for name in ("present", "copy"):
        database = Database(f"sqlite:///{tmp_path}/{name}.db")
        database.migrate()
        audit = Audit(database, PEPPER)
        for k in range(4):
            with database.writing() as connection:
                audit.add(connection, "event", {"k": k, "where": name})
        with database.reading() as connection:
            rows.append([dict(row) for row in connection.execute(sql.select(tables.audit)).mappings()])
    for name, k in (("present", 1), ("copy", 2)):  # the copy's second entry goes into the present one, and back
        database = Database(f"sqlite:///{tmp_path}/{name}.db")
        other = rows[1 if name == "present" else 0][k]
        with database.writing() as connection:
            connection.execute(sql.text("DROP TRIGGER audit_no_update"))
            connection.execute(tables.audit.update().where(tables.audit.c.seq == k + 1).values(other))
        assert Audit(database, PEPPER).verify() == (k + 1, f"entry {k + 1} was changed")
        database.close()


def test_writers_of_the_audit_log_make_one_chain(database: Database) -> None:
    audit = Audit(database, PEPPER)

    def write() -> None:
        for _ in range(10):
            with database.writing() as connection:
                audit.add(connection, "event", {})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert audit.verify() == (40, "")


WRITES = """
import sys
from efface.serve.audit import Audit
from efface.serve.database import Database

database = Database(sys.argv[1])
audit = Audit(database, b"p" * 32)
for k in range(10):
    with database.writing() as connection:
        audit.add(connection, "event", {"process": sys.argv[2], "k": k})
"""


def test_processes_write_one_chain(database: Database) -> None:
    """No entry is lost or doubled, and each process finds its own in order."""
    url = database.engine.url.render_as_string(hide_password=False)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITES, url, name], env=environment) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    audit = Audit(database, PEPPER)
    found = audit.entries()
    assert audit.verify() == (30, "") and [entry["seq"] for entry in found] == list(range(1, 31))
    for name in "abc":
        assert [entry["k"] for entry in found if entry["process"] == name] == list(range(10))


# ---------------------------------------------------------------- jobs


def test_sqlite_flushes_every_transaction(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/serve.db")
    with database.reading() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("synchronous", "journal_mode")]
    assert found == [2, "wal"]
    database.close()


def test_an_idempotency_key_accepts_a_request_once_per_tenant(database: Database) -> None:
    jobs = Jobs(database)
    first, fresh = jobs.accept(new(idempotency="k"), nothing)
    assert fresh and jobs.accept(new(idempotency="k"), nothing) == (first, False)
    assert jobs.accept(new("press", idempotency="k"), nothing)[0] != first
    assert jobs.accept(new(), nothing)[0] != jobs.accept(new(), nothing)[0]
    with pytest.raises(Refused) as caught:
        jobs.accept(new(idempotency="k", body_hash="2" * 64), nothing)
    assert (caught.value.status, caught.value.code) == (422, "idempotency_key_reused")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(jobs.accept(new(idempotency="r"), nothing)[0])) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1


def test_a_job_is_not_accepted_without_its_audit_entry(database: Database) -> None:
    def fails(connection: sql.Connection) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        Jobs(database).accept(new(), fails)
    assert Jobs(database).waiting("stub") == []


def test_only_the_holder_of_the_present_fence_finishes_a_job(database: Database) -> None:
    jobs = Jobs(database)
    name, _ = jobs.accept(new(), nothing)
    (late,) = jobs.claim([name], "a")
    assert jobs.claim([name], "b") == [] and jobs.running() == {(name, 1): 0}
    assert jobs.beat([late], 2) == ({name}, set()) and jobs.states([name]) == {name: ("running", 2, 3)}
    assert not jobs.release(name, 1, 0, nothing)  # it has a heartbeat since
    assert jobs.release(name, 1, 1, nothing) and not jobs.release(name, 1, 1, nothing)
    (now,) = jobs.claim([name], "b")
    assert not jobs.finish(late, [PICTURE], None, nothing) and jobs.beat([late], 3) == (set(), set())
    assert jobs.pictures(name) == []
    assert jobs.finish(now, [PICTURE], None, nothing) and not jobs.finish(now, [PICTURE], None, nothing)
    assert jobs.pictures(name) == [PICTURE]
    found = jobs.get("kids", name)
    assert found is not None and found.state == "done" and found.request == {"n": 1} and jobs.get("press", name) is None


def test_the_jobs_of_a_batch_end_together_or_not_at_all(database: Database) -> None:
    jobs = Jobs(database)
    names = [jobs.accept(new(), nothing)[0] for _ in range(4)]
    claims = jobs.claim(names, "a")
    assert jobs.release(claims[1].id, claims[1].fence, 0, nothing)
    (other,) = jobs.claim([names[1]], "b")
    told: list[tuple[str, str]] = []
    failed = Refused(500, "It failed. Tell the operator.", "drawing_failed")
    errors = (None, None, failed, None)

    def ends(last: Any) -> list[End]:
        def also(name: str) -> Any:
            return lambda connection, state: told.append((name, state))

        every = [also(claim.id) for claim in claims]
        every[3] = last or every[3]
        return [End(c, [] if e else [PICTURE], e, a) for c, e, a in zip(claims, errors, every, strict=True)]

    def broken(*_: Any) -> None:
        raise RuntimeError("no entry")

    with pytest.raises(RuntimeError, match="no entry"):
        jobs.finish_all(ends(broken))
    states = jobs.states(names)
    assert [states[name][0] for name in names] == ["running"] * 4
    assert all(jobs.pictures(name) == [] for name in names)
    told.clear()
    assert jobs.finish_all(ends(None)) == ["done", "", "failed", "done"]
    assert told == [(names[0], "done"), (names[2], "failed"), (names[3], "done")]
    assert [len(jobs.pictures(name)) for name in names] == [1, 0, 0, 1]
    assert jobs.finish_all(ends(None)) == [""] * 4
    assert jobs.beat(claims, 1)[0] == set() and jobs.beat([other], 1)[0] == {other.id}
    assert jobs.finish(other, [PICTURE], None, nothing) == "done"


def test_heartbeats_ends_and_cancellations_lock_in_one_order(database: Database) -> None:
    """Else the database would end one of two transactions that wait for each other."""
    jobs, audit = Jobs(database), Audit(database, PEPPER)
    errors: list[BaseException] = []

    def entry(connection: sql.Connection, state: str = "") -> None:
        audit.add(connection, "event", {"state": state})

    def tried(act: Any) -> None:
        try:
            act()
        except Unavailable as error:
            errors.append(error)

    for _ in range(8):
        names = [jobs.accept(new(), nothing)[0] for _ in range(6)]
        claims = jobs.claim(names, "a")
        acts = [lambda claims=claims: [jobs.beat(claims[::-1], k) for k in range(3)]]
        acts += [lambda claims=claims: jobs.finish_all([End(claim, [PICTURE], None, entry) for claim in claims])]
        acts += [lambda name=name: jobs.cancel("kids", name, entry) for name in names[::-1]]
        threads = [threading.Thread(target=tried, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        states = jobs.states(names)
        assert {states[name][0] for name in names} <= {"done", "cancelled"}
        assert all(jobs.pictures(name) == [] for name in names)  # a cancelled job and a deleted one have none
    assert errors == [] and audit.verify()[1] == ""


def test_a_job_whose_workers_die_fails_after_three_attempts(database: Database) -> None:
    jobs = Jobs(database)
    name, _ = jobs.accept(new(), nothing)
    for attempt in range(module.ATTEMPTS):
        (claim,) = jobs.claim([name], "a")
        assert claim.fence == 2 * attempt + 1
        assert jobs.release(name, claim.fence, 0, nothing)
    found = jobs.get("kids", name)
    assert found is not None and found.state == "failed" and found.error is not None
    assert found.error.code == "worker_lost" and jobs.waiting("stub") == []


def test_cancelling_at_any_time_leaves_no_picture(database: Database) -> None:
    jobs = Jobs(database)
    queued, running, done, dead = (jobs.accept(new(), nothing)[0] for _ in range(4))
    held = {name: jobs.claim([name], "a")[0] for name in (running, done, dead)}
    assert jobs.finish(held[done], [PICTURE], None, nothing)
    assert not jobs.cancel("press", queued, nothing)
    assert all(jobs.cancel("kids", name, nothing) for name in (queued, running, done, dead))
    assert jobs.beat([held[running]], 1) == ({running}, {running})
    assert jobs.finish(held[running], [PICTURE], None, nothing) and jobs.release(dead, 1, 0, nothing)
    states = jobs.states([queued, running, done, dead])
    assert [states[name][0] for name in (queued, running, done, dead)] == [
        "cancelled",
        "cancelled",
        "done",
        "cancelled",
    ]
    assert all(jobs.pictures(name) == [] for name in states)


def test_pictures_expire_and_load_counts_live_jobs(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(database)
    names = [jobs.accept(new(tenant), nothing)[0] for tenant in ("kids", "kids", "press")]
    assert jobs.load("kids", "stub") == (3, 2, 3.0) and jobs.count(module.LIVE) == 3
    assert jobs.finish(jobs.claim(names[:1], "a")[0], [PICTURE], None, nothing)
    assert jobs.load("kids", "stub") == (2, 1, 2.0) and jobs.expire(60) == 0
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert jobs.expire(60) == 1 and jobs.pictures(names[0]) == [] and jobs.states(names).keys() == set(names[1:])


def test_many_jobs_expire_in_several_transactions(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that deletes all pictures of a day would keep others from writing, such as heartbeats, for too long."""
    monkeypatch.setattr(module, "EXPIRED", 2)
    jobs = Jobs(database)
    names = [jobs.accept(new(), nothing)[0] for _ in range(6)]
    for claim in jobs.claim(names[:5], "a"):
        jobs.finish(claim, [PICTURE], None, nothing)
    left = []
    for _ in range(4):
        left.append((jobs.expire(-1.0), len(jobs.states(names)), sum(len(jobs.pictures(name)) for name in names)))
    assert left == [(2, 4, 3), (2, 2, 1), (1, 1, 0), (0, 1, 0)]


def test_a_worker_sees_the_jobs_of_its_own_model(database: Database) -> None:
    jobs = Jobs(database)
    names = [jobs.accept(new(model=model), nothing)[0] for model in ("stub", "other")]
    assert [job.id for job in jobs.waiting("other")] == names[1:] and jobs.waiting("third") == []
    assert jobs.count(module.LIVE) == 2 and jobs.count(module.LIVE, "stub") == 1


def test_two_workers_never_claim_one_job(database: Database) -> None:
    jobs = Jobs(database)
    names = [jobs.accept(new(), nothing)[0] for _ in range(40)]
    claimed: collections.Counter[str] = collections.Counter()

    def work(owner: str) -> None:
        while waiting := jobs.waiting("stub"):
            for claim in jobs.claim([job.id for job in waiting[:3]], owner):
                claimed[claim.id] += 1

    threads = [threading.Thread(target=work, args=(f"w{k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert claimed == collections.Counter(names)


# ---------------------------------------------------------------- leases and clocks


def test_a_lease_follows_heartbeats_and_not_the_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    leases = Leases(10.0, lambda: now)
    job = ("job", 1)
    assert leases.dead({job: 0}) == []
    monkeypatch.setattr(time, "time", lambda: 4e9)  # the clock of the machine jumps by decades
    now = 9.0
    assert leases.dead({job: 1}) == []  # a heartbeat
    now = 18.9
    assert leases.dead({job: 1}) == []
    now = 19.0
    assert leases.dead({job: 1}) == [("job", 1, 1)]
    assert leases.dead({("job", 2): 1}) == []  # another holder
    assert leases.dead({}) == [] and leases.dead({job: 1}) == []  # it was away: counted from its return


DRAWS = """
import sys, time
from pathlib import Path
from efface.serve.database import Database
from efface.serve.service import Limits, Service
from efface.serve.worker import Worker
from test_serve import Stub

class Slow(Stub):
    def draw(self, rows, call, on_step, on_partial):
        Path(sys.argv[2]).write_text("drawing")
        time.sleep(60)

Worker._rows = lambda self, claim: [claim]  # it is killed before it needs them
Worker(Service(Database(sys.argv[1]), b"p" * 32, Limits(rows=4, lease=0.5), "stub"), Slow()).run()
"""


def test_a_killed_worker_loses_no_job_and_doubles_none(database: Database, tmp_path: Path) -> None:
    from test_serve import Stub

    from efface.serve.worker import Worker

    limits = Limits(rows=4, lease=0.5)
    service = Service(database, PEPPER, limits, "stub")
    stored = service.policies.add("kids", {"erase": ["alcohol"]}, "test")
    call = {"model": "stub", "size": [8, 8], "steps": 1, "guidance_scale": None, "negative_prompt": False}
    request = {"prompt": "a cat", "negative_prompt": None, "also_erase": [], "seed": 1, "call": call, "n": 1}
    request |= {"output_format": "png", "output_compression": None}
    facts = {"policy": stored.id, "policy_hash": stored.policy.hash, "request": json.dumps(request)}
    names = [service.jobs.accept(new(**facts), nothing)[0] for _ in range(6)]
    url = database.engine.url.render_as_string(hide_password=False)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    drawing = tmp_path / "drawing"
    killed = subprocess.Popen([sys.executable, "-c", DRAWS, url, drawing], env={**os.environ, "PYTHONPATH": path})
    try:
        _until(lambda: drawing.exists(), 30)
        assert service.jobs.count(["running"]) == 4
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert service.jobs.count(["running"]) == 4  # nobody has noticed yet
    stub = Stub()
    workers = [Worker(service, stub) for _ in range(2)]
    for worker in workers:
        worker.start()
    _until(lambda: service.jobs.count(["done"]) == 6, 10)
    for worker in workers:
        worker.stop()
        worker.join(5)
    assert all(len(service.jobs.pictures(name)) == 1 for name in names)
    assert sum(len(rows) for rows, _ in stub.batches) == 6
    ends = [entry["job"] for entry in service.audit.entries() if entry["kind"] == "job finished"]
    assert sorted(ends) == sorted(names) and service.audit.verify()[1] == ""


def _until(holds: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


# ---------------------------------------------------------------- a database that goes away


def test_a_full_disk_accepts_nothing_and_loses_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/serve.db", wait=0.1)
    database.migrate()
    jobs = Jobs(database)
    kept = jobs.accept(new(), nothing)[0]
    with database.writing() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    sql.event.listen(database.engine, "connect", lambda c, _: c.execute(f"PRAGMA max_page_count={pages}"))
    database.engine.dispose()
    with pytest.raises(Unavailable, match="full"):
        for _ in range(200):
            jobs.accept(new(request=json.dumps({"prompt": "x" * 4_000})), nothing)
    assert kept in {job.id for job in jobs.waiting("stub")}
    (claim,) = jobs.claim([kept], "a")
    with pytest.raises(Unavailable, match="full"):
        jobs.finish(claim, [Picture(b"x" * 1_000_000, {})], None, nothing)
    assert jobs.states([kept])[kept][0] == "running" and jobs.pictures(kept) == []
    database.close()


def test_an_sqlite_file_is_its_owners_and_a_full_disk_makes_it_unusable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds prompts and pictures."""
    folder = tmp_path / "service"
    service, _ = initialise(folder)
    database = service.database
    assert folder.stat().st_mode & 0o777 == 0o700
    with database.reading():
        found = {each.name: each.stat().st_mode & 0o777 for each in folder.iterdir()}
    assert found.keys() > {"serve.db", "serve.db-wal", "pepper"} and set(found.values()) == {0o600}
    assert database.usable()
    used = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: used._replace(free=2**20))
    assert not database.usable()
    database.close()


def test_a_service_that_a_full_disk_refused_can_be_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            initialise(tmp_path / "service")
    service, key = initialise(tmp_path / "service")
    assert service.keys.holder(key) is not None
    service.database.close()


def test_a_locked_database_is_unavailable_and_comes_back(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/serve.db", wait=0.1)
    database.migrate()
    jobs = Jobs(database)
    with database.writing(), pytest.raises(Unavailable, match="locked"):
        jobs.accept(new(), nothing)
    assert jobs.accept(new(), nothing)[1]
    database.close()


def test_writers_of_one_process_take_turns(tmp_path: Path) -> None:
    """Who writes again at once does not overtake who waits, which SQLite itself would let happen."""
    database, turns, order = Database(f"sqlite:///{tmp_path}/serve.db"), Turns(), list[str]()
    database.migrate()
    assert turns.take(1.0) and not turns.take(0.01)

    def later(name: str) -> None:
        assert turns.take(20.0)
        order.append(name)
        turns.give()

    threads = [threading.Thread(target=later, args=(name,)) for name in "bc"]
    for k, thread in enumerate(threads):
        thread.start()
        _until(lambda k=k: len(turns._waiting) == k + 1, 10)
    turns.give()
    later("a")
    for thread in threads:
        thread.join()
    assert order == ["b", "c", "a"] and turns.take(0.0)
    with database.writing() as connection:
        thread = threading.Thread(target=Jobs(database).accept, args=(new(), nothing))
        thread.start()
        _until(lambda: len(database._turns._waiting) == 1, 10)  # without a connection, so readers have one
        assert database.engine.pool.checkedout() == 1  # type: ignore[attr-defined]
        connection.execute(sql.text("SELECT 1"))
    thread.join()
    assert Jobs(database).count(["queued"]) == 1
    database.close()


def test_connections_keep_few_pages_in_memory(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/serve.db")
    with database.reading() as one, database.reading() as two:
        found = [each.exec_driver_sql("PRAGMA cache_size").scalar() for each in (one, two)]
        assert found == [-CACHE] * 2 and database.engine.pool.size() * CACHE <= 4_096  # type: ignore[attr-defined]
    for _ in range(3):
        with database.reading() as connection:
            connection.exec_driver_sql("SELECT 1")
    assert database.engine.pool.checkedin() == 2  # type: ignore[attr-defined]
    database.close()


def test_a_frozen_process_with_a_lock_makes_others_unavailable_for_a_while(postgres: str) -> None:
    """It holds the lock of the audit log in an open transaction, and does nothing."""
    url = _fresh(postgres, "TEMPLATE migrated")
    frozen, other = Database(url, wait=0.3), Database(url, wait=0.3)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(Unavailable))
        Audit(frozen, PEPPER).add(stack.enter_context(frozen.writing()), "event", {})
        began = time.monotonic()
        with pytest.raises(Unavailable, match="lock timeout"), other.writing() as connection:
            Audit(other, PEPPER).add(connection, "event", {})
        assert time.monotonic() - began < 5
        _until(lambda: _writes(other), 10)  # the server ends the transaction of the frozen one
        assert Audit(other, PEPPER).verify() == (1, "")
    for each in (frozen, other):
        each.close()


def _writes(database: Database) -> bool:
    with contextlib.suppress(Unavailable), database.writing() as connection:
        Audit(database, PEPPER).add(connection, "event", {})
        return True
    return False


def test_a_server_that_breaks_all_connections_comes_back(postgres: str) -> None:
    """As a restart does, also in the middle of a transaction."""
    url = _fresh(postgres, "TEMPLATE migrated")
    database, other = Database(url), sql.create_engine(f"{postgres}/postgres", isolation_level="AUTOCOMMIT")
    jobs, audit = Jobs(database), Audit(database, PEPPER)
    kept = jobs.accept(new(), lambda connection: audit.add(connection, "job accepted", {}))[0]

    def break_all(connection: sql.Connection | None = None) -> None:
        with other.connect() as admin:
            query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = :name"
            assert admin.execute(sql.text(query), {"name": url.rpartition("/")[2]}).scalar()

    with pytest.raises(Unavailable, match="Correct that, and try again"):
        jobs.accept(new(), break_all)
    assert [job.id for job in jobs.waiting("stub")] == [kept]
    break_all()  # connections that are not in use are replaced
    assert jobs.accept(new(), nothing)[1] and audit.verify() == (1, "")
    other.dispose()
    database.close()


def test_a_standby_server_is_unavailable_and_not_damaged(postgres: str) -> None:
    database = Database(_fresh(postgres, "TEMPLATE migrated"))
    with pytest.raises(Unavailable, match="read-only"), database.writing() as connection:
        connection.execute(sql.text("SET TRANSACTION READ ONLY"))
        Audit(database, PEPPER).add(connection, "event", {})
    database.close()


def test_servers_that_start_together_make_the_tables_once(postgres: str) -> None:
    url, errors = _fresh(postgres), list[BaseException]()

    def start() -> None:
        database = Database(url)
        try:
            database.migrate()
        except (ValueError, OSError) as error:
            errors.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and Database(url).version() == "0003"


# ---------------------------------------------------------------- fairness


def queue(*jobs: tuple[str, str, int, float]) -> list[Waiting]:
    return [Waiting(k, f"{tenant}{k}", tenant, batch, rows, cost) for k, (tenant, batch, rows, cost) in enumerate(jobs)]


def served(fair: Fair, waiting: list[Waiting], batches: int) -> list[list[Waiting]]:
    made = []
    for _ in range(batches):
        chosen = fair.choose(waiting)
        waiting = [job for job in waiting if job not in chosen]
        made.append(chosen)
    return made


def test_a_batch_has_one_key_and_no_more_rows_than_fit() -> None:
    waiting = queue(("a", "x", 2, 2), ("a", "y", 1, 1), ("b", "x", 1, 1), ("b", "x", 2, 2), ("c", "x", 1, 1))
    (first,) = served(Fair(4), waiting, 1)
    assert [(job.tenant, job.batch) for job in first] == [("a", "x"), ("b", "x"), ("c", "x")]
    (large,) = served(Fair(4), queue(("a", "x", 9, 9), ("a", "x", 1, 1)), 1)
    assert [job.rows for job in large] == [9]
    assert Fair(4).choose([]) == []


def test_a_flood_delays_another_tenant_by_one_batch() -> None:
    waiting = queue(*[("flood", "x", 1, 1.0)] * 500, ("small", "y", 1, 1.0))
    batches = served(Fair(4), waiting, 3)
    assert "small" in {job.tenant for batch in batches[:2] for job in batch}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(1, 4), st.integers(1, 50)), max_size=40
    ),
    st.integers(1, 6),
)
def test_every_job_is_drawn_once_and_first_come_first_served_within_tenant_and_key(
    jobs: Sequence[tuple[str, str, int, int]], rows: int
) -> None:
    waiting = queue(*((tenant, batch, n, float(cost)) for tenant, batch, n, cost in jobs))
    fair, drawn = Fair(rows), list[Waiting]()
    left = list(waiting)
    while left:
        chosen = fair.choose(left)
        assert chosen and len({job.batch for job in chosen}) == 1
        assert len(chosen) == 1 or sum(job.rows for job in chosen) <= rows
        left = [job for job in left if job not in chosen]
        drawn += chosen
    assert sorted(job.seq for job in drawn) == [job.seq for job in waiting]
    for pair in {(job.tenant, job.batch) for job in waiting}:
        mine = [job.seq for job in drawn if (job.tenant, job.batch) == pair]
        assert mine == sorted(mine)


def test_jobs_that_fill_a_batch_are_paid_for() -> None:
    """Two tenants share a batching key, the third has another one: each gets a third of the rows."""
    waiting = [each for _ in range(400) for each in (("a", "x", 1, 1.0), ("b", "x", 1, 1.0), ("c", "y", 1, 1.0))]
    rows = collections.Counter(job.tenant for batch in served(Fair(4), queue(*waiting), 90) for job in batch)
    assert sum(rows.values()) == 360 and max(rows.values()) - min(rows.values()) <= 8, rows


def test_who_filled_rows_that_nobody_wanted_waits_for_few_batches_later() -> None:
    """One tenant fills the batches of another for hours. Then a third one comes, with jobs of another kind."""
    fair, few = Fair(8), [("small", "x", 1, 1.0), *[("large", "x", 1, 1.0)] * 20]
    for _ in range(2_000):
        assert collections.Counter(job.tenant for job in fair.choose(queue(*few))) == {"small": 1, "large": 7}
    later = queue(*[("large", "x", 1, 1.0)] * 400, *[("new", "y", 1, 1.0)] * 400)
    rows = collections.Counter(job.tenant for batch in served(fair, later, 40) for job in batch)
    assert sum(rows.values()) == 320 and rows["new"] - 24 <= rows["large"] <= rows["new"], rows


@pytest.mark.parametrize("keys", [("x", "x"), ("x", "y")])
def test_tenants_with_full_queues_get_equal_shares_of_the_cost(keys: tuple[str, str]) -> None:
    """One tenant has long jobs, the other short ones."""
    waiting = queue(*[("long", keys[0], 1, 10.0)] * 200, *[("short", keys[1], 1, 1.0)] * 2_000)
    cost: collections.Counter[str] = collections.Counter()
    for batch in served(Fair(4), waiting, 120):
        for job in batch:
            cost[job.tenant] += int(job.cost)
    assert abs(cost["long"] - cost["short"]) <= 60, cost
