"""Which erasers draw which rows, and whether the engine's record proves that they acted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core import Concept, config
from ..families import filled
from ..hooks import watch
from ..hooks.watch import Record
from .policy import Erasure, Policy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Line:
    """An eraser with the concepts of each row of a batch."""

    eraser: Any
    rows: tuple[tuple[Concept, ...], ...]


def lines(policies: Sequence[Policy], pipe: DiffusionPipeline, factor: float = 1.0) -> list[Line]:
    """The erasers for rows with these policies. Rows of several policies share an eraser with equal settings.

    Args:
        policies: one per row.
        pipe: the pipeline, whose family may have defaults.
        factor: of every strength.
    """
    erasures: dict[str, Erasure] = {}
    concepts: dict[str, list[tuple[Concept, ...]]] = {}
    for row, policy in enumerate(policies):
        for each in policy.erase:
            erasures.setdefault(each.setting, each)
            every = concepts.setdefault(each.setting, [()] * len(policies))
            every[row] = (*every[row], *each.anchored)
    made = []
    for setting, each in erasures.items():
        rows = tuple(concepts[setting])
        eraser = filled(each.build(tuple(dict.fromkeys(c for row in rows for c in row))), pipe)
        more = {} if factor == 1 else {"strength": eraser.strength * factor}
        made.append(Line(dataclasses.replace(eraser, rows=rows, **more), rows))
    return made


@dataclass(frozen=True)
class Acted:
    """What one eraser did to one row.

    Args:
        eraser: its name and fields as JSON types, without `rows`.
        concepts: the names of the row's concepts.
        steps: the denoiser calls that it edited, as spans (first, last).
        exempt: reason to the number of denoiser calls without an edit, such as "outside the window".
        calls: denoiser calls with conditional rows.
    """

    eraser: dict[str, Any]
    concepts: tuple[str, ...]
    steps: tuple[tuple[int, int], ...]
    exempt: dict[str, int]
    calls: int

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def acted(line: Line, record: Record, row: int, steps: int) -> tuple[Acted, str]:
    """What the eraser did to a row, and why this does not prove that it acted as its method plans; "" if it does."""
    calls = [(rows, exempt) for rows, exempt in record.log if exempt != watch.NO_CONDITIONAL_ROWS]
    edited = [k for k, (rows, _) in enumerate(calls) if row in rows]
    reasons: dict[str, int] = {}
    for _, exempt in calls:
        if exempt:
            reasons[exempt] = reasons.get(exempt, 0) + 1
    facts = {name: value for name, value in config(line.eraser).items() if name not in ("rows", "concepts")}
    found = Acted(facts, tuple(c.name for c in line.rows[row]), _spans(edited), reasons, len(calls))
    name = facts["method"]
    if len(calls) < steps:
        return found, f"{name} saw {len(calls)} denoiser calls with prompts in {steps} steps"
    if wrong := [reason for reason in reasons if reason in (watch.NO_CONCEPTS, watch.NO_GUIDANCE, watch.OFF)]:
        return found, f"{name} did not act because of {wrong[0]!r}"
    if missing := [k for k, (rows, exempt) in enumerate(calls) if not exempt and row not in rows]:
        return found, f"{name} did not edit the row in denoiser call {missing[0]}"
    if not edited:
        return found, f"{name} edited the row in no denoiser call"
    return found, ""


def proven(policy: Policy, logs: Sequence[tuple[Line, Record]], row: int, steps: int) -> tuple[tuple[Acted, ...], str]:
    """What the erasers did to a row in so many steps, and why this does not prove its policy; "" if it does."""
    mine = [acted(line, record, row, steps) for line, record in logs if line.rows[row]]
    erased = {concept for line, _ in logs for concept in line.rows[row]}
    missing = [c.name for each in policy.erase for c in each.anchored if c not in erased]
    why = [reason for _, reason in mine if reason] or [f"no eraser acted on {name!r}" for name in missing[:1]]
    return tuple(each for each, _ in mine), "; ".join(why)


def _spans(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for k in numbers:
        if spans and spans[-1][1] == k - 1:
            spans[-1] = spans[-1][0], k
        else:
            spans.append((k, k))
    return tuple(spans)
