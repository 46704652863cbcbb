"""A module with deltas: its weights are exactly its own values plus the sum of the changes.

Each change computes the weights again. So deltas can be removed in any order, and without deltas the module is bitwise
the original.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._weights import Elsewhere, fused, fused_change, stored
from .factors import Change, dense, each
from .watch import Seal, Watch, differing


class Changes(Protocol):
    """An overlay's view of a delta: its changes by canonical parameter name, and their factor."""

    @property
    def weights(self) -> Mapping[str, Change]: ...
    @property
    def strength(self) -> float: ...


class Listed(Protocol):
    """An applied delta at its current strength, and its modules."""

    delta: Changes
    modules: list[Callable[[], Any]]


@dataclass(frozen=True)
class _Kept:
    """The facts on an edited tensor.

    Args:
        own: its value without deltas.
        fused: the LoRAs (PEFT) that are fused into that value.
        seal: a seal of its current content.
    """

    own: Tensor
    fused: tuple[str, ...]
    seal: Seal


class Overlay(Watch):
    """A module with deltas, and the hook that checks it.

    Args:
        module: a part of a pipeline.
        name: the name of that part, such as "unet".
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module: Callable[[], Any] = weakref.ref(module)
        self.name = name
        self.on: Sequence[Listed] = ()
        self.kept: dict[str, _Kept] = {}  # by path in the module
        self.loaded: set[str] = set()  # paths that `load_state_dict` wrote to since then
        OVERLAYS[module] = self

    def own(self) -> dict[str, Tensor]:
        """The edited tensors without deltas, by canonical name."""
        return {f"{self.name}.{path}": self._own(path) for path in self.kept}

    def _own(self, path: str) -> Tensor:
        """A tensor's own value, with the currently fused LoRAs."""
        kept = self.kept[path]
        changes, now = _fused_since(self.module(), path, kept.fused)
        if now == kept.fused:
            return kept.own
        value = kept.own.clone()
        for change in changes:
            value.add_(change.to(value))
        return value

    def write(self, names: Iterable[str]) -> None:
        """Writes own values plus the applied changes to these tensors. Without changes, writes exactly the own values.

        Raises:
            ValueError: a tensor cannot be written now. No tensor was written.
        """
        paths = [name.removeprefix(f"{self.name}.") for name in names if name.startswith(f"{self.name}.")]
        targets = {path: stored(self.module(), path) for path in paths}
        for path, target in targets.items():
            acting = [entry.delta for entry in self.on if f"{self.name}.{path}" in entry.delta.weights]
            if path not in self.loaded:  # a loaded value stays
                self._write(path, target, acting)
            if not acting:
                self.kept.pop(path, None)
                self.loaded.discard(path)

    def _write(self, path: str, target: Tensor, acting: Sequence[Changes]) -> None:
        names = fused(self.module(), path)[1]
        if path not in self.kept:
            self.kept[path] = _Kept(target.detach().clone(), names, Seal.of(target, names))
        value = own = self._own(path)
        for delta in acting:
            if delta.strength:
                change = dense(each(delta.weights[f"{self.name}.{path}"], lambda x: x.to(own.device)))
                precise = value.to(torch.promote_types(value.dtype, torch.float32))
                value = precise + delta.strength * change.to(precise.dtype)
        with torch.inference_mode(target.is_inference()), torch.no_grad():  # if the model was loaded in that mode
            target.copy_(value)
        self._seal(path, Seal.of(target, names))

    def _seal(self, path: str, seal: Seal) -> None:
        self.kept[path] = replace(self.kept[path], seal=seal)

    def check(self, *, keep_loaded: bool = False) -> None:
        """Raises unless the tensors hold their written content.

        Args:
            keep_loaded: accepts tensors that `load_state_dict` replaced, which then stay.

        Raises:
            RuntimeError: other code wrote to a tensor. The message names the tensor and the cure.
        """
        if self.loaded and not keep_loaded:
            raise RuntimeError(
                f"`load_state_dict` replaced {len(self.loaded)} of the weights that a delta edits, such as "
                f"{f'{self.name}.{min(self.loaded)}'!r}. Call `handle.remove()`, which keeps the loaded weights, and "
                "apply the delta again."
            )
        if strange := self.strange() - self.loaded:
            raise RuntimeError(
                f"Other code changed {len(strange)} of the weights that a delta edits, such as "
                f"{f'{self.name}.{min(strange)}'!r} (by unloading a fused LoRA, replacing a layer, quantising, or "
                "assigning to the weight). Undo that change, or call `efface.delta.forget(pipe)`, which keeps the "
                "current weights and forgets the deltas."
            )

    def strange(self) -> set[str]:
        """The paths whose tensors do not hold their written content, up to casts and LoRAs fused or unfused since
        then."""
        pairs: dict[str, tuple[Seal, Tensor]] = {}
        found: set[str] = set()
        for path, kept in self.kept.items():
            try:
                pairs[path] = kept.seal, stored(self.module(), path)
            except Elsewhere:
                continue  # not visible
            except ValueError:
                found.add(path)
        for path in differing(pairs):
            seal, tensor = pairs[path]
            changes, now = _fused_since(self.module(), path, seal.fused)
            if seal.cast(tensor):
                self._seal(path, Seal.of(tensor, seal.fused))
            elif seal.near(tensor, changes):
                self._seal(path, Seal.of(tensor, now))
            else:
                self._seal(path, seal.moved(tensor))
                found.add(path)
        return found

    def after_load(self, module: nn.Module, keys: Any) -> None:
        """Records the tensors that `load_state_dict` replaced."""
        self.loaded = self.strange()

    def release(self) -> None:
        """Forgets all deltas. The weights keep their current values."""
        OVERLAYS.pop(self.module(), None)
        self.take_off(self.module())

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """A copy of the module has the same deltas, and separate own values."""
        copy = memo.get(id(self.module()))  # a module is known before its hooks are copied
        if copy is None:
            return Watch()
        made = Overlay(copy, self.name)
        made.kept = {path: replace(kept, own=kept.own.clone()) for path, kept in self.kept.items()}
        made.loaded = set(self.loaded)
        made.on = deepcopy(self.on, memo)  # a delta that is on several modules stays one
        for entry in made.on:
            entry.modules.append(made.module)
        return made


OVERLAYS: weakref.WeakKeyDictionary[nn.Module, Overlay] = weakref.WeakKeyDictionary()


def _fused_since(module: nn.Module, path: str, then: tuple[str, ...]) -> tuple[list[Tensor], tuple[str, ...]]:
    """The change of a tensor by LoRAs fused or unfused since `then`, if known; and the currently fused LoRAs."""
    layer, now = fused(module, path)
    changes = [fused_change(layer, [name], path) for name in now if name not in then]
    undone = [fused_change(layer, [name], path) for name in then if name not in now]
    return [c for c in changes if c is not None] + [-c for c in undone if c is not None], now
