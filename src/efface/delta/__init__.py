"""`Delta`, the result of an editor: applying, removing, arithmetic and files. `Directions`, vectors in its place."""

from . import file
from .applied import check_written, forget, handles, unedited
from .delta import Delta, active
from .factors import Change, Factors, dense
from .features import Directions
from .state import present

__all__ = [
    "KINDS",
    "Change",
    "Delta",
    "Directions",
    "Factors",
    "active",
    "check_written",
    "dense",
    "forget",
    "handles",
    "present",
    "unedited",
]

KINDS = {file.WEIGHTS: Delta, file.DIRECTIONS: Directions}
"""The classes that a file of `efface fit` may hold, by kind."""
