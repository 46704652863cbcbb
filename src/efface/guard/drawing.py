"""One call of a pipeline under policies with the same deltas, with its proof and its gates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .. import api
from .._encodings import compared_once
from ..detectors._base import forgetting
from ..hooks.sites import records
from .deltas import present
from .partial import Partial, callback
from .policy import Policy
from .proof import Line, lines, proven
from .record import Batch, RowRecord

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from ..core import Detector
    from ..delta import Delta
    from ..hooks.watch import Record


@dataclass
class Drawing:
    """Rows that are drawn in one call, and changed by their gates.

    Args:
        pipe: the pipeline, with the deltas on its weights.
        batch: prompts, seeds and the arguments of the call.
        policies: one per row, all with the same deltas.
        deltas: the deltas.
        on_step: called with the number of each finished step.
    """

    pipe: DiffusionPipeline
    batch: Batch
    policies: Sequence[Policy]
    deltas: Sequence[Delta]
    on_step: Callable[[int], None] | None
    pictures: Tensor = field(init=False)
    rows: list[RowRecord] = field(init=False)

    def draw(self, partial: Partial | None = None, factor: float = 1.0) -> Drawing:
        """Draws all rows, and compares the engine's record with their policies.

        Args:
            partial: shows pictures of rows that are not finished.
            factor: of the strength of every eraser.
        """
        pipe, batch, edits = self.pipe, self.batch, self.policies[0].deltas
        needed, call = lines(self.policies, pipe, factor), dict(batch.call)
        with ExitStack() as acting:
            with compared_once():
                applied = acting.enter_context(api.stack(pipe, *(line.eraser for line in needed)))

            def logs() -> list[tuple[Line, Record]]:
                found = {id(handle): record for handle, record in records(pipe)}
                return [(line, found[id(handle)]) for line, handle in zip(needed, applied, strict=True)]

            def unproven(row: int, steps: int) -> str:
                return proven(self.policies[row], logs(), row, steps)[1] or present(pipe, edits, self.deltas)[1]

            follows = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
            if follows and (self.on_step is not None or partial is not None):
                call["callback_on_step_end"] = callback(self.on_step, partial, unproven)
            self.pictures = api.draw(pipe, batch.prompts, batch.seeds, len(batch.prompts), batch.guidance, **call)
            edited, lacks = present(pipe, edits, self.deltas)
            final, steps = logs(), int(batch.call["num_inference_steps"])
        self.rows = []
        for k, (policy, tenant) in enumerate(zip(self.policies, batch.tenants, strict=True)):
            acted, why = proven(policy, final, k, steps)
            why = "; ".join(filter(None, (why, lacks)))
            outcome = "not proven" if why else "drawn"
            self.rows.append(RowRecord(tenant, policy.hash, policy.version, outcome, acted, (), why, edited))
        return self

    def judge(self, detectors: Mapping[str, Sequence[tuple[str, Detector]]]) -> Drawing:
        """Applies the gates: each row whose detector finds a concept is blocked, drawn again, or logged.

        Args:
            detectors: hash of a policy to its concepts and their detectors.
        """
        gates = {k: policy.gate for k, policy in enumerate(self.policies) if policy.gate is not None}
        waiting = [k for k in gates if self.rows[k].outcome == "drawn"]
        redraws = 0
        while waiting:
            again: dict[float, list[int]] = {}
            for k in waiting:
                row, gate = self.rows[k], gates[k]
                judges = detectors[self.policies[k].hash]
                seen = _seen(judges, self.pictures[k])
                outcome = "redrawn" if redraws else "drawn"
                if seen:
                    outcome = "logged" if gate.on_detection == "log" else "blocked"
                    if gate.on_detection == "redraw" and redraws < gate.redraws:
                        again.setdefault(gate.stronger, []).append(k)
                self.rows[k] = replace(row, outcome=outcome, detections=(*row.detections, seen))
            redraws += 1
            for stronger, rows in again.items():
                self._redraw(rows, stronger**redraws)
            waiting = [k for rows in again.values() for k in rows if self.rows[k].outcome == "drawn"]
        return self

    def _redraw(self, rows: Sequence[int], factor: float) -> None:
        some = [self.policies[k] for k in rows]
        new = Drawing(self.pipe, self.batch.some(rows), some, self.deltas, self.on_step).draw(factor=factor)
        for j, k in enumerate(rows):
            self.pictures[k] = new.pictures[j]
            self.rows[k] = replace(new.rows[j], detections=self.rows[k].detections)


def _seen(judges: Sequence[tuple[str, Detector]], picture: Tensor) -> tuple[str, ...]:
    """The concepts that any judge finds in a picture [3, H, W]."""
    with forgetting():  # nobody judges it again
        return tuple(name for name, judge in judges if bool(judge(picture[None].clamp(0, 1)).any()))


def alike(policies: Sequence[Policy]) -> list[list[int]]:
    """The rows in groups whose policies have the same deltas."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for k, policy in enumerate(policies):
        groups.setdefault(policy.weights, []).append(k)
    return list(groups.values())
