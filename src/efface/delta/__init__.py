"""What editors learn: `Delta`, on and off a pipeline, in arithmetic and in files."""

from .applied import check_written, forget, handles, unedited
from .delta import Delta, active
from .factors import Change, Factors, dense
from .state import present

__all__ = ["Change", "Delta", "Factors", "active", "check_written", "dense", "forget", "handles", "present", "unedited"]
