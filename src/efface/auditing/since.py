"""Compares an audit with an earlier one of the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..detectors._named import Spec
from ..runs import Run
from .judge import compared, see
from .result import AUDITED, opened
from .verdict import percent


def earlier_run(folder: str | Path) -> Run:
    """The audited run of an earlier audit.

    Raises:
        FileNotFoundError: the folder holds no audit.
    """
    place = Path(folder) / AUDITED
    if not (place / "run.json").exists():
        raise FileNotFoundError(f"{folder} holds no audit to compare with. Name the folder of an earlier one.")
    return Run.open(place)


def check_since(folder: str | Path, out: Path) -> None:
    """Raises an error if the folder holds no audit, or is the one of today's audit."""
    earlier_run(folder)
    opened(folder)
    if Path(folder).resolve() == out.resolve():
        raise ValueError(
            f"Expected `since` to be the folder of an earlier audit, got {folder}, which is this audit's own. Name two."
        )


def since(
    folder: str | Path, run: Run, concepts: Sequence[Mapping[str, Any]], detector: Spec, recognises: Spec | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The paired difference of each concept's rate since an earlier audit, and the concepts that have regressed.

    Today's detector judges both audits' pictures. Only the rows that both have count, which a note says. `lost` names
    the concepts of which nothing could be compared.

    Raises:
        FileNotFoundError: the folder holds no audit.
        ValueError: the earlier audit has another suite or sampling, or no row in common.
    """
    earlier = earlier_run(folder)
    for name, then, today in (
        ("suite", earlier.record["suite"]["name"], run.record["suite"]["name"]),
        ("sampling", earlier.record["call"], run.record["call"]),
    ):
        if then != today:
            raise ValueError(
                f"Expected an earlier audit with the same {name}, got {then!r} there and {today!r} here. Audit both "
                "models alike."
            )
    old, new = ({sample.row.id: sample for sample in each.finished()} for each in (earlier, run))
    common = [name for name in new if name in old and old[name].row == new[name].row]
    if not common:
        raise ValueError(f"Expected rows in common with the audit in {folder}, got none. Audit the same rows.")
    notes = []
    if not len(common) == len(new) == len(old):
        notes.append(
            f"{len(common)} rows are in both audits, of {len(new)} today and {len(old)} earlier. Only these count."
        )
    then, today = (each.record["sessions"][-1]["versions"] for each in (earlier, run))
    differ = [f"{name} {then.get(name)} then, {today[name]} today" for name in today if then.get(name) != today[name]]
    notes += [f"Other versions: {'; '.join(differ)}."] if differ else []
    before, now = (see([each[name] for name in common], detector, recognises) for each in (old, new))
    asked = Counter(sample.row.concept for sample in old.values())
    audited = [concept["concept"] for concept in concepts]
    found, regressed, lost = [], [], []
    for name in dict.fromkeys([*audited, *(each["concept"] for each in opened(folder).facts["concepts"])]):
        rows, there, _ = now.of(name)
        if name not in audited or not rows:
            lost.append(name)
            why = "no row is in both audits" if name in audited else "this audit does not look for it"
            notes.append(f"{name} is not compared with the earlier audit, because {why}.")
            continue
        if len(rows) < asked[name]:
            notes.append(f"{name}: {len(rows)} of its {asked[name]} earlier rows are in this audit.")
        _, was, _ = before.of(name)
        apart = compared(there, was, rows, max)
        low, high = apart["interval"]
        change = f"[{100 * low:.1f}, {100 * high:.1f}] since {folder}, on {len(rows)} equal rows and seeds"
        words = f"{name}: the rate changed by {percent(apart['value'])} {change}."
        if low > 0:
            words = f"{name}: the rate rose by {percent(apart['value'])} {change}."
            regressed.append({"concept": name, "words": words})
        elif high > 0:
            words += f" A rise of up to {percent(high)} is not excluded."
        found.append({"concept": name, "n": len(rows), **apart, "words": words})
    made = {"folder": str(folder), "rows": len(common), "notes": notes, "differences": found, "lost": lost}
    return made, regressed
