"""`Delta`, the result of an editor: applying, removing, arithmetic and files."""

from .applied import check_written, forget, handles, unedited
from .delta import Delta, active
from .factors import Change, Factors, dense
from .state import present

__all__ = ["Change", "Delta", "Factors", "active", "check_written", "dense", "forget", "handles", "present", "unedited"]
