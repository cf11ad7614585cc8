"""Talk to a node: one object for the machine, one for a worker on it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from node import rpc, wire
from node.copies import StateCopy
from node.doctor.finding import Diagnosis, Wanted
from node.errors import NodeError, NodeLost, NodeRefused, OutOfMemory, TandemError, UserError, WorkerError, WorkerLost
from node.events import Condition, Event, Failed
from node.files import replacing
from node.home import home
from node.identity import credentials
from node.info import Busy, Manifest, Measured, NodeInfo, RingPart, StoredFile
from node.pairing.desk import OpenCode
from node.peers import home_of
from node.spec import FileRef, Request, Setup
from node.store import RESERVE_BYTES
from node.supervisor import OF_A_GENERATION
from tandem.v1 import node_pb2, node_pb2_grpc

OPEN_SECONDS = 30.0
CLOSING_SECONDS = 15.0
DIAGNOSE_SECONDS = 60.0
"""For a machine to look at itself, where system_profiler is slow, and MLX is loaded on a busy machine."""
FILE_TRIES = 5
PAUSE_SECONDS = 1.0
"""Before a broken transfer is taken up again; longer each time."""
DAMAGED_TRIES = 2
"""A file that arrives other than it was sent is sent once more: what lies between may have bent it."""
FILE_STALL_SECONDS = 10.0
"""A file of which nothing more comes for so long is given up: its machine is frozen or cut off."""
SLOWEST_BYTES_PER_SECOND = 1 << 17
"""A file that arrives more slowly than this over its whole length is given up."""
PULL_SILENCE_SECONDS = 60.0

_BROKEN = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError)
"""What grpc raises on a stream that has ended."""

_LOST = {"user": UserError, "memory": OutOfMemory, "worker": WorkerError, "lost": WorkerLost}


class NodeClient:
    """A node, as others see it.

    Args:
        address: ``host:port``.
        name: what people call it; until it has said so, its address.
        certificate: of its ``TANDEM_HOME``, in PEM; None for our own.
    """

    def __init__(self, address: str, name: str = "", certificate: bytes | None = None) -> None:
        self.address = address
        self.name = name or address
        self._home = credentials(home()).home if certificate is None else home_of(certificate)
        self._channel = rpc.open_channel(address, certificate)
        self._node = node_pb2_grpc.NodeStub(self._channel)
        self._files = node_pb2_grpc.FilesStub(self._channel)

    async def describe(self, timeout: float = rpc.CALL_SECONDS) -> NodeInfo:
        """What it says about itself.

        Raises:
            NodeRefused: it talks another version of the protocol.
            NodeError: it cannot be reached or does not answer properly.
        """
        request = node_pb2.DescribeRequest(protocol=rpc.PROTOCOL)
        with self._named():
            info = rpc.decode_info(await self._node.Describe(request, timeout=timeout))
        self._check(info)
        return info

    def _check(self, info: NodeInfo) -> None:
        """Refuse who talks another protocol, or is another than its certificate says."""
        if info.protocol != rpc.PROTOCOL:
            raise NodeRefused(
                "version", f"{info.name} runs mlx-tandem {info.version}, which talks another version of the protocol"
            )
        if info.home != self._home:
            raise NodeError(f"{self.name} says that it is of another TANDEM_HOME than its certificate is")

    async def open_worker(
        self, run: str, owner: str, *, wait: bool = False, on_queue: Callable[[int, Busy], None] | None = None
    ) -> RemoteWorker:
        """Take the node for a job.

        Args:
            run: id of the run, for people.
            owner: who wants it, for people.
            wait: stand in line when it is busy.
            on_queue: told how many come first, and who has it now.

        Raises:
            NodeRefused: it takes no job now.
            NodeLost: it cannot be reached.
        """
        call: Any = self._node.Work()
        try:
            with self._named():
                opened = node_pb2.Open(run=run, owner=owner, wait=wait, protocol=rpc.PROTOCOL)
                async with asyncio.timeout(None if wait else OPEN_SECONDS):
                    await call.write(node_pb2.WorkRequest(open=opened))
                    while (event := await call.read()) is not grpc.aio.EOF:
                        match event.WhichOneof("body"):
                            case "opened":
                                return RemoteWorker(self, call, event.opened.job)
                            case "refused":
                                raise NodeRefused(event.refused.kind, event.refused.message)
                            case "queued" if on_queue is not None:
                                on_queue(event.queued.before, wire.read(Busy, event.queued.busy))
                raise NodeLost(f"{self.name} ended the conversation")
        except BaseException:
            call.cancel()
            raise

    async def measure(self, addresses: Sequence[str], seconds: float, certificate: bytes) -> tuple[Measured, ...]:
        """How fast it reaches these addresses of another node's relay, for so many seconds each.

        Args:
            addresses: ``ip:port`` each.
            seconds: for each.
            certificate: the other node's, in PEM.
        """
        request = node_pb2.MeasureRequest(addresses=addresses, seconds=seconds, certificate=certificate)
        timeout = rpc.CALL_SECONDS + len(addresses) * (seconds + rpc.CALL_SECONDS)
        with self._named():
            reply = await self._node.Measure(request, timeout=timeout)
        return tuple(wire.read(Measured, result) for result in reply.results)

    async def diagnose(self, wanted: Wanted, timeout: float | None = None) -> Diagnosis:
        """What is wrong with its machine, and what comes of the connections that it is to try.

        Args:
            wanted: what it tries on the network.
            timeout: seconds for it to answer; None takes the usual.

        Raises:
            NodeRefused: it talks another version of the protocol.
            NodeError: it cannot be reached, does not answer in time, or knows no such question.
        """
        request = node_pb2.DiagnoseRequest(protocol=rpc.PROTOCOL, reach=wanted.reach, expect=wanted.expect)
        with self._named():
            found = rpc.decode_diagnosis(await self._node.Diagnose(request, timeout=timeout or DIAGNOSE_SECONDS))
        self._check(found.info)
        return found

    async def control(self, action: str, secret: str) -> NodeInfo:
        """Say the owner's wish: ``pause``, ``resume`` or ``stop``."""
        request = node_pb2.ControlRequest(action=action, secret=secret)
        with self._named():
            return rpc.decode_info((await self._node.Control(request, timeout=rpc.CALL_SECONDS)).info)

    async def pair(self, secret: str) -> OpenCode:
        """Have it show a new pairing code; for programs of its own ``TANDEM_HOME``."""
        request = node_pb2.ControlRequest(action="pair", secret=secret)
        with self._named():
            code = (await self._node.Control(request, timeout=rpc.CALL_SECONDS)).code
        return OpenCode(code.code, code.port, code.seconds)

    async def missing(self, files: Sequence[StoredFile]) -> tuple[StoredFile, ...]:
        """Which of these files its store lacks."""
        request = node_pb2.FileList(files=[rpc.encode_file(file) for file in files])
        with self._named():
            # It looks at each file.
            reply = await self._files.Missing(request, timeout=6 * rpc.CALL_SECONDS)
        return tuple(rpc.decode_file(file) for file in reply.files)

    async def pull(
        self,
        manifest: Manifest,
        sources: Sequence[str],
        progress: Callable[[int, int], None],
        certificates: Mapping[str, bytes] | None = None,
    ) -> str:
        """Have it get a model from these sources; the manifest's digest when it is there.

        Args:
            manifest: the files.
            sources: ``host:port`` of nodes, the preferred ones first.
            progress: told bytes that are there, of how many.
            certificates: of the sources, in PEM; those that are not named are of its own ``TANDEM_HOME``.

        Raises:
            NodeError: it could not.
        """
        request = node_pb2.PullRequest(
            manifest=rpc.encode_manifest(manifest), sources=sources, certificates=certificates or {}
        )
        call: Any = self._files.Pull(request)
        try:
            with self._named():
                while True:
                    async with asyncio.timeout(PULL_SILENCE_SECONDS):
                        said = await call.read()
                    if said is grpc.aio.EOF:
                        # The status says why, if it says anything.
                        if await call.code() != grpc.StatusCode.OK:
                            raise NodeError(f"{self.name}: {await call.details()}")
                        raise NodeError(f"{self.name} did not get the whole model")
                    progress(said.bytes, said.total)
                    if said.manifest:
                        return str(said.manifest)
        finally:
            call.cancel()

    async def introduce(self, job: str, certificates: Sequence[bytes], manifest: str) -> None:
        """Tell which other machines take part in the job that it works on for us.

        Args:
            job: as ``open_worker`` named it.
            certificates: of their ``TANDEM_HOME``, in PEM.
            manifest: SHA-256 of the manifest of the model that they may get from it; "" for none yet.

        Raises:
            NodeError: it cannot be reached, or works for somebody else.
        """
        request = node_pb2.Introduction(job=job, certificates=certificates, manifest=manifest)
        with self._named():
            await self._node.Introduce(request, timeout=rpc.CALL_SECONDS)

    async def held(self, run: str, timeout: float = rpc.CALL_SECONDS, *, now: bool = False) -> StateCopy | None:
        """What it holds of a run whose coordinator or worker went away; it waits while it still works for that run.

        Args:
            run: its id.
            timeout: seconds for it to answer.
            now: not to wait: what it works on is known.

        Raises:
            NodeError: it cannot be reached, does not answer in time, or knows no such question.
        """
        with self._named():
            copy = rpc.decode_held(await self._node.Held(node_pb2.HeldWanted(run=run, now=now), timeout=timeout))
        for file in copy.files if copy is not None else ():
            FileRef(file.name, file.sha256, file.size)  # bare, or refused
        return copy

    async def fetch_held(self, run: str, file: StoredFile, target: Path) -> None:
        """Get a file of what it holds; ``target`` is whole and verified, or not there.

        Raises:
            NodeError: it cannot be had.
            OSError: it cannot be written here.
        """
        await self.get_file(node_pb2.FileWanted(held_run=run, name=file.name), file.sha256, file.size, target)

    async def get_file(self, wanted: node_pb2.FileWanted, sha256: str, size: int, target: Path) -> None:
        """Get a file; a broken transfer goes on where it broke. ``target`` is whole and verified, or not there.

        Args:
            wanted: which one.
            sha256: of its content.
            size: of it, in bytes.
            target: where it is put.
        """
        FileRef(wanted.name, sha256, size)  # bare, or refused
        free = shutil.disk_usage(target.parent).free if target.parent.exists() else size + RESERVE_BYTES
        if size > free - RESERVE_BYTES:
            # As writing it would say; before it fills the disk for everything else.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        with replacing(target) as partial:
            for _ in range(DAMAGED_TRIES):
                if await self._arrive(wanted, size, partial) == sha256:
                    return
            raise NodeError(f"{self.name}: {wanted.name} did not arrive as it was sent")

    async def _arrive(self, wanted: node_pb2.FileWanted, size: int, target: Path) -> str:
        """Get a file from its beginning; the digest of what has arrived."""
        digest, tries = hashlib.sha256(), 0
        with target.open("wb") as file:
            while True:
                wanted.offset = file.tell()
                try:
                    async with contextlib.aclosing(self._parts(wanted, _file_seconds(size))) as parts:
                        async for part in parts:
                            digest.update(part.data)
                            file.write(part.data)
                            if file.tell() > size:
                                raise NodeError(f"{self.name}: {wanted.name} is longer than was said")
                    return digest.hexdigest()
                except grpc.aio.AioRpcError as error:
                    tries += 1
                    if error.code() != grpc.StatusCode.UNAVAILABLE or tries == FILE_TRIES:
                        raise rpc.error_of(error, self.name) from error
                    await asyncio.sleep(PAUSE_SECONDS * tries)

    async def _parts(self, wanted: node_pb2.FileWanted, seconds: float) -> AsyncGenerator[node_pb2.FilePart, None]:
        """The parts of a file, as long as they come.

        Raises:
            NodeLost: none has come for too long.
        """
        call: Any = self._node.GetFile(wanted, timeout=seconds)
        try:
            while True:
                async with asyncio.timeout(FILE_STALL_SECONDS):
                    part = await call.read()
                if part is grpc.aio.EOF:
                    return
                yield part
        except TimeoutError as error:
            raise NodeLost(f"{self.name} sent nothing of {wanted.name} for {FILE_STALL_SECONDS:g} s") from error
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the connection. May be called twice."""
        await self._channel.close()

    @contextlib.contextmanager
    def _named(self) -> Any:
        """Name the machine in what goes wrong."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise rpc.error_of(error, self.name) from error
        except TimeoutError as error:
            raise NodeLost(f"{self.name} did not answer in time") from error


