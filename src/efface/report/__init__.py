"""Writes runs into one self-contained HTML page, without network or scripts, and its numbers into a JSON file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, checks, files
from ..runs import Run, open_store
from .attacked import write_attacks
from .audited import write_audit
from .compare import entries, grouped
from .page import view
from .plot import pareto
from .template import renderer
from .words import number, span

if TYPE_CHECKING:
    from ..feedback import Store

__all__ = ["number", "pareto", "span", "write_attacks", "write_audit", "write_report"]


def write_report(
    runs: Sequence[Run | str | Path],
    out: str | Path,
    *,
    mixed: bool = False,
    pairs: int = 24,
    labels: Store | str | Path | None = None,
) -> dict[str, Any]:
    """Writes scored runs into one HTML page, and the numbers into a JSON file next to it.

    The page shows removal and retention by category, next to the base model and with intervals. It shows pictures
    before and after at equal seeds; pictures that a detector flags are blurred until clicked. It ends with the commands
    that made the runs.

    Args:
        runs: runs or their folders, each scored.
        out: the page. The numbers go to a file of the same name with `.json`.
        mixed: whether runs that are not comparable (other rows, model, sampling or detector) may share the page, in
            separate, marked groups.
        pairs: the largest number of picture rows per group. Fewer if many runs share the page.
        labels: a store of people's labels of all runs. Adds rates that they correct, and the detector's errors.

    Returns:
        The content of the JSON file.

    Raises:
        FileNotFoundError: a folder holds no run, or the run is not scored.
        ValueError: there are no runs; runs are not comparable (the message names the differences); a run is not
            finished or has damaged files; the labels are not of these runs, incomplete, or of one pass; `out` is in a
            run folder; or the page's JSON file would replace a file that is not a report's.
        ImportError: matplotlib or jinja2 is missing.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.write_report([], "report.html")
        Traceback (most recent call last):
        ValueError: Expected runs for a report, got none. Name at least one run folder.
    """
    if not runs:
        raise ValueError("Expected runs for a report, got none. Name at least one run folder.")
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(checks.refusal("a report that is named .html", str(out), "Give --out NAME.html."))
    render = renderer("page.html.j2")
    opened = [r if isinstance(r, Run) else Run.open(r) for r in runs]
    _check_out(out, opened)
    with open_store(labels) as store:
        groups, reasons = grouped(entries(opened, store))
    if len(groups) > 1 and not mixed:
        shown = "\n".join(f"  {reason}" for reason in reasons)
        raise ValueError(
            f"These runs are not comparable:\n{shown}\nReport them separately, or put them on one page in marked "
            "groups with `mixed=True` (--mixed)."
        )
    made = datetime.now(UTC).isoformat(timespec="seconds")
    views = [view(k, group, pairs) for k, group in enumerate(groups)]
    page = render(groups=views, reasons=reasons, made=made, version=__version__)
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
    """Raises ValueError if the page or its JSON file would replace anything but an earlier report."""
    folders = [run.folder for run in runs] + [run.base.folder for run in runs if run.base]
    for folder in folders:
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise ValueError(
                f"{out} is in the run folder {folder}, whose files it could replace. Name a file elsewhere."
            )
    numbers = out.with_suffix(".json")
    if not os.path.lexists(numbers):
        return
    try:
        found = files.read_json(numbers, "")
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"format", "made", "groups"} <= found.keys():
        raise ValueError(
            f"The report's numbers would replace {numbers}, which is not a report's file. Name another page."
        )
