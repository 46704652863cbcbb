"""Judgements in a database: SQLite by default, or any URL of SQLAlchemy."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import _sqlite, checks, files
from .judgement import NAME, Judgement

KEY = ("kind", "run", "row", "picture", "concept", "annotator", "pass")
WAIT = 5.0
_CURE = "Restore the store, or import an exported file into a new one."


@functools.cache
def _sql() -> Any:
    try:
        import sqlalchemy
    except ImportError as error:
        raise ImportError(
            'The store of judgements needs the package sqlalchemy. Install it with pip install "efface[feedback]".'
        ) from error
    return sqlalchemy


@functools.cache
def _tables() -> tuple[Any, Any, Any]:
    """The metadata, and the tables of judgements and of samples."""
    sql = _sql()
    data = sql.MetaData()
    text = {
        "kind": sql.String(16),
        "run": sql.String(64),
        "row": sql.String(200),
        "picture": sql.String(64),
        "concept": sql.String(200),
        "annotator": sql.String(NAME),
        "model": sql.String(1000),
        "outcome": sql.String(16),
        "time": sql.String(40),
        "details": sql.Text(),
    }
    judgements = sql.Table(
        "judgements",
        data,
        sql.Column("id", sql.Integer, primary_key=True),
        *(sql.Column(name, kind, nullable=False) for name, kind in text.items()),
        sql.Column("pass", sql.Integer, nullable=False),
        sql.UniqueConstraint(*KEY, name="one_judgement"),
    )
    samples = sql.Table(
        "samples",
        data,
        sql.Column("run", sql.String(64), primary_key=True),
        sql.Column("concept", sql.String(200), primary_key=True),
        sql.Column("sample", sql.Text(), nullable=False),
    )
    return data, judgements, samples


class Store:
    """The judgements of people, in a database.

    Each call is one transaction, flushed to disk before it returns: a kill loses no judgement that was stored. SQLite
    files are in WAL mode with synchronous=FULL. Threads may share a store.

    Args:
        place: a file, or a URL of SQLAlchemy such as "postgresql://user@host/labels".
        create: whether a missing file or missing tables are made.
        wait: seconds to wait for another process that holds an SQLite file.

    Raises:
        FileNotFoundError: the file does not exist, and `create` is False.
        ValueError: the file is not a store, or another version of Efface wrote it.
        ImportError: the package sqlalchemy is missing.

    Example:
        >>> import tempfile
        >>> from efface.feedback import Judgement, Store
        >>> store = Store(tempfile.mkdtemp() + "/labels.db")
        >>> seen = Judgement("0" * 64, "", "cat-0", "1" * 64, "cat", "ana", 1, "there", "2026-01-01")
        >>> store.add([seen]), store.add([seen]), len(store.judgements(concept="cat"))
        (1, 0, 1)
    """

    def __init__(self, place: str | Path, *, create: bool = True, wait: float = WAIT) -> None:
        sql, text = _sql(), os.fspath(place)
        self._wait = checks.number("wait", wait, 0)
        self._sqlite = "://" not in text or text.startswith("sqlite")
        if "://" not in text:
            path = checks.path("store", text)
            if files.there(path):
                files.check_ordinary(path, files.TENSORS)
            elif not create:
                raise FileNotFoundError(
                    f"There is no store {path}. `efface judge label` and `efface feedback collect` make one."
                )
            elif not path.parent.is_dir():
                raise ValueError(f"{path.parent} is not a folder, so {path} cannot be made. Name another store.")
            text = f"sqlite:///{path.absolute()}"
        try:
            url = sql.make_url(text)
            self.name = url.database if self._sqlite else url.render_as_string(hide_password=True)
            options = {"connect_args": {"timeout": self._wait}} if self._sqlite else {}
            self._engine = sql.create_engine(url, **options)
        except (sql.exc.ArgumentError, ImportError) as error:
            cure = "Give a file, or a URL of SQLAlchemy whose driver is installed."
            raise ValueError(f"Expected a store that SQLAlchemy can open, got an error ({error}). {cure}") from error
        if self._sqlite:
            _sqlite.prepare(self._engine)
        self._prepare(create)

    def _prepare(self, create: bool) -> None:
        sql, (data, *tables) = _sql(), _tables()
        with self._told():
            there = sql.inspect(self._engine)
            for table in tables:
                if there.has_table(table.name):
                    found = {column["name"] for column in there.get_columns(table.name)}
                    if found != {column.name for column in table.columns}:
                        raise ValueError(
                            f"{self.name} is not a store of this version of Efface, because the columns of "
                            f"`{table.name}` differ. Export it with the version that wrote it, and import the file."
                        )
                elif not create:
                    raise ValueError(f"{self.name} is not a store of judgements. Name another file.")
            if create:
                with self._transaction(write=True) as connection:
                    data.create_all(connection)

    @contextlib.contextmanager
    def _transaction(self, write: bool = False) -> Iterator[Any]:
        with self._engine.connect().execution_options(write=write) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the database in the words of Efface."""
        sql = _sql()
        try:
            yield
        except sql.exc.OperationalError as error:
            if "locked" in str(error.orig):
                raise BlockingIOError(
                    f"Another process holds the store {self.name}, also after {self._wait:g} seconds. Wait for it, or "
                    "end it."
                ) from error
            raise OSError(
                f"The store {self.name} cannot be used ({error.orig}). Correct that, and try again."
            ) from error
        except sql.exc.DatabaseError as error:
            raise ValueError(f"{self.name} is not a store of judgements ({error.orig}). Name another file.") from error

    def add(self, judgements: Sequence[Judgement], *, replace: bool = False, where: Sequence[str] = ()) -> int:
        """Stores judgements, all or none. What the store already holds is skipped.

        Args:
            judgements: what to store.
            replace: whether a judgement replaces an earlier one of the same picture, annotator and pass.
            where: where each judgement came from, for messages.

        Returns:
            The number of judgements that are new or changed.

        Raises:
            ValueError: an earlier judgement of the same picture, annotator and pass has another outcome.
            BlockingIOError: another process holds the store.
        """
        sql, (_, table, _) = _sql(), _tables()
        new = 0
        with self._told(), self._transaction(write=True) as connection:
            for k, each in enumerate(judgements):
                record = _row(each)
                same = sql.and_(*(table.c[name] == record[name] for name in KEY))
                earlier = connection.execute(sql.select(table.c.outcome).where(same)).scalar()
                if earlier is None:
                    connection.execute(table.insert().values(record))
                elif earlier == each.outcome:
                    continue
                elif replace:
                    connection.execute(table.update().where(same).values(record))
                else:
                    place = f"{where[k]}, " if where else ""
                    raise ValueError(
                        f"Expected {place}row {each.row!r} to be {earlier!r} as in the store, got {each.outcome!r} "
                        f"from {each.annotator!r} in pass {each.number}. Correct one of them."
                    )
                new += 1
        return new

    def judgements(self, **where: Any) -> list[Judgement]:
        """The stored judgements in the order in which they came.

        Args:
            where: fields that have to be equal, such as `run=` or `concept=`.
        """
        from .. import schema
        from .forms import JudgementLine

        sql, (_, table, _) = _sql(), _tables()
        query = sql.select(table).order_by(table.c.id)
        for name, value in where.items():
            query = query.where(table.c["pass" if name == "number" else name] == value)
        with self._told(), self._transaction() as connection:
            found = connection.execute(query).mappings().all()
        made = []
        for each in found:
            place = f"{self.name}, judgement {each['id']}"
            record = {name: value for name, value in each.items() if name != "id"}
            record["details"] = files.json_of(record["details"], place, _CURE)
            made.append(Judgement.of(schema.check(record, JudgementLine, place, _CURE)))
        return made

    def sample(self, run: str, concept: str) -> dict[str, Any] | None:
        """The pictures that were drawn for labelling, as `keep_sample` stored them; None if there are none."""
        from .. import schema
        from .forms import SampleFacts

        sql, (_, _, table) = _sql(), _tables()
        query = sql.select(table.c.sample).where(table.c.run == run, table.c.concept == concept)
        with self._told(), self._transaction() as connection:
            found = connection.execute(query).scalar()
        if found is None:
            return None
        where = f"{self.name}, the sample of {concept!r}"
        sample: dict[str, Any] = schema.check(files.json_of(found, where, _CURE), SampleFacts, where, _CURE)
        return sample

    def keep_sample(self, run: str, concept: str, sample: Mapping[str, Any]) -> None:
        """Stores the pictures that were drawn for labelling, so that each pass judges the same ones."""
        _, _, table = _tables()
        with self._told(), self._transaction(write=True) as connection:
            connection.execute(table.insert().values(run=run, concept=concept, sample=json.dumps(dict(sample))))

    def close(self) -> None:
        """Closes the connections. An SQLite store is then one file, which can be copied."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _row(judgement: Judgement) -> dict[str, Any]:
    record = judgement.record()
    return record | {"details": json.dumps(record["details"], sort_keys=True)}