class RemoteWorker:
    """A worker on another machine; see ``supervisor.WorkerLink`` and ``coordinator.crew.RingLink``.

    Attributes:
        condition: of its machine, as last heard; ``receive`` gives it too, in its place among the worker's events.
        keep_state: whether the node is to keep the worker's state when the link is closed, as it does when it breaks:
            for a coordinator that could not save it.
    """

    def __init__(self, client: NodeClient, call: Any, job: str) -> None:
        self._client = client
        self._node = client._node
        self._call = call
        self.job = job
        self._generation = 0
        self._heard: deque[bytes | Condition] = deque()
        self._reading: asyncio.Task[Any] | None = None
        self._one_reads, self._one_writes = asyncio.Lock(), asyncio.Lock()
        self._said: TandemError | None = None
        self._closed = False
        self.condition = Condition()
        self.keep_state = False

    @property
    def generation(self) -> int:
        """See ``WorkerLink``."""
        return self._generation

    def cancel(self) -> None:
        """See ``WorkerLink``."""
        self._generation += 1

    async def send(self, request: Request) -> None:
        """See ``WorkerLink``; the model must be named by its manifest: paths of this machine stay here."""
        if isinstance(request, Setup):
            model = dataclasses.replace(request.job.model, path="")
            request = Setup(dataclasses.replace(request.job, folder="", model=model))
        requests = node_pb2.WorkerRequests(requests=[wire.encode_request(request, self._generation)])
        await self._write(node_pb2.WorkRequest(requests=requests))

    async def form_ring(self, part: RingPart) -> None:
        """See ``RingLink``."""
        message = node_pb2.FormRing(generation=self._generation)
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, tuple):
                getattr(message, field.name).extend(value)
            else:
                setattr(message, field.name, value)
        await self._write(node_pb2.WorkRequest(form_ring=message))

    async def receive(self) -> Event:
        """See ``WorkerLink``."""
        while True:
            while not self._heard:
                await self._hear()
            heard = self._heard.popleft()
            if isinstance(heard, Condition):
                return heard
            generation, event = wire.decode_event(heard)
            if isinstance(event, Failed):
                self._said = _failure(event)
                raise self._said
            if generation >= self._generation or not isinstance(event, OF_A_GENERATION):
                return event

    async def give(self, ref: FileRef, source: Path) -> None:
        """See ``WorkerLink``."""
        file = node_pb2.FileInfo(name=ref.name, sha256=ref.sha256, size=ref.size)

        async def parts() -> AsyncIterator[node_pb2.FilePart]:
            with source.open("rb") as content:
                first = True
                while (data := await asyncio.to_thread(content.read, rpc.PART_BYTES)) or first:
                    yield (
                        node_pb2.FilePart(job=self.job, file=file, data=data) if first else node_pb2.FilePart(data=data)
                    )
                    first = False

        with self._client._named():
            for left in reversed(range(DAMAGED_TRIES)):
                try:
                    await self._node.PutFile(parts(), timeout=_file_seconds(ref.size))
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() != grpc.StatusCode.DATA_LOSS or not left:
                        raise

    async def fetch(self, ref: FileRef, target: Path) -> None:
        """See ``WorkerLink``; a broken transfer goes on where it broke."""
        await self._get("", ref.name, ref.sha256, ref.size, target)

    async def outputs(self, folder: str) -> tuple[StoredFile, ...]:
        """The files of one of the job's folders, ``fused`` or ``peft``."""
        request = node_pb2.FolderWanted(job=self.job, folder=folder)
        with self._client._named():
            reply = await self._node.ListFiles(request, timeout=_file_seconds(1 << 32))
        return tuple(rpc.decode_file(file) for file in reply.files)

    async def fetch_output(self, file: StoredFile, target: Path) -> None:
        """Get one of them; ``target`` is whole and verified, or not there."""
        await self._get(file.folder, file.name, file.sha256, file.size, target)

    async def _get(self, folder: str, name: str, sha256: str, size: int, target: Path) -> None:
        wanted = node_pb2.FileWanted(job=self.job, folder=folder, name=name)
        await self._client.get_file(wanted, sha256, size, target)

    async def close(self) -> None:
        """See ``WorkerLink``."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(CLOSING_SECONDS):
                if not self.keep_state:
                    await self._call.write(node_pb2.WorkRequest(release=node_pb2.Release()))
                await self._call.done_writing()
                while await self._message() is not grpc.aio.EOF:
                    pass
        except (TandemError, *_BROKEN, TimeoutError):
            self.kill()
        finally:
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.gather(self._reading, return_exceptions=True)

    def kill(self) -> None:
        """End the worker at once."""
        self._call.cancel()

    # --- the stream ---------------------------------------------------------------------------------------------------

    async def _write(self, message: node_pb2.WorkRequest) -> None:
        try:
            async with self._one_writes:  # grpc refuses a second one meanwhile
                await self._call.write(message)
        except _BROKEN as error:
            raise await self._lost() from error

    async def _message(self) -> Any:
        """The next message, or EOF. Whoever stops waiting for it leaves it to the next who does: to cancel a read would
        cancel the whole call.
        """
        async with self._one_reads:
            if self._reading is None:
                self._reading = asyncio.create_task(self._call.read())
            await asyncio.wait({self._reading})
            reading, self._reading = self._reading, None
        if reading.cancelled():
            raise NodeLost(f"the connection to {self._client.name} was closed")
        return reading.result()

    async def _hear(self) -> None:
        """Read one message."""
        try:
            message = await self._message()
        except _BROKEN as error:
            raise await self._lost() from error
        if message is grpc.aio.EOF:
            raise await self._lost()
        self._take(message)
        if self._said is not None and not self._heard:
            raise self._said

    def _take(self, message: node_pb2.WorkEvent) -> None:
        match message.WhichOneof("body"):
            case "events":
                self._heard.extend(message.events.events)
            case "condition":
                self.condition = rpc.decode_condition(message.condition)
                self._heard.append(self.condition)
            case "lost":
                self._said = self._said or _LOST.get(message.lost.kind, TandemError)(message.lost.message)

    async def _lost(self) -> TandemError:
        """Why the stream ended; what the worker said before stays to be received."""
        if self._said is not None:
            return self._said
        ended: TandemError = NodeLost(f"{self._client.name} ended the conversation")
        try:
            async with asyncio.timeout(rpc.CALL_SECONDS):
                while (message := await self._message()) is not grpc.aio.EOF:
                    self._take(message)
        except grpc.aio.AioRpcError as error:
            ended = rpc.error_of(error, self._client.name)
            if isinstance(ended, NodeLost):
                ended = NodeLost(f"{self._client.name} is gone: the connection to it broke")
        except (*_BROKEN, NodeLost, TimeoutError):
            ended = NodeLost(f"the connection to {self._client.name} broke")
        for data in self._heard:
            if isinstance(data, Condition):
                continue
            _, event = wire.decode_event(data)
            if isinstance(event, Failed):
                return _failure(event)
        self._said = self._said or ended
        return self._said


def _failure(event: Failed) -> TandemError:
    """As ``LocalWorker`` would raise it; the log is on the other machine."""
    if event.kind in ("user", "disk"):
        return (UserError if event.kind == "user" else TandemError)(event.message)
    if event.kind == "memory":
        return OutOfMemory(f"the model's process ran out of memory: {event.message}")
    return WorkerError(f"the worker failed: {event.message}")


def _file_seconds(size: int) -> float:
    return 30.0 + size / SLOWEST_BYTES_PER_SECOND
