"""Messages over a byte stream between two processes of one machine: a length, then the bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading

MAX_MESSAGE_BYTES = 256 << 20
_HEAD = struct.Struct(">I")


def frame(message: bytes) -> bytes:
    """A message with its length in front."""
    return _HEAD.pack(len(message)) + message


def _checked(length: int) -> int:
    if length > MAX_MESSAGE_BYTES:
        raise ConnectionError(f"a message of {length} bytes; at most {MAX_MESSAGE_BYTES} are taken")
    return length


async def read_message(reader: asyncio.StreamReader) -> bytes | None:
    """The next message, or None when the other side has closed.

    Raises:
        ConnectionError: the stream broke in the middle of a message, or the message is too large.
    """
    try:
        head = await reader.readexactly(_HEAD.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ConnectionError("the stream ended within a message") from error
        return None
    try:
        return await reader.readexactly(_checked(_HEAD.unpack(head)[0]))
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("the stream ended within a message") from error


class _Incoming(asyncio.Protocol):
    """Feeds a reader. Unlike asyncio's own, a connection that breaks leaves it what has arrived."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    def data_received(self, data: bytes) -> None:
        self._reader.feed_data(data)

    def eof_received(self) -> None:
        self._reader.feed_eof()

    def connection_lost(self, _: Exception | None) -> None:
        self._reader.feed_eof()


class AsyncChannel:
    """The supervisor's side, for the tasks of one event loop. Made by ``open``.

    What the other side said before it went can be read even after sending to it has failed: the two directions use
    two handles of the socket, because asyncio gives up a whole transport when a write fails.
    """

    def __init__(self, reader: asyncio.StreamReader, transport: asyncio.Transport, outgoing: socket.socket) -> None:
        self._reader = reader
        self._transport = transport
        self._outgoing = outgoing
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()
        self._torn = False

    @classmethod
    async def open(cls, connection: socket.socket) -> AsyncChannel:
        """Take over a connected socket."""
        connection.settimeout(0)
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: _Incoming(reader), sock=connection)
        reader.set_transport(transport)
        return cls(reader, transport, connection.dup())

    async def send(self, message: bytes) -> None:
        """Send one message; waits while the other side does not read.

        Raises:
            OSError: the other side is gone, or an earlier message was cut short by a cancellation.
        """
        async with self._sending:
            if self._torn:
                raise ConnectionError("an earlier message was cut short")
            self._torn = True
            await asyncio.get_running_loop().sock_sendall(self._outgoing, frame(message))
            self._torn = False

    async def receive(self) -> bytes | None:
        """See ``read_message``."""
        async with self._receiving:
            return await read_message(self._reader)

    def finish(self) -> None:
        """Tell the other side that nothing more comes; what it says can still be read."""
        with contextlib.suppress(OSError):
            self._outgoing.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close both directions. May be called twice."""
        self._outgoing.close()
        self._transport.close()


class BlockingChannel:
    """The worker's side, for threads: any of them may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: bytes) -> None:
        """Send one message; waits while the other side does not read.

        Raises:
            OSError: the other side is gone.
        """
        with self._sending:
            self._connection.sendall(frame(message))

    def receive(self) -> bytes | None:
        """The next message, or None when the other side has closed or is gone."""
        head = self._read(_HEAD.size)
        return None if head is None else self._read(_checked(_HEAD.unpack(head)[0]))

    def _read(self, count: int) -> bytes | None:
        buffer = bytearray(count)
        view, done = memoryview(buffer), 0
        while done < count:
            try:
                got = self._connection.recv_into(view[done:])
            except ConnectionError:
                return None
            if got == 0:
                return None
            done += got
        return bytes(buffer)
