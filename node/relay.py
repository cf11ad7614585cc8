"""Carry a group's connections between machines: one public port, loopback ports for the ring itself.

Rings speak plain TCP without any handshake, so they listen on loopback only. A rank's ring connects to a loopback port
of its own relay, which dials the next rank's relay and says, in a preamble, whose end it wants; that relay connects to
the ring there. A preamble of another kind asks for a measurement of the link.

Between relays all is TLS 1.3, and each side shows its certificate: a rank's end is for the machine of the previous rank
only, measurements are for all that are trusted, and nothing is for anybody else. Where the coordinator wants two
neighbours' connection in clear, both say so under TLS first, and then go on without it.

All of it runs in threads with blocking sockets: measured, that is twice as fast as an event loop.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from node.errors import NodeError
from node.halfopen import HalfOpen
from node.peers import fingerprint
from node.secure import PlainStream, SecureStream, Stream
from node.trust import Trust

MAGIC = b"TNDM"
VERSION = 2
KIND_ROUTE = 1
KIND_MEASURE = 2
ROUTE_BYTES = 16
PREAMBLE = struct.Struct("!4sBB16sH?")
"""Magic, version, kind, route, index of the connection, whether it goes on in clear."""
IN_CLEAR = b"\x01"
"""The answer to a preamble that asks for that; there is no other."""

PREAMBLE_SECONDS = 5.0
"""From a connection's first moment to the end of its preamble, showing certificates included."""
DIAL_SECONDS = 5.0
RETRY_SECONDS = 0.02
"""Between two tries to reach a ring that does not listen yet; there is nothing that would tell."""
AGAIN_SECONDS = 0.25
"""Between two tries with a relay that would not have us: it may be crowded, or another machine has its address now."""
UNSENT_SECONDS = 20.0
MOST_HALF_OPEN = 64
MOST_EARLY = 64
"""Of trusted machines' connections that wait for a route to be opened."""
MOST_CONNECTIONS = 16
"""Connections of one route."""


@dataclass(frozen=True)
class Neighbour:
    """The machine on one side of a rank.

    Attributes:
        certificate: by which it is known, in PEM.
        encrypted: whether what is sent between it and us is; when not, only who it is has been shown.
    """

    certificate: bytes
    encrypted: bool = True


@dataclass
class _Route:
    """One rank's end: where its ring listens, who is beside it, and what belongs to it."""

    ring_ports: tuple[int, ...]
    deadline: float
    previous: str
    next: str
    previous_encrypted: bool
    next_encrypted: bool
    context: ssl.SSLContext
    """For dialling the next rank."""
    taken: set[int] = field(default_factory=set)
    listeners: list[socket.socket] = field(default_factory=list)
    sockets: set[socket.socket] = field(default_factory=set)
    closed: bool = False


