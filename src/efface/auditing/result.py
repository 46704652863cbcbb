"""The result of an audit, from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from .verdict import CODES

AUDIT, SETTING, LOCK = "audit.json", "setting.json", ".lock"
AUDITED, BASE, RANDOM, ATTACKS = "audited", "base", "random", "attacks"
PAGE, JUNIT, STATEMENT = "audit.html", "junit.xml", "statement.json"
RESTORE = "Restore it, or audit again in another folder."


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Args:
        folder: its folder.
        facts: the content of audit.json.

    Example:
        >>> import tempfile
        >>> from efface.auditing import opened
        >>> opened(tempfile.mkdtemp())
        Traceback (most recent call last):
        FileNotFoundError: ... has no audit.json, so it holds no audit. Make one with `efface audit`.
    """

    folder: Path
    facts: Mapping[str, Any]

    @property
    def outcome(self) -> str:
        """ "met", "exceeded", "not judged", or "measured" if there is no limit: the worst of all concepts."""
        return str(self.facts["outcome"])

    @property
    def code(self) -> int:
        """The exit code of `efface audit`: 0 met or measured, 3 exceeded, 4 not judged."""
        return CODES[self.outcome]

    @property
    def verdict(self) -> str:
        """The verdict in words: a headline, then the sentences of each concept, and what changed since an earlier
        audit."""
        lines = [self.facts["headline"], *self.facts["notes"]]
        lines += [line for each in self.facts["concepts"] for line in each["words"]]
        since = self.facts["since"] or {"differences": (), "notes": ()}
        return "\n".join([*lines, *(each["words"] for each in since["differences"]), *since["notes"]])


def opened(folder: str | Path) -> Audit:
    """Reads an audit from its folder.

    Raises:
        FileNotFoundError: the folder holds no audit.
        ValueError: audit.json is damaged, or of another version.
    """
    from .. import schema
    from .forms import AuditFile

    path = files.inside(Path(folder), AUDIT)
    if not files.there(path):
        raise FileNotFoundError(f"{folder} has no {AUDIT}, so it holds no audit. Make one with `efface audit`.")
    return Audit(Path(folder), schema.read(path, AuditFile, RESTORE))
