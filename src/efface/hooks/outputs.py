"""The modules of the denoiser whose outputs methods change, such as the mid block of a UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family
from . import watch
from .forward import Hooks
from .step import Step


def found(denoiser: nn.Module, name: str) -> nn.Module | None:
    """The module at a dotted path, inside `torch.compile` as well; None if there is none."""
    module: Any = denoiser
    for part in name.split("."):
        module = getattr(module, part, None)
    return module if isinstance(module, nn.Module) else None


class Outputs:
    """Hooks on modules by name. A module that other code replaced between two calls is hooked in its turn.

    Args:
        facts: the family.
        running: returns the denoiser call in which a module runs.
    """

    def __init__(self, facts: Family, running: Callable[[str], Step]) -> None:
        self._facts, self._running = facts, running
        self._hooks = Hooks()

    def fit(self, denoiser: nn.Module | None, names: Sequence[str]) -> None:
        """Hooks the modules of these names, as the outermost hooks, and no others. Missing modules are left out."""
        modules = {name: found(denoiser, name) for name in names} if denoiser is not None else {}
        self._hooks.fit({m: partial(self._changed, name) for name, m in modules.items() if m is not None})

    def _changed(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the `forward` of a module: its output, with the picture's part changed on conditional rows."""
        out, step = forward(*args, **kwargs), self._running(name)
        batch = step.batch
        if step.seen is not None or not batch.conditional:
            return out
        acting = [(applied, weight) for applied, weight, exempt in step.plan if not exempt]
        acting = [(applied, weight) for applied, weight in acting if name in applied.method.steers]
        if not acting:
            return out
        at = None if isinstance(out, Tensor) else self._facts.picture_output
        hidden: Tensor = out if at is None else out[at]
        if len(hidden) != batch.rows:
            raise RuntimeError(watch.other_rows(name, len(hidden), batch.rows))
        changed = hidden[batch.first : batch.last]
        for applied, weight in acting:
            rows = applied.row_concepts(batch.conditional)
            rows = [*applied.method.steered_concepts(rows, applied.memory)]
            edited = applied.method.steer(changed, name, rows, applied.memory)
            changed = torch.lerp(changed, edited, weight.to(edited)) if isinstance(weight, Tensor) else edited
        hidden = batch.replaced(hidden, changed)
        step.steered.add(name)
        return hidden if at is None else (*out[:at], hidden, *out[at + 1 :])
