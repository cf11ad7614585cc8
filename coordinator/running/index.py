"""The index of runs: one small file for each, under ``TANDEM_HOME``, which the run itself writes.

Each is replaced as a whole, so that one that is damaged takes no other with it.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.home import registry, working
from node.errors import UserError
from node.files import make_private_folder, write_text_atomically

MOST_ENTRY_BYTES = 1 << 20
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Index:
    """All runs that are known.

    Attributes:
        entries: by their ids.
        broken: files that hold no entry.
    """

    entries: tuple[dict[str, Any], ...]
    broken: tuple[Path, ...]


def new_id() -> str:
    """An id that sorts by time and does not collide."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def record(run: str, **facts: Any) -> None:
    """Add facts to a run's entry: folder, model, data, status, figures.

    Raises:
        OSError: the index cannot be written.
        UserError: that is no id.
    """
    known = read(run) or {"run": run, "began": time.time()}
    path = entry_path(run)
    make_private_folder(path.parent)
    write_text_atomically(path, json.dumps({**known, **facts}, indent=1, default=str) + "\n")


def read(run: str) -> dict[str, Any] | None:
    """A run's entry, or None when there is none."""
    return _entry(entry_path(run))


def read_all() -> Index:
    """Every run."""
    entries, broken = [], []
    for path in sorted(registry().glob("[!.]*.json")):  # the others are half written
        entry = _entry(path)
        if entry is not None:
            entries.append(entry)
        elif path.exists():  # another command may be removing it
            broken.append(path)
    return Index(tuple(entries), tuple(broken))


def forget(run: str) -> None:
    """Remove the entry and log of a run that nobody is at work on (``presence.nobody``); its folder stays.

    Raises:
        OSError: they cannot be removed.
    """
    for path in (entry_path(run), log_path(run)):
        path.unlink(missing_ok=True)


def entry_path(run: str) -> Path:
    """Where a run's entry is."""
    return registry() / _name(run, ".json")


def log_path(run: str) -> Path:
    """Where a run writes that has no terminal."""
    return registry() / _name(run, ".log")


def lock_path(run: str) -> Path:
    """What the process holds that is at work on a run."""
    return working() / _name(run, ".lock")


def _name(run: str, suffix: str) -> str:
    """A file's name; a run's id may come out of a folder that others made.

    Raises:
        UserError: that is no id.
    """
    if not _ID.fullmatch(run):
        raise UserError(f"{run[:60]!r} is no id of a run; coordinator runs lists them")
    return f"{run}{suffix}"


def _entry(path: Path) -> dict[str, Any] | None:
    """What a file says of the run that it is named for; None where that is no entry."""
    try:
        if path.stat().st_size > MOST_ENTRY_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("run") != path.stem:
        return None
    return content if isinstance(content.get("folder"), str) and content["folder"] else None
