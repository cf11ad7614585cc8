"""The registry of runs: one small file for each, under ``TANDEM_HOME``."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

from coordinator.home import registry
from node.files import make_private_folder, write_text_atomically


def new_id() -> str:
    """An id that sorts by time and does not collide."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def record(run: str, **facts: Any) -> None:
    """Add facts to a run's entry: folder, model, data, started, status, final losses.

    Raises:
        OSError: the registry cannot be written.
    """
    path = _entry(run)
    known = read(run) or {"run": run}
    make_private_folder(path.parent)
    write_text_atomically(path, json.dumps({**known, **facts}, indent=1, default=str) + "\n")


def read(run: str) -> dict[str, Any] | None:
    """A run's entry, or None when there is none."""
    try:
        content = json.loads(_entry(run).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _entry(run: str) -> Path:
    return registry() / f"{run}.json"
