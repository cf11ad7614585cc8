"""What the programs do, as JSON lines in files of a bounded size: ``logs/PROGRAM.jsonl`` in ``TANDEM_HOME``.

A log is a help and no part of the work: where it cannot be written, because the disk is full or the folder is not
ours, nothing is said and nothing stops. Nothing is made before there is something to write.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import click

from node.errors import UserError
from node.files import make_private_folder
from node.redact import redact_arguments, redact_values

LEVELS = ("debug", "info", "warning", "error", "off")
LEVEL = "TANDEM_LOG"
"""The variable that chooses one; ``info`` unless it is set."""
MOST_BYTES = 4 << 20
"""Of one file; then it is put aside."""
KEPT_FILES = 3
"""Those that were put aside."""
QUIET = (click.ClickException, click.exceptions.Exit, click.Abort, EOFError, BrokenPipeError)
"""How a command ends that did not fail."""
RUN = "tandem.run"
"""The logger that takes what a run tells."""
_OURS = ("coordinator", "node", RUN)

# Who uses us as a library and sets up no log of his own sees warnings of a run in its view, and not once more.
logging.getLogger(RUN).addHandler(logging.NullHandler())
logging.getLogger(RUN).propagate = False


def folder() -> Path:
    """Where the logs are."""
    from node.home import home  # more than `--help` needs

    return home() / "logs"


class JsonLines(logging.Formatter):
    """A record as one JSON object, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging``."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            **getattr(record, "details", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(redact_values(entry), ensure_ascii=False, default=str)


class RotatingFile(logging.handlers.WatchedFileHandler):
    """A file that several processes append to; whichever finds it full puts it aside, and the others follow.

    Args:
        program: that it is named for; it and its folder are made with the first record.
        head: the first record of this process.
    """

    def __init__(self, program: str, head: str) -> None:
        super().__init__(os.devnull, encoding="utf-8", delay=True)
        self._program = program
        self._head = head
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging``."""
        try:
            path = folder() / f"{self._program}.jsonl"
            self.baseFilename = str(path)
            make_private_folder(path.parent)
            _put_aside(path)
            if self._head:
                head, self._head = self._head, ""
                first = {"name": RUN, "levelname": "INFO", "levelno": logging.INFO, "msg": head, "created": time.time()}
                super().emit(logging.makeLogRecord(first))
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """See ``logging``: a log that cannot be written is no reason to say anything."""

    def close(self) -> None:
        """See ``logging``; what could not be written is tried once more then, which may fail as before."""
        with contextlib.suppress(OSError):
            super().close()


def _put_aside(path: Path) -> None:
    """Give a file that is full another name, and those before it older ones."""
    if _size(path) < MOST_BYTES:
        return
    handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _size(path) >= MOST_BYTES:  # nobody else has done it meanwhile
            names = [path, *(path.with_name(f"{path.stem}.{number}.jsonl") for number in range(1, KEPT_FILES + 1))]
            for newer, older in reversed(list(pairwise(names))):
                with contextlib.suppress(FileNotFoundError):
                    newer.replace(older)
    finally:
        os.close(handle)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def logged(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """Write down what this process does meanwhile, and why it failed.

    Args:
        program: its name, and the file's.
        arguments: that it was called with.

    Raises:
        UserError: ``TANDEM_LOG`` is no level.
    """
    level = os.environ.get(LEVEL, "").strip().lower() or "info"
    if level not in LEVELS:
        raise UserError(f"{LEVEL}={level}: give one of {', '.join(LEVELS)}")
    if level == "off":
        yield
        return
    head = f"{program} {metadata.version('mlx-tandem')} began: {' '.join([program, *redact_arguments(arguments)])}"
    file = RotatingFile(program, head)
    root = logging.getLogger()
    # What was shown while nobody had set up a log is shown still.
    shown = [logging.lastResort] if logging.lastResort is not None and not root.handlers else []
    ours = [logging.getLogger(name) for name in _OURS]
    before = [logger.level for logger in ours]
    for handler in (file, *shown):
        root.addHandler(handler)
    ours[-1].addHandler(file)
    for logger in ours:
        logger.setLevel(level.upper())
    try:
        yield
    except Exception as error:
        if not isinstance(error, QUIET) and getattr(error, "exit_code", 1) == 1:
            ours[-1].error("failed: %s", error, exc_info=True)
        raise
    finally:
        for handler in (file, *shown):
            root.removeHandler(handler)
        ours[-1].removeHandler(file)
        for logger, earlier in zip(ours, before, strict=True):
            logger.setLevel(earlier)
        file.close()
