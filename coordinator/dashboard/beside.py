"""The dashboard beside a training: a process of its own, so that a page that is looked at costs the run nothing."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.dashboard.address import Place

LEAVING_SECONDS = 5.0


@contextlib.contextmanager
def beside(place: Place, folders: Sequence[Path]) -> Iterator[None]:
    """Serve runs while the context lasts.

    Args:
        place: where; its socket is handed over.
        folders: of the runs; they need not be there yet.
    """
    handle = place.socket.fileno()
    command = [sys.executable, "-P", "-m", "coordinator.dashboard", str(handle), place.host]
    server = subprocess.Popen(
        [*command, *(str(folder.resolve()) for folder in folders)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=(handle,),
        start_new_session=True,  # Ctrl-C is for the training, which ends this
    )
    place.socket.close()
    assert server.stdin is not None
    try:
        with contextlib.suppress(OSError):  # it is gone, and has said on stderr why
            server.stdin.write(place.token.encode() + b"\n")  # arguments can be seen by others
            server.stdin.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            server.stdin.close()
        try:
            server.wait(LEAVING_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
