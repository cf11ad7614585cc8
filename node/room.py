"""How much a coordinator may put into a job's folder, counted when a file is announced: before its bytes are here."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from node.errors import UserError
from node.sizes import show_size
from node.spec import FileRef
from node.store import RESERVE_BYTES

MOST_JOB_FILES = 64
MOST_JOB_BYTES = 512 << 30
"""That a job's folder may take when a coordinator puts files there."""


@dataclass(eq=False)
class Arrival:
    """A file that is about to arrive, or does.

    Attributes:
        name: that it gets.
        size: bytes that were announced.
        partial: where they are until they are all here; None before the first.
        written: bytes that are here.
    """

    name: str
    size: int
    partial: Path | None = None
    written: int = 0


class Room:
    """The room of one job's folder; for all threads.

    Args:
        folder: of the job.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._arriving: set[Arrival] = set()

    @contextlib.contextmanager
    def reserved(self, file: FileRef) -> Iterator[Arrival]:
        """Have room for a file while it arrives; those that arrive at the same time are counted as if they were here.

        The folder has few files: looking at them takes no time that others would notice.

        Raises:
            UserError: it is more than there is room for; the message says how much there may be.
        """
        arrival = Arrival(file.name, file.size)
        with self._lock:
            self._check(file)
            self._arriving.add(arrival)
        try:
            yield arrival
        finally:
            with self._lock:
                self._arriving.discard(arrival)

    def _check(self, file: FileRef) -> None:
        partial = {arrival.partial for arrival in self._arriving}
        # What it replaces goes when it is here. What others replace stays until they are.
        held = [
            path for path in self._folder.iterdir() if path.is_file() and path.name != file.name and path not in partial
        ]
        names = {path.name for path in held} | {arrival.name for arrival in self._arriving if arrival.name != file.name}
        if len(names) >= MOST_JOB_FILES:
            raise UserError(f"{file.name}: the job's folder has {len(names)} files; {MOST_JOB_FILES} are the most")
        taken = sum(path.lstat().st_size for path in held) + sum(arrival.size for arrival in self._arriving)
        if taken + file.size > MOST_JOB_BYTES:
            raise UserError(
                f"{file.name} ({show_size(file.size)}): the job's folder holds {show_size(taken)};"
                f" {show_size(MOST_JOB_BYTES)} are the most"
            )
        free = shutil.disk_usage(self._folder).free
        free -= sum(max(0, arrival.size - arrival.written) for arrival in self._arriving)
        if file.size > free - RESERVE_BYTES:
            raise UserError(
                f"no room for {file.name} ({show_size(file.size)}): {show_size(max(0, free))} are free on that disk,"
                f" of which {show_size(RESERVE_BYTES)} are kept free"
            )
