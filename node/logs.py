"""Logs of worker processes: none of them fills the disk."""

from __future__ import annotations

from pathlib import Path

MOST_LOG_BYTES = 16 << 20
"""Of one log; then all but its end is dropped."""
KEPT_LOG_BYTES = 1 << 20


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
