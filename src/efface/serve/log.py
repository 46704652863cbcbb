"""The log: one JSON object per line on stderr, in ASCII, so that no text can forge a line."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from .. import checks


def told(event: str, **facts: Any) -> None:
    """Writes a line. Long texts are cut."""
    short = {name: checks.short(value, 500) if isinstance(value, str) else value for name, value in facts.items()}
    line = json.dumps({"time": round(time.time(), 3), "event": event, **short}, default=repr)
    print(line, file=sys.stderr, flush=True)
