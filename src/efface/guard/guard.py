"""Draws the prompts of several tenants in one batch, each row under its tenant's policy."""

from __future__ import annotations

import inspect
import itertools
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import checks
from .._encodings import Encodings, held
from ..core import Concept, Concepts, Detector
from ..detectors._named import detector, judges_anything_unsafe
from ..families import family
from ..hooks.sites import handles
from ..pictures import to_pil
from ..registry import near
from . import file
from .deltas import Shelf, edited
from .drawing import Drawing, alike
from .explain import explained
from .forms import plain
from .partial import Partial
from .policy import DELIVERED, Erasure, Policy
from .record import Batch, Guarded, PolicyNotApplied, RowRecord, lock_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

STEPS = 25
SCALES = ("guidance_scale", "true_cfg_scale")
OWN = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", *SCALES)
"""Arguments of a pipeline call that the guard sets."""


class Guard:
    """Draws pictures under policies: which concepts are erased for which tenant, and how.

    Each call of the guard erases per row, compares the engine's record with the policy, and returns a picture only if
    the record proves that the policy acted in every denoiser call of its row. Threads may share a guard and pipelines:
    a lock per denoiser lets one call draw at a time.

    Args:
        policies: tenant to a `Policy`, to concepts that `method` erases, or to `efface.unguarded`.
        method: the method for tenants whose entry is a list of concepts.
        deltas: the folder of the deltas that policies name, or a `Shelf`. None: no policy may name deltas.
        fields: fields of that method, such as `strength`.

    Raises:
        FileNotFoundError: the file of a delta is missing.
        ValueError: a policy is empty, unknown or contradicts itself, its detector cannot judge its concepts, or the
            file of a delta has another SHA-256 or does not name its concepts.
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

    def __init__(
        self,
        policies: Mapping[str, Policy | Concepts],
        method: str = "eiup",
        *,
        deltas: str | Path | Shelf | None = None,
        **fields: Any,
    ) -> None:
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
        self._shelf = deltas if isinstance(deltas, Shelf) else Shelf(deltas)
        self._encodings: weakref.WeakKeyDictionary[Any, Encodings] = weakref.WeakKeyDictionary()
        for edit in itertools.chain(*(policy.deltas for policy in made.values())):
            self._shelf.get(edit)

    @classmethod
    def load(cls, path: str | Path, *, deltas: str | Path | None = None) -> Guard:
        """The guard of a YAML file with policies, see docs/guard.md.

        Args:
            path: the file.
            deltas: the folder of the deltas that its policies name.

        Raises:
            FileNotFoundError: the file, or that of a delta, does not exist.
            ValueError: as `Guard`, or the file is not such a file.
        """
        return cls(file.read(path), deltas=deltas)

    @classmethod
    def joined(cls, guards: Sequence[Guard]) -> Guard:
        """A guard of all tenants of several guards. It shares their detectors, and the deltas of the first one.

        A server keeps a guard for each policy, and joins those of a batch.

        Args:
            guards: the guards. A tenant of several has the policy of the last one.

        Raises:
            ValueError: there is no guard.

        Example:
            >>> import efface
            >>> kids, press = efface.Guard({"kids": ["alcohol"]}), efface.Guard({"press": efface.unguarded})
            >>> [*efface.Guard.joined([kids, press]).policies]
            ['kids', 'press']
        """
        if not guards:
            raise ValueError(checks.refusal("at least one guard", guards, "Give guards."))
        made = cls.__new__(cls)
        made._policies = {tenant: policy for each in guards for tenant, policy in each._policies.items()}
        made._detectors = {name: found for each in guards for name, found in each._detectors.items()}
        made._shelf, made._encodings = guards[0]._shelf, guards[0]._encodings
        return made

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
            ValueError: a tenant is unknown, the numbers differ, a policy does not allow the guidance scale, or the call
                has an argument that the guard sets.
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
        partial: Partial | None = None,
        **call: Any,
    ) -> Guarded:
        """As calling the guard, but a row that is not proven has no picture and says why, and the others are returned.

        Rows whose policies have other deltas are drawn in calls of the pipeline of their own.

        Args:
            pipe, prompts, tenants, seeds, guidance, call: as in a call of the guard.
            on_step: called with the number of each finished step. An exception of it ends the call.
            partial: shows pictures of rows that are not finished. Only rows that are proven so far are shown.

        Raises:
            ValueError: a policy does not allow partial pictures or the guidance scale, or a delta does not fit the
                pipeline.
            NotRestored: the weights could not be restored after a call with deltas.
        """
        batch = self._batch(pipe, prompts, tenants, seeds, guidance, call)
        policies = [self.policy(tenant) for tenant in batch.tenants]
        _check_guidance(pipe, policies, guidance)
        with lock_of(pipe):
            self._encodings[pipe] = held(pipe)  # the erasers of each call are new
            if handles(pipe):
                raise RuntimeError(
                    "Expected a pipeline without run-time erasers, got one with some. Remove them, and write them into "
                    "the policies."
                )
            if partial is not None:
                partial.check(pipe, policies)
            drawn: dict[int, tuple[Tensor, RowRecord]] = {}
            for some in alike(policies):
                mine, part = [policies[k] for k in some], batch if len(some) == len(policies) else batch.some(some)
                with edited(pipe, mine[0].deltas, self._shelf) as deltas:
                    made = Drawing(pipe, part, mine, deltas, on_step).draw(partial and partial.of(some))
                    made.judge(self._detectors)
                drawn |= dict(zip(some, zip(made.pictures, made.rows, strict=True), strict=True))
        pictures = torch.stack([drawn[k][0] for k in range(len(policies))])
        rows = tuple(drawn[k][1] for k in range(len(policies)))
        for picture, row in zip(pictures, rows, strict=True):
            if row.outcome not in DELIVERED:
                picture.zero_()  # the result holds the batch, too
        images = [p if row.outcome in DELIVERED else None for p, row in zip(to_pil(pictures), rows, strict=True)]
        return Guarded(tuple(images), rows, batch.seeds, replace(batch, pictures=pictures))

    def check(self, pipe: DiffusionPipeline) -> None:
        """Applies the deltas of each policy to the pipeline and removes them, without drawing.

        Raises:
            FileNotFoundError: the file of a delta is missing.
            ValueError: a delta is not the one that its policy names, or does not fit the pipeline.
            NotRestored: the weights could not be restored.
        """
        with lock_of(pipe):
            for policy in self._policies.values():
                with edited(pipe, policy.deltas, self._shelf):
                    pass

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
        return explained(self.policy(result.rows[row].tenant), result, row, self._shelf)

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


def _detectors(policy: Policy) -> list[tuple[str, Detector]]:
    """The detectors of a policy's gate, by concept."""
    if policy.gate is None:
        return []
    spec = plain(policy.gate.detector)
    if judges_anything_unsafe(spec):
        return [("anything unsafe", detector(spec))]
    return [(concept.name, detector(spec, concept.name)) for concept in policy.concepts]


def _check_guidance(pipe: DiffusionPipeline, policies: Sequence[Policy], guidance: float | None) -> None:
    """Raises ValueError for a scale, or the pipeline's default one, that a policy does not allow."""
    for policy in policies:
        if policy.guidance is not None:
            usual = inspect.signature(type(pipe).__call__).parameters
            (name,) = (each for each in family(pipe).guided(policy.guidance[0]) if each in SCALES)
            policy.check_guidance(usual[name].default if guidance is None else guidance)
