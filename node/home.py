"""Where the program keeps what outlives a run: ``TANDEM_HOME``, by default the platform's data folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

from node.copies import RECORD_SUFFIX
from node.errors import TandemError
from node.holds import KEPT_SECONDS, Holds, job_name

LOG_SECONDS = 7 * 24 * 3600


def home() -> Path:
    """The data folder; nothing is created."""
    given = os.environ.get("TANDEM_HOME")
    if given:
        return Path(given).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlx-tandem"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "mlx-tandem"


def holds() -> Holds:
    """What is kept here of runs whose coordinator or worker went away."""
    return Holds(home() / "held")


def new_job_folder(name: str, owner: str = "") -> Path:
    """A folder for the copies and the log of workers that this process starts; nothing is created.

    What processes that were killed left behind is removed, logs after a week; the newest state among it is held.

    Args:
        name: of the job; of a run its id.
        owner: id of the home whose job it is; "" for our own.
    """
    tidy_jobs()
    return _jobs() / f"{job_name(name, owner)}-pid{os.getpid()}-{secrets.token_hex(2)}"


def tidy_jobs() -> None:
    """Hold the newest states that processes which were killed left behind, and remove the rest."""
    for folder in _jobs().glob("*-pid*"):
        if folder.is_symlink():
            continue  # nothing of ours: where it leads is not ours to tidy
        pid = folder.name.rpartition("-pid")[2].partition("-")[0]
        if pid.isdecimal() and not is_running(int(pid)):
            with contextlib.suppress(FileNotFoundError):  # somebody else tidies, too
                _tidy(folder)


def _tidy(folder: Path) -> None:
    age = time.time() - folder.stat().st_mtime
    if not _hold_copies(folder) and age < KEPT_SECONDS:
        return  # no room for them just now: they are tried again
    for pattern in ("*.safetensors", f"*{RECORD_SUFFIX}"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    logged = any(log.stat().st_size for log in folder.glob("*.log"))
    if not logged or age > LOG_SECONDS:
        shutil.rmtree(folder, ignore_errors=True)


def hold_leftovers(run: str) -> None:
    """Hold the newest state that any worker of a run of ours left behind here, whoever started it."""
    for folder in _jobs().glob("*-pid*"):
        if folder.name.rpartition("-pid")[0] == run:
            _hold_copies(folder)


def _hold_copies(folder: Path) -> bool:
    """Whether the copies in a job's folder are not needed any more: the newest is held, or there is none."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(TandemError):  # a job that is no run's
            run, _, owner = folder.name.rpartition("-pid")[0].partition(".")
            holds().take(run, folder, owner=owner)
        return True
    return False


def _jobs() -> Path:
    return home() / "jobs"


def is_running(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
