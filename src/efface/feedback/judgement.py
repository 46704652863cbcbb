"""What one annotator said about one picture."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from .. import checks

LABELS = ("there", "other", "nothing")
"""The outcomes of a label: the concept is there, something else is recognisable, nothing is recognisable."""
OUTCOMES: dict[str, tuple[str, ...]] = {
    "label": LABELS,
    "binary": ("yes", "no"),
    "ranking": ("1", "2", "3", "4", "5", "6", "7", "8", "9", "x"),
}
"""Kind of judgement to its outcomes. In a ranking, 1 shows most of the concept and x shows none of it; `details` holds
the name of the set that was ranked together."""
NAME = 200  # characters of an annotator's name
_SHA = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What one annotator said about one picture in one pass.

    Args:
        run: SHA-256 over the facts that determine a run's pictures.
        model: the hash of the model.
        row: the id of the picture's row.
        picture: SHA-256 of the picture's file.
        concept: the concept that was looked for.
        annotator: who judged.
        number: the pass, 1 or more.
        outcome: one of `OUTCOMES[kind]`.
        time: when, in ISO 8601.
        kind: "label", "binary" or "ranking".
        details: facts on how the picture was chosen: for a label the stratum, its size and how many were drawn.

    Raises:
        ValueError: the outcome is not one of the kind, a text is empty, or a hash is no SHA-256.
    """

    run: str
    model: str
    row: str
    picture: str
    concept: str
    annotator: str
    number: int
    outcome: str
    time: str
    kind: str = "label"
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checks.choice("outcome", self.outcome, OUTCOMES[checks.choice("kind", self.kind, OUTCOMES)])
        checks.whole("pass", self.number)
        annotator_name(self.annotator)
        for name in ("row", "concept", "time"):
            checks.text(name, getattr(self, name))
        for name in ("run", "picture"):
            if not _SHA.fullmatch(getattr(self, name)):
                raise ValueError(
                    checks.refusal(f"`{name}` to be a SHA-256", getattr(self, name), "Give 64 hex digits.")
                )

    @property
    def coder(self) -> tuple[str, int]:
        """One independent look: an annotator in one pass."""
        return self.annotator, self.number

    def record(self) -> dict[str, Any]:
        """As a line of a file, and as a row of the store."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["pass"] = fields.pop("number")
        return fields | {"details": dict(self.details)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Judgement:
        """A judgement from its record."""
        known = {f.name: record[f.name] for f in dataclasses.fields(cls) if f.name != "number"}
        return cls(**known, number=record["pass"])


def annotator_name(name: str) -> str:
    """Checks the name of an annotator: one line of at most 200 characters."""
    checks.text("annotator", name)
    if len(name) > NAME or not name.isprintable():
        raise ValueError(
            checks.refusal(f"`annotator` to be one line of at most {NAME} characters", name, "Shorten it.")
        )
    return name
