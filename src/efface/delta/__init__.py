"""`Delta`, the result of an editor: applying, removing, arithmetic and files. `Directions`, `Steering` and `Tokens`,
which hold vectors, edits of outputs and new words in its place."""

from collections.abc import Callable

from .applied import check_written, forget, handles, unedited
from .delta import Delta, active
from .factors import Change, Factors, dense
from .features import Directions
from .state import present
from .steering import Steering
from .tokens import Tokens

__all__ = [
    "KINDS",
    "Change",
    "Delta",
    "Directions",
    "Factors",
    "Steering",
    "Tokens",
    "active",
    "check_written",
    "dense",
    "forget",
    "handles",
    "present",
    "unedited",
]

KINDS: dict[str, Callable[..., Delta | Directions | Steering | Tokens]] = {
    each._kind: each._read for each in (Delta, Directions, Tokens, Steering)
}
"""The makers of what a file of `efface fit` may hold, by kind."""
