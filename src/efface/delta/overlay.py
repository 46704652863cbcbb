"""A module with deltas on: its weights are its own values, exactly, plus the sum of the changes.

They are made anew on each change, so deltas come off in any order, and the last one leaves the module as it was, to the
bit.
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
    """What an overlay knows of a delta: its changes, by canonical parameter name, and how much of them is added."""

    @property
    def weights(self) -> Mapping[str, Change]: ...
    @property
    def strength(self) -> float: ...


class Listed(Protocol):
    """A delta that is on, at its present strength, and its modules."""

    delta: Changes
    modules: list[Callable[[], Any]]


@dataclass(frozen=True)
class _Kept:
    """What is known about an edited tensor.

    Args:
        own: its value without any delta.
        fused: the LoRAs (PEFT) that were fused into that value.
        seal: what the tensor holds now.
    """

    own: Tensor
    fused: tuple[str, ...]
    seal: Seal


class Overlay(Watch):
    """A module with deltas on, and the hook that checks it.

    Args:
        module: a part of a pipeline.
        name: of that part, such as "unet".
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module: Callable[[], Any] = weakref.ref(module)
        self.name = name
        self.on: Sequence[Listed] = ()
        self.kept: dict[str, _Kept] = {}  # by path inside the module
        self.loaded: set[str] = set()  # paths that `load_state_dict` has written to since
        OVERLAYS[module] = self

    def own(self) -> dict[str, Tensor]:
        """By canonical name, the edited tensors without any delta."""
        return {f"{self.name}.{path}": self._own(path) for path in self.kept}

    def _own(self, path: str) -> Tensor:
        """A tensor's own value, with the LoRAs that are fused into it now."""
        kept = self.kept[path]
        changes, now = _fused_since(self.module(), path, kept.fused)
        if now == kept.fused:
            return kept.own
        value = kept.own.clone()
        for change in changes:
            value.add_(change.to(value))
        return value

    def write(self, names: Iterable[str]) -> None:
        """Writes own values plus the changes that are on to these tensors; own values exactly where none acts.

        Raises:
            ValueError: one of them cannot be written now. None was.
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
        with torch.inference_mode(target.is_inference()), torch.no_grad():  # where the model was loaded in that mode
            target.copy_(value)
        self._seal(path, Seal.of(target, names))

    def _seal(self, path: str, seal: Seal) -> None:
        self.kept[path] = replace(self.kept[path], seal=seal)

    def check(self, *, keep_loaded: bool = False) -> None:
        """Raises unless the tensors hold what was written to them.

        Args:
            keep_loaded: what `load_state_dict` has replaced is to stay, so it is no error.

        Raises:
            RuntimeError: something else has written to a tensor. The message names it, with the cure.
        """
        if self.loaded and not keep_loaded:
            raise RuntimeError(
                f"`load_state_dict` has replaced {len(self.loaded)} of the weights that a delta edits, such as "
                f"{f'{self.name}.{min(self.loaded)}'!r}, so the delta is no longer in them. Call `handle.remove()`, "
                "which keeps the loaded weights, and apply the delta again."
            )
        if strange := self.strange() - self.loaded:
            raise RuntimeError(
                f"Something else has changed {len(strange)} of the weights that a delta edits, such as "
                f"{f'{self.name}.{min(strange)}'!r}: a LoRA that was unloaded while fused, a replaced layer, a "
                "quantisation, or an assignment to the weight. Undo that change, or call "
                "`efface.delta.forget(pipe)`, which keeps the weights as they are now and takes the deltas off the "
                "list."
            )

    def strange(self) -> set[str]:
        """The paths whose tensors do not hold what was written, up to casts and LoRAs fused or unfused since."""
        pairs: dict[str, tuple[Seal, Tensor]] = {}
        found: set[str] = set()
        for path, kept in self.kept.items():
            try:
                pairs[path] = kept.seal, stored(self.module(), path)
            except Elsewhere:
                continue  # it cannot be seen
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
        """Notes what `load_state_dict` has replaced."""
        self.loaded = self.strange()

    def release(self) -> None:
        """Takes all deltas off the list. The weights keep their present values."""
        OVERLAYS.pop(self.module(), None)
        self.take_off(self.module())

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """A copy of the module has the same deltas on, and own values that it does not share."""
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
    """What LoRAs that were fused or unfused since `then` have added to a tensor, where known; and those fused now."""
    layer, now = fused(module, path)
    changes = [fused_change(layer, [name], path) for name in now if name not in then]
    undone = [fused_change(layer, [name], path) for name in then if name not in now]
    return [c for c in changes if c is not None] + [-c for c in undone if c is not None], now
