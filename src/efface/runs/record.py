"""`Run`, a run folder as it is read; and what its record says of model, versions and machine."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, files
from ..records import Metric, Row, Sample, Score, rows_hash
from .folder import CARD, RUN, SCORES, kept
from .remote import local

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMAT = 1
DECIDES = ("format", "suite", "rows", "call", "batch", "model", "erasers")
"""The entries of run.json that decide the pictures: a folder continues only if all of them agree."""
RESTORE = "Restore it, or run again into another folder."

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many pictures are done, and of how many."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder. What is in it may come from a stranger: it is checked when it is read.

    Args:
        folder: where it is.
        record: what its run.json says.
        metrics: the suite's metrics, if they are at hand; else they are made from the record.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.Run.open(tempfile.mkdtemp())
        Traceback (most recent call last):
        FileNotFoundError: ... is not a run folder: it has no run.json. `efface bench` makes one.
    """

    folder: Path
    record: Mapping[str, Any]
    metrics: tuple[Metric, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in a folder.

        Raises:
            FileNotFoundError: there is no run in it.
            ValueError: its record cannot be read, an entry of it is wrong, or another version of Efface wrote it.
        """
        from .. import schema

        folder = local(folder)
        path = files.inside(folder, RUN)
        if not files.there(path):
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {RUN}. `efface bench` makes one.")
        record = files.read_json(path, RESTORE)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path} is not a record of format {FORMAT}. Run it again with this version of Efface.")
        return cls(folder, schema.check(record, schema.RunFile, path, RESTORE))

    @property
    def n(self) -> int:
        """How many pictures the whole run has."""
        return int(self.record["rows"]["n"])

    @property
    def complete(self) -> bool:
        return len(self.entries()) == self.n

    @property
    def base(self) -> Run | None:
        """The plain model's run of the same rows; None if this is one itself.

        Raises:
            FileNotFoundError: the folder that the record names holds no run.
            ValueError: it holds a run of other rows, another model or other settings, or one with erasers.
        """
        beside = self.record["base"]
        if not beside:
            return None
        if os.path.isabs(beside) or "\0" in beside:
            raise ValueError(f"Expected `base` in {self.folder / RUN} to be relative, got {beside!r}. {RESTORE}")
        base = Run.open(os.path.normpath(self.folder / beside))
        wanted = {key: self.record[key] for key in DECIDES} | {"erasers": [], "base": None}
        found = {key: base.record[key] for key in wanted}
        files.check_same(found, wanted, f"{base.folder} is not the base of {self.folder}", RESTORE)
        return base

    def entries(self) -> list[dict[str, Any]]:
        """The finished lines of samples.jsonl, in row order.

        Raises:
            ValueError: a line is damaged; or all are there, but not of the rows that run.json names.
        """
        found = kept(self.folder, self.n, self.record["batch"])
        entries = [found[k][1] for k in sorted(found)]
        if len(entries) == self.n and rows_hash(list(map(_row, entries))) != self.record["rows"]["sha256"]:
            raise ValueError(f"The rows in {self.folder} are not those that its {RUN} names by SHA-256. {RESTORE}")
        return entries

    def samples(self) -> list[Sample]:
        """What was drawn, in row order; pictures are read when they are asked for, and their SHA-256 is checked.

        Raises:
            ValueError: as `entries`.
        """
        return [
            Sample(_row(entry), path=self.folder / entry["file"], sha256=entry.get("sha256", ""))
            for entry in self.entries()
        ]

    def finished(self) -> list[Sample]:
        """As `samples`, of a complete run.

        Raises:
            ValueError: as `samples`, or pictures are missing.
        """
        samples = self.samples()
        if len(samples) != self.n:
            raise ValueError(
                f"{self.folder} is not finished: {len(samples)} of {self.n} pictures. Run the command that made it, "
                "it continues."
            )
        return samples

    def scores(self) -> tuple[list[Score], list[Score]]:
        """The scores of this run and of the plain model; `efface.score` makes them.

        Raises:
            FileNotFoundError: the run is not scored yet.
            ValueError: the file cannot be read, or an entry is wrong.
        """
        from .. import schema

        found = self._made(SCORES, schema.ScoresFile, "scores", "them")
        return [_score(s) for s in found["scores"]], [_score(s) for s in found["base"]]

    def card(self) -> dict[str, Any]:
        """The summary that reports read; `efface.score` makes it.

        Raises:
            FileNotFoundError: the run is not scored yet.
            ValueError: the file cannot be read, or an entry is wrong.
        """
        from .. import schema

        return self._made(CARD, schema.CardFile, CARD, "it")

    def _made(self, name: str, form: Any, what: str, them: str) -> dict[str, Any]:
        """A file that `efface.score` makes."""
        from .. import schema

        path = files.inside(self.folder, name)
        if not files.there(path):
            raise FileNotFoundError(f"{self.folder} has no {what} yet: `efface score {self.folder}` makes {them}.")
        found: dict[str, Any] = schema.read(path, form, f"`efface score {self.folder}` makes it anew.")
        return found


def _row(entry: Mapping[str, Any]) -> Row:
    return Row(**entry["row"])


def model_facts(pipe: DiffusionPipeline, name: str | None) -> dict[str, Any]:
    """What a record says of the model."""
    from ..api import model_hash

    settings = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    return {
        "name": name if name is not None else f"a {type(pipe).__name__} in memory",
        "text_hash": model_hash(pipe),
        "pipeline": type(pipe).__name__,
        "scheduler": json.loads(json.dumps({"class": type(pipe.scheduler).__name__, **settings}, default=str)),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
    }


def score_facts(score: Score) -> dict[str, Any]:
    """A score as JSON, which has no NaN: null stands for it."""
    fields = dataclasses.asdict(score)
    fields |= {k: None if math.isnan(fields[k]) else fields[k] for k in ("value", "low", "high")}
    if score.per_sample is not None:
        fields["per_sample"] = {k: None if math.isnan(v) else v for k, v in score.per_sample.items()}
    return fields


def _score(fields: Mapping[str, Any]) -> Score:
    known = {f.name: fields[f.name] for f in dataclasses.fields(Score)}
    known |= {k: math.nan if known[k] is None else known[k] for k in ("value", "low", "high")}
    if known["per_sample"] is not None:
        known["per_sample"] = {k: math.nan if v is None else v for k, v in known["per_sample"].items()}
    return Score(**known)


def versions() -> dict[str, str]:
    """The versions of what draws."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"efface": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def session(command: str | None) -> dict[str, Any]:
    """What a record says of this process."""
    torch = sys.modules.get("torch")
    threads = f", {torch.get_num_threads()} threads" if torch else ""
    return {
        "started": now(),
        "command": command or this_command(),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}{threads}",
    }


def this_command() -> str:
    """The command line of this process."""
    name, *rest = sys.argv or [""]
    return shlex.join([Path(name).name, *rest] if not name.endswith(".py") else ["python", name, *rest])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def silent(what: str, done: int, total: int) -> None:
    pass
