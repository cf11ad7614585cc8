"""Ending a run from another terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from coordinator.running import index, presence
from coordinator.running.presence import Presence
from node.errors import TandemError, UserError

SAVING_SECONDS = 600.0
STOP_SIGNAL = signal.SIGUSR1
"""Asks a run to save and end. Nothing else sends it: under ``nohup`` a run heeds no SIGHUP."""
LEAVING_SECONDS = 10.0


def ask_to_stop(run: str) -> Presence:
    """Have the process of a run do what it does at Ctrl-C; asking twice is like asking once.

    Raises:
        UserError: nobody is at work on it, or nobody whom we can tell.
    """
    return _send(run, STOP_SIGNAL)


def wait_until_saved(run: str) -> None:
    """Wait until the process of a run, asked to stop, has ended.

    Raises:
        TandemError: it has not in ten minutes.
    """
    if not presence.wait_for_end(run, SAVING_SECONDS):
        raise TandemError(
            f"run {run} has not ended in {SAVING_SECONDS / 60:.0f} min; coordinator stop --now {run} ends it at once,"
            " and what it wrote before stays whole"
        )


def stop_now(run: str) -> None:
    """Have the process of a run leave at once; what is on disk is whole. One that hangs is killed.

    Raises:
        UserError: see ``ask_to_stop``.
        TandemError: it cannot be killed.
    """
    # Of two different ones none is lost, and the second ends it, in whichever order they come.
    holder = _send(run, signal.SIGTERM, signal.SIGINT)
    ended = presence.wait_for_end(run, LEAVING_SECONDS)
    if not ended:
        with contextlib.suppress(UserError):  # it has just ended
            _send(run, signal.SIGKILL)
        ended = presence.wait_for_end(run, LEAVING_SECONDS)
    entry = index.read(run)
    if ended and entry is not None and entry.get("status") == "running":
        message = "left at once, as coordinator stop --now asked"
        index.record(run, status="interrupted", message=message, ended=time.time())
    if not ended:
        raise TandemError(
            f"process {holder.pid} of run {run} cannot be ended; it may wait for a disk that does not answer"
        )


def _send(run: str, *numbers: signal.Signals) -> Presence:
    with _process(run) as (holder, handle):
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):  # the first may have ended it
                if handle is None:
                    os.kill(holder.pid, number)
                else:
                    signal.pidfd_send_signal(handle, number)
        return holder


@contextlib.contextmanager
def _process(run: str) -> Iterator[tuple[Presence, int | None]]:
    """The process of a run, and a handle to it where the system has such: its number cannot become another's then."""
    holder = presence.find(run)
    if holder is None:
        raise UserError(f"run {run} is not at work; coordinator status shows what is")
    if not holder.here:
        raise UserError(f"run {run} is at work on {holder.host}; stop it there")
    if not holder.signals:
        raise UserError(f"run {run} belongs to a program of yours (process {holder.pid}); stop it there")
    handle = None
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(holder.pid)
    try:
        # Whoever has the number now holds the run's lock: the lock came first, and is held still.
        if presence.find(run) != holder:
            raise UserError(f"run {run} has just ended")
        yield holder, handle
    finally:
        if handle is not None:
            os.close(handle)
