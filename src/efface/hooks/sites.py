"""Finds Efface's state of a pipeline's denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._text import SITES
from .._weights import denoiser_of
from ..core import Handle
from ..families import family
from .copies import wake
from .denoiser import Site
from .watch import Record

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def site(pipe: DiffusionPipeline) -> Site:
    """The site of a pipeline's denoiser. Raises TypeError if the family is unknown."""
    facts = family(pipe)
    wake(pipe)
    denoiser = denoiser_of(pipe)
    if denoiser not in SITES:
        SITES[denoiser] = Site(denoiser, facts)
    found: Site = SITES[denoiser]
    return found


def handles(pipe: DiffusionPipeline) -> list[Handle]:
    """The handles of the applied methods, in order."""
    return [handle for handle, _ in records(pipe)]


def records(pipe: DiffusionPipeline) -> list[tuple[Handle, Record]]:
    """The handles of the applied methods, in order, with the records of the latest pipeline call."""
    facts = family(pipe)
    wake(pipe)
    present = getattr(pipe, facts.denoiser)
    found = SITES.get(getattr(present, "_orig_mod", present))
    return [(each.handle, each.record) for each in found.applied if each.handle is not None] if found else []


@contextmanager
def rows_given(pipe: DiffusionPipeline, conditional: Sequence[bool]) -> Iterator[None]:
    """See `efface.conditional_rows`. Has no effect without methods."""
    family(pipe)
    wake(pipe)
    found = SITES.get(denoiser_of(pipe))
    if found is None:
        yield
        return
    with found.rows_given(conditional):
        yield
