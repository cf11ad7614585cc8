"""``python -m coordinator.running.background FD``: a run without a terminal. ``detach`` starts it.

It reads its order from standard input, says on FD how it began, and writes what a run says to its standard output,
which is its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from coordinator.config import TrainConfig
from coordinator.job import train
from coordinator.running import index
from coordinator.stream import Noted, Reader, RunEvent, RunStarted, StepFinished
from coordinator.view.plain import PlainView
from node.errors import Interrupted, TandemError
from node.in_use import hold
from node.log_file import logged
from node.logs import bound_log

TUPLES = frozenset(field.name for field in dataclasses.fields(TrainConfig) if "tuple" in str(field.type))


class Starting:
    """Tells who started us how it began, once.

    Args:
        handle: that they read.
        view: shows the run.
        run: its id.
        log: where the view writes.
    """

    def __init__(self, handle: int, view: Reader, run: str, log: Path) -> None:
        self._handle: int | None = handle
        self._view = view
        self._run = run
        self._log = log

    def handle(self, event: RunEvent) -> None:
        """See ``stream.Reader``."""
        self._view.handle(event)
        if isinstance(event, StepFinished) and event.report:
            bound_log(self._log)
        if isinstance(event, RunStarted) or (isinstance(event, Noted) and event.kind == "queued"):
            self.tell(began=True)

    def close(self) -> None:
        """See ``stream.Reader``."""
        self._view.close()

    def tell(self, **answer: Any) -> bool:
        """Say it; whether anybody heard it."""
        if self._handle is None:
            return False
        handle, self._handle = self._handle, None
        try:
            os.write(handle, (json.dumps(answer) + "\n").encode())
        except BrokenPipeError:  # the terminal is gone already
            return False
        finally:
            os.close(handle)
        return True


def main() -> int:
    """Do the run that standard input orders."""
    hold()
    handle = int(sys.argv[1])
    os.set_inheritable(handle, False)  # noqa: FBT003
    try:
        order = json.loads(sys.stdin.buffer.read())
    except ValueError:  # who was to give it was stopped meanwhile
        return Interrupted.exit_code
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    log, run = Path(order["log"]), str(order["run"])
    config = TrainConfig(**{name: _field(name, value) for name, value in order["config"].items()})
    starting = Starting(handle, PlainView(sys.stdout), run, log)
    try:
        with logged("coordinator", ["train", "--detach"]):
            asyncio.run(train(config, starting, resume=order["resume"], run=run, log=log))
    except (TandemError, KeyboardInterrupt) as error:
        failed = error if isinstance(error, TandemError) else Interrupted("stopped")
        return _end(starting, config, run, failed)
    except OSError as error:
        if error.filename is None:
            raise
        return _end(starting, config, run, TandemError(f"{error.filename}: {error.strerror}"))
    return 0


def _end(starting: Starting, config: TrainConfig, run: str, error: TandemError) -> int:
    """Say why it ended: to who started it while they wait, else to the log and the index."""
    line = " ".join(str(error).split())
    if not starting.tell(failed=line, code=error.exit_code):
        print(line if isinstance(error, Interrupted) else f"error: {line}", file=sys.stderr)  # noqa: T201
        if index.read(run) is None:
            with contextlib.suppress(OSError):  # the log has it
                _record(config, run, line, error)
    return error.exit_code


def _record(config: TrainConfig, run: str, line: str, error: TandemError) -> None:
    """A run that never trained, for whoever looks for it later."""
    folder = str(Path(config.adapter_path).resolve())
    status = "interrupted" if isinstance(error, Interrupted) else "failed"
    facts = {"folder": folder, "model": config.model, "data": config.data, "opened": False}
    index.record(run, status=status, message=line, exit_code=error.exit_code, ended=time.time(), **facts)


def _field(name: str, value: Any) -> Any:
    """A field of the options as it was: JSON knows no tuples."""
    return tuple(value) if isinstance(value, list) and name in TUPLES else value


if __name__ == "__main__":
    sys.exit(main())
