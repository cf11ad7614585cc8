"""Reading a file of JSON lines as it grows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Tail:
    """What is new in a file of JSON lines.

    A line that is still being written waits until it is whole. A file that is replaced or cut is read from its
    beginning; one that is moved away, or not there yet, gives nothing.

    Args:
        path: the file; it need not be there.

    Attributes:
        broken: lines that were no JSON object and were passed over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._position = 0
        self.broken = 0

    def read(self) -> list[dict[str, Any]]:
        """The objects of the lines that were completed since the last call, in order."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if (facts.st_dev, facts.st_ino) != self._file or facts.st_size < self._position:
                    self._file, self._position = (facts.st_dev, facts.st_ino), 0
                if facts.st_size == self._position:
                    return []
                file.seek(self._position)
                data = file.read()
        except OSError:
            self._file = None
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        return [entry for line in whole.split(b"\n") if line.strip() and (entry := self._entry(line)) is not None]

    def _entry(self, line: bytes) -> dict[str, Any] | None:
        try:
            entry = json.loads(line.decode("utf-8", "replace"))
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            return entry
        self.broken += 1
        return None
