"""The end of a JSON-lines file that another process writes: what is new since the last look."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

_PIECE = 1 << 20


class Tail:
    """New objects of one of a run's files (``metrics.jsonl``, ``events.jsonl``), from its beginning on.

    Only whole lines count: one that is half written, or is taken back because the disk is full, is read when it is
    whole. A file that is not there yet has none. The file itself is kept open, so that it is followed where a new run
    moves it (``previous/ID/``), and nothing of that run is taken for this one's.

    A run that goes on after a stop writes ``metrics.jsonl`` anew, up to the step it goes on from. Then it is read from
    its beginning once more: steps may come a second time.

    Args:
        path: of the file.

    Attributes:
        broken_lines: whole lines that hold no object; a crash may leave one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken_lines = 0
        self._offset = 0
        self._file: int | None = None
        self._release: weakref.finalize[[int], Tail] | None = None

    def read(self) -> list[dict[str, Any]]:
        """The objects of all lines that were completed since the last call.

        Raises:
            OSError: the file is there and cannot be read.
        """
        if self._file is None and not self._open():
            return []
        entries = self._new_lines()
        if self._was_replaced():
            self.close()
            entries += self.read()
        return entries

    def close(self) -> None:
        """Keep the file open no more; the next ``read`` begins at the beginning."""
        if self._release is not None:
            self._release()
        self._file = self._release = None
        self._offset = 0

    def _open(self) -> bool:
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        self._release = weakref.finalize(self, os.close, self._file)
        return True

    def _new_lines(self) -> list[dict[str, Any]]:
        assert self._file is not None
        if os.fstat(self._file).st_size < self._offset:  # cut in place: what is there now is new
            self._offset = 0
        parts = []
        at = self._offset
        while part := os.pread(self._file, _PIECE, at):
            parts.append(part)
            at += len(part)
        whole, newline, _ = b"".join(parts).rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [entry for line in whole.split(b"\n") if line.strip() and (entry := self._entry(line)) is not None]

    def _entry(self, line: bytes) -> dict[str, Any] | None:
        try:
            entry = json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            return entry
        self.broken_lines += 1
        return None

    def _was_replaced(self) -> bool:
        """Whether the file at the path is another one, and ours no longer has a name: moved, it has one still."""
        assert self._file is not None
        ours = os.fstat(self._file)
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        return ours.st_nlink == 0 and (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)
