"""Ctrl-C ends the command while it loads. Later it keeps finished results.

Imports may catch or wrap a `KeyboardInterrupt`, so it could surface as another error or disappear.
"""

import os
import signal
from types import FrameType

INTERRUPTED = 130
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


def _end(number: int, frame: FrameType | None) -> None:
    said = "Interrupted.\n"
    if os.isatty(2):
        said = f"{SHOW_CURSOR}\n{said}"
    os.write(2, said.encode())
    os._exit(INTERRUPTED)


def at_once() -> None:
    """Lets Ctrl-C end the process, unless it is ignored, as in a shell's background job."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def gently() -> None:
    """Lets Ctrl-C raise `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
