"""How Efface imports Ray, which reads these variables then."""

from __future__ import annotations

import os
import sys
from typing import Any


def imported(local: bool, use: str, extra: str) -> Any:
    """The module `ray`.

    Args:
        local: whether this process starts a cluster, which then requires a token.
        use: what needs Ray, for the message.
        extra: the extra of Efface that installs it.

    Raises:
        ImportError: Ray is not installed.
    """
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # a task after a failed one may fail as well
        if local:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            # Ray then takes the loopback address for this machine's own, and its servers listen there only.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(f'{use} needs Ray. Install it with pip install "efface[{extra}]".') from error
    return ray
