"""Policies: what is erased for which tenant, with a proof for each picture.

guard = efface.Guard({"kids": ["alcohol"], "press": efface.unguarded})
result = guard(pipe, prompts, tenants=["kids", "press"])
"""

from .file import parsed, read
from .guard import Guard
from .policy import Erasure, Gate, Policy, unguarded
from .record import DELIVERED, Guarded, PolicyNotApplied, RowRecord

__all__ = [
    "DELIVERED",
    "Erasure",
    "Gate",
    "Guard",
    "Guarded",
    "Policy",
    "PolicyNotApplied",
    "RowRecord",
    "parsed",
    "read",
    "unguarded",
]
