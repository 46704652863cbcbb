"""Writes an audit into one self-contained HTML page: the verdict in words, then failures with pictures, then tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from ..runs import Run
from .compare import Entry
from .pictures import pairs_of
from .template import renderer

FAILURES, EXAMPLES = 24, 8


def write_audit(facts: Mapping[str, Any], run: Run, base: Run | None, out: Path) -> None:
    """Writes the page of an audit.

    Args:
        facts: the content of audit.json.
        run: the audited model's run, scored.
        base: the base model's run. None: there is none.
        out: the page.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        ValueError: a picture is damaged.
    """
    render = renderer("audited.html.j2")
    scores, plain = ({score.metric: score for score in group} for group in run.scores())
    entry = Entry("audited model", run, run.card(), scores, plain)
    shown = {row for each in facts["concepts"] for row in each.get("shown", ())}
    failures = pairs_of([entry], FAILURES, shown) if shown else []
    others = {sample.row.id for sample in run.samples()} - shown
    examples = pairs_of([entry], EXAMPLES, others) if others else []
    files.write(
        out, render(facts=facts, failures=failures, shown=len(shown), examples=examples, based=base is not None)
    )
