"""The modules of the denoiser whose outputs methods change, such as the mid block of a UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..families import Family
from . import watch
from .forward import Act, Forward
from .step import Step


class Stepping(Protocol):
    """The called denoiser, which knows the current denoiser call."""

    step: Step | None


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
        site: holds the current denoiser call.
    """

    def __init__(self, facts: Family, site: Stepping) -> None:
        self._facts, self._site = facts, site
        self.hooks: dict[str, Forward] = {}
        self._steered: set[str] = set()  # in this denoiser call

    def fit(self, denoiser: nn.Module | None, names: Sequence[str]) -> None:
        """Hooks the modules of these names, as the outermost hooks, and no others. Missing modules are left out."""
        modules = {} if denoiser is None else {name: found(denoiser, name) for name in names}
        for name, hook in tuple(self.hooks.items()):
            if hook.module() is not modules.get(name) or not hook.on_top():
                self.hooks.pop(name).take_off()
        for name, module in modules.items():
            if module is not None and name not in self.hooks:
                self.hooks[name] = Forward(module, self._act(name))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A denoiser call, which ends its step.

        Raises RuntimeError unless each method changed the outputs of all its modules, except as its plan says.
        """
        self._steered = set()
        try:
            yield
            plan = [] if self._site.step is None else self._site.step.plan
            due = {name for applied, _, exempt in plan if not exempt for name in applied.method.steers}
            if missed := sorted(due - self._steered):
                raise RuntimeError(watch.not_steered(missed, self._facts.denoiser))
        finally:
            self._site.step = None

    def _act(self, name: str) -> Act:
        def act(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._changed(name, forward(*args, **kwargs))

        return act

    def _changed(self, name: str, out: Any) -> Any:
        """The output of a module, with the picture's part changed on conditional rows."""
        if self._site.step is None:
            raise RuntimeError(watch.outside(name))
        step, batch = self._site.step, self._site.step.batch
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
        self._steered.add(name)
        return hidden if at is None else (*out[:at], hidden, *out[at + 1 :])
