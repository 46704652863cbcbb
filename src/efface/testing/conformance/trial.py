"""The trial of a method, and the error for a broken promise."""

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
"""A method changes a picture by more than this share of its size. Less means a dead hook."""

ROUNDING = 1e-5
"""Further rows in a batch change other rows by less than this share of their size."""


class ConformanceError(AssertionError):
    """A method breaks a promise. The message names the promise, the family and where to look."""


class DoesNotApply(unittest.SkipTest):
    """A promise does not apply to this method on this family. pytest and unittest report the test as skipped."""


def changed(method: Any, **fields: Any) -> Any:
    """The same method with other values in some fields."""
    return type(method)(**{name: getattr(method, name) for name in field_names(method)} | fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A method on a tiny pipeline.

    Args:
        method: the tested method, with concepts whose words the tiny tokenizers know.
        family: a name of `efface.testing.FAMILIES`.
        pipe: a pipeline of that family, without erasers.
        steps: steps of each call. None: the kit's default, 3.
    """

    method: Any
    family: str
    pipe: Any
    steps: int | None = None

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return options if self.steps is None else {"num_inference_steps": self.steps, **options}

    def latents(self, prompt: str | Sequence[str] = PROMPT, **options: Any) -> Tensor:
        """The latents that this pipeline draws now."""
        return latents(self.pipe, prompt, **self._options(options))

    def drawn(self, *methods: Any, prompt: str | tuple[str, ...] = PROMPT, **options: Any) -> Tensor:
        """The latents of another pipeline with the same weights and these methods; without methods, the base
        model's."""
        return drawn(self.family, *methods, prompt=prompt, **self._options(options))

    def having(self, **fields: Any) -> Self:
        """The same trial of the method with other values in some fields."""
        return dataclasses.replace(self, method=changed(self.method, **fields))

    def require(self, kept: bool, said: str) -> None:
        """Raises ConformanceError unless the promise is kept."""
        if not kept:
            raise ConformanceError(f"{type(self.method).__name__} on {self.family}: {said}")

    def require_effect(self, picture: Tensor, than: Tensor, what: str = "The method", cure: str = "") -> None:
        found = change(picture, than)
        cure = cure or (
            "Check that it overrides `edit`, `guide` or `rewrite`, and that `edits_attention` or `guides` is True."
        )
        self.require(
            found > EFFECT,
            f"{what} changes the picture by {found:.1e} of its size, less than the {EFFECT:g} of a working method. "
            f"{cure}",
        )

    def require_equal(self, picture: Tensor, other: Tensor, said: str) -> None:
        if not torch.equal(picture, other):
            self.require(False, f"{said} The pictures differ by {change(picture, other):.1e} of their size.")

    def require_unchanged(self, rows: Tensor, base: Tensor, said: str) -> None:
        """Requires bitwise equality, or equality up to rounding if the method adds rows to the batch."""
        if not torch.equal(rows, base):
            far = change(rows, base)
            self.require(bool(self.method.guides) and far < ROUNDING, f"{said} They differ by {far:.1e} of their size.")

    def require_restored(self, before: drawing.State) -> None:
        found = differences(snapshot(self.pipe), before)
        self.require(
            not found,
            f"The pipeline changed in {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}. Store values across "
            "steps in `memory`, and let `apply` place the hooks.",
        )
