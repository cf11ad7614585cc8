"""The ``Files`` service of a node: its store, to others; and the same service of others, to its store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio

from node import manifest as manifests
from node import rpc
from node.errors import NodeError, NodeLost, TandemError, UserError
from node.info import StoredFile
from node.pull import OTHER_PROCESS_SECONDS, Hub, Puller
from node.store import Absent, NoRoom, Store
from tandem.v1 import node_pb2, node_pb2_grpc

STALL_SECONDS = 10.0
"""A source that sends nothing for so long is left for the next one."""
SIGN_SECONDS = 2.0
"""Who waits for bytes itself says so to those who wait for it."""
PATIENCE_SECONDS = 30.0
"""How long it does so; longer than it takes to leave a source that is silent."""
GRACE_SECONDS = 2.0
"""For a transfer to begin here, when all nodes are told at the same time to get a model from one another."""
MOST_SOURCES = 256


class FileService(node_pb2_grpc.FilesServicer):
    """Gives and gets models' files.

    Args:
        store: of this node.
        hub: where files come from that no source has; by default the Hugging Face Hub.
        model_for: tells of a call the digest of the only model that its caller may have files of, "" for none; None
            for whoever may have all.
        stall_seconds, patience_seconds: see ``STALL_SECONDS`` and ``PATIENCE_SECONDS``.
    """

    def __init__(
        self,
        store: Store,
        hub: Hub | None = None,
        *,
        model_for: Callable[[Any], str | None] = lambda _: None,
        stall_seconds: float = STALL_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._store = store
        self._model_for = model_for
        self._patience_seconds = patience_seconds
        self._certificates: dict[str, bytes] = {}

        def connect(address: str) -> RemoteStore:
            return RemoteStore(address, stall_seconds, self._certificates.get(address))

        self._puller = Puller(store, connect, hub)

    async def Missing(self, request: node_pb2.FileList, context: Any) -> node_pb2.FileList:  # noqa: N802
        """Which of these files are not here in full."""
        files = await _checked(request.files, context)
        missing = await asyncio.to_thread(self._store.missing, files)
        return node_pb2.FileList(files=[rpc.encode_file(file) for file in missing])

    async def Fetch(  # noqa: N802
        self, request: node_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[node_pb2.FilePart]:
        """A file's bytes from an offset on; of a file that is still arriving, as they arrive."""
        if not manifests.is_sha256(request.sha256) or request.offset < 0:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a file is named by its SHA-256 and an offset")
        model = self._model_for(context)
        if model is not None and not await self._belongs(request.sha256, model):
            # Whether it is here is none of the caller's business.
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not paired: only the files of the job's model")
        reading = _Reading(self._store, self._puller, request.sha256, request.offset, self._patience_seconds)
        try:
            async with contextlib.aclosing(reading.parts()) as parts:
                async for offset, data in parts:
                    yield node_pb2.FilePart(offset=offset, data=data)
        except Absent as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except NodeLost as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except OSError as error:
            await context.abort(grpc.StatusCode.DATA_LOSS, f"file {request.sha256[:12]}…: {error.strerror}")

    async def _belongs(self, sha256: str, model: str) -> bool:
        """Whether a file is one of this model's; of one that is not known yet, the transfer may be about to begin."""
        begun = time.monotonic()
        while model:
            files = self._puller.files_of(model)
            if files is None and (known := await asyncio.to_thread(self._store.manifest, model)) is not None:
                files = {file.sha256 for file in known.files}
            if files is not None:
                return sha256 in files
            if time.monotonic() - begun > GRACE_SECONDS:
                break
            await self._puller.news.wait(OTHER_PROCESS_SECONDS)
        return False

    async def Pull(  # noqa: N802
        self, request: node_pb2.PullRequest, context: Any
    ) -> AsyncIterator[node_pb2.PullProgress]:
        """Get a model's files from the sources."""
        if request.manifest.ByteSize() > manifests.MOST_MANIFEST_BYTES or len(request.sources) > MOST_SOURCES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "more files or sources than can be meant")
        for address in request.sources:
            # The newest is right: an address may be another machine's by now.
            if certificate := request.certificates.get(address):
                self._certificates[address] = certificate
            else:
                self._certificates.pop(address, None)
        while len(self._certificates) > MOST_SOURCES:
            del self._certificates[next(iter(self._certificates))]
        await _checked(request.manifest.files, context)
        manifest = rpc.decode_manifest(request.manifest)
        try:
            async with contextlib.aclosing(self._puller.pull(manifest, list(request.sources))) as states:
                async for state in states:
                    yield node_pb2.PullProgress(
                        bytes=state.bytes, total=state.total, source=state.source, manifest=state.digest
                    )
        except NoRoom as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except TandemError as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))