class Relay:
    """One machine's relay.

    Args:
        host: address to listen on; all of them unless told.
        port: public TCP port; 0 takes a free one.
        measured: serves a connection that asks for a measurement; it is closed afterwards.
        trust: says who is who.

    Attributes:
        trust: the same.

    Raises:
        OSError: the port is taken (from ``start``).
    """

    def __init__(
        self,
        host: str = "0.0.0.0",
        port: int = 0,
        measured: Callable[[SecureStream], None] | None = None,
        *,
        trust: Trust,
    ) -> None:
        self._host = host
        self._wanted_port = port
        self._measured = measured
        self.trust = trust
        self._context: tuple[tuple[bytes, ...], ssl.SSLContext] | None = None
        self._forget: Callable[[], None] | None = None
        self._listener: socket.socket | None = None
        self._routes: dict[bytes, _Route] = {}
        self._changed = threading.Condition()
        self._half_open = HalfOpen(MOST_HALF_OPEN)
        self._early = threading.BoundedSemaphore(MOST_EARLY)
        self._waiting: dict[socket.socket, str] = {}
        """Connections from others, with the fingerprint of who it is, once known."""
        self._threads: set[threading.Thread] = set()
        self._done: set[threading.Thread] = set()
        """Threads whose work is over; they may need a moment more to end, so they are joined, too."""
        self._stopped = False

    @property
    def port(self) -> int:
        """The public port, once started."""
        assert self._listener is not None
        port: int = self._listener.getsockname()[1]
        return port

    def start(self) -> None:
        """Begin to listen."""
        self._forget = self.trust.on_revoked(self._revoked)
        self._listener = socket.create_server((self._host, self._wanted_port), backlog=MOST_HALF_OPEN)
        self._spawn(self._accept_public, self._listener)

    def open(
        self,
        route: bytes,
        ring_ports: Sequence[int],
        next_route: bytes,
        next_addresses: Sequence[str],
        deadline_seconds: float,
        *,
        next: Neighbour,  # noqa: A002 - reads as in ``RingPart``
        previous: Neighbour,
    ) -> list[int]:
        """Make one rank's connections possible.

        Args:
            route: names this rank's end.
            ring_ports: loopback ports that its ring listens on, or soon will.
            next_route: names the next rank's end.
            next_addresses: ``host:port`` of the next rank's relay, one for each connection.
            deadline_seconds: time for the whole group to form.
            next: the machine of the next rank.
            previous: the machine of the previous rank, the only one that this rank's end is given to.

        Returns:
            Loopback ports to connect the ring to, one for each connection.

        Raises:
            UserError: a neighbour is not trusted.
        """
        if len(route) != ROUTE_BYTES or len(next_route) != ROUTE_BYTES:
            raise ValueError(f"a route has {ROUTE_BYTES} bytes")
        if not 0 < len(ring_ports) == len(next_addresses) <= MOST_CONNECTIONS:
            raise ValueError(f"1 to {MOST_CONNECTIONS} connections, as many in as out")
        marks = [fingerprint(neighbour.certificate) for neighbour in (previous, next)]
        self._check_trusted(marks)
        opened = _Route(
            tuple(ring_ports),
            time.monotonic() + deadline_seconds,
            marks[0],
            marks[1],
            previous.encrypted,
            next.encrypted,
            self.trust.context(server=False, peers=[next.certificate]),
        )
        opened.listeners = [socket.create_server(("127.0.0.1", 0), backlog=1) for _ in next_addresses]
        ports = [listener.getsockname()[1] for listener in opened.listeners]
        with self._changed:
            if route in self._routes or self._stopped:
                for listener in opened.listeners:
                    listener.close()
                raise ValueError("this route is open already" if not self._stopped else "the relay has stopped")
            self._routes[route] = opened
            self._changed.notify_all()
            # Before anybody can stop the relay, which joins what there is.
            for index, (listener, address) in enumerate(zip(opened.listeners, next_addresses, strict=True)):
                self._spawn(self._carry_out, opened, listener, next_route, index, address)
        try:
            self._check_trusted(marks)  # again: who was revoked just before the route was known closed nothing
        except NodeError:
            self.close(route)
            raise
        return ports

    def close(self, route: bytes) -> None:
        """End a route and all its connections; one that is not open is no matter."""
        with self._changed:
            closed = self._routes.pop(route, None)
            if closed is None:
                return
            closed.closed = True
            listeners, sockets = list(closed.listeners), list(closed.sockets)
            self._changed.notify_all()
        for connection in sockets:
            _shut(connection)
        for listener in listeners:
            _wake(listener)

    def stop(self) -> None:
        """End everything; returns when all threads have."""
        if self._forget is not None:
            self._forget()
        with self._changed:
            self._stopped = True
            routes, waiting = list(self._routes), list(self._waiting)
            self._changed.notify_all()
        for route in routes:
            self.close(route)
        for connection in waiting:
            _shut(connection)
        if self._listener is not None:
            _wake(self._listener)
        while True:
            with self._changed:
                threads = {thread for thread in self._threads | self._done if thread.is_alive()}
                threads.discard(threading.current_thread())
            if not threads:
                break
            for thread in threads:
                thread.join()
        if self._listener is not None:
            self._listener.close()

    # --- connections from other machines ----------------------------------------------------------------------------

    def _accept_public(self, listener: socket.socket) -> None:
        while not self._stopped:
            try:
                connection, (host, *_) = listener.accept()
            except OSError:
                # Out of descriptors, or gone before it was taken: others will come.
                with self._changed:
                    self._changed.wait(RETRY_SECONDS)
                continue
            self._half_open.enter(connection, host)
            with self._changed:
                if self._stopped:
                    self._half_open.leave(connection)
                    connection.close()
                    return
                self._waiting[connection] = ""
                try:
                    self._spawn(self._serve, connection)
                except RuntimeError:  # no more threads, for now: others will come, and find some
                    self._waiting.pop(connection)
                    self._half_open.leave(connection)
                    connection.close()

    def _serve(self, connection: socket.socket) -> None:
        """Let who is trusted say what it wants, and do it; all others are closed without a word."""
        try:
            try:
                welcomed = self._welcome(connection)
            finally:
                self._half_open.leave(connection)
            if welcomed is None:
                return
            stream, kind, name, index, in_clear = welcomed
            if kind == KIND_MEASURE and self._measured is not None:
                with contextlib.suppress(OSError):
                    self._measured(stream)
            elif kind == KIND_ROUTE and (route := self._take_end(name, index, stream.fingerprint, in_clear)):
                self._carry_in(connection, stream, route, index)
        finally:
            with self._changed:
                self._waiting.pop(connection, None)
            connection.close()

    def _welcome(self, connection: socket.socket) -> tuple[SecureStream, int, bytes, int, bool] | None:
        """The stream of somebody trusted, and what its preamble says: kind, route, index and whether to go on in clear.

        None for anybody else, and anything else.
        """
        deadline = time.monotonic() + PREAMBLE_SECONDS
        try:
            stream = SecureStream(connection, self._server_context(), server=True, deadline=deadline)
            with self._changed:
                self._waiting[connection] = stream.fingerprint
            # After that is written down: from now on it would be told of.
            if self.trust.standing(stream.fingerprint) is None:
                return None
            head = _read_preamble(stream, deadline)
        except OSError:
            return None
        return None if head is None else (stream, *head)

    def _server_context(self) -> ssl.SSLContext:
        """For all that are trusted now."""
        trusted = self.trust.certificates()
        kept = self._context
        if kept is None or kept[0] != trusted:
            kept = self._context = trusted, self.trust.context(server=True, peers=trusted)
        return kept[1]

    def _carry_in(self, connection: socket.socket, stream: SecureStream, route: _Route, index: int) -> None:
        ring = self._reach(route, "127.0.0.1", route.ring_ports[index])
        if ring is None:
            return
        with ring, contextlib.suppress(OSError):
            if route.previous_encrypted:
                self._carry(route, (ring, PlainStream(ring)), (connection, stream))
            else:
                bare = stream.bare()
                stream.settimeout(DIAL_SECONDS)
                stream.send(IN_CLEAR)
                self._carry(route, (ring, PlainStream(ring)), (connection, bare))

    def _take_end(self, name: bytes, index: int, mark: str, in_clear: bool) -> _Route | None:
        """The route of this name, for the machine that it is meant for; it may be opened a moment later.

        Each of its connections is given once.
        """
        if not self._early.acquire(blocking=False):
            return None
        try:
            deadline = time.monotonic() + DIAL_SECONDS
            with self._changed:
                while (route := self._routes.get(name)) is None:
                    left = deadline - time.monotonic()
                    if self._stopped or left <= 0:
                        return None
                    self._changed.wait(left)
                fits = mark == route.previous and in_clear is not route.previous_encrypted
                if not fits or index >= len(route.ring_ports) or index in route.taken:
                    return None
                route.taken.add(index)
                return route
        finally:
            self._early.release()

    def _check_trusted(self, marks: Sequence[str]) -> None:
        if not all(map(self.trust.standing, marks)):
            raise NodeError("a neighbour in the group is a machine that this one is not paired with")

    def _revoked(self, mark: str) -> None:
        """Have no more to do with who has the certificate of this fingerprint."""
        with self._changed:
            routes = [name for name, route in self._routes.items() if mark in (route.previous, route.next)]
            connections = [connection for connection, whose in self._waiting.items() if whose == mark]
        for name in routes:
            self.close(name)
        for connection in connections:
            _shut(connection)

    # --- connections to other machines ------------------------------------------------------------------------------

    def _carry_out(self, route: _Route, listener: socket.socket, next_route: bytes, index: int, address: str) -> None:
        """Take one connection of our own ring and carry it to the next rank's."""
        with listener:
            listener.settimeout(max(route.deadline - time.monotonic(), 0.1))
            try:
                ring, _ = listener.accept()
            except OSError:
                return  # the ring never came
            if route.closed:
                ring.close()
                return
        with ring:
            dialled = self._dial(route, address)
            if dialled is None:
                return
            peer, stream = dialled
            with peer, contextlib.suppress(OSError):
                stream.settimeout(DIAL_SECONDS)
                in_clear = not route.next_encrypted
                stream.send(preamble(KIND_ROUTE, next_route, index, in_clear=in_clear))
                if not in_clear:
                    self._carry(route, (ring, PlainStream(ring)), (peer, stream))
                    return
                # Its ring may come up to the last moment.
                stream.settimeout(max(route.deadline - time.monotonic(), 0.1))
                if stream.receive_record() == IN_CLEAR:
                    self._carry(route, (ring, PlainStream(ring)), (peer, stream.bare()))

    def _dial(self, route: _Route, address: str) -> tuple[socket.socket, SecureStream] | None:
        """A connection to the next rank's machine, which has shown that it is; None when the route closes before."""
        host, _, port = address.rpartition(":")
        while (peer := self._reach(route, host.strip("[]"), int(port))) is not None:
            with self._changed:
                if route.closed:
                    peer.close()
                    return None
                route.sockets.add(peer)
            try:
                stream = SecureStream(peer, route.context, server=False, deadline=time.monotonic() + DIAL_SECONDS)
                if stream.fingerprint == route.next:
                    return peer, stream
            except OSError:
                pass  # tried again below
            with self._changed:
                route.sockets.discard(peer)
                peer.close()
                self._changed.wait(AGAIN_SECONDS)
        return None

    def _reach(self, route: _Route, host: str, port: int) -> socket.socket | None:
        """A connection, as soon as somebody listens there; None when the route closes before."""
        while not (route.closed or self._stopped) and time.monotonic() < route.deadline:
            with contextlib.suppress(OSError):
                return socket.create_connection((host, port), DIAL_SECONDS)
            with self._changed:
                self._changed.wait(RETRY_SECONDS)
        return None

    # --- carrying ---------------------------------------------------------------------------------------------------

    def _carry(self, route: _Route, one: tuple[socket.socket, Stream], other: tuple[socket.socket, Stream]) -> None:
        """Copy both ways until one side ends; returns when both have."""
        sockets = {one[0], other[0]}
        with self._changed:
            if route.closed or self._stopped:
                return
            route.sockets |= sockets
        try:
            for connection in sockets:
                _tune(connection)
            back = threading.Thread(target=_copy, args=(other, one), name="relay", daemon=True)
            back.start()
            _copy(one, other)
            back.join()
        finally:
            with self._changed:
                route.sockets -= sockets

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)
            finally:
                with self._changed:
                    self._threads.discard(thread)
                    self._done.add(thread)

        thread = threading.Thread(target=run, name="relay", daemon=True)
        with self._changed:
            self._done = {done for done in self._done if done.is_alive()}
            thread.start()
            self._threads.add(thread)


