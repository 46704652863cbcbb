"""Run folders to one HTML page that stands alone: no network, no script, fit for print; and its numbers as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from .. import __version__, checks, files
from ..runs import Run
from .compare import entries, grouped
from .page import view
from .plot import pareto
from .words import number, span

__all__ = ["number", "pareto", "span", "write_report"]


def write_report(
    runs: Sequence[Run | str | Path], out: str | Path, *, mixed: bool = False, pairs: int = 24
) -> dict[str, Any]:
    """Writes scored runs into one HTML page, and its numbers into a JSON file beside it.

    The page shows what was removed and what was kept, beside the plain model and with intervals, by category; pictures
    before and after at equal seeds, where what a detector flags is blurred until clicked; and how to make it all again.

    Args:
        runs: runs or their folders, each scored.
        out: the page; its numbers go to the same name with `.json`.
        mixed: whether runs that must not be compared (other rows, model, sampling or detector) may share the page. They
            stand in groups of their own then, and the page says so.
        pairs: rows of pictures in a group, at most; fewer if many runs share the page.

    Returns:
        What the JSON file holds.

    Raises:
        FileNotFoundError: no run in a folder, or it is not scored.
        ValueError: no runs, or runs that must not be compared (the message says what differs); a run that is not
            finished or has damaged files; or `out` in a run folder, or beside a file of that name with `.json` that is
            not a report's.
        ImportError: matplotlib or jinja2 is missing.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.write_report([], "report.html")
        Traceback (most recent call last):
        ValueError: Nothing to report: give at least one run folder.
    """
    if not runs:
        raise ValueError("Nothing to report: give at least one run folder.")
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(checks.refusal("a report that is named .html", str(out), "Give --out NAME.html."))
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f'A report needs {error.name}: pip install "efface[bench]".') from error
    opened = [r if isinstance(r, Run) else Run.open(r) for r in runs]
    _check_out(out, opened)
    groups, reasons = grouped(entries(opened))
    if len(groups) > 1 and not mixed:
        shown = "\n".join(f"  {reason}" for reason in reasons)
        raise ValueError(
            f"These runs must not be compared:\n{shown}\nReport them apart, or put them on one page in marked groups "
            "with `mixed=True` (--mixed)."
        )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "number": number,
        "span": span,
        "breakable": _breakable,
        "json": partial(json.dumps, indent=1),
    }
    template = environment.from_string((resources.files(__name__) / "page.html.j2").read_text("utf-8"))
    made = datetime.now(UTC).isoformat(timespec="seconds")
    views = [view(k, group, pairs) for k, group in enumerate(groups)]
    page = template.render(groups=views, reasons=reasons, made=made, version=__version__)
    summary = {
        "format": 1,
        "made": made,
        "efface": __version__,
        "not_comparable": reasons,
        "groups": [{"runs": [{"label": e.label, **e.card} for e in group]} for group in groups],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, page)
    files.write_json(out.with_suffix(".json"), summary)
    return summary


def _check_out(out: Path, runs: Sequence[Run]) -> None:
    """ValueError if the page or its numbers would take the place of something else than an earlier report."""
    folders = [run.folder for run in runs] + [run.base.folder for run in runs if run.base]
    for folder in folders:
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise ValueError(f"{out} is in the run folder {folder}, whose files it could replace. Name another place.")
    numbers = out.with_suffix(".json")
    if not os.path.lexists(numbers):
        return
    try:
        found = files.read_json(numbers, "")
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"format", "made", "groups"} <= found.keys():
        raise ValueError(
            f"{numbers} would be replaced by the report's numbers, but is not a report's. Name another page."
        )


def _breakable(text: str) -> Any:
    """A name that may be broken after its underscores, slashes and dots."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([_/.])(?=\w)", r"\1<wbr>", str(escape(text))))