class RemoteStore:
    """Another node's store; see ``pull.Source``.

    Args:
        address: ``host:port`` of its service.
        stall_seconds: without a sign of it are too many.
        certificate: of its ``TANDEM_HOME``, in PEM; None for our own.
    """

    def __init__(self, address: str, stall_seconds: float = STALL_SECONDS, certificate: bytes | None = None) -> None:
        self._address = address
        self._stall_seconds = stall_seconds
        self._channel = rpc.open_channel(address, certificate)
        self._files = node_pb2_grpc.FilesStub(self._channel)

    async def fetch(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        """See ``pull.Source``."""
        call: Any = self._files.Fetch(node_pb2.FetchRequest(sha256=sha256, offset=offset))
        try:
            while True:
                async with asyncio.timeout(self._stall_seconds):
                    part = await call.read()
                if part is grpc.aio.EOF:
                    return
                if part.offset != offset:
                    raise NodeError(f"{self._address} sent byte {part.offset} of a file where {offset} was next")
                offset += len(part.data)
                yield part.data
        except grpc.aio.AioRpcError as error:
            raise rpc.error_of(error, self._address) from error
        except TimeoutError as error:
            raise NodeLost(f"{self._address} sent nothing for {self._stall_seconds:g} s") from error
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


class _Reading:
    """One file, read from an offset to its end, however long that takes to arrive."""

    def __init__(self, store: Store, puller: Puller, sha256: str, offset: int, patience_seconds: float) -> None:
        self._store = store
        self._puller = puller
        self._sha256 = sha256
        self._offset = offset
        self._patience_seconds = patience_seconds
        self._quiet_since = self._said = time.monotonic()

    async def parts(self) -> AsyncGenerator[tuple[int, bytes], None]:
        """Offsets and bytes; no bytes are a sign that it waits.

        Raises:
            Absent: it is not here and nobody brings it.
            NodeLost: it has stopped arriving.
            OSError: it cannot be read, or is shorter than it was.
        """
        begun = time.monotonic()
        while (opened := self._open()) is None:
            if not self._puller.expects(self._sha256) and time.monotonic() - begun > GRACE_SECONDS:
                raise Absent(f"no file {self._sha256[:12]}… here")
            if await self._wait():
                yield self._offset, b""
        handle, size = opened
        try:
            while size is None or self._offset < size:
                # Asked before reading: what was written before it ended is read below.
                arriving = size is None and self._store.is_arriving(self._sha256)
                data = await asyncio.to_thread(os.pread, handle, rpc.PART_BYTES, self._offset)
                if data:
                    yield self._offset, data
                    self._offset += len(data)
                    self._quiet_since = self._said = time.monotonic()
                elif size is not None:
                    raise OSError(0, "shorter than it was")
                elif not arriving and self._store.locate(self._sha256) is not None:
                    size = os.fstat(handle).st_size
                elif not arriving and not self._puller.expects(self._sha256):
                    raise NodeLost("the file has stopped arriving")
                elif await self._wait():
                    yield self._offset, b""
        finally:
            os.close(handle)

    def _open(self) -> tuple[int, int | None] | None:
        """The file, if it is here or arrives; the rest of an interrupted transfer is nothing to wait at."""
        with contextlib.suppress(Absent):
            handle, size = self._store.open_for_reading(self._sha256)
            if size is not None or self._store.is_arriving(self._sha256):
                return handle, size
            os.close(handle)
        return None

    async def _wait(self) -> bool:
        """Wait for more; whether it is time to say so.

        Raises:
            NodeLost: there has been nothing for too long.
        """
        now = time.monotonic()
        if now - self._quiet_since > self._patience_seconds:
            raise NodeLost(f"the file has not grown for {self._patience_seconds:g} s")
        # What another process receives wakes nobody here.
        await self._puller.news.wait(OTHER_PROCESS_SECONDS)
        if time.monotonic() - self._said < SIGN_SECONDS:
            return False
        self._said = time.monotonic()
        return True


async def _checked(files: Any, context: Any) -> tuple[StoredFile, ...]:
    """The files of a message, or the end of the call."""
    try:
        decoded = tuple(rpc.decode_file(file) for file in files)
        manifests.check_files(decoded)
    except UserError as error:
        await _refuse(context, error)
    return decoded


async def _refuse(context: Any, error: UserError) -> NoReturn:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    raise error
