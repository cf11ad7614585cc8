"""Which environments programs run from: deploy/install.sh removes old versions that none uses any more.

What a process is called does not tell. A framework build of Python, as many Macs have, starts the framework's own
program: `ps` shows that one's path, and nothing of the environment. So each program holds a shared lock on a file that
every environment has; it is free as soon as the last of them has ended, however that was.

    python -m node.in_use FOLDER ...    prints those that no program holds
"""

from __future__ import annotations

import fcntl
import os
import sys
from functools import cache
from pathlib import Path

LOCKED = "pyvenv.cfg"


@cache
def hold() -> int | None:
    """Hold the environment of this program for as long as the process lives; None where that cannot be."""
    try:
        handle = os.open(Path(sys.prefix) / LOCKED, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # a Python without an environment, which no installer of ours has made
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # a disk without locks; then `ps` is what shows us
        os.close(handle)
        return None
    return handle


def is_free(environment: Path) -> bool:
    """Whether no program holds this environment; False where that cannot be found out."""
    try:
        # Some network file systems lock for one alone only what is open to be written.
        handle = os.open(environment / LOCKED, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # it was never finished
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


if __name__ == "__main__":
    sys.stdout.writelines(f"{folder}\n" for folder in sys.argv[1:] if is_free(Path(folder)))
