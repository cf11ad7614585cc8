"""Messages over a byte stream between two processes of one machine: a length, then the bytes."""

from __future__ import annotations

import asyncio
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
