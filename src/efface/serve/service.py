"""The parts of the service that requests and workers share."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import checks, files
from .audit import Audit
from .bell import Bell
from .database import Database
from .jobs import Jobs
from .keys import PEPPER, Keys
from .metrics import Metrics
from .policies import Policies

PEPPER_FILE, DATABASE_FILE = "pepper", "serve.db"


@dataclass(frozen=True)
class Limits:
    """The bounds of the service.

    Args:
        body: bytes of a request's body.
        queue: live jobs of all tenants.
        tenant: live jobs of one tenant.
        rows: rows of a batch.
        wait: seconds that a request waits for its pictures.
        read: seconds for reading a request's body.
        send: seconds for sending a part of a response.
        lease: seconds without a heartbeat after which another worker takes a job.
        stall: seconds without a finished step after which a worker counts as stalled, and its heartbeat ends.
        drain: seconds for finishing accepted jobs after SIGTERM.
        keep: seconds that jobs and their pictures are kept after they have finished.

    Raises:
        ValueError: a bound is not above 0.
    """

    body: int = 65_536
    queue: int = 1_000
    tenant: int = 200
    rows: int = 8
    wait: float = 300.0
    read: float = 10.0
    send: float = 30.0
    lease: float = 15.0
    stall: float = 600.0
    drain: float = 60.0
    keep: float = 86_400.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            checks.number(name, value, 0, above=True)


@dataclass
class Service:
    """What requests and workers share.

    Args:
        database: the database.
        pepper: the secret behind keyed hashes.
        limits: the bounds.
        model: the name of the model that is served.
        sizes: the sizes that it draws; the first is the default.
    """

    database: Database
    pepper: bytes = field(repr=False)
    limits: Limits = field(default_factory=Limits)
    model: str = "emoji"
    sizes: Sequence[tuple[int, int]] = ((64, 64),)
    draining: threading.Event = field(default_factory=threading.Event)
    warm: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    open: Counter[str] = field(default_factory=Counter)
    """Open requests of this process per tenant."""
    arrived: Bell = field(default_factory=Bell)
    """Rung when this process has accepted a job."""
    ended: Bell = field(default_factory=Bell)
    """Rung when a worker of this process has finished jobs, or stored a partial picture."""

    def __post_init__(self) -> None:
        self.audit = Audit(self.database, self.pepper)
        self.keys = Keys(self.database, self.audit, self.pepper)
        self.policies = Policies(self.database, self.audit)
        self.jobs = Jobs(self.database)
        self.metrics = Metrics()


def initialise(folder: Path, database: str | None = None) -> tuple[Service, str]:
    """Makes the pepper and the tables, and returns the service and the first admin key.

    Args:
        folder: a new or empty folder for the pepper, and for the database if it is SQLite.
        database: a URL. None: an SQLite file in the folder.

    Raises:
        FileExistsError: the folder holds a pepper already.
        ValueError: the database belongs to another service, whose pepper would not fit any more.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = folder / PEPPER_FILE
    if files.there(place):
        raise FileExistsError(f"{folder} holds a service already. Name another folder, or use `efface serve key`.")
    opened = Database(database or _url(folder))
    opened.migrate()
    if not opened.empty():
        raise ValueError(
            f"Expected a database without a service, but {opened.name} has one. Restore its pepper, or name another "
            "database."
        )
    handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | files.NO_LINK, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(PEPPER).hex().encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a full disk: it can be made again
        place.unlink()
        raise
    service = Service(opened, _pepper(folder))
    return service, service.keys.add("admin", None, admin=True)[1]


def opened(folder: Path, database: str | None = None, **options: Any) -> Service:
    """The service in a folder that `initialise` made.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the pepper is damaged or of another database, or the tables are of another version.
    """
    if not files.there(folder / PEPPER_FILE):
        raise FileNotFoundError(f"{folder} holds no service. `efface serve init {folder}` makes one.")
    if database is None and not files.there(folder / DATABASE_FILE):
        raise FileNotFoundError(f"{folder / DATABASE_FILE} is missing. Restore it, or give --database.")
    found = Database(database or _url(folder))
    found.migrate()
    service = Service(found, _pepper(folder), **options)
    if not service.audit.fits():
        raise ValueError(
            f"{folder / PEPPER_FILE} does not fit {found.name}, or the end of its audit log was changed. Restore both "
            "from one backup."
        )
    return service


def _url(folder: Path) -> str:
    return f"sqlite:///{folder.absolute() / DATABASE_FILE}"


def _pepper(folder: Path) -> bytes:
    place = folder / PEPPER_FILE
    try:
        pepper = bytes.fromhex(files.read_text(place, 1_000).strip())
    except ValueError as error:
        raise ValueError(f"{place} is damaged ({error}). Restore it, because all keys depend on it.") from error
    if len(pepper) < PEPPER:
        raise ValueError(f"{place} is damaged, because it is too short. Restore it, because all keys depend on it.")
    return pepper
