"""Folders that are whole or not there, and never overwrite what we did not write."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node.errors import UserError
from node.exports.card import is_ours
from node.files import sync_folder


@contextmanager
def new_folder(target: Path, known: tuple[str, ...]) -> Iterator[Path]:
    """Give an empty folder beside ``target`` to fill; on success it is synced and takes the name in one step.

    Args:
        target: must not exist, be empty, or be a folder that this function's users wrote before.
        known: patterns of the files that such a folder holds.

    Raises:
        UserError: the target holds something else.
    """
    check_free(target, known)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    old = partial.with_name(partial.name + ".old")
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        partial.chmod(0o755)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        sync_folder(target.parent)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_free(target: Path, known: tuple[str, ...]) -> None:
    """Refuse a target folder that holds anything but what we wrote there before.

    Raises:
        UserError: it does, or it is a file.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; name a folder that does not exist yet")
    entries = list(target.iterdir())
    if not entries:
        return
    strange = [e for e in entries if e.is_dir() or not any(e.match(pattern) for pattern in known)]
    if strange:
        raise UserError(f"{target} holds {strange[0].name}; name a folder that is empty or does not exist yet")
    if not is_ours(target):
        raise UserError(f"{target} holds a model that was not written here; name another folder")
