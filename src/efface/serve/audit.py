"""The audit log: appended to, never changed, each entry chained to the one before it."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sql

from .. import checks
from . import tables
from .database import Database

FIRST = "0" * 64


class Audit:
    """One chain of entries. Each hash is an HMAC with the pepper, so that only its holder can extend the chain.

    Args:
        database: the database.
        pepper: the secret of the service.

    Example:
        >>> import tempfile
        >>> from efface.serve.audit import Audit
        >>> from efface.serve.database import Database
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/serve.db")
        >>> database.migrate()
        >>> audit = Audit(database, b"pepper")
        >>> with database.writing() as connection:
        ...     audit.add(connection, "key added", {"tenant": "kids"})
        >>> audit.verify()
        (1, '')
    """

    def __init__(self, database: Database, pepper: bytes) -> None:
        self._database, self._pepper = database, pepper

    def add(self, connection: sql.Connection, kind: str, facts: Mapping[str, Any]) -> None:
        """Appends an entry in the caller's transaction."""
        if not self._database.sqlite:
            connection.execute(sql.text("LOCK TABLE audit IN EXCLUSIVE MODE"))
        table = tables.audit
        last = connection.execute(sql.select(table).order_by(table.c.seq.desc()).limit(1)).mappings().first()
        seq, previous = (1, FIRST) if last is None else (last["seq"] + 1, last["hash"])
        body = json.dumps({"seq": seq, "time": round(time.time(), 3), "kind": kind, **facts}, sort_keys=True)
        connection.execute(table.insert().values(seq=seq, body=body, hash=self._hash(previous, body)))

    def _hash(self, previous: str, body: str) -> str:
        return hmac.new(self._pepper, f"{previous}\n{body}".encode(), hashlib.sha256).hexdigest()

    def keyed(self, text: str) -> str:
        """The keyed hash of a text, such as a prompt, which the log shows instead of it."""
        return hmac.new(self._pepper, b"text\n" + text.encode(), hashlib.sha256).hexdigest()

    def entries(self, most: int = 1_000) -> list[dict[str, Any]]:
        """The latest entries, oldest first."""
        table = tables.audit
        with self._database.reading() as connection:
            found = (
                connection.execute(sql.select(table.c.body).order_by(table.c.seq.desc()).limit(most)).scalars().all()
            )
        return [json.loads(body) for body in reversed(found)]

    def fits(self) -> bool:
        """Whether the last entry was written with this pepper."""
        table, starts = tables.audit, tables.starts
        with self._database.reading() as connection:
            last = connection.execute(sql.select(table).order_by(table.c.seq.desc()).limit(2)).all()
            start = connection.execute(sql.select(starts).order_by(starts.c.seq.desc()).limit(1)).first()
        if not last:
            return True
        previous = last[1].hash if len(last) == 2 else start.hash if start is not None else FIRST
        return hmac.compare_digest(last[0].hash, self._hash(previous, last[0].body))

    def verify(self) -> tuple[int, str]:
        """The number of the last entry, and the first fault of the chain; "" if there is none.

        A chain whose end was cut off has no fault. Compare the number with an earlier one, kept elsewhere.
        """
        with self._database.reading() as connection:
            return self._verify(connection)

    def _verify(self, connection: sql.Connection) -> tuple[int, str]:
        n, previous = 0, FIRST
        start = connection.execute(sql.select(tables.starts).order_by(tables.starts.c.seq.desc()).limit(1)).first()
        if start is not None:
            n, previous = start.seq, start.hash
            if not hmac.compare_digest(start.mac, self._start(start.seq, start.hash)):
                return n, f"the start after entry {n} was forged"
        every = sql.select(tables.audit).order_by(tables.audit.c.seq)
        for row in connection.execute(every, execution_options={"yield_per": 1_000}).mappings():
            n += 1
            if row["seq"] != n:
                return n, f"entry {n} is missing"
            if not hmac.compare_digest(row["hash"], self._hash(previous, row["body"])):
                return n, f"entry {n} was changed"
            previous = row["hash"]
        return n, ""

    def _start(self, seq: int, last: str) -> str:
        return hmac.new(self._pepper, f"start\n{seq}\n{last}".encode(), hashlib.sha256).hexdigest()

    def drop(self, days: float) -> int:
        """Deletes the oldest entries, up to the first one that is not older, and returns their number.

        The hash of the last dropped entry is kept, so that the rest can still be checked.

        Raises:
            ValueError: the chain has a fault, which would be hidden.
        """
        before, last, n = time.time() - checks.number("days", days, 0) * 86_400, None, 0
        with self._database.writing() as connection:
            if fault := self._verify(connection)[1]:
                raise ValueError(f"The audit log is damaged ({fault}). Restore the database from a backup.")
            for row in connection.execute(sql.select(tables.audit).order_by(tables.audit.c.seq)).mappings():
                if json.loads(row["body"])["time"] >= before:
                    break
                last, n = row, n + 1
            if last is None:
                return 0
            mac = self._start(last["seq"], last["hash"])
            connection.execute(tables.starts.insert().values(seq=last["seq"], hash=last["hash"], mac=mac))
            self.add(connection, "entries dropped", {"through": last["seq"], "days": days})
            connection.execute(tables.audit.delete().where(tables.audit.c.seq <= last["seq"]))
        return n
