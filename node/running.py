"""Which nodes serve from a ``TANDEM_HOME``. Imports little: commands ask it before anything else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunningNode:
    """A ``node serve`` of this ``TANDEM_HOME``.

    Attributes:
        name, id: of the node.
        port: of its service.
        pid: of its process.
        host: where programs of this machine reach it.
    """

    name: str
    id: str
    port: int
    pid: int
    host: str = "127.0.0.1"

    @property
    def address(self) -> str:
        """Where programs of this machine reach it."""
        return f"{self.host}:{self.port}"


def running_nodes(home: Path) -> list[RunningNode]:
    """Nodes that serve from this ``TANDEM_HOME`` now."""
    found = []
    for path in sorted((home / "nodes").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            node = RunningNode(**json.loads(path.read_text()))
            if is_held(path.with_suffix(".lock")):
                found.append(node)
    return found


def is_held(lock: Path) -> bool:
    """Whether a process lives that holds this lock, if it can be looked at: a pid alone may be anybody's by now."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
