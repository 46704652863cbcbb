"""Jobs: accepted once, drawn by one worker at a time, finished once."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from . import tables
from .database import Database
from .errors import Refused, restored

LIVE = ("queued", "running")
ID = re.compile("job_[0-9a-f]{32}")
ATTEMPTS = 3
LOST = Refused(500, "Workers ended while drawing this request. Send it again, or tell the operator.", "worker_lost")
Also = Callable[[sql.Connection], None]
"""Runs in the transaction that finishes a job, such as an audit entry."""

_T = tables.jobs


@dataclass(frozen=True)
class New:
    """A request to accept. The fields are those of the table `jobs`."""

    tenant: str
    key: str
    policy: int
    policy_hash: str
    model: str
    batch: str
    rows: int
    cost: float
    steps: int
    request: str
    body_hash: str
    idempotency: str | None = None


@dataclass(frozen=True)
class Waiting:
    """A queued job, as the scheduler sees it."""

    seq: int
    id: str
    tenant: str
    batch: str
    rows: int
    cost: float


@dataclass(frozen=True)
class Claim:
    """A job that a worker holds. Only with the present fence can it finish the job."""

    id: str
    fence: int
    tenant: str
    key: str
    policy: int
    policy_hash: str
    rows: int
    cost: float
    request: Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A row of a finished job: its file, or None if it was blocked, and its record."""

    content: bytes | None
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A job as its tenant sees it."""

    id: str
    state: str
    step: int
    steps: int
    created: float
    body_hash: str
    error: Refused | None
    request: Mapping[str, Any]
    policy: int
    policy_hash: str


class Jobs:
    """The jobs of the service, in its database.

    Args:
        database: the database.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    # ---- what requests do

    def accept(self, new: New, also: Also) -> tuple[str, bool]:
        """Commits a job, and returns its id and whether it is new.

        Raises:
            Refused: the idempotency key was used with another body.
        """
        name = f"job_{secrets.token_hex(16)}"
        values = vars(new) | {"id": name, "state": "queued", "attempts": 0, "fence": 0, "beat": 0, "cancel": False}
        try:
            with self.database.writing() as connection:
                connection.execute(_T.insert().values(values | {"step": 0, "created": time.time()}))
                also(connection)
        except sql.exc.IntegrityError:
            return self._joined(new), False
        return name, True

    def _joined(self, new: New) -> str:
        query = sql.select(_T.c.id, _T.c.body_hash)
        query = query.where(_T.c.tenant == new.tenant, _T.c.idempotency == new.idempotency)
        with self.database.reading() as connection:
            found = connection.execute(query).mappings().one()
        if found["body_hash"] != new.body_hash:
            raise Refused(
                422, "This Idempotency-Key was used with another body. Send another key.", "idempotency_key_reused"
            )
        return str(found["id"])

    def get(self, tenant: str, name: str) -> Job | None:
        """A job of a tenant; None if there is none, or if it belongs to another tenant."""
        if not ID.fullmatch(name):
            return None
        with self.database.reading() as connection:
            query = sql.select(_T).where(_T.c.id == name, _T.c.tenant == tenant)
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        error = None if row["error"] is None else restored(json.loads(row["error"]))
        names = ("id", "state", "step", "steps", "created", "body_hash", "policy", "policy_hash")
        return Job(**{name: row[name] for name in names}, error=error, request=json.loads(row["request"]))

    def states(self, names: Sequence[str]) -> dict[str, tuple[str, int, int]]:
        """State, step and steps of each job."""
        query = sql.select(_T.c.id, _T.c.state, _T.c.step, _T.c.steps).where(_T.c.id.in_(names))
        with self.database.reading() as connection:
            return {row.id: (row.state, row.step, row.steps) for row in connection.execute(query)}

    def pictures(self, name: str) -> list[Picture]:
        """The rows of a finished job, in order."""
        table = tables.pictures
        with self.database.reading() as connection:
            found = connection.execute(sql.select(table).where(table.c.job == name).order_by(table.c.number)).mappings()
            return [Picture(row["content"], json.loads(row["record"])) for row in found]

    def cancel(self, tenant: str, name: str, also: Also) -> bool:
        """Cancels a live job, and deletes the pictures of a finished one. False if there is no such job."""
        with self.database.writing() as connection:
            mine = (_T.c.id == name, _T.c.tenant == tenant)
            if connection.execute(sql.select(_T.c.id).where(*mine)).first() is None:
                return False
            ended = {"state": "cancelled", "finished": time.time(), "request": "{}"}
            if not connection.execute(_T.update().where(*mine, _T.c.state == "queued").values(ended)).rowcount:
                connection.execute(_T.update().where(*mine, _T.c.state == "running").values(cancel=True))
            connection.execute(tables.pictures.delete().where(tables.pictures.c.job == name))
            also(connection)
            return True

    def load(self, tenant: str) -> tuple[int, int, float]:
        """Live jobs in total, of this tenant, and the cost of all."""
        query = sql.select(
            sql.func.count(),
            sql.func.count().filter(_T.c.tenant == tenant),
            sql.func.coalesce(sql.func.sum(_T.c.cost), 0),
        ).where(_T.c.state.in_(LIVE))
        with self.database.reading() as connection:
            total, own, cost = connection.execute(query).one()
        return int(total), int(own), float(cost)

    def count(self, states: Sequence[str], model: str | None = None) -> int:
        """The number of jobs in these states, of one model or of all."""
        query = sql.select(sql.func.count()).where(_T.c.state.in_(states))
        query = query if model is None else query.where(_T.c.model == model)
        with self.database.reading() as connection:
            return int(connection.execute(query).scalar() or 0)

    def expire(self, seconds: float) -> int:
        """Deletes pictures of jobs that finished longer ago, and returns the number of rows."""
        old = sql.select(_T.c.id).where(_T.c.finished.is_not(None), _T.c.finished < time.time() - seconds)
        with self.database.writing() as connection:
            return connection.execute(tables.pictures.delete().where(tables.pictures.c.job.in_(old))).rowcount

    # ---- what workers do

    def waiting(self, model: str, most: int = 2_000) -> list[Waiting]:
        """The queued jobs of a model, oldest first."""
        columns = [_T.c[name] for name in ("seq", "id", "tenant", "batch", "rows", "cost")]
        query = sql.select(*columns).where(_T.c.state == "queued", _T.c.model == model)
        query = query.order_by(_T.c.seq).limit(most)
        with self.database.reading() as connection:
            return [Waiting(*row) for row in connection.execute(query)]

    def claim(self, names: Sequence[str], owner: str) -> list[Claim]:
        """Claims those of the jobs that are still queued. Other workers do not wait for it."""
        query = sql.select(_T).where(_T.c.id.in_(names), _T.c.state == "queued").order_by(_T.c.seq)
        made = []
        with self.database.writing() as connection:
            for row in connection.execute(query.with_for_update(skip_locked=True)).mappings().all():
                changes = {"state": "running", "owner": owner, "fence": row["fence"] + 1, "beat": 0, "step": 0}
                changes["attempts"] = row["attempts"] + 1
                connection.execute(_T.update().where(_T.c.id == row["id"]).values(changes))
                same = ("id", "tenant", "key", "policy", "policy_hash", "rows", "cost")
                request = json.loads(row["request"])
                made.append(Claim(**{name: row[name] for name in same}, fence=changes["fence"], request=request))
        return made

    def beat(self, claims: Sequence[Claim], step: int) -> tuple[set[str], set[str]]:
        """Shows that the holder lives. Returns the jobs that it still holds, and those that are to be cancelled."""
        held, cancelled = set(), set()
        with self.database.writing() as connection:
            for each in claims:
                mine = _mine(each)
                if connection.execute(_T.update().where(*mine).values(beat=_T.c.beat + 1, step=step)).rowcount:
                    held.add(each.id)
                    if connection.execute(sql.select(_T.c.cancel).where(*mine)).scalar():
                        cancelled.add(each.id)
        return held, cancelled

    def finish(self, claim: Claim, pictures: Sequence[Picture], error: Refused | None, also: Also) -> bool:
        """Finishes a job with pictures or an error. False, without a trace, if the claim was lost."""
        with self.database.writing() as connection:
            row = connection.execute(sql.select(_T.c.cancel).where(*_mine(claim)).with_for_update()).first()
            if row is None:
                return False
            state = "cancelled" if row.cancel else "failed" if error else "done"
            stored = None if error is None else json.dumps(error.stored())
            values: dict[str, Any] = {"state": state, "error": stored, "finished": time.time(), "owner": None}
            request = {
                name: value
                for name, value in claim.request.items()
                if name in ("n", "size", "quality", "output_format")
            }
            values["request"] = json.dumps(request)
            if state == "done":
                values["step"] = _T.c.steps
                rows = [
                    {"job": claim.id, "number": k, "content": each.content, "record": json.dumps(each.record)}
                    for k, each in enumerate(pictures)
                ]
                connection.execute(tables.pictures.insert(), rows)
            connection.execute(_T.update().where(*_mine(claim)).values(values))
            also(connection)
            return True

    def running(self) -> dict[tuple[str, int], int]:
        """The beat of each running job, by id and fence."""
        query = sql.select(_T.c.id, _T.c.fence, _T.c.beat).where(_T.c.state == "running")
        with self.database.reading() as connection:
            return {(row.id, row.fence): row.beat for row in connection.execute(query)}

    def release(self, name: str, fence: int, beat: int) -> bool:
        """Takes a job from a holder without a heartbeat. After three attempts the job fails."""
        same = (_T.c.id == name, _T.c.fence == fence, _T.c.beat == beat, _T.c.state == "running")
        with self.database.writing() as connection:
            row = connection.execute(sql.select(_T.c.attempts, _T.c.cancel).where(*same).with_for_update()).first()
            if row is None:
                return False
            values: dict[str, Any] = {"state": "queued", "owner": None, "fence": fence + 1}
            if row.cancel:
                values |= {"state": "cancelled", "finished": time.time(), "request": "{}"}
            elif row.attempts >= ATTEMPTS:
                values |= {
                    "state": "failed",
                    "error": json.dumps(LOST.stored()),
                    "finished": time.time(),
                    "request": "{}",
                }
            return bool(connection.execute(_T.update().where(*same).values(values)).rowcount)

    def put_back(self, claims: Sequence[Claim]) -> None:
        """Returns claimed jobs to the queue."""
        with self.database.writing() as connection:
            for each in claims:
                connection.execute(_T.update().where(*_mine(each)).values(state="queued", owner=None))


def _mine(claim: Claim) -> tuple[Any, ...]:
    return _T.c.id == claim.id, _T.c.fence == claim.fence, _T.c.state == "running"


class Leases:
    """Finds holders without a heartbeat, by this process's own clock, so that changes of the time of day do no harm.

    Args:
        patience: seconds without a heartbeat after which a holder counts as dead.
        clock: seconds, which never go back.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience, self._clock = patience, clock
        self._seen: dict[tuple[str, int], tuple[int, float]] = {}

    def dead(self, running: Mapping[tuple[str, int], int]) -> list[tuple[str, int, int]]:
        """Id, fence and beat of the running jobs whose beat stood still for too long."""
        now = self._clock()
        seen = {}
        for job, beat in running.items():
            earlier = self._seen.get(job)
            seen[job] = earlier if earlier is not None and earlier[0] == beat else (beat, now)
        self._seen = seen
        return [(*job, beat) for job, (beat, since) in seen.items() if now - since >= self._patience]
