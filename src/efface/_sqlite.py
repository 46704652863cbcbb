"""How Efface uses SQLite: nothing is lost at a kill, and writers wait for one another from their first statement."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, event


def prepare(engine: Engine) -> None:
    """Makes transactions of an engine begin when they are asked to; those with the option `write` lock immediately."""
    event.listen(engine, "connect", _careful)
    event.listen(engine, "begin", _begin)


def _careful(connection: Any, _: Any) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _begin(connection: Any) -> None:
    write = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
