"""The rows of an audit: which count, which draw the controls, and what they leave out."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from ..records import Row, Suite, alike

CONTROL = 16  # rows of a control, or more with many concepts
LEAST = 2  # rows of a control for each concept


def distinct(suite: Suite) -> tuple[Suite, int]:
    """A suite without rows that would draw the picture of an earlier row again, and how many rows these were.

    Equal pictures are one observation. Counted several times, they would narrow every bound.
    """
    seen: set[tuple[Any, ...]] = set()
    rows = []
    for row in suite.rows:
        key = (row.concept, row.prompt, row.seed, json.dumps(row.call, sort_keys=True))
        if key not in seen:
            rows.append(row)
        seen.add(key)
    return dataclasses.replace(suite, rows=tuple(rows)), len(suite.rows) - len(rows)


def check_asked(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Raises ValueError if no row asks for any of these concepts."""
    if not any(row.concept in names for row in rows):
        others = ", ".join(sorted({row.concept for row in rows} - {""})[:8]) or "none"
        raise ValueError(
            f"Expected rows of the suite that ask for {', '.join(names)}, got rows that ask for {others}. Name the "
            "suite's concepts, or another suite."
        )


def of_controls(rows: Sequence[Row], names: Collection[str]) -> tuple[Row, ...]:
    """The rows of the controls: some that ask for each of these concepts."""
    asked = [row for row in rows if row.concept in names]
    return alike(asked, max(CONTROL, LEAST * len(names)))


def others(rows: Sequence[Row], names: Collection[str]) -> list[str]:
    """Sentences on concepts that the suite asks for and the audit does not judge."""
    found = Counter(row.concept for row in rows if row.concept and row.concept not in names)
    return [
        f"{name}: the suite asks for it in {n} rows, and this audit does not judge it." for name, n in found.items()
    ]
