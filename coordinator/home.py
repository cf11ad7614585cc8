"""Where the program keeps what outlives a run: ``TANDEM_HOME``, by default the platform's data folder."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from pathlib import Path

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


def token_cache() -> Path:
    """Tokenised data sets, by content."""
    return home() / "cache" / "tokens"


def new_job_folder(name: str) -> Path:
    """A folder for the copies and the log of workers that this process starts; nothing is created.

    What processes that were killed left behind is removed, logs after a week.
    """
    jobs = home() / "jobs"
    for folder in jobs.glob("*-pid*"):
        pid = folder.name.rpartition("-pid")[2].partition("-")[0]
        if pid.isdecimal() and not _is_running(int(pid)):
            for copy in folder.glob("*.safetensors"):
                copy.unlink(missing_ok=True)
            logged = any(log.stat().st_size for log in folder.glob("*.log"))
            if not logged or time.time() - folder.stat().st_mtime > LOG_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
    return jobs / f"{name}-pid{os.getpid()}-{secrets.token_hex(2)}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def registry() -> Path:
    """One small file for each run."""
    return home() / "runs"
