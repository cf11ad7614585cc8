"""Standard input, output and error of our programs: there even where they were closed, and named by their errors."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

OUTPUT = "standard output"
ERROR = "standard error"
_STREAMS = (("stdin", "standard input"), ("stdout", OUTPUT), ("stderr", ERROR))


class _Named(io.FileIO):
    """Where a stream writes to: the system's errors have no name of a file, as who opened it was not us."""

    def __init__(self, number: int, called: str) -> None:
        super().__init__(number, "w", closefd=False)
        self._called = called

    def write(self, data: Any, /) -> int:
        """See ``io.FileIO``."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = self._called
            raise


def prepare_streams() -> None:
    """Have three streams, and ``OSError.filename`` tell which of them cannot be written to.

    Python has None for those that were closed (``>&-``), and the next file that is opened gets the number: whatever a
    library or a child process then writes to its output would go into that file.
    """
    for number, (attribute, called) in enumerate(_STREAMS):
        stream = getattr(sys, attribute)
        if stream is None:
            handle = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(handle, handle == number)
            # Never closed, as Python's own streams are not.
            mode = "r" if number == 0 else "w"
            setattr(sys, attribute, os.fdopen(handle, mode, encoding="utf-8", closefd=False))
        elif number and stream is getattr(sys, f"__{attribute}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            raw = _Named(stream.fileno(), called)
            buffer = raw if stream.write_through else io.BufferedWriter(raw)
            named = io.TextIOWrapper(
                buffer,
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, attribute, named)


def give_up(called: str) -> None:
    """Try nothing more of what a stream still holds: Python does so at exit, and complains."""
    attribute = next(attribute for attribute, name in _STREAMS if name == called)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, getattr(sys, attribute).fileno())
    os.close(nowhere)
