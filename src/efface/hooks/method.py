"""The base class of run-time methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core import Handle
from .contract import Contract
from .sites import site

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Method(Contract):
    """A run-time method: `apply` puts it on the list of the pipeline's denoiser."""

    def apply(self, pipe: DiffusionPipeline) -> Handle:
        """Takes effect at once; returns the handle that takes it off again (also a context manager)."""
        here = site(pipe)
        try:
            return here.add(pipe, self)
        except BaseException:
            here.forget_if_empty()
            raise
