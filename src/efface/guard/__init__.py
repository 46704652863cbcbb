"""Policies: what is erased for which tenant, with a proof for each picture.

    guard = efface.Guard({"kids": ["alcohol"], "press": efface.unguarded})
    result = guard(pipe, prompts, tenants=["kids", "press"])

What draws is imported on first use, so that policies can be handled without torch.
"""

from typing import TYPE_CHECKING

import lazy_loader as _lazy_loader

from .edit import Edit
from .file import parsed, read
from .policy import DELIVERED, Erasure, Gate, Policy, unguarded

if TYPE_CHECKING:
    from .deltas import Edited, NotRestored, Shelf
    from .guard import Guard
    from .partial import Partial
    from .record import Guarded, PolicyNotApplied, RowRecord

_LATE = {
    "deltas": ["Edited", "NotRestored", "Shelf"],
    "guard": ["Guard"],
    "partial": ["Partial"],
    "record": ["Guarded", "PolicyNotApplied", "RowRecord"],
}
__getattr__, _, _ = _lazy_loader.attach(__name__, submod_attrs=_LATE)

__all__ = [
    "DELIVERED",
    "Edit",
    "Edited",
    "Erasure",
    "Gate",
    "Guard",
    "Guarded",
    "NotRestored",
    "Partial",
    "Policy",
    "PolicyNotApplied",
    "RowRecord",
    "Shelf",
    "parsed",
    "read",
    "unguarded",
]
