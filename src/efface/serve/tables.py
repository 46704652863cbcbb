"""The tables of the service. `migrations` makes them; a test compares the two."""

from __future__ import annotations

import sqlalchemy as sql

DATA = sql.MetaData()
HASH = sql.String(64)
NAME = sql.String(100)

policies = sql.Table(
    "policies",
    DATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("name", NAME, nullable=False),
    sql.Column("version", sql.Integer, nullable=False),
    sql.Column("hash", HASH, nullable=False),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("created", sql.Float, nullable=False),
    sql.UniqueConstraint("name", "version", name="one_version"),
)
"""Immutable versions of policies. The latest version of a name acts."""

keys = sql.Table(
    "keys",
    DATA,
    sql.Column("id", sql.String(40), primary_key=True),
    sql.Column("hash", HASH, nullable=False, unique=True),
    sql.Column("tenant", NAME, nullable=False),
    sql.Column("policy", NAME, nullable=True),
    sql.Column("admin", sql.Boolean, nullable=False),
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("expires", sql.Float, nullable=True),
    sql.Column("revoked", sql.Float, nullable=True),
    sql.Column("rate", sql.Float, nullable=True),
    sql.Column("burst", sql.Float, nullable=True),
    sql.Column("level", sql.Float, nullable=True),
    sql.Column("filled", sql.Float, nullable=True),
)
"""API keys, as keyed hashes. `level` is what a key with a rate may spend, as of the time `filled`."""

jobs = sql.Table(
    "jobs",
    DATA,
    sql.Column("seq", sql.Integer, primary_key=True, autoincrement=True),
    sql.Column("id", sql.String(40), nullable=False, unique=True),
    sql.Column("tenant", NAME, nullable=False),
    sql.Column("key", sql.String(40), nullable=False),
    sql.Column("policy", sql.Integer, nullable=False),
    sql.Column("policy_hash", HASH, nullable=False),
    sql.Column("model", sql.String(500), nullable=False),
    sql.Column("batch", HASH, nullable=False),
    sql.Column("rows", sql.Integer, nullable=False),
    sql.Column("cost", sql.Float, nullable=False),
    sql.Column("request", sql.Text, nullable=False),
    sql.Column("body_hash", HASH, nullable=False),
    sql.Column("idempotency", sql.String(200), nullable=True),
    sql.Column("state", sql.String(16), nullable=False, index=True),
    sql.Column("attempts", sql.Integer, nullable=False),
    sql.Column("owner", sql.String(100), nullable=True),
    sql.Column("fence", sql.Integer, nullable=False),
    sql.Column("beat", sql.Integer, nullable=False),
    sql.Column("cancel", sql.Boolean, nullable=False),
    sql.Column("step", sql.Integer, nullable=False),
    sql.Column("steps", sql.Integer, nullable=False),
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("finished", sql.Float, nullable=True),
    sql.Column("error", sql.Text, nullable=True),
    sql.UniqueConstraint("tenant", "idempotency", name="one_request"),
)
"""Accepted requests. `fence` grows with every claim, and only its holder can finish a job."""

pictures = sql.Table(
    "pictures",
    DATA,
    sql.Column("job", sql.String(40), primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("content", sql.LargeBinary, nullable=True),
    sql.Column("record", sql.Text, nullable=False),
)
"""The rows of finished jobs. A blocked row has a record and no content."""

partial = sql.Table(
    "partial_pictures",
    DATA,
    sql.Column("job", sql.String(40), primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("content", sql.LargeBinary, nullable=False),
)
"""Pictures of jobs that were being drawn, for streams. They are deleted with the job, or if it does not end well."""

audit = sql.Table(
    "audit",
    DATA,
    sql.Column("seq", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("body", sql.Text, nullable=False),
    sql.Column("hash", HASH, nullable=False),
)
"""One chain: each hash covers the entry and the hash before it. Triggers refuse changes."""

starts = sql.Table(
    "audit_starts",
    DATA,
    sql.Column("seq", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("hash", HASH, nullable=False),
    sql.Column("mac", HASH, nullable=False),
)
"""Where the chain starts since its earlier entries were dropped: the last dropped entry. Only those can be deleted."""
