"""Start a worker process, talk to it, notice when it is gone.

The worker gets one end of a socket pair. When this process ends, however it ends, the socket closes and the worker
leaves too. It is spawned, never forked, and its environment names our own import paths only.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Protocol

from node import wire
from node.channel import frame, read_message
from node.errors import OutOfMemory, TandemError, UserError, WorkerError, WorkerLost
from node.events import Event, Failed
from node.spec import Request, Stop
from tandem.v1 import worker_pb2

LOG_NAME = "worker.log"
TAIL_BYTES = 2000


class WorkerLink(Protocol):
    """An ordered stream of requests down and of events up, wherever the worker runs."""

    async def send(self, request: Request) -> None:
        """Put a request behind those before it.

        Raises:
            WorkerLost: the worker is gone.
        """

    async def receive(self) -> Event:
        """The next event.

        Raises:
            WorkerLost: the worker is gone.
            UserError, OutOfMemory, WorkerError: the worker said why it cannot go on.
        """

    def cancel(self) -> None:
        """Drop what was sent and has not begun; later requests belong to a new generation."""

    async def close(self) -> None:
        """Let the worker finish and end; kill it when it does not. May be called twice."""


class LocalWorker:
    """A worker process of this machine. Made by ``start``."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: Path,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._log = log
        self._generation = 0
        self._closed = False
        self._killed = False

    @classmethod
    async def start(cls, folder: Path) -> LocalWorker:
        """Spawn a worker whose output goes to ``worker.log`` in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / LOG_NAME
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
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
                env=_environment(),
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer, log)

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    async def send(self, request: Request) -> None:
        """See ``WorkerLink``."""
        try:
            self._writer.write(frame(wire.encode_request(request, self._generation)))
            await self._writer.drain()
        except ConnectionError as error:
            raise await self._lost() from error

    async def receive(self) -> Event:
        """See ``WorkerLink``."""
        try:
            data = await read_message(self._reader)
        except ConnectionError as error:
            raise await self._lost() from error
        if data is None:
            raise await self._lost()
        _, event = wire.decode_event(data)
        if isinstance(event, Failed):
            raise _error_of(event, self._log)
        return event

    def cancel(self) -> None:
        """See ``WorkerLink``."""
        self._generation += 1

    async def close(self, timeout_seconds: float = 60.0) -> None:
        """See ``WorkerLink``; events that are still on their way are dropped."""
        if self._closed:
            return
        self._closed = True
        try:
            self._writer.write(frame(wire.encode_request(Stop(), self._generation)))
            async with asyncio.timeout(timeout_seconds):
                while await self._reader.read(1 << 16):
                    pass
                await self._process.wait()
        except (ConnectionError, TimeoutError):
            self.kill()
        finally:
            self._writer.close()
            await self._process.wait()

    def kill(self) -> None:
        """End the process at once."""
        # A second time would reap the process before asyncio does, which then complains on stderr.
        if self._process.returncode is None and not self._killed:
            self._killed = True
            self._process.kill()

    async def _lost(self) -> WorkerLost:
        """Why the stream ended. The process is on its way out, or is made to be."""
        self._closed = True
        self._writer.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        code = self._process.returncode or 0
        why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = _tail(self._log)
        return WorkerLost(f"the worker {why}" + (f"; its last words: {tail}" if tail else ""))


def _environment() -> dict[str, str]:
    """The worker's environment: ours, with the import path of this very installation first."""
    ours = str(Path(__file__).resolve().parent.parent)
    wire_package = str(Path(worker_pb2.__file__ or "").resolve().parents[2])
    kept = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = list(dict.fromkeys([ours, wire_package, *kept]))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _error_of(event: Failed, log: Path) -> TandemError:
    if event.kind == "user":
        return UserError(event.message)
    if event.kind == "memory":
        return OutOfMemory(f"the model's process ran out of memory: {event.message}")
    return WorkerError(f"the worker failed: {event.message} (details in {log})")


def _tail(log: Path) -> str:
    """The last line of a log, or "" when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
