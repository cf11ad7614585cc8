"""Which process is at work on a run. It holds a lock for as long as it lives: a number alone may be anybody's by now.

The file is locked before it gets its name, so that who sees it sees it locked and whole. A killed process leaves the
file and no lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coordinator.home import registry, working
from coordinator.running.index import lock_path
from node.errors import UserError
from node.files import make_private_folder
from node.running import is_held


@dataclass(frozen=True)
class Presence:
    """A process that is at work on a run.

    Attributes:
        run: its id.
        folder: of the run, absolute.
        model: as it was given.
        pid: of the process.
        host: the machine that it is on.
        since: when it began, in seconds since 1970.
        signals: whether it saves and ends when it is sent SIGINT; a thread of somebody's program does not.
        log: where it writes what it says, when it has no terminal; else "".
    """

    run: str
    folder: str
    model: str
    pid: int
    host: str
    since: float
    signals: bool
    log: str = ""

    @property
    def here(self) -> bool:
        """Whether its process number is one of this machine."""
        return self.host == platform.node()


@contextlib.contextmanager
def present(run: str, folder: Path, model: str, *, signals: bool, log: Path | None = None) -> Iterator[None]:
    """Be seen to work on a run.

    Raises:
        UserError: another process is at work on it.
        OSError: ``TANDEM_HOME`` cannot be written.
    """
    us = Presence(
        *(run, str(folder.resolve()), model, os.getpid(), platform.node(), time.time(), signals),
        log=str(log or ""),
    )
    path = lock_path(run)
    handle = _announce(path, us)
    try:
        yield
    finally:
        with contextlib.suppress(OSError), _changing():
            path.unlink(missing_ok=True)
        os.close(handle)


def find(run: str) -> Presence | None:
    """Who is at work on a run now, or None."""
    return _holder(lock_path(run))


def find_all() -> list[Presence]:
    """Everybody who is at work now, who began first before the others."""
    found = [holder for path in working().glob("[!.]*.lock") if (holder := _holder(path)) is not None]
    return sorted(found, key=lambda one: (one.since, one.run))


@contextlib.contextmanager
def nobody(run: str) -> Iterator[None]:
    """Keep everybody from beginning to work on a run; a moment only, as no other run begins meanwhile.

    Raises:
        UserError: somebody is at work on it.
        OSError: ``TANDEM_HOME`` cannot be written.
    """
    path = lock_path(run)
    make_private_folder(path.parent)
    with _changing():
        if is_held(path):  # whatever stands in it
            other = _holder(path)
            who = f" (process {other.pid})" if other is not None else ""
            raise UserError(f"run {run} is at work{who}; first coordinator stop {run}")
        path.unlink(missing_ok=True)
        yield


def wait_for_end(run: str, seconds: float) -> bool:
    """Wait until nobody is at work on a run any more; whether that is so.

    Args:
        run: its id.
        seconds: to wait at most.
    """
    try:
        handle = os.open(lock_path(run), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    gone = threading.Event()

    def wait() -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
        finally:
            os.close(handle)
            gone.set()

    # In a thread, so that Ctrl-C and the deadline end the waiting; it ends with the lock or with us.
    threading.Thread(target=wait, daemon=True).start()
    return gone.wait(seconds)


def _announce(path: Path, us: Presence) -> int:
    """Lock a new file and give it its name; the handle that holds the lock."""
    make_private_folder(path.parent)
    with _changing():
        other = _holder(path)
        if other is not None:
            raise UserError(
                f"run {us.run} is at work already (process {other.pid}); to see it: coordinator watch {us.run}"
            )
        _sweep(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".lock")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(handle, json.dumps(dataclasses.asdict(us)).encode())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            os.close(handle)
            raise
    return handle


def _sweep(ours: Path) -> None:
    """Remove what killed processes left: locks, and entries of our run that were half written."""
    for path in ours.parent.glob("*.lock"):
        if not is_held(path):
            path.unlink(missing_ok=True)
    for path in registry().glob(f".{ours.stem}.json.*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _changing() -> Iterator[None]:
    """Names are given and taken by one process at a time."""
    handle = os.open(working(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _holder(path: Path) -> Presence | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        if is_held(path):
            found = Presence(**json.loads(path.read_text()))
            return found if found.run == path.stem else None
    return None
