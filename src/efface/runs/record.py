"""`Run`, which reads a run folder; and the facts on model, versions and machine for its record."""

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
"""The entries of run.json that determine the pictures. A folder continues only if all of them agree."""
MODELS = "models"
"""What the entry `compares` of run.json says if the base run is of another model."""
RESTORE = "Restore it, or run again in another folder."

Progress = Callable[[str, int, int], None]
"""Called with the task, the number of finished pictures, and the total."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder. Its files may come from an untrusted source, so every read checks them.

    Args:
        folder: its path.
        record: the content of run.json.
        metrics: the suite's metrics. None: made from the record.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.Run.open(tempfile.mkdtemp())
        Traceback (most recent call last):
        FileNotFoundError: ... has no run.json, so it is not a run folder. Make one with `efface bench`.
    """

    folder: Path
    record: Mapping[str, Any]
    metrics: tuple[Metric, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Opens the run in a folder.

        Raises:
            FileNotFoundError: the folder holds no run.
            ValueError: the record cannot be read, an entry is wrong, or another version of Efface wrote it.
        """
        from .. import schema

        folder = local(folder)
        path = files.inside(folder, RUN)
        if not files.there(path):
            raise FileNotFoundError(f"{folder} has no {RUN}, so it is not a run folder. Make one with `efface bench`.")
        record = files.read_json(path, RESTORE)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path} is not a record of format {FORMAT}. Run it again with this version of Efface.")
        return cls(folder, schema.check(record, schema.RunFile, path, RESTORE))

    @property
    def n(self) -> int:
        """The number of pictures in the complete run."""
        return int(self.record["rows"]["n"])

    @property
    def complete(self) -> bool:
        return len(self.entries()) == self.n

    @property
    def base(self) -> Run | None:
        """The base model's run of the same rows. None if this is a base run.

        It is of the same model without erasers; or of another model, if the run was made to compare models.

        Raises:
            FileNotFoundError: the folder that the record names holds no run.
            ValueError: the rows, the model or the settings differ, or the base run has erasers.
        """
        beside = self.record["base"]
        if not beside:
            return None
        if os.path.isabs(beside) or "\0" in beside:
            raise ValueError(f"Expected `base` in {self.folder / RUN} to be relative, got {beside!r}. {RESTORE}")
        base = Run.open(os.path.normpath(self.folder / beside))
        wanted = {key: self.record[key] for key in DECIDES} | {"erasers": [], "base": None}
        if self.record.get("compares") == MODELS and not self.record["erasers"]:
            del wanted["model"]
        found = {key: base.record[key] for key in wanted}
        files.check_same(found, wanted, f"{base.folder} is not the base of {self.folder}", RESTORE)
        return base

    def entries(self) -> list[dict[str, Any]]:
        """The finished lines of samples.jsonl, in row order.

        Raises:
            ValueError: a line is damaged, or the complete rows are not those that run.json names.
        """
        found = kept(self.folder, self.n, self.record["batch"])
        entries = [found[k][1] for k in sorted(found)]
        if len(entries) == self.n and rows_hash(list(map(_row, entries))) != self.record["rows"]["sha256"]:
            raise ValueError(f"The rows in {self.folder} do not match the SHA-256 in its {RUN}. {RESTORE}")
        return entries

    def samples(self) -> list[Sample]:
        """The samples in row order. Each picture is read on demand, with a check of its SHA-256.

        Raises:
            ValueError: as `entries`.
        """
        return [
            Sample(_row(entry), path=self.folder / entry["file"], sha256=entry.get("sha256", ""))
            for entry in self.entries()
        ]

    def finished(self) -> list[Sample]:
        """As `samples`, for a complete run.

        Raises:
            ValueError: as `samples`, or pictures are missing.
        """
        samples = self.samples()
        if len(samples) != self.n:
            raise ValueError(
                f"{self.folder} is not finished and has {len(samples)} of {self.n} pictures. Run the command that made "
                "it, which continues."
            )
        return samples

    def scores(self) -> tuple[list[Score], list[Score]]:
        """The scores of this run and of the base model. `efface.score` makes them.

        Raises:
            FileNotFoundError: the run is not scored yet.
            ValueError: the file cannot be read, or an entry is wrong.
        """
        from .. import schema

        found = self._made(SCORES, schema.ScoresFile, "scores", "them")
        return [_score(s) for s in found["scores"]], [_score(s) for s in found["base"]]

    def scored_by(self) -> list[dict[str, Any]]:
        """The metrics that scored this run, by name and fields.

        Raises:
            FileNotFoundError: the run is not scored yet.
            ValueError: the file cannot be read, or an entry is wrong.
        """
        from .. import schema

        return list(self._made(SCORES, schema.ScoresFile, "scores", "them")["metrics"])

    def card(self) -> dict[str, Any]:
        """The summary for reports. `efface.score` makes it.

        Raises:
            FileNotFoundError: the run is not scored yet.
            ValueError: the file cannot be read, or an entry is wrong.
        """
        from .. import schema

        card = self._made(CARD, schema.CardFile, CARD, "it")
        if "labels" in card:
            from ..feedback.forms import CardLabels

            where = self.folder / CARD
            schema.check({"labels": card["labels"]}, CardLabels, where, f"`efface score {self.folder}` makes it again.")
        return card

    def _made(self, name: str, form: Any, what: str, them: str) -> dict[str, Any]:
        """Reads a file that `efface.score` makes."""
        from .. import schema

        path = files.inside(self.folder, name)
        if not files.there(path):
            raise FileNotFoundError(f"{self.folder} has no {what} yet. `efface score {self.folder}` makes {them}.")
        found: dict[str, Any] = schema.read(path, form, f"`efface score {self.folder}` makes it again.")
        return found


def _row(entry: Mapping[str, Any]) -> Row:
    return Row(**entry["row"])


def model_facts(pipe: DiffusionPipeline, name: str | None) -> dict[str, Any]:
    """The facts on the model for a record."""
    from ..api import model_hash
    from ..delta.state import schedule

    return {
        "name": name if name is not None else f"a {type(pipe).__name__} in memory",
        "text_hash": model_hash(pipe),
        "pipeline": type(pipe).__name__,
        "scheduler": schedule(pipe),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
    }


def score_facts(score: Score) -> dict[str, Any]:
    """A score as JSON types. null stands for NaN."""
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
    """The versions of the packages that draw."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"efface": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def session(command: str | None) -> dict[str, Any]:
    """The facts on this process for a record."""
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
