"""The database of the service: SQLite on one machine, or PostgreSQL by its URL."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import event, exc

from .. import _sqlite, checks, files
from .turns import Turns

WAIT = 10.0
"""Seconds to wait for another process that writes."""
FROZEN = 3
"""PostgreSQL ends a transaction whose process does nothing for so many times the wait: it may hold locks."""
PASSING = ("08", "25", "40", "53", "57")
"""Classes of PostgreSQL's errors that pass: connections, standby servers, conflicts, resources, operators."""
ROOM = 64 * files.MIB
"""Bytes that have to be free beside an SQLite file. Pictures of a batch need less."""
MIGRATING = 0x0EFFACE
CACHE = 512
"""KiB of pages that each connection to SQLite keeps in memory."""
CURE = "Give a URL such as sqlite:////srv/efface/serve.db, with an installed driver."


class Unavailable(OSError):
    """The database cannot be reached, is locked, or cannot write. Nothing was accepted or changed."""


class Database:
    """Transactions on the tables of the service.

    A writing transaction is on disk when its block ends. SQLite files are in WAL mode with synchronous=FULL, and
    writers wait for each other: those of one process in turn, because SQLite itself lets some of many wait for long.

    Args:
        url: a URL of SQLAlchemy for SQLite or PostgreSQL.
        wait: seconds to wait for another process that writes.

    Raises:
        ValueError: the URL is of another database, its driver is not installed, or the file is not an ordinary file.

    Example:
        >>> import tempfile
        >>> from efface.serve.database import Database
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/serve.db")
        >>> database.migrate()
        >>> database.version()
        '0003'
    """

    def __init__(self, url: str, wait: float = WAIT) -> None:
        parsed = _parsed(checks.text("database", url))
        try:
            self.sqlite = parsed.get_backend_name() == "sqlite"
            if not self.sqlite and parsed.get_backend_name() != "postgresql":
                raise ValueError(
                    checks.refusal("a URL of SQLite or PostgreSQL", parsed.get_backend_name(), "Give another URL.")
                )
            if self.sqlite:
                _check_file(parsed.database)
            self.name = parsed.database if self.sqlite else parsed.render_as_string(hide_password=True)
            options: dict[str, Any] = {"connect_args": {"timeout": wait}} if self.sqlite else _patience(parsed, wait)
            options |= {"pool_size": 8, "max_overflow": 32, "pool_use_lifo": True}  # few connections, with warm caches
            self.engine = sql.create_engine(parsed, hide_parameters=True, **options)
        except (exc.ArgumentError, ImportError) as error:
            raise ValueError(f"Expected a database that SQLAlchemy can open, got an error ({error}). {CURE}") from error
        self._wait, self._turns = wait, Turns()
        if self.sqlite:
            _sqlite.prepare(self.engine)
            event.listen(self.engine, "connect", _frugal)
        else:
            event.listen(self.engine, "connect", functools.partial(_limited, wait))

    @contextlib.contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """A transaction that changes nothing."""
        with self._told(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """A transaction that is on disk when the block ends, or leaves no trace."""
        with self._told(), self._alone(), self._writer() as connection, connection.begin():
            yield connection

    def _writer(self) -> sql.Connection:
        return self.engine.connect().execution_options(write=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for other writers of this process, before it takes a connection."""
        if not self.sqlite:
            yield
            return
        if not self._turns.take(self._wait):
            raise self._broken(TimeoutError("database is locked"), True)
        try:
            yield
        finally:
            self._turns.give()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (exc.OperationalError, exc.TimeoutError, exc.InterfaceError) as error:
            raise self._broken(error, True) from error
        except exc.IntegrityError:
            raise
        except exc.DBAPIError as error:
            raise self._broken(error, _passes(error)) from error
        except (exc.StatementError, UnicodeError) as error:
            raise self._broken(error, False) from error

    def _broken(self, error: Exception, passes: bool) -> Exception:
        why = checks.short(str(getattr(error, "orig", None) or error), 150)
        if passes:
            return Unavailable(f"The database {self.name} cannot be used ({why}). Correct that, and try again.")
        return ValueError(
            f"The database {self.name} is damaged or of another program ({why}). Restore it from a backup."
        )

    def migrate(self) -> None:
        """Makes the tables, or brings them to this version."""
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.writing() as connection:
            if not self.sqlite:  # servers may start together
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(MIGRATING)))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise ValueError(
                    f"The database {self.name} has tables of another version of Efface ({error}). Install that "
                    "version, or name another database."
                ) from error

    def version(self) -> str:
        """The version of the tables; "" if there are none."""
        with self.reading() as connection:
            if not sql.inspect(connection).has_table("alembic_version"):
                return ""
            return str(connection.execute(sql.text("SELECT version_num FROM alembic_version")).scalar() or "")

    def usable(self) -> bool:
        """Whether it has tables, and its disk has room. The disk of a PostgreSQL server is not seen from here.

        Raises:
            Unavailable: it cannot be reached.
        """
        if not self.version():
            return False
        return not self.sqlite or shutil.disk_usage(Path(str(self.name)).absolute().parent).free >= ROOM

    def empty(self) -> bool:
        """Whether no service has written to it."""
        from .tables import audit

        with self.reading() as connection:
            return connection.execute(sql.select(audit.c.seq).limit(1)).first() is None

    def close(self) -> None:
        self.engine.dispose()


def _parsed(url: str) -> sql.URL:
    """The URL. The errors of SQLAlchemy may quote a password, so they are left out."""
    try:
        return sql.make_url(url)
    except (ValueError, exc.ArgumentError):
        cure = f"{CURE} Write special characters of a password as %40 and so on."
        raise ValueError(f"Expected the URL of a database, got one that cannot be read. {cure}") from None


def _patience(url: sql.URL, wait: float) -> dict[str, Any]:
    """Options for PostgreSQL: a server that does not answer is found out within the wait, where the driver can."""
    options: dict[str, Any] = {"pool_pre_ping": True, "pool_timeout": wait}
    if url.get_driver_name() in ("psycopg", "psycopg2"):
        given = {"connect_timeout": max(int(wait / 2), 2), "tcp_user_timeout": int(wait * 1_000)}
        options["connect_args"] = {name: value for name, value in given.items() if name not in url.query}
    return options


def _frugal(connection: Any, _: Any) -> None:
    """Deleted prompts are overwritten, and the pages in memory are few."""
    connection.execute("PRAGMA secure_delete=ON")
    connection.execute(f"PRAGMA cache_size=-{CACHE}")


def _limited(wait: float, connection: Any, _: Any) -> None:
    """No statement waits for a lock for ever, and no frozen process holds one for ever."""
    milliseconds = int(wait * 1_000)
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = {milliseconds}")
        cursor.execute(f"SET idle_in_transaction_session_timeout = {FROZEN * milliseconds}")
    connection.commit()


def _passes(error: exc.DBAPIError) -> bool:
    state = str(getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None) or "")
    return error.connection_invalidated or state[:2] in PASSING


def _check_file(name: str | None) -> None:
    if not name or name == ":memory:" or name.startswith("file:"):
        raise ValueError(checks.refusal("an SQLite database in a file", name, "Write sqlite:////folder/serve.db."))
    path = checks.path("database", name)
    if files.there(path):
        files.check_ordinary(path, files.TENSORS)
        return
    with contextlib.suppress(OSError):  # which the first transaction tells
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | files.NO_LINK, 0o600))  # it holds prompts and pictures
