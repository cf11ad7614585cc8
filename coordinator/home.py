"""What the coordinator keeps in ``TANDEM_HOME``."""

from __future__ import annotations

from pathlib import Path

from node.home import holds, home, new_job_folder

__all__ = ["holds", "home", "new_job_folder", "registry", "token_cache", "working"]


def token_cache() -> Path:
    """Tokenised data sets, by content."""
    return home() / "cache" / "tokens"


def registry() -> Path:
    """One small file for each run."""
    return home() / "runs"


def working() -> Path:
    """One lock for each run that a process is at work on."""
    return home() / "working"
