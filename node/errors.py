"""Every error that a person can meet, as one small tree.

    TandemError                 exit code 1: something failed
    ├── UserError               exit code 2: a mistake that the person can mend; nothing was written
    │   └── RowError            a bad row of a data file, with its file and line
    ├── WorkerError             the worker process could not do what it was asked
    │   ├── WorkerLost          the process is gone or its connection closed
    │   └── OutOfMemory         the device's memory did not suffice
    ├── NodeError               another machine could not do what it was asked
    │   ├── NodeLost            it cannot be reached, or its connection broke
    │   └── NodeRefused         it does not take the job: busy, paused, another version
    ├── TooFewNodes             exit code 3: fewer machines than --min-nodes asks for
    └── Interrupted             exit code 130: stopped by Ctrl-C, resumable

Messages are one line: what is wrong, where, and how to mend it. Foreign exceptions (OSError, MLX, Hugging Face)
become one of these at the boundary where they arise.
"""

from __future__ import annotations

from pathlib import Path


class TandemError(Exception):
    """Something failed; the message says what, where, and what to do."""

    exit_code = 1


class UserError(TandemError):
    """A mistake in what was asked for: options, files, data. Found before anything expensive starts."""

    exit_code = 2


class RowError(UserError):
    """A row of a data file that cannot be used.

    Args:
        file: the data file.
        line: its line number, from 1.
        reason: what is wrong with it, and how it should look.
    """

    def __init__(self, file: Path | str, line: int, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}")
        self.file = Path(file)
        self.line = line
        self.reason = reason


class WorkerError(TandemError):
    """The worker process reported that it could not do what it was asked."""


class WorkerLost(WorkerError):
    """The worker process ended, or its connection closed, without being asked to."""


class OutOfMemory(WorkerError):
    """The device ran out of memory."""


class NodeError(TandemError):
    """Another machine could not do what it was asked; the message names it."""


class NodeLost(NodeError):
    """A machine cannot be reached, or its connection broke."""


class NodeRefused(NodeError):
    """A machine does not take the job.

    Args:
        kind: ``busy``, ``paused``, ``version``, ``files_only``, ``idle_only``, ``unpaired``.
        message: one line.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class TooFewNodes(TandemError):
    """Fewer machines take part than ``--min-nodes`` asks for."""

    exit_code = 3


class Interrupted(TandemError):
    """Stopped by Ctrl-C after saving; the message holds the command that goes on."""

    exit_code = 130


def error_of(exit_code: int | None, message: str) -> TandemError:
    """The error by which another process ended, told here once more.

    Args:
        exit_code: that it ended with, if that is known.
        message: what it said.
    """
    kinds: tuple[type[TandemError], ...] = (UserError, TooFewNodes, Interrupted)
    return next((kind for kind in kinds if kind.exit_code == exit_code), TandemError)(message)


_MEMORY_WORDS = (
    "out of memory",
    "outofmemory",
    "insufficient memory",
    "memoryerror",
    "bad_alloc",
    "unable to allocate",
    "attempting to allocate",
    "cannot allocate",
    "can't allocate",
    # MLX's tags. Not the bare word: a C library that finds its heap corrupted says it, too.
    "[malloc",
    "::malloc",
)


def mentions_memory(text: str) -> bool:
    """Whether this message of MLX, Python or the system says that memory ran out."""
    lowered = text.lower()
    return any(word in lowered for word in _MEMORY_WORDS)


def one_line(error: BaseException, longest: int = 300) -> str:
    """What an exception says, on one line and not too long; its type when it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."
