"""Starting a run in a process of its own, which outlives this command and its terminal.

The process is a coordinator like any other; ``background`` is what runs in it. We stay until training has begun: who
made a mistake that only the data or the model show is told here, not in a log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.checks import check_options
from coordinator.config import TrainConfig
from coordinator.runfolder import RunFolder
from coordinator.running import index
from coordinator.running.control import STOP_SIGNAL
from coordinator.running.presence import find
from node.errors import Interrupted, TandemError, UserError, error_of
from node.files import make_private_folder

LOOK_SECONDS = 0.2
ENDING_SECONDS = 60.0


@dataclass(frozen=True)
class Detached:
    """A run that goes on without us.

    Attributes:
        run: its id.
        folder: that it writes to.
        pid: of its process.
        log: what it says.
    """

    run: str
    folder: Path
    pid: int
    log: Path


def detach(config: TrainConfig, *, resume: bool, say: Callable[[str], None]) -> Detached:
    """Start a run in the background, and return when it trains or stands in line for a node.

    Args:
        config: all options.
        resume: go on with the run in the adapter folder.
        say: takes each line that the run says until then.

    Raises:
        UserError: a mistake in what was asked for; nothing was written.
        Interrupted: Ctrl-C came first; the run is stopped.
        TandemError: it failed before it trained.
    """
    check_options(config, resume=resume)
    folder = RunFolder(Path(config.adapter_path))
    run = (folder.run_id() if resume else None) or index.new_id()
    other = find(run)
    if other is not None:
        raise UserError(f"run {run} is at work already (process {other.pid}); to see it: coordinator watch {run}")
    folder.check_free()
    log = index.log_path(run)
    make_private_folder(log.parent)
    said_before = log.stat().st_size if log.exists() else 0
    order = {"config": dataclasses.asdict(config), "resume": resume, "run": run, "log": str(log)}
    with _started(log) as (process, answers):
        lines = _Lines(log, said_before)
        try:
            _give(process, order)
            answer = _answer(answers, lambda: lines.tell(say))
            lines.tell(say)
        except KeyboardInterrupt:
            answer = _stopped(process, answers)
        if answer.get("began"):
            return Detached(run, folder.path.resolve(), process.pid, log)
        process.wait()
    if "failed" not in answer:
        raise TandemError(f"the run ended before it trained; {log} says more")
    if not said_before:
        log.unlink(missing_ok=True)
    raise error_of(answer["code"], answer["failed"])


@contextlib.contextmanager
def _started(log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The run's process, in a session of its own, which waits for its order; and where it says how it began."""
    answers, theirs = os.pipe()
    try:
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "coordinator.running.background", str(theirs)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=[theirs],
                    start_new_session=True,  # a terminal that closes tells its own session only
                )
        finally:
            os.close(theirs)
        yield process, answers
    finally:
        os.close(answers)


def _give(process: subprocess.Popen[bytes], order: dict[str, Any]) -> None:
    """Tell it what to do; one that ended at once has said why."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(order).encode())


def _answer(answers: int, meanwhile: Callable[[], None]) -> dict[str, Any]:
    """What the process says of its beginning; nothing where it ended without a word."""
    said = b""
    while not said.endswith(b"\n"):
        while not select.select([answers], [], [], LOOK_SECONDS)[0]:
            meanwhile()
        piece = os.read(answers, 1 << 16)
        if not piece:
            return {}
        said += piece
    answer = json.loads(said)
    assert isinstance(answer, dict)
    return answer


def _stopped(process: subprocess.Popen[bytes], answers: int) -> dict[str, Any]:
    """Ctrl-C before it trained: it ends, too."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.send_signal(STOP_SIGNAL)
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    answer = _answer(answers, lambda: None)
    return answer if "failed" in answer else {"failed": "stopped", "code": Interrupted.exit_code}


class _Lines:
    """What a run writes to its log, line by line."""

    def __init__(self, log: Path, start: int) -> None:
        self._log = log
        self._at = start

    def tell(self, say: Callable[[str], None]) -> None:
        """Say the whole lines that are new."""
        with self._log.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        for line in whole.decode(errors="replace").splitlines():
            say(line)
