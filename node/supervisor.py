"""Start a worker process, talk to it, notice when it is gone.

The worker gets one end of a socket pair. When this process ends, however it ends, the socket closes and the worker
leaves too. It is spawned, never forked, with a cleaned environment (``node/environment.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

from node import wire
from node.channel import AsyncChannel
from node.environment import handed_down
from node.errors import OutOfMemory, TandemError, UserError, WorkerError, WorkerLost, mentions_memory
from node.events import Addend, Digested, Event, Failed, Joined, Restored, RingFailed
from node.files import link_or_copy, make_private_folder
from node.logs import bound_log
from node.spec import FileRef, Request, Stop
from tandem.v1 import worker_pb2

LOG_NAME = "worker.log"
TAIL_BYTES = 2000
TAIL_LINES = 10
GOING_SECONDS = 5.0
LOOK_AT_LOG_SECONDS = 1.0
OF_A_GENERATION = (Joined, RingFailed, Addend, Digested, Restored)
"""Events that mean nothing in a later generation."""


class WorkerLink(Protocol):
    """An ordered stream of requests down and of events up, wherever the worker runs."""

    async def send(self, request: Request) -> None:
        """Put a request behind those before it.

        Raises:
            WorkerLost: the worker is gone.
            TandemError: it is, and had said or logged why; see ``receive``.
        """

    async def receive(self) -> Event:
        """The next event.

        Late ones come too, of requests that were cancelled after they had begun: who receives an event decides, by the
        step, chunk or id in it, whether it is stale.

        Raises:
            WorkerLost: the worker is gone.
            UserError, OutOfMemory, WorkerError: the worker said why it cannot go on, or its log does.
            TandemError: likewise; a file could not be read or written.
        """

    def cancel(self) -> None:
        """Drop what was sent and has not begun; later requests belong to a new generation."""

    @property
    def generation(self) -> int:
        """Of the requests sent from now on; counted by ``cancel``, from 0."""

    async def give(self, ref: FileRef, source: Path) -> None:
        """Put a file into the job's folder under the reference's name.

        Raises:
            WorkerLost, NodeLost: the worker's machine is gone.
            OSError, TandemError: it cannot be read here or written there, or is not what the reference says.
        """

    async def fetch(self, ref: FileRef, target: Path) -> None:
        """Get a file of the job's folder; ``target`` is whole, verified and synced, or not there.

        Raises:
            As ``give``.
        """

    async def close(self) -> None:
        """Let the worker finish and end; kill it when it does not. May be called twice."""


class LocalWorker:
    """A worker process of this machine. Made by ``start``."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        channel: AsyncChannel,
        log: Path,
        log_start: int,
    ) -> None:
        self._process = process
        self._channel = channel
        self._log = log
        self._folder = log.parent
        self._log_start = log_start
        self._said: TandemError | None = None
        self._generation = 0
        self._closed = False
        self._killed = False
        self._look_at_log = 0.0

    @classmethod
    async def start(cls, folder: Path, environment: Mapping[str, str] | None = None) -> Self:
        """Spawn a worker whose output goes to ``worker.log`` in ``folder``, with these further variables."""
        make_private_folder(folder)
        log = folder / LOG_NAME
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            log_start = output.tell()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "node.worker",
                "--fd",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**worker_environment(), **(environment or {})},
                # What a terminal tells its programs (Ctrl-C, its own end) is the coordinator's to deal with.
                start_new_session=True,
            )
        return cls(process, await AsyncChannel.open(ours), log, log_start)

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    async def send(self, request: Request) -> None:
        """See ``WorkerLink``."""
        await self.send_bytes(wire.encode_request(request, self._generation), self._generation)

    async def send_bytes(self, data: bytes, generation: int) -> None:
        """Send a request that is encoded already, of a generation that is this one's from now on; see ``send``."""
        self._generation = max(self._generation, generation)
        try:
            await self._channel.send(data)
        except OSError as error:
            raise await self._lost() from error

    async def receive_bytes(self) -> bytes:
        """The next event as it came, ``Failed`` included; raises as ``receive`` when there is none."""
        try:
            data = await self._channel.receive()
        except ConnectionError as error:
            raise await self._lost() from error
        if data is None:
            raise await self._lost()
        self._bound_log()
        return data

    async def receive(self) -> Event:
        """See ``WorkerLink``."""
        while True:
            generation, event = wire.decode_event(await self.receive_bytes())
            if isinstance(event, Failed):
                self._said = _error_of(event, self._log)
                raise self._said
            if generation >= self._generation or not isinstance(event, OF_A_GENERATION):
                return event

    def cancel(self) -> None:
        """See ``WorkerLink``."""
        self._generation += 1

    @property
    def generation(self) -> int:
        """See ``WorkerLink``."""
        return self._generation

    async def give(self, ref: FileRef, source: Path) -> None:
        """See ``WorkerLink``; the file gets a second name."""
        link_or_copy(source, self._folder / ref.name)

    async def fetch(self, ref: FileRef, target: Path) -> None:
        """See ``WorkerLink``; the file gets a second name."""
        link_or_copy(self._folder / ref.name, target)

    async def close(self, timeout_seconds: float = 10.0) -> None:
        """See ``WorkerLink``; events that are still on their way are dropped."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._channel.send(wire.encode_request(Stop(), self._generation))
                while await self._channel.receive() is not None:
                    pass
                await self._process.wait()
        except (OSError, TimeoutError):
            self.kill()
        finally:
            self._channel.close()
            await self._process.wait()
            self._kill_group()

    def kill(self) -> None:
        """End the process at once."""
        # A second time would reap the process before asyncio does, which then complains on stderr.
        if self._process.returncode is None and not self._killed:
            self._killed = True
            self._process.kill()
        self._kill_group()

    def _bound_log(self) -> None:
        """Keep the log from filling the disk. A worker says something every second, so this is looked at as often."""
        now = time.monotonic()
        if now >= self._look_at_log:
            self._look_at_log = now + LOOK_AT_LOG_SECONDS
            if bound_log(self._log):
                self._log_start = 0

    def _kill_group(self) -> None:
        """End what the worker started: its reducer may hang where it cannot see that the worker is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says so of a group that is all dead
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _lost(self) -> TandemError:
        """Why the stream ended. The process is on its way out, or is made to be."""
        self._closed = True
        self._channel.finish()
        try:
            async with asyncio.timeout(GOING_SECONDS):
                await self._hear_the_rest()
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        self._channel.close()
        self._kill_group()
        if self._said is not None:
            return self._said
        code = self._process.returncode or 0
        why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = _last_lines(self._log, self._log_start)
        # On Metal a command that finds no memory does not raise: the process is aborted.
        for line in reversed(lines):
            if mentions_memory(line):
                return OutOfMemory(f"the model's process ran out of memory: it {why}; {line}")
        return WorkerLost(f"the worker {why}" + (f"; its last words: {lines[-1]}" if lines else ""))

    async def _hear_the_rest(self) -> None:
        """Read what the worker said before it went, for the reason among it."""
        with contextlib.suppress(ConnectionError, wire.WireError):
            while (data := await self._channel.receive()) is not None:
                _, event = wire.decode_event(data)
                if isinstance(event, Failed):
                    self._said = _error_of(event, self._log)


def worker_environment() -> dict[str, str]:
    """The worker's environment: what of ours is handed down, with the import path of this very installation first."""
    ours = str(Path(__file__).resolve().parent.parent)
    wire_package = str(Path(worker_pb2.__file__ or "").resolve().parents[2])
    kept = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = list(dict.fromkeys([ours, wire_package, *kept]))
    return handed_down() | {"PYTHONPATH": os.pathsep.join(paths)}


def _error_of(event: Failed, log: Path) -> TandemError:
    if event.kind == "user":
        return UserError(event.message)
    if event.kind == "memory":
        return OutOfMemory(f"the model's process ran out of memory: {event.message}")
    if event.kind == "disk":
        return TandemError(event.message)
    return WorkerError(f"the worker failed: {event.message} (details in {log})")


def _last_lines(log: Path, start: int) -> list[str]:
    """The last lines of a log, stripped; none of those before ``start``, an offset in bytes."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines if line.strip()][-TAIL_LINES:]
