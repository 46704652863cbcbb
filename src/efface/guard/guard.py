"""Draws the prompts of several tenants in one batch, each row under its tenant's policy."""

from __future__ import annotations

import inspect
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import api, checks
from ..core import Concept, Concepts, Detector
from ..detectors._named import detector, judges_anything_unsafe
from ..hooks.sites import handles, records
from ..pictures import to_pil
from ..registry import near
from . import file
from .explain import explained
from .forms import plain
from .policy import Erasure, Policy
from .proof import Line, acted, lines
from .record import DELIVERED, Batch, Guarded, PolicyNotApplied, RowRecord, lock_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

STEPS = 25
OWN = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "guidance_scale", "true_cfg_scale")
"""Arguments of a pipeline call that the guard sets."""


@dataclass
class _Drawn:
    """The pictures and records of some rows, while a gate may still change them."""

    pictures: Tensor
    rows: dict[int, RowRecord]


class Guard:
    """Draws pictures under policies: which concepts are erased for which tenant, and how.

    Each call of the guard erases per row, compares the engine's record with the policy, and returns a picture only if
    the record proves that the policy acted in every denoiser call of its row. Threads may share a guard and pipelines:
    a lock per denoiser lets one call draw at a time.

    Args:
        policies: tenant to a `Policy`, to concepts that `method` erases, or to `efface.unguarded`.
        method: the method for tenants whose entry is a list of concepts.
        fields: fields of that method, such as `strength`.

    Raises:
        ValueError: a policy is empty, unknown or contradicts itself, or its detector cannot judge its concepts.
        TypeError: an entry is neither a policy nor concepts.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> guard = efface.Guard({"kids": ["alcohol"], "press": efface.unguarded})
        >>> prompts = ["a night at the pub", "a night at the pub"]
        >>> result = guard(pipe, prompts, tenants=["kids", "press"], seeds=[1, 1], num_inference_steps=2)
        >>> [(row.tenant, [each.steps for each in row.acted]) for row in result.rows]
        [('kids', [((0, 1),)]), ('press', [])]
    """

    def __init__(self, policies: Mapping[str, Policy | Concepts], method: str = "eiup", **fields: Any) -> None:
        if not isinstance(policies, Mapping) or not policies:
            cure = 'Write for example {"kids": ["alcohol"], "press": efface.unguarded}.'
            raise ValueError(checks.refusal("`policies` from tenants to policies", policies, cure))
        strength = fields.pop("strength", None)
        made: dict[str, Policy] = {}
        for tenant, entry in policies.items():
            checks.text("tenant", tenant)
            if isinstance(entry, Policy):
                made[tenant] = entry
                continue
            if isinstance(entry, Mapping) or not isinstance(entry, (str, Concept, Sequence)):
                cure = "Give a Policy, concepts, or efface.unguarded."
                raise TypeError(checks.refusal(f"the policy of {tenant!r} to be a policy or concepts", entry, cure))
            if not entry:
                raise ValueError(
                    f"Expected concepts for the tenant {tenant!r}, got none. Write efface.unguarded to erase nothing."
                )
            concepts: Any = [entry] if isinstance(entry, (str, Concept)) else list(entry)
            made[tenant] = Policy(erase=[Erasure(concepts=concepts, method=method, strength=strength, fields=fields)])
        self._policies = made
        self._detectors = {policy.hash: _detectors(policy) for policy in made.values()}

    @classmethod
    def load(cls, path: str | Path) -> Guard:
        """The guard of a YAML file with policies, see docs/guard.md.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: as `Guard`, or the file is not such a file.
        """
        return cls(file.read(path))

    @property
    def policies(self) -> dict[str, Policy]:
        """Tenant to policy, as a copy."""
        return dict(self._policies)

    def policy(self, tenant: str) -> Policy:
        """The policy of a tenant. Raises ValueError if the tenant is unknown."""
        if tenant not in self._policies:
            hint = near(str(tenant), self._policies)
            raise ValueError(
                f"Expected a tenant with a policy, got {checks.shown(tenant)}. {hint or 'Add a policy for it.'}"
            )
        return self._policies[tenant]

    def __call__(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        tenants: Sequence[str],
        seeds: Sequence[int] | None = None,
        guidance: float | None = None,
        **call: Any,
    ) -> Guarded:
        """Draws one picture per prompt under the policy of its tenant.

        Args:
            pipe: a diffusers text-to-image pipeline without run-time erasers.
            prompts: N prompts.
            tenants: N tenants.
            seeds: N seeds. None: random ones, which the result holds.
            guidance: the guidance scale. None keeps the pipeline's default.
            call: further arguments of the pipeline. `num_inference_steps` is 25 by default.

        Raises:
            PolicyNotApplied: the record of a row does not prove that its policy acted. There are no pictures then.
            ValueError: a tenant is unknown, the numbers differ, or the call has an argument that the guard sets.
            RuntimeError: the pipeline has run-time erasers already, or another thread uses it without the guard.
        """
        made = self.draw(pipe, prompts, tenants, seeds, guidance, **call)
        if failed := [k for k, row in enumerate(made.rows) if row.outcome == "not proven"]:
            row = made.rows[failed[0]]
            raise PolicyNotApplied(
                f"The policy of {row.tenant!r} is not proven for row {failed[0]}, because {row.why}. Draw the row with "
                "another method or pipeline."
            )
        return made

    def draw(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        tenants: Sequence[str],
        seeds: Sequence[int] | None = None,
        guidance: float | None = None,
        on_step: Callable[[int], None] | None = None,
        **call: Any,
    ) -> Guarded:
        """As calling the guard, but a row that is not proven has no picture and says why, and the others are returned.

        Args:
            pipe, prompts, tenants, seeds, guidance, call: as in a call of the guard.
            on_step: called with the number of each finished step. An exception of it ends the call.
        """
        batch = self._batch(pipe, prompts, tenants, seeds, guidance, call)
        policies = [self.policy(tenant) for tenant in batch.tenants]
        with lock_of(pipe):
            if handles(pipe):
                raise RuntimeError(
                    "Expected a pipeline without run-time erasers, got one with some. Remove them, and write them into "
                    "the policies."
                )
            made = self._drawn(pipe, batch, policies, range(len(policies)), 1.0, on_step)
            self._judge(pipe, batch, policies, made, on_step)
        pictures = to_pil(made.pictures)
        rows = tuple(made.rows[k] for k in range(len(policies)))
        images = [p if row.outcome in DELIVERED else None for p, row in zip(pictures, rows, strict=True)]
        again = replace(batch, pictures=made.pictures)
        return Guarded(tuple(images), rows, batch.seeds, again)

    def explain(self, result: Guarded, row: int = 0) -> Image:
        """The picture of a row beside a map of where the erasers changed what attention read there.

        It draws the row again. See docs/guard.md for what the map can and cannot show.

        Args:
            result: the result of a call of this guard.
            row: the number of the row.

        Raises:
            ValueError: the row has no picture or no erasure, its picture was redrawn, or its methods do not act in
                attention, so the place where they read the concept is not defined.
        """
        checks.whole("row", row, 0, len(result.rows) - 1)
        return explained(self.policy(result.rows[row].tenant), result, row)

    # ---- one call

    def _batch(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        tenants: Sequence[str],
        seeds: Sequence[int] | None,
        guidance: float | None,
        call: Mapping[str, Any],
    ) -> Batch:
        texts = [checks.text("prompt", text) for text in checks.texts("prompts", prompts)]
        owners = checks.texts("tenants", tenants)
        if not texts or len(owners) != len(texts):
            raise ValueError(
                f"Expected one tenant per prompt, got {len(owners)} tenants and {len(texts)} prompts. Give as many "
                "tenants as prompts."
            )
        if own := [name for name in OWN if name in call]:
            cure = "Give `prompts`, `seeds` and `guidance` instead."
            raise ValueError(checks.refusal("no argument that the guard sets", own[0], cure))
        numbers = [secrets.randbelow(checks.SEEDS) for _ in texts] if seeds is None else [*seeds]
        if len(numbers) != len(texts):
            raise ValueError(
                f"Expected one seed per prompt, got {len(numbers)} seeds and {len(texts)} prompts. Give as many seeds "
                "as prompts."
            )
        for seed in numbers:
            checks.seed("seed", seed)
        checks.whole("num_inference_steps", call.get("num_inference_steps", STEPS))
        call = {"num_inference_steps": STEPS, **call}
        return Batch(weakref.ref(pipe), tuple(texts), owners, tuple(numbers), guidance, call)

    def _drawn(
        self,
        pipe: DiffusionPipeline,
        batch: Batch,
        policies: Sequence[Policy],
        numbers: Sequence[int],
        factor: float,
        on_step: Callable[[int], None] | None,
    ) -> _Drawn:
        """Draws a batch with its erasers, and compares the record. `numbers` are the rows' numbers in the result."""
        needed, call = lines(policies, pipe, factor), dict(batch.call)
        if on_step is not None and "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
            call["callback_on_step_end"] = _reporting(on_step)
        with api.stack(pipe, *(line.eraser for line in needed)) as applied:
            pictures = api.draw(pipe, batch.prompts, batch.seeds, len(batch.prompts), batch.guidance, **call)
            found = {id(handle): record for handle, record in records(pipe)}
            logs = [(line, found[id(handle)]) for line, handle in zip(needed, applied, strict=True)]
        steps = int(batch.call["num_inference_steps"])
        rows = {}
        for k, (policy, tenant) in enumerate(zip(policies, batch.tenants, strict=True)):
            mine = [acted(line, record, k, steps) for line, record in logs if line.rows[k]]
            why = "; ".join(reason for _, reason in mine if reason) or _lacks(policy, [line for line, _ in logs], k)
            outcome = "not proven" if why else "drawn"
            row = RowRecord(tenant, policy.hash, policy.version, outcome, tuple(each for each, _ in mine), (), why)
            rows[numbers[k]] = row
        return _Drawn(pictures, rows)

    def _judge(
        self,
        pipe: DiffusionPipeline,
        batch: Batch,
        policies: Sequence[Policy],
        made: _Drawn,
        on_step: Callable[[int], None] | None,
    ) -> None:
        """Applies the gates: each row whose detector finds a concept is blocked, drawn again, or logged."""
        gates = {k: policy.gate for k, policy in enumerate(policies) if policy.gate is not None}
        waiting = [k for k in gates if made.rows[k].outcome == "drawn"]
        redraws = 0
        while waiting:
            again: dict[float, list[int]] = {}
            for k in waiting:
                row, gate = made.rows[k], gates[k]
                seen = tuple(
                    name for name, judge in self._detectors[policies[k].hash] if _finds(judge, made.pictures[k])
                )
                detections = (*row.detections, seen)
                outcome = "redrawn" if redraws else "drawn"
                if seen:
                    outcome = "logged" if gate.on_detection == "log" else "blocked"
                    if gate.on_detection == "redraw" and redraws < gate.redraws:
                        again.setdefault(gate.stronger, []).append(k)
                made.rows[k] = replace(row, outcome=outcome, detections=detections)
            redraws += 1
            waiting = [k for rows in again.values() for k in rows]
            for stronger, rows in again.items():
                some = [policies[k] for k in rows]
                new = self._drawn(pipe, batch.some(rows), some, rows, stronger**redraws, on_step)
                for j, k in enumerate(rows):
                    made.pictures[k] = new.pictures[j]
                    made.rows[k] = replace(new.rows[k], detections=made.rows[k].detections)
            waiting = [k for k in waiting if made.rows[k].outcome == "drawn"]


def _lacks(policy: Policy, applied: Sequence[Line], row: int) -> str:
    """What the policy erases but no eraser of the row does; "" if nothing."""
    erased = {concept for line in applied for concept in line.rows[row]}
    missing = [concept.name for concept in policy.concepts if concept not in erased]
    return f"no eraser acted on {missing[0]!r}" if missing else ""


def _detectors(policy: Policy) -> list[tuple[str, Detector]]:
    """The detectors of a policy's gate, by concept."""
    if policy.gate is None:
        return []
    spec = plain(policy.gate.detector)
    if judges_anything_unsafe(spec):
        return [("anything unsafe", detector(spec))]
    return [(concept.name, detector(spec, concept.name)) for concept in policy.concepts]


def _finds(judge: Detector, picture: Tensor) -> bool:
    """Whether any judge finds the concept in a picture [3, H, W]."""
    return bool(judge(picture[None].clamp(0, 1)).any())


def _reporting(on_step: Callable[[int], None]) -> Callable[..., dict[str, Any]]:
    def report(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1)
        return {}

    return report
