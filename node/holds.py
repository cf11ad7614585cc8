"""What this machine keeps of runs whose coordinator or worker went away, so that somebody can go on from there.

    held/RUN/state.json                     which state it is; always of files that are here in full
    held/RUN/0000243-<digest>.weights…      its two files
    held/RUN.HOME/…                         likewise, of a run whose coordinator is of another ``TANDEM_HOME``

One state for each run of each home, the newest: who gives a run the name of another's neither finds nor changes what is
held of that. A home is named by its id, a hash of its key, which outlives restarts and pairing anew. They are kept for
a day, as many as the limits let: this is a net, no archive. Programs of one ``TANDEM_HOME`` share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from node.copies import StateCopy, newest_copy, read_record, write_record
from node.errors import UserError
from node.files import link_or_copy, make_private_folder, sync_folder
from node.identity import ID_CHARACTERS
from node.info import StoredFile

KEPT_SECONDS = 24 * 3600.0
MOST_HOLDS = 8
MOST_BYTES = 10 << 30
"""Of all holds together; the newest stays however large it is."""

_STATE = "state.json"
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_OWNER = re.compile(rf"(?:[0-9a-f]{{{ID_CHARACTERS}}})?")


class Holds:
    """The states that are held below a folder.

    Whose run it is says ``owner``: the id of the coordinator's home; "" for our own.

    Args:
        folder: for them; made when it is needed.
        kept_seconds, most_holds, most_bytes: how long and how much is kept.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kept_seconds: float = KEPT_SECONDS,
        most_holds: int = MOST_HOLDS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._folder = folder
        self._kept_seconds = kept_seconds
        self._most_holds = most_holds
        self._most_bytes = most_bytes

    def take(self, run: str, copies: Path, *, newer_than: int = 0, owner: str = "") -> StateCopy | None:
        """Hold the newest copy that a job's folder has, unless a newer one of this run is held.

        Args:
            run: its id.
            copies: where its worker wrote; nothing is removed there.
            newer_than: a step; the state of this or an earlier one is not worth it.
            owner: whose run it is.

        Returns:
            What is held of the run now.

        Raises:
            UserError: that is no id of a run.
            OSError: the disk is full or cannot be written; what was held before still is.
        """
        target, copy = self._place(run, owner), newest_copy(copies)
        if copy is None or copy.step <= newer_than:
            return self.find(run, owner)
        with self._locked():
            held = self.find(run, owner)
            if held is not None and held.step > copy.step:
                return held
            make_private_folder(target)
            kept = dataclasses.replace(
                copy, weights=_renamed(copy, copy.weights), optimizer=_renamed(copy, copy.optimizer)
            )
            try:
                for source, file in zip(copy.files, kept.files, strict=True):
                    link_or_copy(copies / source.name, target / file.name)
                sync_folder(target)
                write_record(target / _STATE, kept)
            finally:
                # Of the two states, the old and the new one, whichever is not described.
                self._sweep(target)
            self._expire(keep=target)
            return kept

    def find(self, run: str, owner: str = "") -> StateCopy | None:
        """What is held of a run, or None.

        Raises:
            UserError: that is no id of a run.
        """
        return _whole(self._place(run, owner))

    def path(self, run: str, name: str, owner: str = "") -> Path:
        """Where a file of a run's held state is.

        Raises:
            UserError: no such file is held.
        """
        copy = self.find(run, owner)
        if copy is None or name not in {file.name for file in copy.files}:
            raise UserError(f"nothing of that name is held of the run {run}")
        return self._place(run, owner) / name

    def drop(self, run: str, owner: str = "") -> None:
        """Hold nothing of this run any more.

        Raises:
            UserError: that is no id of a run.
        """
        folder = self._place(run, owner)
        if folder.exists():
            with self._locked():
                _remove(folder)

    def expire(self) -> None:
        """Remove what is too old or too much, oldest first."""
        if self._folder.exists():
            with self._locked():
                self._expire()

    def _expire(self, keep: Path | None = None) -> None:
        held: list[tuple[float, Path, int]] = []
        for folder in self._folder.iterdir():
            if not folder.is_dir():
                continue
            run, _, owner = folder.name.partition(".")
            copy = _whole(folder) if _RUN.fullmatch(run) and _OWNER.fullmatch(owner) else None
            if copy is None or time.time() - copy.written > self._kept_seconds:
                _remove(folder)
            else:
                held.append((copy.written if folder != keep else time.time(), folder, copy.size))
        count = total = 0
        for _, folder, size in sorted(held, reverse=True):
            if count and (count >= self._most_holds or total + size > self._most_bytes):
                _remove(folder)
                continue
            count, total = count + 1, total + size

    def _sweep(self, folder: Path) -> None:
        """Remove what the description in this folder does not name."""
        copy = read_record(folder / _STATE)
        named = {_STATE, *(file.name for file in copy.files)} if copy is not None else set()
        for path in folder.iterdir():
            if path.name not in named:
                path.unlink(missing_ok=True)

    def _place(self, run: str, owner: str) -> Path:
        if not _RUN.fullmatch(run):
            raise UserError(f"{run!r} is no id of a run")
        if not _OWNER.fullmatch(owner):
            raise UserError(f"{owner!r} is no id of a home")
        return self._folder / job_name(run, owner)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time, of all programs of this ``TANDEM_HOME``."""
        make_private_folder(self._folder)
        handle = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def job_name(run: str, owner: str) -> str:
    """How a run of the home of this id, "" for our own, is called where runs of several homes are together."""
    return f"{run}.{owner}" if owner else run


def _whole(folder: Path) -> StateCopy | None:
    """What is held in a folder, or None."""
    copy = read_record(folder / _STATE)
    return copy if copy is not None and copy.whole(folder) else None


def _renamed(copy: StateCopy, file: StoredFile) -> StoredFile:
    """A name that no other state's file has: what is described now must stay as it is until the next is described."""
    kind = "weights" if file is copy.weights else "optimizer"
    return dataclasses.replace(file, name=f"{copy.step:07d}-{file.sha256[:16]}.{kind}.safetensors")


def _remove(folder: Path) -> None:
    """Remove a held state; its description goes first, so that it never names what is not there."""
    (folder / _STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
