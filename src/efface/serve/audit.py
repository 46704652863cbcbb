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
        self.alone(connection)
        last, previous = self._last(connection)
        seq = last + 1
        body = json.dumps({"seq": seq, "time": round(time.time(), 3), "kind": kind, **facts}, sort_keys=True)
        connection.execute(tables.audit.insert().values(seq=seq, body=body, hash=self._hash(previous, body)))

    def alone(self, connection: sql.Connection) -> None:
        """Waits until nobody else writes entries, for the rest of the transaction. Writers of SQLite are alone."""
        if not self._database.sqlite:
            connection.execute(sql.text("LOCK TABLE audit IN EXCLUSIVE MODE"))

    def _hash(self, previous: str, body: str) -> str:
        return hmac.new(self._pepper, f"{previous}\n{body}".encode(), hashlib.sha256).hexdigest()

    def keyed(self, text: str) -> str:
        """The keyed hash of a text, such as a prompt, which the log shows instead of it."""
        return hmac.new(self._pepper, b"text\n" + text.encode(), hashlib.sha256).hexdigest()

    def hashes(self, connection: sql.Connection, *which: str) -> dict[str, str]:
        """Each key and each policy version, or `which` of them, with the keyed hash of its row.

        Entries hold them as `hashes`, so that a row that was changed, added or deleted without an entry is found.
        """
        found = {}
        for row in connection.execute(sql.select(tables.keys)).mappings():
            facts = [row[name] for name in ("hash", "tenant", "policy", "expires", "rate", "burst")]
            found[f"key {row['id']}"] = self.keyed(json.dumps([*facts, bool(row["admin"]), row["revoked"] is None]))
        for row in connection.execute(sql.select(tables.policies)).mappings():
            facts = [row[name] for name in ("id", "hash", "body")]
            found[f"policy {row['name']} version {row['version']}"] = self.keyed(json.dumps(facts))
        return {name: found[name] for name in which} if which else found

    def last(self) -> tuple[int, str]:
        """The number and the hash of the last entry. Kept elsewhere, they show later whether the end was cut off."""
        with self._database.reading() as connection:
            return self._last(connection)

    def _last(self, connection: sql.Connection) -> tuple[int, str]:
        for table in (tables.audit, tables.starts):
            found = connection.execute(sql.select(table).order_by(table.c.seq.desc()).limit(1)).first()
            if found is not None:
                return found.seq, found.hash
        return 0, FIRST

    def has(self, seq: int, hash_: str) -> bool:
        """Whether the chain has this entry, or had it until entries were dropped."""
        table = tables.audit
        with self._database.reading() as connection:
            found = connection.execute(sql.select(table.c.hash).where(table.c.seq == seq)).scalar()
            if found is None:
                start = self._began(connection)
                return seq < start[0] or (seq, hash_) == start
        return hmac.compare_digest(found, hash_)

    def _began(self, connection: sql.Connection) -> tuple[int, str]:
        """The last dropped entry."""
        table = tables.starts
        found = connection.execute(sql.select(table).order_by(table.c.seq.desc()).limit(1)).first()
        return (0, FIRST) if found is None else (found.seq, found.hash)

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
        table = tables.audit
        with self._database.reading() as connection:
            last = connection.execute(sql.select(table).order_by(table.c.seq.desc()).limit(2)).all()
            start = self._began(connection)
        if not last:
            return True
        previous = last[1].hash if len(last) == 2 else start[1]
        return hmac.compare_digest(last[0].hash, self._hash(previous, last[0].body))

    def verify(self) -> tuple[int, str]:
        """The number of the last entry, and the first fault of the chain, or of a key or a policy; "" if there is none.

        A chain whose end was cut off, with the keys and policies of that end, has no fault. `last` and `has` find it.
        """
        with self._database.reading() as connection:
            if not self._database.sqlite:  # entries, keys and policies of one moment
                connection.execute(sql.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            return self._verify(connection)

    def _verify(self, connection: sql.Connection) -> tuple[int, str]:
        n, previous, said = 0, FIRST, dict[str, str]()
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
            said |= json.loads(row["body"]).get("hashes", {})
        now = self.hashes(connection)
        other = sorted(name for name in said | now if said.get(name) != now.get(name))
        return n, f"the {other[0]} is not as the log says" if other else ""

    def _start(self, seq: int, last: str) -> str:
        return hmac.new(self._pepper, f"start\n{seq}\n{last}".encode(), hashlib.sha256).hexdigest()

    def drop(self, days: float) -> int:
        """Deletes the oldest entries, up to the first one that is not older, and returns their number.

        The hash of the last dropped entry is kept, so that the rest can still be checked.

        Raises:
            ValueError: the chain has a fault, which would be hidden.
        """
        before, last, n = time.time() - checks.number("days", days, 0) * 86_400, None, 0
        if fault := self.verify()[1]:
            raise ValueError(f"The audit log is damaged ({fault}). Restore the database from a backup.")
        with self._database.writing() as connection:
            for row in connection.execute(sql.select(tables.audit).order_by(tables.audit.c.seq)).mappings():
                if json.loads(row["body"])["time"] >= before:
                    break
                last, n = row, n + 1
            if last is None:
                return 0
            self.alone(connection)
            mac = self._start(last["seq"], last["hash"])
            connection.execute(tables.starts.insert().values(seq=last["seq"], hash=last["hash"], mac=mac))
            facts = {"through": last["seq"], "days": days, "hashes": self.hashes(connection)}
            self.add(connection, "entries dropped", facts)
            connection.execute(tables.audit.delete().where(tables.audit.c.seq <= last["seq"]))
        return n
