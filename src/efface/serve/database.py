"""The database of the service: SQLite on one machine, or PostgreSQL by its URL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from .. import _sqlite, checks, files

WAIT = 10.0
"""Seconds to wait for another process that writes to an SQLite file."""


class Unavailable(OSError):
    """The database cannot be reached, is locked, or cannot write. Nothing was accepted or changed."""


class Database:
    """Transactions on the tables of the service.

    A writing transaction is on disk when its block ends. SQLite files are in WAL mode with synchronous=FULL, and
    writers wait for each other.

    Args:
        url: a URL of SQLAlchemy for SQLite or PostgreSQL.
        wait: seconds to wait for another process that writes to an SQLite file.

    Raises:
        ValueError: the URL is of another database, its driver is not installed, or the file is not an ordinary file.

    Example:
        >>> import tempfile
        >>> from efface.serve.database import Database
        >>> database = Database(f"sqlite:///{tempfile.mkdtemp()}/serve.db")
        >>> database.migrate()
        >>> database.version()
        '0001'
    """

    def __init__(self, url: str, wait: float = WAIT) -> None:
        try:
            parsed = sql.make_url(checks.text("database", url))
            self.sqlite = parsed.get_backend_name() == "sqlite"
            if not self.sqlite and parsed.get_backend_name() != "postgresql":
                raise ValueError(
                    checks.refusal("a URL of SQLite or PostgreSQL", parsed.get_backend_name(), "Give another URL.")
                )
            if self.sqlite:
                _check_file(parsed.database)
            self.name = parsed.database if self.sqlite else parsed.render_as_string(hide_password=True)
            options: dict[str, Any] = {"connect_args": {"timeout": wait}} if self.sqlite else {"pool_pre_ping": True}
            self.engine = sql.create_engine(parsed, pool_size=8, max_overflow=32, hide_parameters=True, **options)
        except (sql.exc.ArgumentError, ImportError) as error:
            cure = "Give a URL such as sqlite:////srv/efface/serve.db, with an installed driver."
            raise ValueError(f"Expected a database that SQLAlchemy can open, got an error ({error}). {cure}") from error
        if self.sqlite:
            _sqlite.prepare(self.engine)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """A transaction that changes nothing."""
        with self._told(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """A transaction that is on disk when the block ends, or leaves no trace."""
        with self._told(), self.engine.connect().execution_options(write=True) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sql.exc.OperationalError, sql.exc.TimeoutError, sql.exc.InterfaceError) as error:
            why = getattr(error, "orig", None) or error
            raise Unavailable(
                f"The database {self.name} cannot be used ({checks.short(str(why), 160)}). Correct that, and try again."
            ) from error
        except sql.exc.IntegrityError:
            raise
        except (sql.exc.DatabaseError, sql.exc.StatementError, UnicodeError) as error:
            why = getattr(error, "orig", None) or error
            raise ValueError(
                f"The database {self.name} is damaged or of another program ({checks.short(str(why), 150)}). Restore "
                "it from a backup."
            ) from error

    def migrate(self) -> None:
        """Makes the tables, or brings them to this version."""
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.writing() as connection:
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

    def close(self) -> None:
        self.engine.dispose()


def _check_file(name: str | None) -> None:
    if not name or name == ":memory:" or name.startswith("file:"):
        raise ValueError(checks.refusal("an SQLite database in a file", name, "Write sqlite:////folder/serve.db."))
    path = checks.path("database", name)
    if files.there(path):
        files.check_ordinary(path, files.TENSORS)
