"""The deltas of policies: read from the operator's folder by their SHA-256, and on the weights during one call."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import api, checks, files
from .._weights import denoiser_of
from ..delta import Delta, active, check_written
from ..delta import file as delta_file
from ..delta.factors import each as on_each
from ..families import family
from .edit import Edit

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

KEPT = 8
"""Deltas that stay in memory."""
_LOST: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class NotRestored(Exception):
    """The weights of a model could not be restored after a call with deltas, so it draws nothing any more."""


@dataclass(frozen=True)
class Edited:
    """A delta of a policy that was on the weights while a row was drawn.

    Args:
        file: the name of its file.
        sha256: the SHA-256 of the file.
        hash: the hash of its changes, as `Delta.hash`.
        concepts: the names of the concepts that the policy says it erases.
        strength: its strength.
    """

    file: str
    sha256: str
    hash: str
    concepts: tuple[str, ...]
    strength: float

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"concepts": [*self.concepts]}


class Shelf:
    """The deltas in a folder. Threads may share it.

    Args:
        folder: the folder, which only the operator names. None: no policy may have deltas.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else checks.path("deltas", folder)
        self._kept: OrderedDict[tuple[str, float | None], Delta] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, edit: Edit) -> Delta:
        """The delta of an edit, from memory or from its file.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: there is no folder, the file has another SHA-256 or is no delta of weights, or the delta does
                not name the concepts.
        """
        key = edit.sha256, edit.strength
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._read(edit)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            found = self._kept[key]
        names = [concept.name for concept in found.concepts]
        if missing := [concept.name for concept in edit.concepts if concept.name not in names]:
            raise ValueError(
                f"Expected a delta of {missing[0]!r} in {edit.file}, got one of {', '.join(names) or 'no concepts'}. "
                "Correct `concepts` in the policy."
            )
        return found

    def _read(self, edit: Edit) -> Delta:
        if self._folder is None:
            cure = "Name their folder by --deltas, or as `deltas` in Python."
            raise ValueError(checks.refusal("a folder of deltas for this policy", None, cure))
        path = files.inside(self._folder, edit.file)
        if not files.there(path):
            raise FileNotFoundError(f"There is no delta {path}, which a policy names. Restore the file.")
        _check_hash(path, edit.sha256)
        read = delta_file.load(path, {delta_file.WEIGHTS: Delta})
        own = {name: on_each(change, lambda x: x.clone()) for name, change in read.weights.items()}
        _check_hash(path, edit.sha256)  # tensors were views of the file until now
        return replace(read, weights=own, strength=read.strength if edit.strength is None else edit.strength)


def _check_hash(path: Path, sha256: str) -> None:
    files.check_ordinary(path, files.TENSORS)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"Expected the SHA-256 {sha256[:16]}... of the policy in {path}, got {found[:16]}... Restore the file, or "
            "store a policy that names this one."
        )


@contextlib.contextmanager
def edited(pipe: DiffusionPipeline, edits: Sequence[Edit], shelf: Shelf) -> Iterator[tuple[Delta, ...]]:
    """Puts deltas on the weights of a pipeline, in order, and restores the weights to the bit when the block ends.

    Raises:
        ValueError: a delta is not the one that its policy names, or does not fit the model.
        NotRestored: the weights cannot be restored, in this call or in an earlier one.
    """
    denoiser = denoiser_of(pipe)
    if denoiser in _LOST:
        raise NotRestored("The weights of this model were not restored after an earlier call. Load the model again.")
    deltas = tuple(shelf.get(each) for each in edits)
    for each, delta in zip(edits, deltas, strict=True):
        _check_parts(pipe, each, delta)
    before = active(pipe)
    try:
        with api.stack(pipe, *deltas):
            yield deltas
    finally:
        if active(pipe) != before:
            _LOST.add(denoiser)
            raise NotRestored(
                "The weights of this model could not be restored after a call with deltas. Load the model again."
            )


def _check_parts(pipe: DiffusionPipeline, edit: Edit, delta: Delta) -> None:
    """Raises ValueError unless the delta changes the denoiser only, which is what a guard locks."""
    own = family(pipe).denoiser
    if other := [name for name in delta.weights if name.partition(".")[0] != own]:
        raise ValueError(
            f"Expected changes of {own!r} in {edit.file}, got one of {other[0]!r}. Merge this delta into the model, or "
            "apply it for all tenants."
        )


def present(pipe: DiffusionPipeline, edits: Sequence[Edit], deltas: Sequence[Delta]) -> tuple[tuple[Edited, ...], str]:
    """Those deltas of a policy that the weights hold now, and why these are not all; "" if they are.

    Raises:
        RuntimeError: other code wrote to the edited weights.
    """
    check_written(pipe)
    on = {id(each) for each in active(pipe)}
    found = tuple(
        Edited(each.file, each.sha256, delta.hash, tuple(c.name for c in each.concepts), delta.strength)
        for each, delta in zip(edits, deltas, strict=True)
        if id(delta) in on and delta.strength
    )
    missing = [each.file for each in edits if each.sha256 not in {other.sha256 for other in found}]
    return found, f"the delta {missing[0]} was not on the weights" if missing else ""
