"""The result of a guarded call, and the lock of a denoiser."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._weights import denoiser_of
from .deltas import Edited
from .proof import Acted

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor, nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKING = threading.Lock()


class PolicyNotApplied(RuntimeError):
    """The record of a row does not prove that its policy acted, so its picture is withheld."""


def lock_of(pipe: DiffusionPipeline) -> threading.RLock:
    """The lock of a pipeline's denoiser, which pipelines with the same denoiser share."""
    denoiser = denoiser_of(pipe)
    with _LOCKING:
        return _LOCKS.setdefault(denoiser, threading.RLock())


@dataclass(frozen=True)
class RowRecord:
    """What happened to one row.

    Args:
        tenant: its tenant.
        policy: the hash of its policy.
        version: the version of its policy.
        outcome: "drawn"; "redrawn" with more strength; "logged", which is returned although a detector found a concept;
            "blocked" by a detector; or "not proven", if the record does not prove that the policy acted.
        acted: what each eraser did to the row.
        deltas: the deltas of its policy that were on the weights.
        detections: the concepts that the detector found, once per drawing.
        why: why the row is not proven, or "".
    """

    tenant: str
    policy: str
    version: int
    outcome: str = "drawn"
    acted: tuple[Acted, ...] = ()
    detections: tuple[tuple[str, ...], ...] = ()
    why: str = ""
    deltas: tuple[Edited, ...] = ()

    def as_json(self) -> dict[str, Any]:
        made = dict(vars(self)) | {"detections": [*map(list, self.detections)]}
        return made | {name: [each.as_json() for each in getattr(self, name)] for name in ("acted", "deltas")}


@dataclass(frozen=True, eq=False)
class Guarded:
    """The pictures of a guarded call with their records.

    Args:
        images: one per prompt; None for a row that was blocked or is not proven.
        rows: the record of each row.
        seeds: the seed of each row.
        again: the call, so that `Guard.explain` can draw it again.
    """

    images: tuple[Image | None, ...]
    rows: tuple[RowRecord, ...]
    seeds: tuple[int, ...]
    again: Batch = field(repr=False)


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of a guarded call."""

    pipe: weakref.ref[DiffusionPipeline]
    prompts: tuple[str, ...]
    tenants: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float | None
    call: Mapping[str, Any]
    pictures: Tensor | None = None

    def some(self, rows: Sequence[int]) -> Batch:
        """The batch with these rows only. Of the arguments of the call, lists of texts have one per row."""
        call, n = dict(self.call), len(self.prompts)
        for name, value in self.call.items():
            if isinstance(value, (list, tuple)) and len(value) == n and all(isinstance(each, str) for each in value):
                call[name] = [value[k] for k in rows]
        prompts, tenants = ([every[k] for k in rows] for every in (self.prompts, self.tenants))
        seeds = tuple(self.seeds[k] for k in rows)
        return Batch(self.pipe, tuple(prompts), tuple(tenants), seeds, self.guidance, call)
