"""Streams between two machines: TLS over a blocking socket, or the socket alone.

Each is used by two threads at once, one that reads and one that writes, which an ``ssl.SSLSocket`` does not allow. Here
the state of TLS is used under a lock, and nobody waits for the network while holding it.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
import time
from typing import Protocol

BUFFER_BYTES = 1 << 18
RECORD_BYTES = (1 << 14) + 512
"""More than the largest record of TLS."""
_HEADER_BYTES = 5
_NOTHING = memoryview(b"")


class Stream(Protocol):
    """What is read and written by a thread each."""

    def receive(self) -> memoryview:
        """The next bytes, empty at the end; they hold until the next call."""

    def send(self, data: memoryview | bytes) -> None:
        """Send all of it."""

    def end(self) -> None:
        """Let the other side see the end; it may still send."""


class PlainStream:
    """A socket as it is.

    Args:
        connection: blocking.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def receive(self) -> memoryview:
        """See ``Stream``."""
        return self._buffer[: self._socket.recv_into(self._buffer)]

    def send(self, data: memoryview | bytes) -> None:
        """See ``Stream``."""
        self._socket.sendall(data)

    def end(self) -> None:
        """See ``Stream``."""
        self._socket.shutdown(socket.SHUT_WR)


class SecureStream:
    """A socket under TLS; made when both sides have shown who they are.

    Args:
        connection: blocking, connected, nothing of it read. Its timeouts hold for the stream.
        context: says whom to trust.
        server: whether this is the side that was connected to.
        deadline: of ``time.monotonic``, for the handshake.

    Attributes:
        fingerprint: of the other side's certificate.

    Raises:
        OSError: the other side is not trusted, speaks no TLS 1.3, was too slow, or has gone.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, server: bool, deadline: float) -> None:
        self._socket = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._state = threading.Lock()
        # Records must leave in the order in which they were sealed.
        self._sending = threading.Lock()
        self._kept = _NOTHING
        self._ended = False
        self._timeout: float | None = None
        self._until: float | None = None
        self._sealed = self._clear = _NOTHING
        self._shake_hands(deadline)
        certificate = self._tls.getpeercert(binary_form=True)
        if certificate is None:
            raise ConnectionError("it showed no certificate")
        self.fingerprint = hashlib.sha256(certificate).hexdigest()

    @property
    def cipher(self) -> str:
        """What it is sealed with."""
        found = self._tls.cipher()
        return found[0] if found else ""

    def settimeout(self, seconds: float | None) -> None:
        """For each wait from now on, in either direction; nothing is lost when one runs out while receiving."""
        self._timeout = seconds
        self._socket.settimeout(seconds)

    def end_by(self, deadline: float) -> None:
        """Have no wait from now on last longer than this, however many there are and however small the pieces are.

        Args:
            deadline: of ``time.monotonic``.
        """
        self._until = deadline

    def receive(self) -> memoryview:
        """See ``Stream``.

        Raises:
            OSError: what came is not what was sent, or it ended before the other side said so.
        """
        if self._kept:
            kept, self._kept = self._kept, _NOTHING
            return kept
        if not self._sealed:
            # Not before somebody trusted is there.
            self._sealed = memoryview(bytearray(BUFFER_BYTES))
            self._clear = memoryview(bytearray(BUFFER_BYTES + 2 * RECORD_BYTES))
        got = 0
        while not self._ended:
            with self._state:
                if got:
                    self._incoming.write(self._sealed[:got])
                # All that is there, at once: ``end`` must never find a whole record waiting.
                count = self._unseal()
            if count:
                return self._clear[:count]
            if not self._ended:
                got = self._receive_sealed(self._sealed)
        return _NOTHING

    def recv(self, most: int) -> bytes:
        """Like ``receive``, but so many bytes at most."""
        view = self.receive()
        self._kept = view[most:]
        return bytes(view[:most])

    def send(self, data: memoryview | bytes) -> None:
        """See ``Stream``."""
        with self._sending:
            with self._state:
                sent = self._tls.write(data)
                while sent < len(data):
                    sent += self._tls.write(data[sent:])
                # With it goes what receiving has left to be answered: only here is sent, as a thread that receives must
                # not wait for the other side to do so, too.
                sealed = self._outgoing.read()
            self._keep_to_deadline()
            self._socket.sendall(sealed)

    def end(self) -> None:
        """See ``Stream``."""
        with self._sending:
            with self._state:
                with contextlib.suppress(ssl.SSLWantReadError):  # the other side's end may come later
                    self._tls.unwrap()
                sealed = self._outgoing.read()
            self._socket.sendall(sealed)
            self._socket.shutdown(socket.SHUT_WR)

    # --- going on without TLS ---------------------------------------------------------------------------------------

    def receive_record(self) -> bytes:
        """What the next record holds; not a byte after it is read, as it may be sent in clear."""
        record = bytearray(self._exactly(_HEADER_BYTES))
        size = int.from_bytes(record[3:])
        if size > RECORD_BYTES:
            raise ConnectionError("a record of no size")
        record += self._exactly(size)
        with self._state:
            self._incoming.write(record)
            return self._tls.read(RECORD_BYTES)

    def bare(self) -> PlainStream:
        """The socket without TLS, for when both sides have agreed to that.

        Raises:
            ConnectionError: the other side has not waited for it.
        """
        if self._kept or self._incoming.pending or self._tls.pending():
            raise ConnectionError("it sends before it may")
        return PlainStream(self._socket)

    # ----------------------------------------------------------------------------------------------------------------

    def _shake_hands(self, deadline: float) -> None:
        buffer = memoryview(bytearray(RECORD_BYTES))
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                pass  # what to say first, and then to hear, is below
            finally:
                # On failure, too: it says why.
                self._wait_until(deadline)
                self._socket.sendall(self._outgoing.read())
            self._wait_until(deadline)
            self._incoming.write(buffer[: self._receive_sealed(buffer)])

    def _wait_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the other side took too long to say who it is")
        self._socket.settimeout(left)

    def _keep_to_deadline(self) -> None:
        if self._until is None:
            return
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for all of it is over")
        self._socket.settimeout(left if self._timeout is None else min(left, self._timeout))

    def _receive_sealed(self, buffer: memoryview) -> int:
        self._keep_to_deadline()
        got = self._socket.recv_into(buffer)
        if not got:
            # Anyone on the way can end a connection; only the other side can say that it is at its end.
            raise ConnectionError("the connection was cut")
        return got

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            view = view[self._receive_sealed(view) :]
        return bytes(data)

    def _unseal(self) -> int:
        """Read into the buffer all that has come in full; how much that is."""
        count = got = 0
        while count < len(self._clear):
            try:
                # With a buffer it gives the number of bytes, which its type stub does not know.
                got = self._tls.read(len(self._clear) - count, self._clear[count:])  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                got = 0  # both have said that they are at their ends
            if not got:
                self._ended = True
                break
            count += got
        return count
