"""Adding up by ``mlx.distributed``: numbers go through shared memory to a reducer process that owns the group.

It can be killed when the group hangs, and the model's process goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from node.logs import bound_log
from node.reducer import shared
from node.spec import RingSpec
from node.worker.adder import NEWER_GENERATION, Floats, Limit, ReductionFailed, Rounding

KILLED_SECONDS = 5.0
OWN_TIMER_SECONDS = 1.0
"""The reducer ends itself when the group does not form in time, with no word; we wait so much longer."""


class Interrupt:
    """Tells a waiting reduction that a newer generation was heard of.

    Args:
        bell: a descriptor that becomes readable then, and now and then for nothing.
        rung: whether it is so; empties the bell.
    """

    def __init__(self, bell: int, rung: Callable[[], bool]) -> None:
        self.bell = bell
        self.rung = rung


def _opened(log: Path) -> BinaryIO:
    """A log to write to; where its disk is too full even for a name, nowhere."""
    try:
        return log.open("ab")
    except OSError:
        return open(os.devnull, "ab")


class ReducerAdder:
    """A reducer process of this worker; see ``Adder``.

    Args:
        count: most numbers that are added up at once.
        interrupt: ends any wait.
        log: takes what the process writes.
        owed: numbers of a step, where what rounding keeps back of them is remembered; else 0.
    """

    def __init__(self, count: int, interrupt: Interrupt, log: Path, owed: int = 0) -> None:
        size = 4 * (count + owed)
        memory = shared.create(size)
        self._connection, theirs = socket.socketpair()
        bound_log(log)
        with theirs, _opened(log) as output:
            arguments = ["--fd", str(theirs.fileno()), "--memory", str(memory), "--bytes", str(size)]
            arguments += ["--owed", str(owed)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "node.reducer", *arguments],
                pass_fds=[theirs.fileno(), memory],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        floats: Floats = np.frombuffer(shared.attach(memory, size), np.float32)
        self.numbers, self._owed = floats[:count], floats[count:]
        self._interrupt = interrupt
        self._pending = b""

    def form(self, spec: RingSpec, layout: int) -> None:
        """See ``Adder``."""
        limit = Limit.of_forming(spec)
        command = {"form": dataclasses.asdict(spec), "layout": layout}
        self._tell(command)
        self._hear("formed", dataclasses.replace(limit, until=limit.until + OWN_TIMER_SECONDS))

    def begin(self, first: int, count: int, step: int, rounding: Rounding | None = None) -> None:
        """See ``Adder``."""
        del step
        command: dict[str, object] = {"sum": count, "first": first}
        if rounding is not None and rounding.settle:
            owed = self._owed[rounding.place : rounding.place + count]
            self.numbers[first : first + count] += owed
            owed[:] = 0
        elif rounding is not None:
            command |= {"exact": rounding.exact, "place": rounding.place}
        self._tell(command)

    def finish(self, limit: Limit) -> None:
        """See ``Adder``."""
        self._hear("summed", limit)

    def add(self, count: int, step: int, limit: Limit, rounding: Rounding | None = None) -> None:
        """See ``Adder``."""
        self.begin(0, count, step, rounding)
        self.finish(limit)

    def kill(self) -> None:
        """See ``Adder``."""
        self.kill_process()
        self._connection.close()
        self._process.wait(KILLED_SECONDS)

    def kill_process(self) -> None:
        """See ``Adder``."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    def _tell(self, command: dict[str, object]) -> None:
        try:
            self._connection.sendall(json.dumps(command).encode() + b"\n")
        except OSError as error:
            raise ReductionFailed(self._last_words()) from error

    def _last_words(self) -> str:
        """Why a reducer that takes no more commands has ended."""
        with contextlib.suppress(OSError):
            while data := self._connection.recv(4096):
                self._pending += data
        said = [json.loads(line) for line in self._pending.split(b"\n")[:-1]]
        return next((str(answer["error"]) for answer in said if "error" in answer), "the reducer is gone")

    def _hear(self, answer: str, limit: Limit) -> None:
        said = json.loads(self._line(limit))
        if answer not in said:
            raise ReductionFailed(str(said.get("error", "the reducer gave no answer")))

    def _line(self, limit: Limit) -> bytes:
        while b"\n" not in self._pending:
            left = limit.left
            watched: list[Any] = [self._connection, self._interrupt.bell]
            ready, _, _ = select.select(watched, [], [], left)
            if self._interrupt.bell in ready and self._interrupt.rung():
                raise ReductionFailed(NEWER_GENERATION)
            if self._connection in ready:
                try:
                    data = self._connection.recv(4096)
                except ConnectionError:
                    data = b""
                if not data:
                    late = time.monotonic() >= limit.until - OWN_TIMER_SECONDS
                    raise ReductionFailed(limit.late if late else "the reducer ended")
                self._pending += data
            elif not ready and not left:
                raise ReductionFailed(limit.late)
        line, _, self._pending = self._pending.partition(b"\n")
        return line
