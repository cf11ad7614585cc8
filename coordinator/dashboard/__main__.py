"""The server beside a training: a process of its own, which ends when the training lets go of its standard input."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from coordinator.dashboard.serve import serve


def main(handle: str, host: str, *folders: str) -> None:
    """Serve on an open socket until standard input ends.

    Args:
        handle: number of the listening socket.
        host: that was asked for.
        folders: of the runs.
    """
    os.nice(10)  # training comes first
    token = sys.stdin.buffer.readline().decode().strip()
    serve([Path(folder) for folder in folders], socket.socket(fileno=int(handle)), host, token, until=sys.stdin.buffer)


if __name__ == "__main__":
    main(*sys.argv[1:])
