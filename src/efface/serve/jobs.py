"""Jobs: accepted once, drawn by one worker at a time, finished once."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError

from . import tables
from .claims import Claim, End, Ended, Picture, drop, ended, held, mine
from .database import Database
from .errors import Refused, restored

LIVE = ("queued", "running")
ID = re.compile("job_[0-9a-f]{32}")
ATTEMPTS = 3
MOST = 2_000
"""Queued jobs that a worker sees, unless more fit into its queue."""
EXPIRED = 50
"""Jobs that are deleted in one transaction, because others wait for it, and pictures are overwritten."""
LOST = Refused(500, "Workers ended while drawing this request. Send it again, or tell the operator.", "worker_lost")
Also = Callable[[sql.Connection], None]
"""Runs in the transaction that accepts or cancels a job, such as an audit entry."""
Room = Callable[[int, int, float], None]
"""Raises Refused if there is no room, given the live jobs in total and of the tenant, and the cost of all."""

_T = tables.jobs


def new_id() -> str:
    """An id of a job, with 128 random bits."""
    return f"job_{secrets.token_hex(16)}"


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
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Waiting:
    """A queued job, as the scheduler sees it. A job that a worker has lost before has a batching key of its own."""

    seq: int
    id: str
    tenant: str
    batch: str
    rows: int
    cost: float
    again: bool = False
    """Whether a worker lost it before."""


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

    def accept(self, new: New, also: Also, room: Room | None = None) -> tuple[str, bool]:
        """Commits a job, and returns its id and whether it is new.

        Args:
            new: the job.
            also: writes its audit entry.
            room: decides whether there is room for the job, which counts already. A job that exists needs none.

        Raises:
            Refused: the idempotency key was used with another body or policy, or there is no room.
        """
        values = vars(new) | {"state": "queued", "attempts": 0, "fence": 0, "beat": 0, "cancel": False}
        try:
            with self.database.writing() as connection:
                connection.execute(_T.insert().values(values | {"step": 0, "created": time.time()}))
                also(connection)
                if room is not None:
                    room(*_load(connection, new.tenant, new.model))
        except IntegrityError:
            if new.idempotency is None:
                raise
            return self._joined(new), False
        return new.id, True

    def _joined(self, new: New) -> str:
        query = sql.select(_T.c.id, _T.c.body_hash)
        query = query.where(_T.c.tenant == new.tenant, _T.c.idempotency == new.idempotency)
        with self.database.reading() as connection:
            found = connection.execute(query).mappings().one()
        if found["body_hash"] != new.body_hash:
            raise Refused(
                422,
                "This Idempotency-Key was used with another body or policy. Send another key.",
                "idempotency_key_reused",
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

    def partial(self, name: str, start: int) -> list[tuple[int, bytes]]:
        """The partial pictures of a job from a number on, with their numbers."""
        table = tables.partial
        query = sql.select(table.c.number, table.c.content).where(table.c.job == name, table.c.number >= start)
        with self.database.reading() as connection:
            return [(row.number, row.content) for row in connection.execute(query.order_by(table.c.number))]

    def cancel(self, tenant: str, name: str, also: Also) -> bool:
        """Cancels a live job, and deletes the pictures of a finished one. False if there is no such job.

        `also` runs if this changes anything.
        """
        with self.database.writing() as connection:
            mine = (_T.c.id == name, _T.c.tenant == tenant)
            if connection.execute(sql.select(_T.c.id).where(*mine).with_for_update()).first() is None:
                return False
            ended = {"state": "cancelled", "finished": time.time(), "request": "{}"}
            changed = connection.execute(_T.update().where(*mine, _T.c.state == "queued").values(ended)).rowcount
            live = *mine, _T.c.state == "running", _T.c.cancel.is_(False)
            changed += connection.execute(_T.update().where(*live).values(cancel=True)).rowcount
            if changed + drop(connection, [name], tables.pictures, tables.partial):
                also(connection)
            return True

    def load(self, tenant: str, model: str) -> tuple[int, int, float]:
        """The live jobs of a model in total, of this tenant, and the cost of all."""
        with self.database.reading() as connection:
            return _load(connection, tenant, model)

    def count(self, states: Sequence[str], model: str | None = None) -> int:
        """The number of jobs in these states, of one model or of all."""
        query = sql.select(sql.func.count()).where(_T.c.state.in_(states))
        query = query if model is None else query.where(_T.c.model == model)
        with self.database.reading() as connection:
            return int(connection.execute(query).scalar() or 0)

    def expire(self, seconds: float) -> int:
        """Deletes at most `EXPIRED` jobs that finished longer ago with their pictures, and returns their number."""
        old = _T.c.finished.is_not(None), _T.c.finished < time.time() - seconds
        query = sql.select(_T.c.id).where(*old).limit(EXPIRED).with_for_update(skip_locked=True)
        with self.database.writing() as connection:
            names = connection.execute(query).scalars().all()
            drop(connection, names, tables.pictures, tables.partial)
            connection.execute(_T.delete().where(_T.c.id.in_(names)))
        return len(names)

    # ---- what workers do

    def waiting(self, model: str, most: int = MOST) -> list[Waiting]:
        """The queued jobs of a model, oldest first."""
        again = _T.c.attempts > 0
        alone = sql.case((again, _T.c.batch + _T.c.id), else_=_T.c.batch)
        columns = [_T.c.seq, _T.c.id, _T.c.tenant, alone, _T.c.rows, _T.c.cost, again]
        query = sql.select(*columns).where(_T.c.state == "queued", _T.c.model == model)
        query = query.order_by(_T.c.seq).limit(most)
        with self.database.reading() as connection:
            return [Waiting(*row) for row in connection.execute(query)]

    def claim(self, names: Sequence[str], owner: str) -> list[Claim]:
        """Claims those of the jobs that are still queued. Other workers do not wait for it."""
        query = sql.select(_T).where(_T.c.id.in_(names), _T.c.state == "queued").order_by(_T.c.seq)
        changes = {"state": "running", "owner": owner, "beat": 0, "step": 0}
        counts = {"fence": _T.c.fence + 1, "attempts": _T.c.attempts + 1}
        same = ("id", "tenant", "key", "policy", "policy_hash", "rows", "cost")
        with self.database.writing() as connection:
            found = connection.execute(query.with_for_update(skip_locked=True)).mappings().all()
            if found:
                these = _T.c.id.in_([row["id"] for row in found])
                connection.execute(_T.update().where(these).values(changes | counts))
        return [
            Claim(**{name: row[name] for name in same}, fence=row["fence"] + 1, request=json.loads(row["request"]))
            for row in found
        ]

    def beat(self, claims: Sequence[Claim], step: int) -> tuple[set[str], set[str]]:
        """Shows that the holder lives. Returns the jobs that it still holds, and those that are to be cancelled."""
        with self.database.writing() as connection:
            found = held(connection, claims)
            if found:
                connection.execute(_T.update().where(_T.c.id.in_(list(found))).values(beat=_T.c.beat + 1, step=step))
        return set(found), {name for name, cancel in found.items() if cancel}

    def show(self, claim: Claim, number: int, content: bytes, also: Also) -> bool:
        """Stores a partial picture of a job. False, without a trace, if the claim was lost."""
        table = tables.partial
        with self.database.writing() as connection:
            if connection.execute(sql.select(_T.c.id).where(*mine(claim)).with_for_update()).first() is None:
                return False
            connection.execute(table.delete().where(table.c.job == claim.id, table.c.number == number))
            connection.execute(table.insert().values(job=claim.id, number=number, content=content))
            also(connection)
            return True

    def finish(self, claim: Claim, pictures: Sequence[Picture], error: Refused | None, also: Ended) -> str:
        """Finishes a job with pictures or an error, and returns its state.

        It returns "", without a trace, if the claim was lost.
        """
        return self.finish_all([End(claim, pictures, error, also)])[0]

    def finish_all(self, ends: Sequence[End]) -> list[str]:
        """As `finish`, for several jobs in one transaction."""
        with self.database.writing() as connection:
            found = held(connection, [end.claim for end in ends])
            kept = [end for end in ends if end.claim.id in found]
            states = {end.claim.id: ended(connection, end, found[end.claim.id]) for end in kept}
            for end in kept:  # after all jobs, because who holds the audit log may not wait for a job
                end.also(connection, states[end.claim.id])
        return [states.get(end.claim.id, "") for end in ends]

    def running(self) -> dict[tuple[str, int], int]:
        """The beat of each running job, by id and fence."""
        query = sql.select(_T.c.id, _T.c.fence, _T.c.beat).where(_T.c.state == "running")
        with self.database.reading() as connection:
            return {(row.id, row.fence): row.beat for row in connection.execute(query)}

    def release(self, name: str, fence: int, beat: int, also: Ended) -> str:
        """Takes a job from a holder without a heartbeat, and returns its new state; "" if it has a heartbeat since.

        After three attempts the job fails. `also` runs if the job ends.
        """
        same = (_T.c.id == name, _T.c.fence == fence, _T.c.beat == beat, _T.c.state == "running")
        with self.database.writing() as connection:
            row = connection.execute(sql.select(_T.c.attempts, _T.c.cancel).where(*same).with_for_update()).first()
            if row is None:
                return ""
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
            connection.execute(_T.update().where(*same).values(values))
            if values["state"] != "queued":
                drop(connection, [name], tables.partial)
                also(connection, values["state"])
            return str(values["state"])


def _load(connection: sql.Connection, tenant: str, model: str) -> tuple[int, int, float]:
    total, own = sql.func.count(), sql.func.count().filter(_T.c.tenant == tenant)
    query = sql.select(total, own, sql.func.coalesce(sql.func.sum(_T.c.cost), 0))
    found = connection.execute(query.where(_T.c.state.in_(LIVE), _T.c.model == model)).one()
    return int(found[0]), int(found[1]), float(found[2])
