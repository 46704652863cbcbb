"""The log: one JSON object per line on stderr, in ASCII, so that no text can forge a line."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from .. import checks


def told(event: str, **facts: Any) -> None:
    """Writes a line. Long texts are cut. A log that cannot be written, as on a full disk, stops nothing."""
    short = {name: checks.short(value, 500) if isinstance(value, str) else value for name, value in facts.items()}
    line = json.dumps({"time": round(time.time(), 3), "event": event, **short}, default=repr)
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def named(error: BaseException) -> str:
    """The kind of an error and the line that raised it. Its text is left out, because it may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
