"""Stored policies: numbered versions that never change."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from ..guard import Policy
from . import tables
from .audit import Audit
from .database import Database
from .keys import NAME, checked_name


@dataclass(frozen=True)
class Stored:
    """A version of a policy.

    Args:
        id: its number in the database.
        name: its name.
        policy: the policy, whose `version` counts from 1.
    """

    id: int
    name: str
    policy: Policy


class Policies:
    """The policies of the service.

    Args:
        database: the database.
        audit: the audit log.
    """

    def __init__(self, database: Database, audit: Audit) -> None:
        self._database, self._audit = database, audit

    def add(self, name: str, entries: Mapping[str, Any], by: str) -> Stored:
        """Stores a new version of a policy. Nothing is stored if it equals the latest version.

        Args:
            name: its name, at most 100 characters.
            entries: the entries of `efface.Policy`, without `version`, which counts by itself.
            by: who stores it, for the audit log.

        Raises:
            ValueError: the policy is empty, unknown or contradicts itself.
        """
        checked_name("the name of a policy", name)
        if "version" in entries:
            raise ValueError("Expected a policy without `version`, which the service counts, got one. Leave it out.")
        Policy(**entries)  # before others have to wait, because the first one loads its method
        with self._database.writing() as connection:
            self._audit.alone(connection)  # two writers of one policy make two versions
            earlier = self._latest(connection, name)
            version = 1 if earlier is None else earlier.policy.version + 1
            if earlier is not None and Policy(**entries, version=earlier.policy.version).hash == earlier.policy.hash:
                return earlier
            policy = Policy(**entries, version=version)
            values = {"name": name, "version": version, "hash": policy.hash, "created": time.time()}
            values["body"] = json.dumps(policy.as_json(), sort_keys=True)
            done = connection.execute(tables.policies.insert().values(values))
            before = None if earlier is None else earlier.policy.hash
            facts = {"name": name, "version": version, "before": before, "after": policy.hash, "by": by}
            facts["hashes"] = self._audit.hashes(connection, f"policy {name} version {version}")
            self._audit.add(connection, "policy stored", facts)
            return Stored(int((done.inserted_primary_key or (0,))[0]), name, policy)

    def latest(self, name: str) -> Stored | None:
        """The latest version of a policy; None if there is none."""
        if not NAME.fullmatch(name):
            return None
        with self._database.reading() as connection:
            return self._latest(connection, name)

    def _latest(self, connection: sql.Connection, name: str) -> Stored | None:
        table = tables.policies
        query = sql.select(table).where(table.c.name == name).order_by(table.c.version.desc()).limit(1)
        found = connection.execute(query).mappings().first()
        return None if found is None else _stored(found)

    def with_deltas(self) -> set[str]:
        """The names of policies of which a version may have deltas, without reading the policies."""
        table = tables.policies
        query = sql.select(table.c.name).where(table.c.body.contains('"deltas": [', autoescape=True)).distinct()
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())

    def version(self, number: int) -> Stored | None:
        """A version by its number in the database."""
        with self._database.reading() as connection:
            query = sql.select(tables.policies).where(tables.policies.c.id == number)
            found = connection.execute(query).mappings().first()
        return None if found is None else _stored(found)

    def list(self) -> list[Stored]:
        """The latest version of each policy, by name."""
        with self._database.reading() as connection:
            names = connection.execute(sql.select(tables.policies.c.name).distinct()).scalars().all()
            return [found for name in sorted(names) if (found := self._latest(connection, name)) is not None]


def _stored(row: sql.RowMapping) -> Stored:
    policy = _read(row["body"])
    if policy.hash != row["hash"]:
        raise ValueError(
            f"The stored policy {row['name']!r}, version {row['version']}, does not have its hash. Store it again, or "
            "install the version of Efface that stored it."
        )
    return Stored(int(row["id"]), str(row["name"]), policy)


@functools.lru_cache(1_000)
def _read(body: str) -> Policy:
    return Policy(**json.loads(body))


@functools.lru_cache(1_000)
def _with(body: str, names: tuple[str, ...]) -> Policy:
    return _read(body).plus(names)


def effective(policy: Policy, also_erase: Sequence[str]) -> Policy:
    """The policy with the further erasures of a request. Raises ValueError if one is unknown or contradicts it."""
    return _with(json.dumps(policy.as_json(), sort_keys=True), tuple(also_erase)) if also_erase else policy
