"""Removing runs: from the index, and what they wrote."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from coordinator.home import holds
from coordinator.runfolder import RunFolder
from coordinator.running import index, presence
from coordinator.running.known import Known
from node.errors import TandemError, UserError


def written_files(run: Known) -> list[Path]:
    """What a run wrote to its folder and is there still; nothing that is anybody else's."""
    return RunFolder(run.place).files() if run.place is not None else []


def remove(run: Known, *, files: bool) -> None:
    """Forget a run.

    Args:
        run: as it was when it was looked at; somebody may have begun to work on it since.
        files: whether what it wrote goes, too.

    Raises:
        UserError: it is at work, or its files cannot be looked for, or are elsewhere by now.
        OSError: something cannot be removed.
    """
    with presence.nobody(run.run):
        pass  # before anything is deleted
    if files and run.unreadable:
        raise UserError(
            f"run {run.run}: {run.missing}; see that you may read it, or leave --files out to forget the run only"
        )
    if files and run.place is not None:
        folder = RunFolder(run.place)
        folder.lock()
        try:
            # Who begins from now on meets the lock of the folder.
            if folder.run_id() != run.run:
                raise UserError(f"the files of run {run.run} have left {run.place}; coordinator runs rm --files again")
            _delete(written_files(run))
        finally:
            folder.unlock()
        for left in (run.place, run.place.parent):
            if run.place != run.folder or left == run.place:
                with contextlib.suppress(OSError):  # other things are in it
                    left.rmdir()
    with contextlib.suppress(OSError, TandemError):
        holds().drop(run.run)
    forget(run.run)


def forget(run: str) -> None:
    """Remove a run from the index, also one whose entry cannot be read.

    Raises:
        UserError: it is at work.
        OSError: it cannot be removed.
    """
    with presence.nobody(run):
        index.forget(run)


def _delete(paths: list[Path]) -> None:
    """The mark of whose they are goes last: what a failure leaves can be removed again."""
    for path in sorted(paths, key=lambda path: path.name == "run.json"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
