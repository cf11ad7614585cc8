"""Logs of workers, and of nodes that a service starts: none of them fills the disk."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

MOST_LOG_BYTES = 16 << 20
"""Of one log; then all but its end is dropped."""
KEPT_LOG_BYTES = 1 << 20
LOOK_SECONDS = 60.0
"""How often the log of a node is looked at."""


def bound_log(log: Path) -> bool:
    """Drop all but the end of a log that has grown too large, and say so in it; whether it had.

    Who has it open to append goes on behind what is left.
    """
    try:
        size = log.stat().st_size
        if size <= MOST_LOG_BYTES:
            return False
        with log.open("r+b") as file:
            file.seek(size - KEPT_LOG_BYTES)
            end = file.read(KEPT_LOG_BYTES)
            file.seek(0)
            file.truncate()
            file.write(b"(%d bytes of log were dropped here: %d are the most)\n" % (size - len(end), MOST_LOG_BYTES))
            file.write(end)
    except OSError:
        return False  # a log that cannot be shortened is no reason to stop the work
    return True


@contextlib.contextmanager
def logged_to(log: Path, look_seconds: float = LOOK_SECONDS) -> Iterator[None]:
    """Write to a file what this process and its children would write to stdout and stderr; it stays below a size.

    Args:
        log: the file; it is appended to, and made with its folder where it is missing.
        look_seconds: how often its size is looked at.

    Raises:
        OSError: it cannot be written.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(look_seconds):
            bound_log(log)

    watcher = threading.Thread(target=watch, name="log", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