class ReservedPorts:
    """Loopback ports that nobody else is given until ``release``.

    Bound but not listening, and shareable: the ring, which shares its ports as well, binds them itself.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._sockets: list[socket.socket] = []
        for _ in range(count):
            holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(("127.0.0.1", 0))
            self._sockets.append(holder)
        self.ports: list[int] = [holder.getsockname()[1] for holder in self._sockets]

    def release(self) -> None:
        """Give the ports back. May be called twice."""
        for holder in self._sockets:
            holder.close()


def preamble(kind: int, route: bytes = bytes(ROUTE_BYTES), index: int = 0, *, in_clear: bool = False) -> bytes:
    """What a connection to a relay begins with, under TLS.

    Args:
        kind: ``KIND_ROUTE`` or ``KIND_MEASURE``.
        route: whose end is wanted.
        index: of the route's connections.
        in_clear: whether it is to go on without TLS.
    """
    return PREAMBLE.pack(MAGIC, VERSION, kind, route, index, in_clear)


def _read_preamble(stream: SecureStream, deadline: float) -> tuple[int, bytes, int, bool] | None:
    """Kind, route, index and whether to go on in clear, as a connection begins with them; None for anything else.

    Raises:
        OSError: the other side is too slow, or has gone.
    """
    data = b""
    while len(data) < PREAMBLE.size:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        stream.settimeout(left)
        if not (more := stream.recv(PREAMBLE.size - len(data))):
            return None
        data += more
    magic, version, kind, route, index, in_clear = PREAMBLE.unpack(data)
    return (kind, route, index, in_clear) if (magic, version) == (MAGIC, VERSION) else None


def _tune(connection: socket.socket) -> None:
    connection.settimeout(None)
    # The other side may be gone already; then copying ends at once.
    with contextlib.suppress(OSError):
        # Buffers are left to the system: a size of our own would be cut to a small limit, and no longer grow.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNSENT_SECONDS * 1000))


def _copy(source: tuple[socket.socket, Stream], target: tuple[socket.socket, Stream]) -> None:
    """Copy until the source ends, and pass its end on; when either breaks, both end."""
    receive, send = source[1].receive, target[1].send
    try:
        while data := receive():
            send(data)
        target[1].end()
    except OSError:
        _shut(source[0])
        _shut(target[0])


def _wake(listener: socket.socket) -> None:
    """End a wait for connections: by one of our own, as closing a socket does not wake who waits on it."""
    with contextlib.suppress(OSError):
        host, port = listener.getsockname()[:2]
        socket.create_connection(("127.0.0.1" if host == "0.0.0.0" else host, port), DIAL_SECONDS).close()


def _shut(connection: socket.socket) -> None:
    """End a connection that another thread waits on."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
