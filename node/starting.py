"""The first moments of a program, in which all that it needs is imported: Ctrl-C ends it then as it does later.

Nothing is imported here that takes time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130
"""As ``errors.Interrupted``, which is imported later."""
_STOPPED = b"\nstopped\n"


def leave(number: int, frame: FrameType | None) -> None:
    """Answer Ctrl-C where nothing is to be saved or taken back: what is being imported need not know of it."""
    del number, frame
    try:
        os.write(2, _STOPPED)
    finally:  # the terminal may be gone
        os._exit(INTERRUPTED)


def start(load: Callable[[], Callable[[], int]]) -> int:
    """Run a program, and return its exit code.

    Args:
        load: imports its main function.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return load()()  # a shell had it ignored, as it does in the background
    signal.signal(signal.SIGINT, leave)
    main = load()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:  # before or after the command itself, which answers to it
        os.write(2, _STOPPED)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, leave)  # Python takes its time to end


def node() -> int:
    """The ``node`` script."""

    def load() -> Callable[[], int]:
        from node.cli import main

        return main

    return start(load)
