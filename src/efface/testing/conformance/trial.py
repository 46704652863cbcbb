"""A method on trial, and how a broken promise is told."""

from __future__ import annotations

import dataclasses
import unittest
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ...fields import field_names
from .. import drawing
from ..drawing import PROMPT, change, differences, drawn, latents, snapshot

EFFECT = 1e-3
"""A method changes a picture by more than this share of its size; less means that a hook is dead."""

ROUNDING = 1e-5
"""Further rows in a batch change other rows by less than this share of their size."""


class ConformanceError(AssertionError):
    """A method breaks a promise. The message says which, on which family, and what to look at."""


class DoesNotApply(unittest.SkipTest):
    """A promise is not about this method on this family; pytest and unittest report the test as skipped."""


def changed(method: Any, **fields: Any) -> Any:
    """The same method with other values in some fields."""
    return type(method)(**{name: getattr(method, name) for name in field_names(method)} | fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A method on a tiny pipeline.

    Args:
        method: what is tried, with concepts whose words the tiny tokenizers know.
        family: a name of `efface.testing.FAMILIES`.
        pipe: the pipeline of that family, with nothing on.
        steps: of each call; None is the kit's default, 3.
    """

    method: Any
    family: str
    pipe: Any
    steps: int | None = None

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return options if self.steps is None else {"num_inference_steps": self.steps, **options}

    def latents(self, prompt: str | Sequence[str] = PROMPT, **options: Any) -> Tensor:
        """What this pipeline draws now."""
        return latents(self.pipe, prompt, **self._options(options))

    def drawn(self, *methods: Any, prompt: str | tuple[str, ...] = PROMPT, **options: Any) -> Tensor:
        """What another pipeline with the same weights draws with these methods on; without one, the base picture."""
        return drawn(self.family, *methods, prompt=prompt, **self._options(options))

    def having(self, **fields: Any) -> Self:
        """The same trial of the method with other values in some fields."""
        return dataclasses.replace(self, method=changed(self.method, **fields))

    def require(self, kept: bool, said: str) -> None:
        """ConformanceError unless the promise is kept."""
        if not kept:
            raise ConformanceError(f"{type(self.method).__name__} on {self.family}: {said}")

    def require_effect(self, picture: Tensor, than: Tensor, what: str = "The method", cure: str = "") -> None:
        found = change(picture, than)
        cure = cure or (
            "Check that it overrides `edit`, `guide` or `rewrite`, and that `edits_attention` or `guides` is True."
        )
        self.require(
            found > EFFECT,
            f"{what} changes the picture by {found:.1e} of its size, and a method that acts changes more than "
            f"{EFFECT:g}. {cure}",
        )

    def require_equal(self, picture: Tensor, other: Tensor, said: str) -> None:
        if not torch.equal(picture, other):
            self.require(False, f"{said} The pictures differ by {change(picture, other):.1e} of their size.")

    def require_unchanged(self, rows: Tensor, base: Tensor, said: str) -> None:
        """To the bit, or up to rounding if the method adds rows to the batch."""
        if not torch.equal(rows, base):
            far = change(rows, base)
            self.require(bool(self.method.guides) and far < ROUNDING, f"{said} They differ by {far:.1e} of their size.")

    def require_restored(self, before: drawing.State) -> None:
        found = differences(snapshot(self.pipe), before)
        self.require(
            not found,
            f"The pipeline is not as it was: {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}. Change nothing "
            "on the pipeline yourself: keep values from step to step in `memory`, and let `apply` place the hooks.",
        )
