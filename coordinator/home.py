"""Where the program keeps what outlives a run: ``TANDEM_HOME``, by default the platform's data folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path


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


def job_folder(run: str) -> Path:
    """A worker's copies and log for one run."""
    return home() / "jobs" / run


def registry() -> Path:
    """One small file for each run."""
    return home() / "runs"
