"""What a worker holds of a job: its claim, and how it ends it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from . import tables
from .errors import Refused

Ended = Callable[[sql.Connection, str], None]
"""Runs in the transaction that ends a job, with the state that it ends in, such as an audit entry."""

_T = tables.jobs


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
class End:
    """How a worker ends a job.

    Args:
        claim: the job.
        pictures: its rows.
        error: the error of a job without pictures.
        also: runs in the transaction that ends it.
    """

    claim: Claim
    pictures: Sequence[Picture]
    error: Refused | None
    also: Ended


def held(connection: sql.Connection, claims: Sequence[Claim]) -> dict[str, bool]:
    """Those of the claimed jobs that are not lost, and whether each is to be cancelled.

    It locks them, always in the same order, so that two transactions do not wait for each other.
    """
    fences = {claim.id: claim.fence for claim in claims}
    query = sql.select(_T.c.id, _T.c.fence, _T.c.cancel).where(_T.c.id.in_(list(fences)), _T.c.state == "running")
    found = connection.execute(query.order_by(_T.c.id).with_for_update()).all()
    return {row.id: bool(row.cancel) for row in found if row.fence == fences[row.id]}


def ended(connection: sql.Connection, end: End, cancel: bool) -> str:
    """Writes the end of a job that is held, and returns its state."""
    name = end.claim.id
    state = "cancelled" if cancel else "failed" if end.error else "done"
    stored = None if end.error is None else json.dumps(end.error.stored())
    values: dict[str, Any] = {"state": state, "error": stored, "finished": time.time(), "owner": None}
    shown = ("n", "size", "quality", "output_format")
    values["request"] = json.dumps({key: value for key, value in end.claim.request.items() if key in shown})
    if state == "done":
        values["step"] = _T.c.steps
        rows = [
            {"job": name, "number": k, "content": each.content, "record": json.dumps(each.record)}
            for k, each in enumerate(end.pictures)
        ]
        connection.execute(tables.pictures.insert(), rows)
    else:
        drop(connection, [name], tables.partial)
    connection.execute(_T.update().where(*mine(end.claim)).values(values))
    return state


def mine(claim: Claim) -> tuple[Any, ...]:
    return _T.c.id == claim.id, _T.c.fence == claim.fence, _T.c.state == "running"


def drop(connection: sql.Connection, jobs: Sequence[str], *which: sql.Table) -> int:
    """Deletes the rows of jobs, and returns their number."""
    return sum(connection.execute(table.delete().where(table.c.job.in_(jobs))).rowcount for table in which)
