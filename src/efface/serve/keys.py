"""API keys: shown once, stored as keyed hashes."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from .. import checks
from . import tables
from .audit import Audit
from .database import Database
from .errors import Refused

PREFIX = "ef_"
PEPPER = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LONGEST = 36_500.0
"""Days."""
MOST = 1e9
BURST = 60.0
"""Seconds of its rate that a key may spend at one time."""


def checked_name(field: str, value: object) -> str:
    """A name of a tenant or a policy: letters, digits, `.`, `_` and `-`, at most 100."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        cure = "Write for example kids-eu."
        raise ValueError(
            checks.refusal(
                f"{field} of at most 100 letters, digits, '.', '_' and '-', first a letter or digit", value, cure
            )
        )
    return value


def _rate(rate: float | None, burst: float | None) -> tuple[float | None, float | None]:
    if rate is None:
        if burst is not None:
            raise ValueError("Expected no `burst` without a `rate`, got one. Give both, or leave it out.")
        return None, None
    rate = checks.number("rate", rate, 0, MOST, above=True)
    return rate, BURST * rate if burst is None else checks.number("burst", burst, rate, MOST * BURST)


@dataclass(frozen=True)
class Holder:
    """Whom a key belongs to.

    Args:
        key: the id of the key.
        tenant: the tenant, whose jobs it can see.
        policy: the name of the policy of its requests; None for admin keys.
        admin: whether it may read and write policies.
    """

    key: str
    tenant: str
    policy: str | None
    admin: bool


class Keys:
    """The keys of the service.

    Args:
        database: the database.
        audit: the audit log.
        pepper: the secret of the service, of at least 32 bytes.

    Raises:
        ValueError: the pepper is shorter.
    """

    def __init__(self, database: Database, audit: Audit, pepper: bytes) -> None:
        if len(pepper) < PEPPER:
            raise ValueError(f"Expected a pepper of at least {PEPPER} bytes, got {len(pepper)}. Restore the file.")
        self._database, self._audit, self._pepper = database, audit, pepper

    def _hash(self, key: str) -> str:
        return hmac.new(self._pepper, b"key\n" + key.encode(), hashlib.sha256).hexdigest()

    def add(
        self, tenant: str, policy: str | None, *, admin: bool = False, days: float | None = None,
        rate: float | None = None, burst: float | None = None,
    ) -> tuple[str, str]:  # fmt: skip
        """Makes a key, and returns its id and the key itself, which is not stored.

        Args:
            tenant: the tenant.
            policy: the name of a policy; None for an admin key.
            admin: whether it is an admin key. Admin keys draw nothing.
            days: how long it is valid. None: until it is revoked.
            rate: the cost per second, > 0, that it may spend in the long run, as `fields.cost_of` counts. None: any.
            burst: the cost that it may spend at one time, at least `rate`. None: that of 60 seconds.

        Raises:
            ValueError: there is no such policy, a key has neither or both, or `rate` and `burst` do not fit.
        """
        checked_name("a tenant", tenant)
        if (policy is None) != admin:
            raise ValueError(
                "Expected a key with a policy, or an admin key without one, got neither or both. Give one."
            )
        if days is not None:
            checks.number("days", days, 0, LONGEST, above=True)
        rate, burst = _rate(rate, burst)
        key, name, now = PREFIX + secrets.token_urlsafe(32), f"key_{secrets.token_hex(8)}", time.time()
        facts: dict[str, Any] = {"key": name, "tenant": tenant, "policy": policy, "admin": admin}
        with self._database.writing() as connection:
            known = sql.select(tables.policies.c.id).where(tables.policies.c.name == policy)
            if policy is not None and connection.execute(known).first() is None:
                raise ValueError(checks.refusal("the name of a stored policy", policy, "Store the policy first."))
            values: dict[str, Any] = {
                "id": name,
                "hash": self._hash(key),
                "tenant": tenant,
                "policy": policy,
                "admin": admin,
            }
            values |= {"created": now, "expires": None if days is None else now + days * 86_400}
            values |= {"rate": rate, "burst": burst, "level": burst, "filled": now}
            connection.execute(tables.keys.insert().values(values))
            facts["hashes"] = self._audit.hashes(connection, f"key {name}")
            self._audit.add(connection, "key added", facts)
        return name, key

    def holder(self, key: str) -> Holder | None:
        """Whom a key belongs to; None if it is unknown, revoked or expired. Takes the same steps for any text."""
        table = tables.keys
        with self._database.reading() as connection:
            found = connection.execute(sql.select(table).where(table.c.hash == self._hash(key))).mappings().first()
        if found is None or found["revoked"] is not None:
            return None
        if found["expires"] is not None and found["expires"] <= time.time():
            return None
        return Holder(found["id"], found["tenant"], found["policy"], bool(found["admin"]))

    def spend(self, connection: sql.Connection, key: str, cost: float) -> None:
        """Takes a cost from what a key with a rate may spend, in the caller's transaction: a token bucket.

        A clock that goes back fills nothing, and one that jumps ahead fills one burst.

        Raises:
            Refused: the key may not spend so much now, or never.
        """
        table = tables.keys
        query = sql.select(table.c.rate, table.c.burst, table.c.level, table.c.filled).where(table.c.id == key)
        found = connection.execute(query.with_for_update()).first()
        if found is None or found.rate is None:
            return
        if cost > found.burst:
            message = f"Expected a cost of at most {found.burst:g} for this key, got {cost:g}. Ask for less."
            raise Refused(400, message, "too_costly")
        now = time.time()
        level = min(found.level + max(now - found.filled, 0.0) * found.rate, found.burst)
        if level < cost:
            retry = min(max(math.ceil((cost - level) / found.rate), 1), 120)
            raise Refused(429, "This key has used up its rate. Try again later.", "rate_limit_exceeded", retry=retry)
        connection.execute(table.update().where(table.c.id == key).values(level=level - cost, filled=now))

    def revoke(self, name: str) -> None:
        """Revokes a key by its id. Raises ValueError if there is no such key."""
        table = tables.keys
        with self._database.writing() as connection:
            done = connection.execute(
                table.update().where(table.c.id == name, table.c.revoked.is_(None)).values(revoked=time.time())
            )
            if not done.rowcount:
                raise ValueError(checks.refusal("the id of a key that is not revoked", name, "List the keys."))
            facts = {"key": name, "hashes": self._audit.hashes(connection, f"key {name}")}
            self._audit.add(connection, "key revoked", facts)

    def list(self) -> list[dict[str, Any]]:
        """All keys without their hashes, oldest first."""
        table = tables.keys
        names = [column for column in table.c if column.name not in ("hash", "level", "filled")]
        with self._database.reading() as connection:
            return [dict(row) for row in connection.execute(sql.select(*names).order_by(table.c.created)).mappings()]
